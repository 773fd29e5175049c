"""The records that every compared method takes and returns: a cell of the grid methods x tasks x seeds, and its result."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from neuromas.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Answer:
    """One evaluated question: its answer, the reward and the cost."""

    example: str
    """Id of the example."""
    gold: str
    given: str | None
    """The answer in normal form, None where none could be parsed."""
    reward: float
    calls: int
    prompt_tokens: int
    sampled_tokens: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Validation accuracy after some training steps."""

    step: int
    sampled_tokens: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class CellSpec:
    """One cell: a method on a task with a seed.

    `config` holds task, seed, backbone, budgets and evaluation sizes, the same for all methods; a method changes in it what
    defines the method (topology, adapter) and nothing else.
    """

    method: str
    config: TrainConfig
    trial: bool = False
    """True for a trial of settings: it trains and validates, and answers no evaluation set."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """The result of a cell."""

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
    """Training steps done before the best validation."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The resolved settings of this cell."""
    iterations: list[dict[str, Any]] = field(default_factory=list)
    """What a society was measured to be before its first iteration of finetuning and after each."""


@runtime_checkable
class Method(Protocol):
    """A compared method."""

    name: str
    """The name in `methods` of a comparison file, e.g. `self_consistency`."""
    title: str
    """The name in tables."""
    source: str
    """The paper and the part of it, or what the method controls for."""
    trained: bool

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        """Train if the method trains (in `folder`, resumable), answer the evaluation sets, and return the result."""
        ...
