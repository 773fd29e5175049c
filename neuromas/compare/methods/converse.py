"""Runs conversations through an engine, all examples at once, and accounts for every call."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from neuromas.compare.methods.conversation import Conversation, Spoken
from neuromas.compare.methods.method import Answer, CellResult, CellSpec
from neuromas.config import TrainConfig
from neuromas.model.backbone import Backbone
from neuromas.model.policy import Policy
from neuromas.rollout.engine import Engine
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.rollout.voting import majority_vote
from neuromas.tasks import Task, from_config
from neuromas.training.config_file import to_json
from neuromas.training.evaluate import EXAMPLES_AT_ONCE
from neuromas.training.ledger import spending
from neuromas.training.questions import evaluation_sets
from neuromas.types import Example, Group, Request, Sample

NOBODY = 0
"""Who speaks where there are no nodes: the bare backbone."""


@dataclass(slots=True)
class _Talk:
    """A conversation on its way."""

    conversation: Conversation
    spoken: Spoken
    texts: list[str | None] = field(default_factory=list)
    """What the calls of the current list have written so far."""
    keys: set[str] = field(default_factory=set)


class _Round:
    """All conversations of one call of the engine; each goes on as soon as its own texts are there."""

    def __init__(self, talks: list[_Talk], policy: Policy, seed: tuple[int | str, ...], max_new_tokens: int) -> None:
        self.talks, self.policy, self.seed, self.max_new_tokens = talks, policy, seed, max_new_tokens
        self.limit = policy.backbone.max_tokens
        self.places: list[tuple[int, int]] = []
        """(conversation, place in its current list) of each request."""

    def start(self) -> list[tuple[int, Request]]:
        return [request for which in range(len(self.talks)) for request in self._advance(which, None)]

    def receive(self, key: int, sample: Sample) -> list[tuple[int, Request]]:
        which, place = self.places[key]
        talk = self.talks[which]
        talk.spoken.sampled_tokens += len(sample.token_ids)
        talk.texts[place] = sample.text
        if any(text is None for text in talk.texts):
            return []
        return self._advance(which, [text for text in talk.texts if text is not None])

    def _advance(self, which: int, texts: list[str] | None) -> list[tuple[int, Request]]:
        talk = self.talks[which]
        try:
            calls = next(talk.conversation) if texts is None else talk.conversation.send(texts)
            while not calls:
                calls = talk.conversation.send([])
        except StopIteration as end:
            talk.spoken.text = end.value
            return []
        talk.texts = [None] * len(calls)
        requests = []
        for place, call in enumerate(calls):
            assert call.key not in talk.keys, f"two calls are named {call.key!r}: they would draw alike"
            talk.keys.add(call.key)
            self.places.append((which, place))
            requests.append((len(self.places) - 1, self._request(talk.spoken, call.key, call.text)))
        return requests

    def _request(self, spoken: Spoken, key: str, text: str) -> Request:
        prompt = self.policy.prompt(spoken.example.question, text)
        length = len(prompt.prefix_ids) + len(prompt.suffix_ids)
        if self.limit is not None and length + self.max_new_tokens > self.limit:
            raise ValueError(
                f"call {key} reads {length} tokens and may write --max-new-tokens {self.max_new_tokens}, the backbone reads "
                f"{self.limit}; shorten what is written, or give the method fewer agents or samples"
            )
        spoken.calls += 1
        spoken.prompt_tokens += length
        return Request(NOBODY, prompt, (*self.seed, spoken.example.id, key))


def converse(
    talks: Sequence[tuple[Example, Conversation]],
    policy: Policy,
    engine: Engine,
    *,
    seed: Sequence[int | str],
    temperature: float,
    max_new_tokens: int,
) -> list[Spoken]:
    """Hold all conversations at once, without a barrier between them, and return their answers in order.

    The policy is the bare backbone. A draw depends on (seed, example, key of the call) alone.
    Raises ValueError if a call's prompt leaves no room for its text.
    """
    running = [_Talk(conversation, Spoken(example)) for example, conversation in talks]
    rounds = _Round(running, policy, tuple(seed), max_new_tokens)
    engine.generate(rounds.start(), rounds.receive, temperature=temperature, max_new_tokens=max_new_tokens)
    return [talk.spoken for talk in running]


def answers_of(task: Task, spoken: Sequence[Spoken]) -> tuple[Answer, ...]:
    """Check the answers and put them beside what they cost."""
    rewards = task.rewards([(each.example, each.text) for each in spoken])
    return tuple(
        Answer(
            example=each.example.id, gold=each.example.answer, given=task.parse_answer(each.text), reward=float(reward),
            calls=each.calls, prompt_tokens=each.prompt_tokens, sampled_tokens=each.sampled_tokens,
        )
        for each, reward in zip(spoken, rewards, strict=True)
    )  # fmt: skip


def voted(task: Task, group: Group) -> Spoken:
    """Return the answer that a group's rollouts elect, at the cost of all of them."""
    spent = spending([group])
    texts = [rollout.answer for rollout in group]
    winner = texts[majority_vote(texts, task.parse_answer)]
    return Spoken(group[0].example, winner, spent.calls, spent.prompt_tokens, spent.sampled_tokens)


