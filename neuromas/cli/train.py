"""`neuromas train`: train a network."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from neuromas.bundled import find_backbone
from neuromas.cli.flags import parse_flags
from neuromas.config import TrainConfig
from neuromas.training.config_file import load_toml
from neuromas.training.plan import resolve
from neuromas.training.questions import check_code
from neuromas.training.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainArguments:
    """Train a network of language-model nodes on one task by joint REINFORCE.

    A TOML file may come first: neuromas train configs/chain3.toml --lr 5e-4. Flags win over the file, the file over the
    defaults. `--widths 1` is single-model reinforcement learning with as many trainable parameters.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    resume: bool = False
    """Go on from the last checkpoint of --run-dir, with that run's settings; starts it if there is no such folder yet."""
    allow_code: bool = False
    """Execute the Python file that the task of a run to --resume is in; a task that is named here need not be allowed."""
    dry_run: bool = False
    """Print the network, its trainable parameters and the resolved settings, and stop."""


def run(args: Sequence[str]) -> None:
    base, rest = TrainConfig(), list(args)
    if rest and not rest[0].startswith("-"):
        base = load_toml(Path(rest.pop(0)))
    parsed = parse_flags(TrainArguments, rest, "train", default=TrainArguments(config=base))
    run_path = parsed.config.run_path
    if parsed.resume and (run_path / "config.json").is_file() and len(args) == len(rest):
        # Without a config file, what the flags leave open comes from the run itself.
        run, named = RunDirectory.open(run_path), parsed.config.task.name
        parsed = parse_flags(TrainArguments, rest, "train", default=TrainArguments(config=run.config))
        check_code(run, parsed.allow_code or named == run.config.task.name)
    if parsed.dry_run:
        print_plan(parsed.config)
    else:
        train_and_report(parsed.config, resume=parsed.resume)


def print_plan(config: TrainConfig) -> None:
    """Print what a run would be, after whatever would refuse it but its folder."""
    find_backbone(config.backbone)
    plan = resolve(config)
    from neuromas.cli.describe import describe_plan  # loads torch, which a wrong flag need not wait for

    print(describe_plan(config, plan.questions.task.remark))


def train_and_report(config: TrainConfig, *, resume: bool = False, parent: RunDirectory | None = None) -> None:
    """Train a run, print its scores and draw its curve; exit with 130 if the user stops it."""
    run = RunDirectory.find(config, resume=resume)
    find_backbone(config.backbone)
    plan = resolve(config)
    # What is wrong so far is told without waiting for torch, which these load.
    from neuromas.cli.plot import plot_run
    from neuromas.training.loop import train
    from neuromas.training.signals import Interrupted

    try:
        scores = train(plan, run, parent=parent)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        if parent:
            print(f"that is: neuromas train --resume --run-dir {run.path}", file=sys.stderr)
        sys.exit(130)
    for when, results in scores.items():
        for name, result in results.items():
            print(f"{when} training, {name}: {result}")
    print(f"curve: {plot_run(run)}")
    print(f"look into it: neuromas show {run.path}")
