"""Scores that are never shown alone: accuracy with n, interval, floor, parse rate, and what an answer cost."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from neuromas.system.process import return_freed_memory
from neuromas.system.terminal import shortened
from neuromas.tasks import Task, rewards_of
from neuromas.training.intervals import independent, wilson
from neuromas.training.ledger import spending
from neuromas.types import Example, Group

if TYPE_CHECKING:
    # Imports torch, and scores are shown without it.
    from neuromas.model.policy import Policy

UNPARSED = "(none)"
EXAMPLES_AT_ONCE = 128
PREFIX_BYTES_AT_ONCE = 2**30
"""On a CPU, the most that the prefixes of the questions that are answered together take; at a peak there are two copies."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One network on one set of examples, one rollout each."""

    accuracy: float
    n: int
    distinct: int
    """Different questions among the n: an item that is published twice is one question to the interval."""
    low: float
    """Lower end of the 95% Wilson interval of the accuracy."""
    high: float
    floor: float
    """Accuracy of the best constant answer on exactly these examples."""
    floor_answer: str
    parse_rate: float
    """Share of rollouts whose answer the task could read."""
    calls_per_answer: float
    tokens_per_answer: float
    """Sampled tokens of all nodes."""
    prompt_tokens_per_answer: float
    answers: dict[str, int]
    """How often each answer was given; `(none)` where none could be read."""

    @property
    def at_or_below_floor(self) -> bool:
        return self.accuracy <= self.floor

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: object, where: str) -> "Evaluation":
        """Read a stored score; ValueError names `where` it came from."""
        kinds = {name: f.type for name, f in cls.__dataclass_fields__.items()}
        numbers = {float: (int, float), int: int, str: str}
        found: dict[str, Any] = data if isinstance(data, dict) else {}
        fits = all(isinstance(found.get(name), numbers.get(kind, dict)) for name, kind in kinds.items())
        if not fits or len(found) != len(kinds):
            raise ValueError(f"{where} is damaged (a score lacks a part); restore it, or delete it to go on without it")
        return cls(**found)

    def __str__(self) -> str:
        # A gold answer may be a whole program.
        best = shortened(self.floor_answer)
        repeated = f", {self.distinct} of them different" if self.distinct < self.n else ""
        text = (
            f"{self.accuracy:.1%} (n {self.n}{repeated}, 95% interval {self.low:.1%} to {self.high:.1%}, "
            f"floor {self.floor:.1%} always {best!r}, parsed {self.parse_rate:.1%}, "
            f"{self.calls_per_answer:.3g} calls and {self.tokens_per_answer:.1f} tokens an answer)"
        )
        if self.at_or_below_floor:
            return f"{text}  AT OR BELOW FLOOR"
        return f"{text}  INTERVAL REACHES FLOOR" if self.low <= self.floor else text


def score(task: Task, groups: Sequence[Group]) -> Evaluation:
    """Score finished rollouts; ValueError if there are none."""
    rollouts = [rollout for group in groups for rollout in group]
    if not rollouts:
        raise ValueError("nothing to evaluate: expected at least one example")
    n = len(rollouts)
    right = sum(rewards_of(task, [(rollout.example, rollout.answer) for rollout in rollouts]))
    counts = Counter(rollout.example.id for rollout in rollouts)
    effective = independent(list(counts.values()))
    low, high = wilson(right / n * effective, effective)
    best, best_share = task.floor([rollout.example for rollout in rollouts])
    answers = Counter(task.parse_answer(rollout.answer) or UNPARSED for rollout in rollouts)
    spent = spending(groups)
    return Evaluation(
        accuracy=right / n,
        n=n,
        distinct=len(counts),
        low=low,
        high=high,
        floor=best_share,
        floor_answer=best,
        parse_rate=1 - answers[UNPARSED] / n,
        calls_per_answer=spent.calls / n,
        tokens_per_answer=spent.sampled_tokens / n,
        prompt_tokens_per_answer=spent.prompt_tokens / n,
        answers=dict(answers.most_common()),
    )


def parts(policy: "Policy", examples: Sequence[Example]) -> Iterator[slice]:
    """Yield the slices of examples that are answered together: 128, or on a CPU as many as have room for their prefixes."""
    bounded = policy.backbone.device.type == "cpu"
    start = most = 0
    for stop, example in enumerate(examples):
        needed = policy.prefix_bytes(example.question) if bounded else 0
        # Prefixes are padded to the longest.
        most = max(most, needed)
        if stop > start and (stop - start == EXAMPLES_AT_ONCE or (stop + 1 - start) * most > PREFIX_BYTES_AT_ONCE):
            yield slice(start, stop)
            start, most = stop, needed
    if examples:
        yield slice(start, len(examples))


class Answering(Protocol):
    """What answers examples: a network, or a society."""

    policy: "Policy"

    def rollout(
        self, examples: Sequence[Example], group_size: int, *, seed: Sequence[int | str], temperature: float
    ) -> list[Group]:
        """Answer each example `group_size` times."""
        ...


def evaluate(
    network: Answering,
    task: Task,
    examples: Sequence[Example],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Evaluation, list[Group]]:
    """Answer each example once, greedily by default; return the score and the rollouts that it is from.

    Examples pass through in parts, so that memory does not grow with their number; `between` is called before each part,
    and `tell` is told how far it is after each but the last.
    """
    groups: list[Group] = []
    for part in parts(network.policy, examples):
        between()
        if part.start:
            tell(f"{part.start} of {len(examples)} questions answered")
        groups += network.rollout(examples[part], 1, seed=("evaluate", seed), temperature=temperature)
        return_freed_memory()
    return score(task, groups), groups
