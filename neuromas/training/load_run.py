"""A run from disk, ready to answer."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from neuromas.config import TrainConfig
from neuromas.rollout.network import Network
from neuromas.rollout.society import Society
from neuromas.tasks import Task
from neuromas.training import checkpoint
from neuromas.training.growth_schedule import GrowthSchedule
from neuromas.training.questions import open_run
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import build_network, build_society


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run's network and task; `step` is the checkpoint's, 0 for the untrained network."""

    run: RunDirectory
    network: Network
    task: Task
    step: int


def load_run(path: Path | str, *, untrained: bool = False, allow_code: bool = False) -> LoadedRun:
    """Load the newest checkpoint of a run, or its network before training.

    Raises ValueError if there is no run or checkpoint, a file is damaged, the backbone has other weights than it had, or the
    task is a Python file and `allow_code` does not say that it may be executed.
    """
    run, task = open_run(Path(path), untrained=untrained, allow_code=allow_code)
    network, step = load_network(run, untrained=untrained)
    return LoadedRun(run, network, task, step)


def load_network(run: RunDirectory, *, untrained: bool = False, best: bool = False) -> tuple[Network, int]:
    """Return the network of a run's newest checkpoint, or of its `best`, and its step, or the one before training and 0."""
    network = network_at(run.config, 0 if untrained else run.step)
    return network, _load(run, network, untrained, best)


def network_at(config: TrainConfig, step: int) -> Network:
    """Return the network that a config has after `step` steps, with the adapters that it starts with."""
    # A run trained on a GPU answers on a machine without one.
    network = build_network(dataclasses.replace(config, device="auto"))
    GrowthSchedule(network, config.growths()).restore(step)
    return network


def load_society(run: RunDirectory, *, untrained: bool = False, best: bool = False) -> tuple[Society, int]:
    """Return a society and its iteration, as `load_network` does a network."""
    society = build_society(dataclasses.replace(run.config, device="auto"))
    return society, _load(run, society, untrained, best)


def _load(run: RunDirectory, into: Network | Society, untrained: bool, best: bool) -> int:
    """Load the adapters of a checkpoint and return its step."""
    if untrained:
        if run.checkpoints():
            # On other weights it would not be what the run has begun with.
            run.check_backbone(into.backbone.checksum())
        return 0
    state = checkpoint.load(run, into.adapters)
    assert state is not None
    run.check_backbone(into.backbone.checksum(), state.backbone_checksum)
    # The best is kept of the network as it is last.
    return checkpoint.load_best(run, into.adapters) if best else state.step
