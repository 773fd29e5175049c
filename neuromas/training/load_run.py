"""A run from disk, ready to answer."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from neuromas.rollout.network import Network
from neuromas.tasks import Task
from neuromas.training import checkpoint
from neuromas.training.growth_schedule import GrowthSchedule
from neuromas.training.questions import open_run
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import build_network


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run's network and task; `step` is the checkpoint's, 0 for the untrained network."""

    run: RunDirectory
    network: Network
    task: Task
    step: int


def load_run(path: Path, *, untrained: bool = False, allow_code: bool = False) -> LoadedRun:
    """Load the newest checkpoint of a run, or its network before training.

    Raises ValueError if there is no run or checkpoint, a file is damaged, the backbone has other weights than it had, or the
    task is a Python file and `allow_code` does not say that it may be executed.
    """
    run, task = open_run(path, untrained=untrained, allow_code=allow_code)
    network, step = load_network(run, untrained=untrained)
    return LoadedRun(run, network, task, step)


def load_network(run: RunDirectory, *, untrained: bool = False, best: bool = False) -> tuple[Network, int]:
    """Return the network of a run's newest checkpoint, or of its `best`, and its step, or the one before training and 0."""
    # A run trained on a GPU answers on a machine without one.
    network = build_network(dataclasses.replace(run.config, device="auto"))
    if untrained:
        return network, 0
    GrowthSchedule(network, run.config.growths()).restore(run.step)
    state = checkpoint.load(run, network.adapters)
    assert state is not None
    run.check_backbone(network.backbone.checksum(), state.backbone_checksum)
    # The best is kept of the network as it is last.
    return network, checkpoint.load_best(run, network.adapters) if best else state.step
