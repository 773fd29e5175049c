"""The network: a topology whose nodes write text with one backbone, each with its own adapter."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from torch.nn import Parameter

from neuromas.config import AdapterConfig, PromptConfig
from neuromas.graph import messages
from neuromas.graph.growth import Growth
from neuromas.graph.topology import Topology
from neuromas.graph.wording import Wording, check_begin_answer
from neuromas.model.adapters import AdapterBank
from neuromas.model.backbone import Backbone
from neuromas.model.policy import Policy
from neuromas.model.turns import Frame
from neuromas.rollout.engine import Engine, uniforms
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.rollout.voting import majority_vote
from neuromas.types import Completion, Example, Group, Message, MessageStatus, Replay, Request, Rollout, Sample


class Diverged(ValueError):
    """Says that numbers of the network are no longer finite."""


def worded(backbone: Backbone, prompt: PromptConfig) -> tuple[Wording, Frame]:
    """Return the wording for a backbone, and what stands around its prompts and texts."""
    wording = prompt.build(bundled=backbone.has_bundled_vocabulary, has_chat_template=backbone.has_chat_template)
    return wording, backbone.frame(chat=wording.chat, one_line=wording.one_line)


class Network:
    """A language system that is called, trained and grown as one neural network (arXiv 2605.16757).

    Its policy is the backbone with an adapter for each node of the topology. `max_new_tokens` bounds what a node writes in one
    rollout. `read` finds the answer in a text, for the majority vote if several nodes answer.
    """

    def __init__(
        self,
        topology: Topology,
        backbone: Backbone,
        *,
        adapter: AdapterConfig | None = None,
        engine: Engine | None = None,
        max_new_tokens: int = 80,
        seed: int = 0,
        read: Callable[[str], str | None] | None = None,
        prompt: PromptConfig | None = None,
    ) -> None:
        self.topology = topology
        self.read = read
        self.parent: Topology | None = None
        """The topology before the last growth."""
        self.open_probability = 1.0
        """Probability that a group runs through `topology` and not through `parent`."""
        self.wording, frame = worded(backbone, prompt or PromptConfig())
        self.policy = Policy(backbone, topology.nodes, adapter, seed, frame)
        self.engine: Engine = engine or TorchEngine(self.policy)
        self.max_new_tokens = max_new_tokens
        self._own: dict[tuple[Topology, str], int] = {}

    @property
    def backbone(self) -> Backbone:
        return self.policy.backbone

    @property
    def adapters(self) -> AdapterBank:
        assert self.policy.adapters is not None, "a network has nodes, and nodes have adapters"
        return self.policy.adapters

    def rollout(
        self,
        examples: Sequence[Example],
        group_size: int,
        *,
        seed: Sequence[int | str],
        temperature: float = 1.0,
        branches: int = 1,
    ) -> list[Group]:
        """Pass every example through the network `group_size` times and return one group per example, in order.

        Random numbers depend on (seed, example, rollout, node) alone, so batches and other nodes change nothing but rounding.
        An example of another `repeat` has other ones.
        While a growth is not fully open, a group runs as a whole through the parent's topology or through the grown one; which
        one is drawn from (seed, example). If all groups are closed, they are what the parent itself writes, bit for bit.
        With `branches`, the network is a tree, and rollouts that share a node of the tree share its random numbers and so its
        text.
        """
        self.check_lengths(examples)
        neighbours = self._neighbours(examples, seed)
        rollouts = [
            _RolloutInProgress(example, index, each, tuple(seed))
            for example, each in zip(examples, neighbours, strict=True)
            for index in range(group_size)
        ]
        finished = self._pass_messages(rollouts, temperature, branches)
        return [tuple(finished[i : i + group_size]) for i in range(0, len(finished), group_size)]

    def replay(
        self, texts: Sequence[tuple[Rollout, int, int]], *, seed: Sequence[int | str], temperature: float, remove: bool = False
    ) -> list[Replay]:
        """Continue rollouts from one text each, a tuple of (rollout, node, draw): draw that node's text anew, or `remove` it.

        Every text that follows from it is sampled again, all others are kept. `seed` is the one that the rollouts were drawn
        by. A draw's random numbers depend on (seed, draw, example, rollout, node); with `remove` a node draws by those of the
        rollout itself.
        """
        begun = []
        for (rollout, node, draw), neighbours in zip(
            texts, self._neighbours([rollout.example for rollout, _, _ in texts], seed), strict=True
        ):
            changed = neighbours.following(node)
            kept = {c.node: c for c in rollout.completions if c.node not in changed}
            if remove:
                kept[node] = _removed(next(c for c in rollout.completions if c.node == node))
            drawn_by = tuple(seed) if remove else (*seed, "replay", node, draw)
            begun.append(_RolloutInProgress(rollout.example, rollout.index, neighbours, drawn_by, kept))
        before = [set(rollout.completions) for rollout in begun]
        finished = self._pass_messages(begun, temperature, branches=1)
        return [
            Replay(rollout, tuple(c for c in rollout.completions if c.node not in kept))
            for rollout, kept in zip(finished, before, strict=True)
        ]

    def redeliver(
        self, rollouts: Sequence[Rollout], delivered: Callable[[Rollout, Message], str], *, seed: Sequence[int | str],
        temperature: float,
    ) -> list[Rollout]:  # fmt: skip
        """Continue rollouts from other messages: `delivered` returns the text that arrives in a message's place.

        A node that reads another text than it did, and every node that follows from it, writes anew by the random numbers of
        the rollout itself, which `seed` is of; all other texts are kept. A node whose messages are changed must follow from
        none of them.
        """
        begun = []
        neighbours = self._neighbours([rollout.example for rollout in rollouts], seed)
        for rollout, each in zip(rollouts, neighbours, strict=True):
            kept: dict[int, Completion] = {}
            changed: set[tuple[int, int]] = set()
            for completion in rollout.completions:
                sent = tuple(replace(m, text=delivered(rollout, m)) for m in completion.messages)
                changed |= {(m.sender, m.recipient) for m, new in zip(completion.messages, sent, strict=True) if m != new}
                kept[completion.node] = replace(completion, messages=sent)
            again = set[int]().union(*(each.following(recipient) for _, recipient in changed))
            assert not again & {sender for sender, _ in changed}, "a changed message would be written anew"
            kept = {node: completion for node, completion in kept.items() if node not in again}
            begun.append(_RolloutInProgress(rollout.example, rollout.index, each, tuple(seed), kept))
        return self._pass_messages(begun, temperature, branches=1)

    def begin(self, example: Example, index: int, *, seed: Sequence[int | str]) -> "MessagePassing":
        """Return the passing of messages of one rollout, for a caller that runs its requests as they get ready; see `end`.

        The rollout is the one that `rollout` would return at this index of the example's group.
        """
        self.check_lengths([example])
        (neighbours,) = self._neighbours([example], seed)
        return MessagePassing(self.policy, self.wording, [_RolloutInProgress(example, index, neighbours, tuple(seed))], 1)

    def end(self, passing: "MessagePassing") -> list[Rollout]:
        """Return the rollouts of which all nodes have written, with their winners, in order."""
        self._check_finite(passing.rollouts)
        return [self._vote(rollout) for rollout in passing.finished()]

    def _neighbours(self, examples: Sequence[Example], seed: Sequence[int | str]) -> "list[_Neighbours]":
        """Return the neighbours in the topology that each example's group runs through, one object for each topology."""
        topologies = [self.topology_of(example, seed) for example in examples]
        found = {topology: _Neighbours.of(topology) for topology in dict.fromkeys(topologies)}
        return [found[topology] for topology in topologies]

    def _pass_messages(self, rollouts: "list[_RolloutInProgress]", temperature: float, branches: int) -> list[Rollout]:
        """Sample all texts that rollouts lack, and return the rollouts with their winners, in order."""
        passing = MessagePassing(self.policy, self.wording, rollouts, branches)
        self.engine.generate(passing.start(), passing.receive, temperature=temperature, max_new_tokens=self.max_new_tokens)
        return self.end(passing)

    def _vote(self, rollout: Rollout) -> Rollout:
        """Return the rollout with the winner of a majority vote as its answer, if several nodes answer."""
        answering = [index for index, completion in enumerate(rollout.completions) if not completion.messages]
        if len(answering) == 1:
            return rollout
        assert self.read is not None, "a network in which several nodes answer is built with `read`"
        winner = majority_vote([rollout.completions[index].text for index in answering], self.read)
        return replace(rollout, winner=answering[winner])

    def topology_of(self, example: Example, seed: Sequence[int | str]) -> Topology:
        """Return the topology that the group of this example runs through."""
        if self.parent is None or self.open_probability >= 1:
            return self.topology
        is_open = uniforms((*seed, example.id, "open"), 1)[0] < self.open_probability
        return self.topology if is_open else self.parent

    def grow(self, growth: Growth) -> list[Parameter]:
        """Add a growth, closed at first, and return the new nodes' parameters; `open_probability` opens it.

        Raises ValueError if the network is not the growth's parent, or an earlier growth is not fully open yet.
        """
        if self.open_probability < 1:
            raise ValueError(f"the growth before is open with probability {self.open_probability:g} only; open it fully first")
        if growth.parent != self.topology:
            raise ValueError("this growth is of another network: its parent has other nodes or edges")
        self.parent, self.topology, self.open_probability = growth.parent, growth.grown, 0.0
        return self.adapters.add_nodes(dict(growth.copies), noise=growth.noise) if growth.new else []

    def check_lengths(self, examples: Iterable[Example], *later: Topology) -> None:
        """Raise ValueError if a node's prompt and text may be longer than the backbone reads, in `later` topologies too, or no
        answer begins as the settings say."""
        limit, examples = self.backbone.max_tokens, list(examples)
        check_begin_answer(self.wording.begin_answer, examples)
        shapes = [self.topology, *([self.parent] if self.parent else []), *later]
        if self.wording.begin_messages:
            texts = max(_most_frequent(sender for sender, _ in shape.edges) for shape in shapes)
            if self.max_new_tokens < texts:
                raise ValueError(
                    f"--max-new-tokens must be at least {texts}, the most recipients of a node, got {self.max_new_tokens}"
                )
        if limit is None:
            return
        most_senders = max(_most_frequent(recipient for _, recipient in shape.edges) for shape in shapes)
        # A message comes with a line of its own, and the chat template closes the prompt.
        line = max(16, 8 + len(self.backbone.tokenize(self.wording.message.format(sender=512, text=""))))
        texts = (most_senders + 1) * (self.max_new_tokens + line) + 32
        for example in examples:
            question = len(self.policy.prompt(example.question, "").prefix_ids)
            own = max(self._own_tokens(shape, example.answer_format) for shape in shapes)
            if (needed := question + own + texts) > limit:
                raise ValueError(
                    f"a question of {question} tokens ({example.question[:40]!r}...), {own} tokens for a node alone, "
                    f"{most_senders} messages to a node and --max-new-tokens {self.max_new_tokens} need up to {needed} tokens, "
                    f"the backbone reads {limit}; shorten one of them"
                )

    def _own_tokens(self, topology: Topology, answer_format: str) -> int:
        """Return the most tokens of a node's prompt without question and messages: its layer and its instructions."""
        key = topology, answer_format
        if key not in self._own:
            example = Example("", "", "", answer_format)
            self._own[key] = max(self._own_tokens_of(topology, node, example) for node in topology.nodes)
        return self._own[key]

    def _own_tokens_of(self, topology: Topology, node: int, example: Example) -> int:
        begins = self.wording.begins(topology.recipients(node), example.answer_format)
        text = self.wording.render(topology, node, example, [])
        headers = sum(len(self.policy.frame.end) + len(header) for header in self.policy.later_headers(begins))
        return len(self.policy.prompt("", text, begins=begins).suffix_ids) + headers

    def _check_finite(self, rollouts: Iterable["_RolloutInProgress"]) -> None:
        """Raise Diverged if a text was sampled from log-probabilities that are not finite."""
        for rollout in rollouts:
            for node, completion in rollout.completions.items():
                if not math.isfinite(sum(completion.sample.logprobs)):
                    raise Diverged(
                        f"node {node} samples tokens from log-probabilities that are not finite: its adapter, or the backbone "
                        "in this --dtype, has grown beyond what numbers hold"
                    )

    def ask(self, question: str, *, answer_format: str = 'Write "Answer:" and the answer.', seed: int = 0) -> Rollout:
        """Answer one question greedily and return the rollout with every message."""
        example = Example("asked", question, "", answer_format)
        return self.rollout([example], 1, seed=("ask", seed), temperature=0.0)[0][0]


