"""A run from disk, ready to answer."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from neuromas.checkpoint import RunDirectory
from neuromas.network import Network
from neuromas.stages import Stages
from neuromas.tasks import Task, from_config
from neuromas.train import build_network
from neuromas.types import Example


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run's network and task; `step` is the checkpoint's, 0 for the untrained network."""

    run: RunDirectory
    network: Network
    task: Task
    step: int


def load_run(path: Path, *, untrained: bool = False, data: Path | None = None) -> LoadedRun:
    """Load the newest checkpoint of a run, or its network before training; its task takes items from `data`, if given.

    Raises ValueError if there is no run or checkpoint, a file is damaged, or the backbone has other weights than it had.
    """
    run, task = open_run(path, untrained=untrained, data=data)
    network, step = load_network(run, untrained=untrained)
    return LoadedRun(run, network, task, step)


def open_run(path: Path, *, untrained: bool = False, data: Path | None = None) -> tuple[RunDirectory, Task]:
    """Return a run and its task, without its network; ValueError if there is no run or checkpoint."""
    run = RunDirectory.open(path)
    if not untrained and not run.checkpoints():
        raise ValueError(f"{path} holds no checkpoint yet; train it first")
    config = run.config.task
    return run, from_config(dataclasses.replace(config, data=data) if data else config)


def load_network(run: RunDirectory, *, untrained: bool = False) -> tuple[Network, int]:
    """Return the network of a run's newest checkpoint and its step, or the one before training and 0."""
    # A run trained on a GPU answers on a machine without one.
    network = build_network(dataclasses.replace(run.config, device="auto"))
    if untrained:
        return network, 0
    Stages(network, run.config.growths()).restore(run.step)
    state = run.load(network.adapters)
    assert state is not None
    run.check_backbone(state, network.backbone.checksum())
    return network, state.step


def drawn_in_training(run: RunDirectory, steps: int, examples: Iterable[Example]) -> set[str]:
    """Return the ids of those examples that the first `steps` steps of a run drew: its batches, made once more.

    Raises ValueError if the data that it was trained on is no longer where it was.
    """
    config, wanted, drawn = run.config, {example.id for example in examples}, set[str]()
    task = from_config(config.task)
    task.held_out = run.held_out()
    for step in range(steps):
        drawn |= wanted & {example.id for example in task.training_batch(config.seed, step, config.drawn_per_step)}
    return drawn
