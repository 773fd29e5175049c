"""`neuromas train`: train a network."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from neuromas.cli.flags import parse_flags, parse_settings
from neuromas.config import TrainConfig
from neuromas.graph.society import SocietyConfig
from neuromas.model.sources import find_backbone
from neuromas.training.going_on import make_room
from neuromas.training.plan import resolve
from neuromas.training.questions import check_code
from neuromas.training.run_directory import RunDirectory
from neuromas.training.signals import Interrupted
from neuromas.training.start import train, with_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainArguments:
    """Train a network of language-model nodes on one task by joint REINFORCE.

    A TOML file may come first: neuromas train configs/chain3.toml --lr 5e-4. Flags win over the file, the file over the
    defaults. `--widths 1` is single-model reinforcement learning with as many trainable parameters.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    resume: bool = False
    """Resume from the last checkpoint of --run-dir, with that run's settings; start a run if there is no such folder."""
    allow_code: bool = False
    """Execute the Python file that holds the task of a run to --resume; not needed for a task that the flags name."""
    dry_run: bool = False
    """Print the network, its trainable parameters and the resolved settings, and stop."""
    workers: tuple[int, ...] = ()
    """Train by so many workers of a Ray cluster (that of RAY_ADDRESS, or this machine's cores); two numbers are the fewest and
    the most, and the run then takes what there is. Empty: in this process."""


def run(args: Sequence[str]) -> None:
    """Run the command `train`."""
    run_command(args, "train", TrainArguments, TrainConfig())


def run_command(args: Sequence[str], command: str, arguments: type[TrainArguments], default: TrainConfig) -> None:
    """Run a command that trains, whose settings are `default` where nothing else is said."""
    parsed, rest = parse_settings(arguments, args, command, default, below_file=default)
    run_path = parsed.config.run_path
    if parsed.resume and (run_path / "config.json").is_file() and len(args) == len(rest):
        # Without a config file, settings that the flags do not name come from the run itself.
        run, named = RunDirectory.open(run_path), parsed.config.task.name
        parsed = parse_flags(arguments, rest, command, default=arguments(config=run.config))
        check_code(run, parsed.allow_code or named == run.config.task.name)
    config = parsed.config
    if command == "train" and config.society != SocietyConfig():
        raise ValueError("settings of a society ([society], --society.*) are for `neuromas finetune`; `train` trains a network")
    if command == "finetune" and not config.society.rounds:
        raise ValueError("--society.rounds must be at least 1 to finetune a society, got 0; `neuromas train` trains a network")
    if command == "finetune" and parsed.workers:
        raise ValueError("--workers is for `neuromas train`: agents that debate learn in one process")
    if parsed.dry_run:
        print_plan(with_dtype(config, resume=parsed.resume))
    else:
        train_and_report(config, resume=parsed.resume, workers=parsed.workers)


def print_plan(config: TrainConfig) -> None:
    """Print the plan of a run after all checks of a run but that of its folder."""
    find_backbone(config.backbone)
    plan = resolve(config)
    from neuromas.cli.describe import describe_plan  # loads torch; a wrong flag is refused before

    print(describe_plan(config, plan.questions.task.remark))


def train_and_report(
    config: TrainConfig, *, resume: bool = False, parent: RunDirectory | None = None, workers: tuple[int, ...] = ()
) -> None:
    """Train a run, print its scores and draw its curve; exit with 130 if the user stops it."""
    try:
        scores = train(config, resume=resume, parent=parent, workers=workers)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        if parent:
            print(f"resume it by: neuromas train --resume --run-dir {config.run_path}", file=sys.stderr)
        sys.exit(130)
    from neuromas.cli.plot import plot_run
    from neuromas.compare.iterations import write_run_report

    run = RunDirectory.open(config.run_path)
    for when, results in scores.items():
        for name, result in results.items():
            print(f"{when} {'finetuning' if config.society.rounds else 'training'}, {name}: {result}")
    if best := run.best():
        state = best[1]
        print(
            f"best validation: {state['validation_accuracy']:.1%} after step {state['step']}; "
            f"neuromas eval {run.path} --best scores those adapters"
        )
    try:
        if config.society.rounds:
            print(f"iterations: {write_run_report(run)}")
        print(f"curve: {plot_run(run)}")
    except OSError as error:
        raise ValueError(
            f"--run-dir {run.path}: the run is complete, but its pictures cannot be written ({error.strerror}). "
            f"{make_room(run.path)}"
        ) from error
    print(f"details: neuromas show {run.path}")
