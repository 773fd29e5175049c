"""The ledger: what a run has spent, counted where it is spent."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from neuromas.types import Group


@dataclass(slots=True)
class Ledger:
    """Counts of a run's training. Evaluation is not in it: it is reported per answer, beside each score."""

    trainable_parameters: int
    optimizer_steps: int = 0
    rollouts: int = 0
    calls: int = 0
    """Completions: one per node and rollout."""
    prompt_tokens: int = 0
    """Tokens that nodes read, shared prefixes counted for every reader."""
    sampled_tokens: int = 0
    """Tokens that nodes wrote, stop tokens included."""

    def record(self, groups: Sequence[Group]) -> None:
        """Add one training step."""
        spent = spending(groups)
        self.optimizer_steps += 1
        self.rollouts += sum(map(len, groups))
        self.calls += spent.calls
        self.prompt_tokens += spent.prompt_tokens
        self.sampled_tokens += spent.sampled_tokens

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Spending:
    """Calls and tokens of some rollouts."""

    calls: int
    prompt_tokens: int
    sampled_tokens: int


def spending(groups: Sequence[Group]) -> Spending:
    completions = [c for group in groups for rollout in group for c in rollout.completions]
    return Spending(
        len(completions),
        sum(len(c.prompt.prefix_ids) + len(c.prompt.suffix_ids) for c in completions),
        sum(len(c.sample.token_ids) for c in completions),
    )
