"""What a run that grows from another one may have otherwise, and its config."""

import dataclasses

from neuromas.config import GrowthConfig, TrainConfig
from neuromas.graph.growth import widths_of
from neuromas.training.config_file import differences
from neuromas.training.run_directory import RunDirectory

FREE = ("num_steps", "growth", "lr", "warmup_steps", "final_lr", "step_tokens", "eval_size", "eval_every", "validation_size")
"""Settings in which a run may differ from the run that it grows from, besides those of every resumed run."""


def grown_config(parent: RunDirectory, entry: GrowthConfig, *, steps: int | None, **changes: object) -> TrainConfig:
    """Return the config of a run that grows a finished one and goes on for `steps` steps; None: as many as it had.

    Steps count on from the parent's, so that no question is drawn twice; the learning rate begins anew. Raises ValueError if
    the parent is not finished, is to have another task or backbone, or cannot grow in this way.
    """
    if parent.config.society.rounds:
        raise ValueError(f"run {parent.path} is a society, which does not grow; start a larger one by neuromas finetune")
    done = parent.step
    if done < parent.config.num_steps:
        raise ValueError(
            f"run {parent.path} has done {done} of {parent.config.num_steps} steps; finish it with neuromas train --resume "
            f"--run-dir {parent.path} first"
        )
    begun = [entry.at_step for entry in parent.config.growth if entry.restart_lr]
    if steps is None:
        steps = done - max(begun, default=0)
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    entry = dataclasses.replace(entry, at_step=done, restart_lr=True)
    config = dataclasses.replace(
        parent.config,
        **{"growth": (*parent.config.growth, entry), "num_steps": done + steps, "run_dir": None, **changes},  # type: ignore[arg-type]  # names of fields
    )
    if config.run_dir is None:
        suffix = "-".join(map(str, widths_of(config.growths()[-1].grown)))
        config = dataclasses.replace(config, run_dir=parent.path.with_name(f"{parent.path.name}-to-{suffix}"))
    check_descends(parent, config)
    return config


def check_descends(parent: RunDirectory, config: TrainConfig) -> None:
    """Raise ValueError unless a run of this config can go on from the parent's adapters."""
    same = dataclasses.replace(config, **{name: getattr(parent.config, name) for name in FREE})
    if other := differences(parent.config, same):
        raise ValueError(f"run {parent.path} cannot be grown into another task, backbone or setting: it has {other}")
    if bool(config.step_tokens) != bool(parent.config.step_tokens):
        raise ValueError(
            f"--step-tokens: run {parent.path} has {parent.config.step_tokens}; with a budget a run draws other questions than "
            "without one, and would meet some twice"
        )
    if config.growth[: len(parent.config.growth)] != parent.config.growth or config.num_steps <= parent.step:
        raise ValueError(f"run {parent.path} cannot be grown: the config leaves out its growths or its {parent.step} steps")