def _most_frequent(nodes: Iterable[int]) -> int:
    """Return how often the most frequent of these nodes is among them."""
    return max(Counter(nodes).values(), default=0)


@dataclass(frozen=True, slots=True)
class _Neighbours:
    """Senders and recipients of each node in one topology, looked up once."""

    topology: Topology
    senders: dict[int, tuple[int, ...]]
    recipients: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, topology: Topology) -> "_Neighbours":
        nodes = topology.nodes
        return cls(topology, {n: topology.senders(n) for n in nodes}, {n: topology.recipients(n) for n in nodes})

    def following(self, node: int) -> set[int]:
        """Return a node and all nodes that read of it, directly or not."""
        reached = {node}
        for later in self.topology.nodes:
            if reached.intersection(self.senders[later]):
                reached.add(later)
        return reached


def _removed(completion: Completion) -> Completion:
    """Return a completion in whose place nothing was written: its recipients read the placeholder."""
    messages_ = tuple(Message(m.sender, m.recipient, messages.NOTHING, MessageStatus.EMPTY) for m in completion.messages)
    nothing = Sample((), (), ("",), stopped=True, adapter_version=completion.sample.adapter_version)
    return Completion(completion.node, completion.prompt, nothing, messages_)


@dataclass(slots=True)
class _RolloutInProgress:
    """One rollout in progress, with what its nodes have written so far."""

    example: Example
    index: int
    neighbours: _Neighbours
    seed: tuple[int | str, ...]
    completions: dict[int, Completion] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)

    def is_ready(self, node: int) -> bool:
        """Say whether a node has not written and all its senders have."""
        return node not in self.completions and all(sender in self.completions for sender in self.neighbours.senders[node])


