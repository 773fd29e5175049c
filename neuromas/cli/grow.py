"""`neuromas grow`: add nodes, layers or edges to a finished run's network and train on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from neuromas.cli.flags import parse_flags
from neuromas.cli.train import print_plan, train_and_report
from neuromas.config import GrowthConfig
from neuromas.training.grown_run import grown_config
from neuromas.training.questions import check_code
from neuromas.training.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowArguments:
    """Grow a finished run's network and train on, in a new run; the old one stays as it is.

    Without --to, --connect and --edges the network trains on as it is. Old nodes keep ids, adapters and optimizer state. Steps,
    questions and the ledger count on from the old run's; the learning rate begins anew. All other settings are the old run's.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run to grow."""
    growth: Annotated[GrowthConfig, tyro.conf.arg(name="")] = field(default_factory=GrowthConfig)
    steps: int | None = None
    """Steps to train on. None: as many as the old run had."""
    lr: float | None = None
    """Peak learning rate. None: the old run's."""
    step_tokens: int | None = None
    """Sampled tokens of a step, see `neuromas train`. None: the old run's."""
    run_dir: Path | None = None
    """Folder of the new run. None: RUN-to-WIDTHS."""
    task: str | None = None
    """Checked only: a network grows on the task that it has."""
    backbone: str | None = None
    """Checked only: a network grows on the backbone that it has."""
    allow_code: bool = False
    """Execute the Python file that holds the run's task (class:FILE.py:CLASS)."""
    dry_run: bool = False
    """Print the kept and the new nodes, the grown network and all settings, and stop."""


def run(args: Sequence[str]) -> None:
    """Run the command `grow`."""
    parsed = parse_flags(GrowArguments, args, "grow")
    entry = parsed.growth
    if any(width < 1 for width in entry.widths):
        raise ValueError(f"--to must be positive widths, e.g. 2 2 1, got {' '.join(map(str, entry.widths))}")
    parent = RunDirectory.open(parsed.run)
    check_code(parent, parsed.allow_code)
    changes = {
        name: value for name in ("lr", "step_tokens", "run_dir", "backbone") if (value := getattr(parsed, name)) is not None
    }
    if parsed.task is not None:
        changes["task"] = replace(parent.config.task, name=parsed.task)
    config = grown_config(parent, entry, steps=parsed.steps, **changes)
    if parsed.dry_run:
        print_plan(config)
    else:
        train_and_report(config, parent=parent)
