"""Which tasks can reinforcement learn? What a network does on questions before any training says it."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from neuromas.rollout.network import Network
from neuromas.system.terminal import shortened
from neuromas.tasks import Task, rewards_of
from neuromas.training.evaluate import EXAMPLES_AT_ONCE, evaluate
from neuromas.training.intervals import wilson
from neuromas.training.ledger import spending
from neuromas.training.watch import mixed_share
from neuromas.types import Example, Group, MessageStatus

LEAST, MOST = 0.05, 0.6
ROOM = 0.1
MIXED = 0.2
SHOWN = 3
"""Wrong answers of a task that are shown."""
RULE = (
    f"Rule of thumb: reinforcement can learn a task with a pass@1 of {LEAST:.0%} to {MOST:.0%}, with a pass@k at "
    f"least {100 * ROOM:.0f} points above it, and with unequal rewards in at least {MIXED:.0%} of the groups: "
    "the others teach nothing."
)


@dataclass(frozen=True, slots=True)
class Screening:
    """What an untrained network does on one task; answers are sampled, `samples` for each question, unless it says greedy."""

    task: str
    questions: int
    samples: int
    pass_at: dict[int, float]
    """Expected best reward of k samples, by k: 1, 2, 4 and so on, and all samples."""
    low: float
    """Lower end of the 95% interval of pass@1."""
    high: float
    greedy: float
    """Greedy accuracy, one answer a question."""
    floor: float
    """Accuracy of the best constant answer on these questions."""
    floor_answer: str
    parse_rate: float
    """Share of sampled answers that the task could read."""
    well_formed: float | None
    """Share of messages that were addressed and not empty; None of a network that sends none."""
    mixed: float
    """Share of groups whose rewards are not all equal."""
    tokens_per_answer: float
    """Sampled tokens of all nodes."""
    wrong: tuple[tuple[str, str], ...]
    """An answer of reward 0 as it was written, and the gold one, of each of the first questions that have such an answer."""
    seconds: float

    @property
    def doubts(self) -> tuple[str, ...]:
        """Return what of the rule of thumb does not hold; empty if reinforcement can learn the task."""
        once = self.pass_at[1]
        room = round(self.pass_at[self.samples] - once, 9)  # 0.15 - 0.05 is a bit less than 0.1
        found = {
            f"pass@1 is below {LEAST:.0%}": once < LEAST,
            f"pass@1 is above {MOST:.0%}": once > MOST,
            f"pass@{self.samples} is {100 * room:.0f} points above pass@1": room < ROOM,
            f"{self.mixed:.0%} of the groups are mixed": self.mixed < MIXED,
        }
        return tuple(text for text, holds in found.items() if holds)

    @property
    def verdict(self) -> str:
        """Return whether reinforcement can learn the task, in words."""
        if self.doubts:
            return f"no: {', '.join(self.doubts)}"
        return "yes" if self.low > self.floor else "yes, but not above the floor yet"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "learnable": not self.doubts, "verdict": self.verdict}


def pass_at(k: int, rewards: Sequence[float]) -> float:
    """Return the expected best reward of k samples, estimated without bias from the rewards of n >= k samples.

    It is the mean over all choices of k of the n samples. Where c rewards are 1 and the others 0, it is 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, arXiv 2107.03374).
    """
    choices = math.comb(len(rewards), k)
    # The i-th smallest, from 0, is the best of C(i, k-1) choices; of a thousand samples these are beyond what a float holds.
    return sum(math.comb(i, k - 1) / choices * reward for i, reward in enumerate(sorted(rewards)))


def interval(rewards: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95% interval of the mean reward of groups: Wilson's, for as many independent samples as its variance shows.

    Samples of one question are alike. Where all rewards are equal, a question counts once.
    """
    means, count = [fmean(group) for group in rewards], len(rewards)
    mean, total = fmean(means), sum(map(len, rewards))
    spread = variance(means) / count if count > 1 else 0.0
    effective = min(mean * (1 - mean) / spread, total) if spread else total if 0 < mean < 1 else count
    return wilson(mean * effective, effective, freedom=max(1, count - 1))


def screen(
    network: Network,
    task: Task,
    examples: Sequence[Example],
    samples: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Screening:
    """Answer each question `samples` times and once greedily; `tell` is told how far it is."""
    started, at_once = time.monotonic(), max(1, EXAMPLES_AT_ONCE // samples)
    groups: list[Group] = []
    for start in range(0, len(examples), at_once):
        tell(f"{task.name}: {start} of {len(examples)} questions sampled")
        part = examples[start : start + at_once]
        groups += network.rollout(part, samples, seed=("screen", seed), temperature=temperature)
    tell(f"{task.name}: greedy answers")
    greedy, _ = evaluate(network, task, examples)
    rollouts = [rollout for group in groups for rollout in group]
    flat = rewards_of(task, [(rollout.example, rollout.answer) for rollout in rollouts])
    rewards = [flat[i : i + samples] for i in range(0, len(flat), samples)]
    wrong = {r.example.id: (r.answer, r.example.answer) for r, reward in zip(rollouts, flat, strict=True) if not reward}
    statuses = [message.status for r in rollouts for completion in r.completions for message in completion.messages]
    (best, best_share), (low, high) = task.floor(examples), interval(rewards)
    return Screening(
        task=task.name,
        questions=len(examples),
        samples=samples,
        pass_at={k: fmean(pass_at(k, group) for group in rewards) for k in _sizes(samples)},
        low=low,
        high=high,
        greedy=greedy.accuracy,
        floor=best_share,
        floor_answer=best,
        parse_rate=fmean(task.parse_answer(rollout.answer) is not None for rollout in rollouts),
        well_formed=fmean(status is MessageStatus.OK for status in statuses) if statuses else None,
        mixed=mixed_share(rewards),
        tokens_per_answer=spending(groups).sampled_tokens / len(rollouts),
        wrong=tuple(wrong.values())[:SHOWN],
        seconds=time.monotonic() - started,
    )


def _sizes(samples: int) -> list[int]:
    """Return 1, 2, 4 and so on up to the number of samples, and that number."""
    return [*(1 << i for i in range((samples - 1).bit_length())), samples]


def wrong_answers(screenings: Sequence[Screening]) -> str:
    """Return some wrong answers of each task, a line each: reading tells a wrong answer from a right one in another form."""
    lines: list[str] = []
    for s in screenings:
        lines += [f"{s.task}, wrong: {shortened(text.strip(), 80)!r}, gold {shortened(gold)!r}" for text, gold in s.wrong]
    return "\n".join(lines)


def table(screenings: Sequence[Screening]) -> str:
    """Return the screenings as a Markdown table."""
    samples = screenings[0].samples
    columns = ["task", "n", "pass@1 (95% interval)", f"pass@{samples}", "greedy", "floor", "parsed", "messages", "mixed groups",
               "tokens", "seconds", "can be learned"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "| " + " | ".join(["---"] * len(columns)) + " |"]
    for s in screenings:
        cells = [
            s.task, str(s.questions),
            f"{s.pass_at[1]:.1%} ({s.low:.1%} to {s.high:.1%})", f"{s.pass_at[samples]:.1%}", f"{s.greedy:.1%}",
            f"{s.floor:.1%}", f"{s.parse_rate:.1%}", "-" if s.well_formed is None else f"{s.well_formed:.1%}",
            f"{s.mixed:.1%}", f"{s.tokens_per_answer:.1f}", f"{s.seconds:.0f}", s.verdict,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
