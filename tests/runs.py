"""Runs as tests train them."""

from neuromas.config import TrainConfig
from neuromas.training.evaluate import Evaluation
from neuromas.training.loop import train
from neuromas.training.plan import resolve
from neuromas.training.run_directory import RunDirectory


def train_run(
    config: TrainConfig, *, resume: bool = False, parent: RunDirectory | None = None
) -> dict[str, dict[str, Evaluation]]:
    """Train a run of this config, as the command line does."""
    return train(resolve(config), RunDirectory.find(config, resume=resume), parent=parent)
