"""Runs conversations through an engine, all examples at once, and accounts for every call."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from neuromas.compare.methods.conversation import Answered, Call, Conversation
from neuromas.compare.methods.method import Answer, CellResult, CellSpec
from neuromas.config import TrainConfig
from neuromas.graph.wording import Wording
from neuromas.model.backbone import Backbone
from neuromas.model.policy import Policy
from neuromas.rollout.engine import Engine
from neuromas.rollout.network import worded
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.rollout.voting import majority_vote
from neuromas.tasks import Task, from_config, rewards_of
from neuromas.training.config_file import to_json
from neuromas.training.evaluate import parts
from neuromas.training.ledger import spending
from neuromas.training.questions import evaluation_sets
from neuromas.types import Example, Group, Request, Sample

BARE_BACKBONE = 0
"""Number of the node in requests to the bare backbone, which has no nodes."""


@dataclass(slots=True)
class _RunningConversation:
    """A conversation that has not ended, with the texts that it has so far."""

    conversation: Conversation
    answered: Answered
    texts: list[str | None] = field(default_factory=list)
    """Texts of the calls of the current list; None for a call that still runs."""
    keys: set[str] = field(default_factory=set)


class _Round:
    """Runs all conversations through one call of the engine; each continues as soon as its own texts are complete."""

    def __init__(
        self,
        conversations: list[_RunningConversation],
        policy: Policy,
        wording: Wording,
        seed: tuple[int | str, ...],
        max_new_tokens: int,
    ) -> None:
        self.conversations, self.policy, self.wording = conversations, policy, wording
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self.limit = policy.backbone.max_tokens
        self.indices: list[tuple[int, int]] = []
        """(index of the conversation, index in its current list of calls) of each request."""
        self.begins: list[tuple[str, ...]] = []
        """What each text of a request is begun by."""

    def start(self) -> list[tuple[int, Request]]:
        """Return the keyed requests of every conversation's first calls."""
        return [request for index in range(len(self.conversations)) for request in self._advance(index, None)]

    def receive(self, key: int, sample: Sample) -> list[tuple[int, Request]]:
        """Store a sample; return the next requests of its conversation once all texts of its list are complete."""
        index, call_index = self.indices[key]
        running = self.conversations[index]
        running.answered.sampled_tokens += len(sample.logprobs)
        running.answered.prompt_tokens += len(sample.given)
        running.texts[call_index] = sample.begun(self.begins[key])
        if any(text is None for text in running.texts):
            return []
        return self._advance(index, [text for text in running.texts if text is not None])

    def _advance(self, index: int, texts: list[str] | None) -> list[tuple[int, Request]]:
        running = self.conversations[index]
        try:
            calls = next(running.conversation) if texts is None else running.conversation.send(texts)
            while not calls:
                calls = running.conversation.send([])
        except StopIteration as end:
            running.answered.text = end.value
            return []
        running.texts = [None] * len(calls)
        requests = []
        for call_index, call in enumerate(calls):
            assert call.key not in running.keys, f"two calls are named {call.key!r}: their samples would be the same"
            running.keys.add(call.key)
            self.indices.append((index, call_index))
            self.begins.append(self._begins(call, running.answered.example))
            requests.append((len(self.indices) - 1, self._request(running.answered, call, self.begins[-1])))
        return requests

    def _begins(self, call: Call, example: Example) -> tuple[str, ...]:
        """Return what each text of a call is begun by: where it asks for the answer, that is begun as an output node's is."""
        begins = self.wording.begins((), example.answer_format) if _asks(call, example) else ()
        return ("", *begins) if begins and call.works_first else begins

    def _request(self, answered: Answered, call: Call, begins: tuple[str, ...]) -> Request:
        example = answered.example
        text = call.text
        if _asks(call, example):
            text = text.removesuffix(example.answer_format) + self.wording.asks(example.answer_format)
        prompt = self.policy.prompt(example.question, text, begins=begins)
        headers = self.policy.later_headers(begins)
        given = sum(len(self.policy.frame.end) + len(header) for header in headers)
        read = len(prompt.prefix_ids) + len(prompt.suffix_ids)
        if self.max_new_tokens < len(begins):
            raise ValueError(f"--max-new-tokens must be at least 2 for a call that works first, got {self.max_new_tokens}")
        if self.limit is not None and read + given + self.max_new_tokens > self.limit:
            raise ValueError(
                f"call {call.key} reads {read + given} tokens and may write --max-new-tokens {self.max_new_tokens}, the "
                f"backbone reads {self.limit}; shorten what is written, or give the method fewer agents or samples"
            )
        answered.calls += 1
        answered.prompt_tokens += read
        return Request(BARE_BACKBONE, prompt, (*self.seed, example.id, call.key), headers)


