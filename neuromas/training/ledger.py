"""The ledger: what a run has spent, counted where it is spent."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from neuromas.config import MOST_TIMES_FIRST
from neuromas.types import Group, Replay


@dataclass(slots=True)
class Ledger:
    """Counts of a run's training. Evaluation is not in it: it is reported per answer, with each score."""

    trainable_parameters: int
    """Of the network as it is last, which is its largest."""
    steps: int = 0
    """Training steps: each draws questions and rolls them out."""
    optimizer_steps: int = 0
    """Steps that had a gradient. A step whose groups are all right or all wrong has none, unless divergence is penalised or
    entropy paid for."""
    questions: int = 0
    rollouts: int = 0
    calls: int = 0
    """Completions: one per node and rollout, and those of replays."""
    prompt_tokens: int = 0
    """Tokens that nodes read, shared prefixes counted for every reader."""
    sampled_tokens: int = 0
    """Tokens that nodes wrote, stop tokens included."""
    phases: list[dict[str, int]] = field(default_factory=list)
    """The same counts before the first growth and from each growth to the next; they add up to the totals. Empty where
    nothing has grown."""

    def begin_phase(self, trainable_parameters: int) -> None:
        """Count what follows, a growth, as a phase of its own."""
        if not self.phases:
            self.phases.append(self._counts())
        self.trainable_parameters = trainable_parameters
        self.phases.append({**dict.fromkeys(self._counts(), 0), "trainable_parameters": trainable_parameters})

    def _counts(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name != "phases"}

    def record(self, groups: Sequence[Group], replays: Sequence[Replay] = (), *, updated: bool) -> None:
        """Add one training step with its replays; `updated` says whether it had a gradient."""
        counts = {"questions": len(groups), "rollouts": sum(map(len, groups))}
        added = {"steps": 1, "optimizer_steps": int(updated), **counts, **asdict(spending(groups, replays))}
        for name, count in added.items():
            setattr(self, name, getattr(self, name) + count)
            if self.phases:
                self.phases[-1][name] += count

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Spending:
    """Calls and tokens of some rollouts."""

    calls: int
    prompt_tokens: int
    sampled_tokens: int


def spending(groups: Sequence[Group], replays: Sequence[Replay] = ()) -> Spending:
    """Return what rollouts have cost, and what was sampled for replays."""
    completions = [c for group in groups for rollout in group for c in rollout.completions]
    completions += [c for replay in replays for c in replay.written]
    return Spending(
        len(completions),
        sum(len(c.prompt.prefix_ids) + len(c.prompt.suffix_ids) + len(c.sample.given) for c in completions),
        sum(len(c.sample.logprobs) for c in completions),
    )


@dataclass(slots=True)
class Pace:
    """How many questions a step gets so that every step costs about `step_tokens` sampled tokens, whatever the network's size.

    What a step spends too much or too little, the next one makes up for; so a run's total stays within about one step of its
    number of steps times `step_tokens`. A step aims at half to twice of that, and asks at most
    `MOST_TIMES_FIRST` times the first step's questions.
    """

    owed: int = 0
    """Tokens that the steps so far should have spent and have not; below 0 where they have spent too many."""
    tokens_per_call: float = 0.0
    """Sampled tokens of the last step, replays included, over its rollouts' completions; 0 before the first."""

    def questions(self, step_tokens: int, first: int, calls_per_question: float) -> int:
        """Return the number of questions of the next step, at least 1; `first` if nothing has been sampled yet.

        `calls_per_question` is the expected number of completions of one group.

        >>> Pace(owed=200, tokens_per_call=10.0).questions(1000, 16, 8 * 3)  # 1200 tokens at 240 a question
        5
        """
        if not self.tokens_per_call:
            return first
        wanted = min(max(step_tokens + self.owed, step_tokens / 2), 2 * step_tokens)
        return min(max(1, round(wanted / (self.tokens_per_call * calls_per_question))), MOST_TIMES_FIRST * first)

    def update(self, step_tokens: int, groups: Sequence[Group], replays: Sequence[Replay] = ()) -> None:
        """Count what a step has spent."""
        spent = spending(groups, replays).sampled_tokens
        # Without a budget nothing is owed: a run that grows from this one may have one.
        self.owed += step_tokens - spent if step_tokens else 0
        self.tokens_per_call = spent / spending(groups).calls
