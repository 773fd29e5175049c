"""What every compared method takes and gives: a cell of the grid methods x tasks x seeds, and its honest account."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from neuromas.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Answer:
    """One evaluated question: what was answered, whether it was right, and what the answer cost."""

    example: str
    """Id of the example."""
    gold: str
    given: str | None
    """The answer in normal form, None where none could be read."""
    reward: float
    calls: int
    prompt_tokens: int
    sampled_tokens: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Validation accuracy in the course of training."""

    step: int
    sampled_tokens: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class CellSpec:
    """One cell: a method on a task with a seed. `config` holds task, seed, backbone, budgets and evaluation sizes for all
    methods alike; a method changes in it what makes it this method (topology, adapter) and nothing else."""

    method: str
    config: TrainConfig
    trial: bool = False
    """Whether it only helps to choose settings: it trains and validates, and answers nothing."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """What a cell measured."""

    method: str
    task: str
    seed: int
    answers: dict[str, tuple[Answer, ...]]
    """By set of examples (`test`, or the name of a file), in the order of the set, which is the same for all methods."""
    trainable_parameters: int
    training: dict[str, int] | None
    """The training ledger; None for a method that is not trained."""
    curve: tuple[CurvePoint, ...] = ()
    best_answers: dict[str, tuple[Answer, ...]] = field(default_factory=dict)
    """The same with the adapters of the best validation in training; empty where nothing was validated."""
    best_step: int | None = None
    """Training steps done by then."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The resolved settings of this cell."""


@runtime_checkable
class Method(Protocol):
    """A compared method."""

    name: str
    """As `neuromas compare` takes it, e.g. `self_consistency`."""
    title: str
    """As a table shows it."""
    source: str
    """Paper and where in it, or what it stands for."""
    trained: bool

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        """Train where it is trained (in `folder`, resumable), answer the evaluation sets, give the account."""
        ...