def _asks(call: Call, example: Example) -> bool:
    """Return whether a call asks for the answer. A prompt may also end in a text of a model that has copied the format."""
    return f"\n{call.text}".endswith(f"\n{example.answer_format}")


def converse(
    conversations: Sequence[tuple[Example, Conversation]],
    policy: Policy,
    engine: Engine,
    wording: Wording,
    *,
    seed: Sequence[int | str],
    temperature: float,
    max_new_tokens: int,
) -> list[Answered]:
    """Run all conversations at once, without a barrier between them, and return their answers in order.

    The policy is the bare backbone; the wording says what begins an answer. Sampling depends on (seed, example, key of the
    call) alone. Raises ValueError if a call's prompt leaves no room for its text.
    """
    running = [_RunningConversation(conversation, Answered(example)) for example, conversation in conversations]
    rounds = _Round(running, policy, wording, tuple(seed), max_new_tokens)
    engine.generate(rounds.start(), rounds.receive, temperature=temperature, max_new_tokens=max_new_tokens)
    return [each.answered for each in running]


def answers_of(task: Task, answered: Sequence[Answered]) -> tuple[Answer, ...]:
    """Check the answers and return each with its reward and cost."""
    rewards = rewards_of(task, [(each.example, each.text) for each in answered])
    return tuple(
        Answer(
            example=each.example.id, gold=each.example.answer, given=task.parse_answer(each.text), reward=float(reward),
            calls=each.calls, prompt_tokens=each.prompt_tokens, sampled_tokens=each.sampled_tokens,
        )
        for each, reward in zip(answered, rewards, strict=True)
    )  # fmt: skip


def majority_answer(task: Task, group: Group) -> Answered:
    """Return the majority answer of a group's rollouts, at the cost of all of them."""
    spent = spending([group])
    texts = [rollout.answer for rollout in group]
    winner = texts[majority_vote(texts, task.parse_answer)]
    return Answered(group[0].example, winner, spent.calls, spent.prompt_tokens, spent.sampled_tokens)


def answer_in_parts(
    policy: Policy,
    examples: Sequence[Example],
    answer: Callable[[Sequence[Example]], list[Answered]],
    between: Callable[[], None] = lambda: None,
) -> list[Answered]:
    """Answer examples part by part, so that memory does not grow with their number; `between` is called before each part."""
    answered: list[Answered] = []
    for part in parts(policy, examples):
        between()
        answered += answer(examples[part])
    return answered


def settings_of(config: TrainConfig, **more: object) -> dict[str, object]:
    """Return a cell's settings and those of its method, JSON-ready."""
    return {**json.loads(to_json(config)), **more}


class Answerer:
    """Holds a cell's task, evaluation sets and bare backbone, and runs conversations with them."""

    def __init__(self, config: TrainConfig, temperature: float) -> None:
        self.config, self.temperature = config.check(), temperature
        self.task = from_config(config.task)
        self.sets = evaluation_sets(config, self.task)
        backbone = Backbone.of(config)
        self.wording, frame = worded(backbone, config.prompt)
        self.policy = Policy(backbone, frame=frame)
        self.engine = TorchEngine(self.policy)

    def converse(self, conversations: Sequence[tuple[Example, Conversation]], seed: Sequence[int | str]) -> list[Answered]:
        """Run conversations on the bare backbone with the cell's settings."""
        return converse(
            conversations, self.policy, self.engine, self.wording, seed=seed, temperature=self.temperature,
            max_new_tokens=self.config.max_new_tokens,
        )  # fmt: skip

    def answers(self, conversation: Callable[[Example], Conversation]) -> dict[str, tuple[Answer, ...]]:
        """Return the answers to each evaluation set, by one conversation for each example."""

        def answer(examples: Sequence[Example]) -> list[Answered]:
            return self.converse([(example, conversation(example)) for example in examples], ("evaluate", self.config.seed))

        return {
            name: answers_of(self.task, answer_in_parts(self.policy, examples, answer)) for name, examples in self.sets.items()
        }


def run_untrained(
    name: str,
    conversation: Callable[..., Conversation],
    settings: Mapping[str, int | float],
    spec: CellSpec,
    temperature: float,
) -> CellResult:
    """Answer the cell's evaluation sets by conversations of (example, task, **settings)."""
    answerer = Answerer(spec.config, temperature)
    return CellResult(
        method=name,
        task=answerer.task.name,
        seed=spec.config.seed,
        answers=answerer.answers(lambda example: conversation(example, answerer.task, **settings)),
        trainable_parameters=0,
        training=None,
        settings=settings_of(spec.config, evaluation_temperature=temperature, **settings),
    )