class MessagePassing:
    """Carries messages along the edges: a node's request is made as soon as its last sender has written."""

    def __init__(self, policy: Policy, wording: Wording, rollouts: "list[_RolloutInProgress]", branches: int) -> None:
        self.policy, self.wording, self.rollouts, self.branches = policy, wording, rollouts, branches
        self.keys: list[tuple[int, int]] = []
        """Index of the rollout and node of each request, by the request's key."""

    def start(self) -> list[tuple[int, Request]]:
        """Return the requests of the nodes that can write at once, in all rollouts: at first those without senders."""
        distinct = {id(rollout.neighbours): rollout.neighbours for rollout in self.rollouts}
        return [
            self._request(number, node)
            for neighbours in distinct.values()
            for node in neighbours.topology.nodes
            for number, rollout in enumerate(self.rollouts)
            if rollout.neighbours is neighbours and rollout.is_ready(node)
        ]

    def _request(self, number: int, node: int) -> tuple[int, Request]:
        """Return the request of a node in a rollout, with its key; all its senders have written."""
        rollout = self.rollouts[number]
        senders = rollout.neighbours.senders[node]
        inbox = [m for sender in senders for m in rollout.completions[sender].messages if m.recipient == node]
        topology = rollout.neighbours.topology
        text = self.wording.render(topology, node, rollout.example, inbox)
        begins = self.wording.begins(rollout.neighbours.recipients[node], rollout.example.answer_format)
        prompt = self.policy.prompt(rollout.example.question, text, has_inbox=bool(senders), begins=begins)
        # The number of rollouts that share this node's text.
        leaves = self.branches ** (topology.depth - topology.layer(node)) if self.branches > 1 else 1
        seed = (*rollout.seed, rollout.example.drawn_by, rollout.index // leaves, node)
        request = Request(node, prompt, seed, self.policy.later_headers(begins))
        rollout.requests[node] = request
        self.keys.append((number, node))
        return len(self.keys) - 1, request

    def receive(self, key: int, sample: Sample) -> list[tuple[int, Request]]:
        """Record what a node has written, and return the requests of the recipients that have become ready."""
        number, node = self.keys[key]
        rollout = self.rollouts[number]
        recipients = rollout.neighbours.recipients[node]
        begins = self.wording.begins(recipients, rollout.example.answer_format)
        sent = messages.deliver(sample.texts, node, recipients) if begins else messages.parse(sample.text, node, recipients)
        rollout.completions[node] = Completion(node, rollout.requests[node].prompt, sample, sent, begins)
        return [self._request(number, recipient) for recipient in recipients if rollout.is_ready(recipient)]

    def text_so_far(self, node: int, sample: Sample) -> str:
        """Return what a node of the first rollout has written so far, each text with what it was begun by."""
        (rollout, *_) = self.rollouts
        begins = self.wording.begins(rollout.neighbours.recipients[node], rollout.example.answer_format)
        return "\n".join(begin + text for begin, text in zip_longest(begins[: len(sample.texts)], sample.texts, fillvalue=""))

    def finished(self) -> list[Rollout]:
        """Return the rollouts, with completions in topological order."""
        return [
            Rollout(p.example, p.index, tuple(p.completions[n] for n in p.neighbours.topology.nodes)) for p in self.rollouts
        ]
