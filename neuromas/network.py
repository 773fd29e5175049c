"""The network: a topology whose nodes speak through one backbone, each with its own adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from neuromas import messages
from neuromas.adapters import AdapterBank
from neuromas.backbone import Backbone
from neuromas.config import AdapterConfig
from neuromas.engines.base import Engine
from neuromas.engines.torch_engine import TorchEngine
from neuromas.topology import Topology
from neuromas.types import Completion, Example, Group, Message, Request, Rollout, Sample
from neuromas.votes import elect


class Network:
    """A language system that is called, trained and grown as one neural network (arXiv 2605.16757).

    Puts adapters for the topology's nodes on the backbone. `max_new_tokens` bounds what a node writes in one rollout. `read`
    finds the answer in a text, where several nodes answer and their answers are put to the vote.
    """

    def __init__(
        self,
        topology: Topology,
        backbone: Backbone,
        *,
        adapter: AdapterConfig | None = None,
        engine: Engine | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
        read: Callable[[str], str | None] | None = None,
    ) -> None:
        self.topology = topology
        self.read = read
        self.backbone = backbone
        self.adapters: AdapterBank = backbone.add_adapters(topology.nodes, adapter or AdapterConfig(), seed)
        self.engine: Engine = engine or TorchEngine(backbone)
        self.max_new_tokens = max_new_tokens

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

        A draw depends on (seed, example, rollout, node) alone, so batches and other nodes change nothing. With `branches`,
        rollouts draw alike as far as they have the way through the tree in common, and so hold the same texts there.
        """
        for example in examples:
            self._check_length(example)
        sweep = _Sweep(self, examples, group_size, tuple(seed), branches)
        self.engine.generate(sweep.start(), sweep.receive, temperature=temperature, max_new_tokens=self.max_new_tokens)
        return [tuple(map(self._elect, group)) for group in sweep.groups()]

    def _elect(self, rollout: Rollout) -> Rollout:
        """Put the answers to the vote, if the rollout has several."""
        answering = [place for place, completion in enumerate(rollout.completions) if not completion.messages]
        if len(answering) == 1:
            return rollout
        assert self.read is not None, "a network in which several nodes answer is built with `read`"
        winner = elect([rollout.completions[place].sample.text for place in answering], self.read)
        return replace(rollout, elected=answering[winner])

    def _check_length(self, example: Example) -> None:
        """Raise ValueError if a node's prompt and text may grow beyond what the backbone can read."""
        limit = getattr(self.backbone.model.config, "max_position_embeddings", None)
        if limit is None:
            return
        question = len(self.backbone.prompt(example.question, "").prefix_ids)
        most_senders = max(len(self.topology.senders(node)) for node in self.topology.nodes)
        # A message comes with a line of its own, and the node's own part of the prompt is a few dozen tokens.
        texts = (most_senders + 1) * (self.max_new_tokens + 16) + 64
        if question + texts > limit:
            raise ValueError(
                f"a question of {question} tokens ({example.question[:40]!r}...), {most_senders} messages to a node and "
                f"--max-new-tokens {self.max_new_tokens} need up to {question + texts} tokens, the backbone reads {limit}; "
                "shorten one of them"
            )

    def ask(self, question: str, *, answer_format: str = 'Write "Answer:" and the answer.', seed: int = 0) -> Rollout:
        """Put one question to the network, greedily, and return the rollout with every message."""
        example = Example("asked", question, "", answer_format)
        return self.rollout([example], 1, seed=("ask", seed), temperature=0.0)[0][0]


@dataclass(slots=True)
class _Pass:
    """One rollout on its way: what has been written so far."""

    example: Example
    index: int
    completions: dict[int, Completion] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)


class _Sweep:
    """Carries messages along the edges: a node's request is made as soon as its last sender has written."""

    def __init__(
        self, network: Network, examples: Sequence[Example], group_size: int, seed: tuple[int | str, ...], branches: int
    ) -> None:
        self.topology, self.backbone, self.seed = network.topology, network.backbone, seed
        self.passes = [_Pass(example, index) for example in examples for index in range(group_size)]
        self.group_size = group_size
        self.num_nodes = len(self.topology.nodes)
        self.place = {node: place for place, node in enumerate(self.topology.nodes)}
        self.senders = {node: self.topology.senders(node) for node in self.topology.nodes}
        self.recipients = {node: self.topology.recipients(node) for node in self.topology.nodes}
        self.branches = branches

    def start(self) -> list[tuple[int, Request]]:
        sources = [node for node in self.topology.nodes if not self.senders[node]]
        return [self._request(which, node) for node in sources for which in range(len(self.passes))]

    def _request(self, which: int, node: int) -> tuple[int, Request]:
        running = self.passes[which]
        inbox = [m for sender in self.senders[node] for m in running.completions[sender].messages if m.recipient == node]
        text = messages.render(self.topology, node, running.example, inbox)
        prompt = self.backbone.prompt(running.example.question, text)
        # Rollouts that come from one text of this node.
        leaves = self.branches ** (self.topology.depth - self.topology.layer(node)) if self.branches > 1 else 1
        request = Request(node, prompt, (*self.seed, running.example.id, running.index // leaves, node))
        running.requests[node] = request
        return which * self.num_nodes + self.place[node], request

    def receive(self, key: int, sample: Sample) -> list[tuple[int, Request]]:
        which, place = divmod(key, self.num_nodes)
        node, running = self.topology.nodes[place], self.passes[which]
        sent: tuple[Message, ...] = messages.parse(sample.text, node, self.recipients[node])
        running.completions[node] = Completion(node, running.requests[node].prompt, sample, sent)
        return [
            self._request(which, recipient)
            for recipient in self.recipients[node]
            if all(sender in running.completions for sender in self.senders[recipient])
        ]

    def groups(self) -> list[Group]:
        rollouts = [Rollout(p.example, p.index, tuple(p.completions[n] for n in self.topology.nodes)) for p in self.passes]
        return [tuple(rollouts[i : i + self.group_size]) for i in range(0, len(rollouts), self.group_size)]