def in_parts(
    examples: Sequence[Example],
    answer: Callable[[Sequence[Example]], list[Spoken]],
    between: Callable[[], None] = lambda: None,
) -> list[Spoken]:
    """Answer examples part by part, so that memory does not grow with their number; `between` is called before each."""
    spoken: list[Spoken] = []
    for start in range(0, len(examples), EXAMPLES_AT_ONCE):
        between()
        spoken += answer(examples[start : start + EXAMPLES_AT_ONCE])
    return spoken


def settings_of(config: TrainConfig, **more: object) -> dict[str, object]:
    return {**json.loads(to_json(config)), **more}


class Answerer:
    """A cell's task, evaluation sets and bare backbone, ready for conversations."""

    def __init__(self, config: TrainConfig, temperature: float) -> None:
        self.config, self.temperature = config.check(), temperature
        self.task = from_config(config.task)
        self.sets = evaluation_sets(config, self.task)
        backbone = Backbone.load(config.backbone, dtype=config.dtype, device=config.device, prompt_date=config.prompt_date)
        self.policy = Policy(backbone)
        self.engine = TorchEngine(self.policy)

    def converse(self, talks: Sequence[tuple[Example, Conversation]], seed: Sequence[int | str]) -> list[Spoken]:
        """Hold conversations on the bare backbone, as the cell's settings say."""
        return converse(
            talks, self.policy, self.engine, seed=seed, temperature=self.temperature,
            max_new_tokens=self.config.max_new_tokens,
        )  # fmt: skip

    def answers(self, talk: Callable[[Example], Conversation]) -> dict[str, tuple[Answer, ...]]:
        """Hold a conversation about each example of each evaluation set."""

        def answer(examples: Sequence[Example]) -> list[Spoken]:
            return self.converse([(example, talk(example)) for example in examples], ("evaluate", self.config.seed))

        return {name: answers_of(self.task, in_parts(examples, answer)) for name, examples in self.sets.items()}


def run_untrained(
    name: str, talk: Callable[..., Conversation], settings: Mapping[str, int | float], spec: CellSpec, temperature: float
) -> CellResult:
    """Answer the cell's evaluation sets by conversations of (example, task, **settings)."""
    answerer = Answerer(spec.config, temperature)
    return CellResult(
        method=name,
        task=answerer.task.name,
        seed=spec.config.seed,
        answers=answerer.answers(lambda example: talk(example, answerer.task, **settings)),
        trainable_parameters=0,
        training=None,
        settings=settings_of(spec.config, evaluation_temperature=temperature, **settings),
    )
