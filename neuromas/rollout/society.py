"""The society: agents that debate each question (Subramaniam, Du et al. 2025, arXiv 2501.05707), one adapter each."""

import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

from neuromas.config import AdapterConfig, PromptConfig
from neuromas.graph import society as wording
from neuromas.graph.society import SUMMARISER, SocietyConfig
from neuromas.graph.topology import Topology
from neuromas.model.adapters import AdapterBank
from neuromas.model.backbone import Backbone
from neuromas.model.policy import Policy
from neuromas.rollout.engine import Engine
from neuromas.rollout.network import Diverged, worded
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.rollout.voting import majority_vote
from neuromas.types import Completion, Example, Group, Request, Rollout, Sample

WORDS_AROUND = 48
"""Most tokens of the sentences in a prompt, besides question, answer format and texts, with their heads."""


@dataclass(slots=True)
class _Debate:
    """A debate in progress."""

    example: Example
    index: int
    completions: list[Completion] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    """The last round's texts, by agent."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One text to be written in a debate."""

    debate: _Debate
    node: int
    key: str
    """Names the call within its debate, for its random numbers."""
    text: str
    """What is read after the question."""


class Society:
    """Agents that debate. As with a network, `rollout` passes examples through it; a rollout is one debate.

    A rollout's completions are in the order of the rounds: all answers of a round, before each later one the summaries for it.
    `read` finds the answer in a text, for the vote.
    """

    def __init__(
        self,
        config: SocietyConfig,
        topology: Topology,
        backbone: Backbone,
        *,
        read: Callable[[str], str | None],
        adapter: AdapterConfig | None = None,
        max_new_tokens: int = 80,
        seed: int = 0,
        prompt: PromptConfig | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.config, self.topology, self.read, self.max_new_tokens = config, topology, read, max_new_tokens
        first = [node for node in topology.nodes if topology.layer(node) == 1]
        self.generators = [node for node in first for _ in range(config.samples)]
        """Who writes each answer of the first round."""
        self.critics = [node for node in topology.nodes if topology.layer(node) == 2] or self.generators
        """Who writes each answer of a later round."""
        self.has_critics = self.critics is not self.generators
        prompt = prompt or PromptConfig()
        _, frame = worded(backbone, prompt)
        self.begin = prompt.begin_answer or ""
        """What an answer is begun by, if the answer format names it; empty unless the settings say so: agents work first."""
        self.policy = Policy(backbone, topology.nodes, adapter, seed, frame)
        self.bare = Policy(backbone, frame=frame)
        """The backbone without adapters, which writes summaries."""
        self.engine: Engine = engine or TorchEngine(self.policy)
        self.bare_engine: Engine = engine or TorchEngine(self.bare)

    @property
    def backbone(self) -> Backbone:
        return self.policy.backbone

    @property
    def adapters(self) -> AdapterBank:
        assert self.policy.adapters is not None, "a society has agents, and agents have adapters"
        return self.policy.adapters

    def rollout(
        self, examples: Sequence[Example], group_size: int, *, seed: Sequence[int | str], temperature: float
    ) -> list[Group]:
        """Debate every example `group_size` times and return one group for each example, in order.

        Random numbers depend on (seed, example, debate, round, agent) alone.
        """
        debates = [_Debate(example, index) for example in examples for index in range(group_size)]
        for number in range(1, self.config.rounds + 1):
            advice = self._advice(debates, number, tuple(seed), temperature) if number > 1 else []
            nodes = self.generators if number == 1 else self.critics
            calls = [
                _Call(debate, node, f"round/{number}/agent/{agent}", self._text(debate, agent, of_debate))
                for debate, of_debate in zip(debates, advice or [()] * len(debates), strict=True)
                for agent, node in enumerate(nodes)
            ]
            self._answer(calls, len(nodes), tuple(seed), temperature)
        done = [self.voted(debate.example, debate.index, debate.completions) for debate in debates]
        return [tuple(done[start : start + group_size]) for start in range(0, len(done), group_size)]

    def _text(self, debate: _Debate, agent: int, advice: Sequence[str]) -> str:
        if not debate.answers:
            return wording.first_prompt(debate.example.answer_format)
        return wording.update_prompt(debate.answers[agent], advice[agent], debate.example.answer_format)

    def _advice(
        self, debates: Sequence[_Debate], number: int, seed: tuple[int | str, ...], temperature: float
    ) -> list[Sequence[str]]:
        """Return what each agent of each debate learns of the others' answers, summed up by the bare backbone or in full."""
        agents = range(len(self.generators))
        others = [[[a for k, a in enumerate(d.answers) if k != agent] for agent in agents] for d in debates]
        if len(agents) == 1:
            return [[""] for _ in debates]
        if not self.config.summary:
            return [[wording.advice_of_answers(answers) for answers in of_debate] for of_debate in others]
        calls = [
            _Call(debate, SUMMARISER, f"round/{number}/summary/{agent}", wording.summary_prompt(answers))
            for debate, of_debate in zip(debates, others, strict=True)
            for agent, answers in enumerate(of_debate)
        ]
        texts = self._speak(self.bare, self.bare_engine, calls, seed, temperature)
        advice = [wording.advice_of_summary(text) for text in texts]
        return [advice[start : start + len(agents)] for start in range(0, len(advice), len(agents))]

    def _answer(self, calls: Sequence[_Call], agents: int, seed: tuple[int | str, ...], temperature: float) -> None:
        texts = self._speak(self.policy, self.engine, calls, seed, temperature)
        for start in range(0, len(calls), agents):
            calls[start].debate.answers = texts[start : start + agents]

    def _speak(
        self, policy: Policy, engine: Engine, calls: Sequence[_Call], seed: tuple[int | str, ...], temperature: float
    ) -> list[str]:
        """Let the engine write all calls, add them to their debates, and return their texts."""
        begins = [self._begins(call) for call in calls]
        requests = [
            Request(
                call.node,
                policy.prompt(call.debate.example.question, call.text, has_inbox=bool(call.debate.completions), begins=begin),
                (*seed, call.debate.example.drawn_by, call.debate.index, call.key),
            )
            for call, begin in zip(calls, begins, strict=True)
        ]
        samples: dict[int, Sample] = {}

        def receive(key: int, sample: Sample) -> list[tuple[int, Request]]:
            samples[key] = sample
            return []

        engine.generate(list(enumerate(requests)), receive, temperature=temperature, max_new_tokens=self.max_new_tokens)
        written = [
            Completion(call.node, request.prompt, samples[key], (), begin)
            for key, (call, request, begin) in enumerate(zip(calls, requests, begins, strict=True))
        ]
        for call, completion in zip(calls, written, strict=True):
            if not math.isfinite(sum(completion.sample.logprobs)):
                raise Diverged(f"agent {call.node} samples tokens from log-probabilities that are not finite")
            call.debate.completions.append(completion)
        return [completion.text for completion in written]

    def _begins(self, call: _Call) -> tuple[str, ...]:
        begun = self.begin and call.node != SUMMARISER and self.begin in call.debate.example.answer_format
        return (self.begin,) if begun else ()

    def voted(self, example: Example, index: int, completions: Sequence[Completion]) -> Rollout:
        """Return the debate of these completions with the majority of its last round as its answer."""
        rollout = Rollout(example, index, tuple(completions))
        last = self.answers_of(rollout)[-1]
        winner = majority_vote([completion.text for completion in last], self.read)
        return replace(rollout, winner=len(completions) - len(last) + winner)

    def answers_of(self, rollout: Rollout) -> list[tuple[Completion, ...]]:
        """Return the answers of each round of a debate, by agent; summaries are left out."""
        answers = tuple(completion for completion in rollout.completions if completion.node != SUMMARISER)
        # A single agent may have answered any number of times.
        each = len(answers) // self.config.rounds
        return [answers[start : start + each] for start in range(0, len(answers), each)]

    def with_samples(self, samples: int) -> "Society":
        """Return the same agents, each of which answers a question so many times."""
        other = copy(self)
        other.config = replace(self.config, samples=samples)
        other.generators = [node for node in dict.fromkeys(self.generators) for _ in range(samples)]
        return other

    def check_lengths(self, examples: Iterable[Example]) -> None:
        """Raise ValueError if an agent's prompt and text may be longer than the backbone reads."""
        limit = self.backbone.max_tokens
        if limit is None:
            return
        agents, config = len(self.generators), self.config
        # A summary is of all other answers; without one, an agent reads them and its own.
        texts = 0 if config.rounds == 1 else max(2, agents - 1) if config.summary else agents
        for example in examples:
            question = len(self.policy.prompt(example.question, example.answer_format).prefix_ids)
            own = len(self.backbone.tokenize(example.answer_format)) + len(self.policy.frame.footer) + WORDS_AROUND
            needed = question + own + (texts + 1) * (self.max_new_tokens + 4)
            if needed > limit:
                raise ValueError(
                    f"a question of {question} tokens ({example.question[:40]!r}...) and {texts} texts of --max-new-tokens "
                    f"{self.max_new_tokens} to read need up to {needed} tokens, the backbone reads {limit}; shorten one of "
                    "them, or let fewer agents debate"
                )
