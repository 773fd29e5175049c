"""Trains what a config describes: the one call behind `neuromas train`, `finetune` and `grow`, and what programs call."""

from dataclasses import replace
from typing import TYPE_CHECKING

from neuromas.config import TrainConfig
from neuromas.model.sources import find_backbone
from neuromas.training.plan import resolve
from neuromas.training.run_directory import RunDirectory

if TYPE_CHECKING:  # Imports SciPy, and `neuromas train --help` does not wait for it.
    from neuromas.training.evaluate import Evaluation


def train(
    config: TrainConfig, *, resume: bool = False, parent: RunDirectory | None = None, workers: tuple[int, ...] = ()
) -> dict[str, dict[str, "Evaluation"]]:
    """Train a run to its end and return its scores, `before` and `after`, by set of examples (`test`, or a file's name).

    The run is the folder `config.run_path`. With `resume` one that is there goes on from its newest checkpoint; with a `parent`
    a new one goes on from that run's. `workers` are the fewest and the most of a Ray cluster; empty: this process. A config
    with `society.rounds` finetunes a society. Raises ValueError, which names the flag, for a mistake before any long work,
    and `Interrupted` if the user stops it, after saving.
    """
    config = with_dtype(config, resume=resume)
    run = RunDirectory.find(config, resume=resume)
    find_backbone(config.backbone)
    plan = resolve(config)
    # These load torch: mistakes are reported before.
    if workers:
        from neuromas.training.on_ray import check_workers, train_on_ray

        return train_on_ray(plan, run, check_workers(config, workers))
    from neuromas.training import loop
    from neuromas.training.finetune import finetune

    return finetune(plan, run) if config.society.rounds else loop.train(plan, run, parent=parent)


def with_dtype(config: TrainConfig, *, resume: bool) -> TrainConfig:
    """Return a config whose `--dtype auto` is what it means: the choice of the run to resume, or of this machine."""
    if config.dtype != "auto":
        return config
    if resume and (config.run_path / "config.json").is_file():
        return replace(config, dtype=RunDirectory.open(config.run_path).config.dtype)
    config.check()
    find_backbone(config.backbone)
    from neuromas.model.backbone import resolve_dtype  # loads torch; a wrong flag is refused before

    dtype = resolve_dtype(config.dtype, config.backbone, config.device)
    print(f"--dtype auto: {dtype} suits this backbone and machine")
    return replace(config, dtype=dtype)
