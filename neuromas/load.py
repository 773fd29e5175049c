"""A run from disk, ready to answer."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from neuromas.checkpoint import RunDirectory
from neuromas.network import Network
from neuromas.stages import Stages
from neuromas.tasks import Task, from_config
from neuromas.train import build_network


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
    run = RunDirectory.open(path)
    if not untrained and not run.checkpoints():
        raise ValueError(f"{path} holds no checkpoint yet; train it first")
    # A run trained on a GPU answers on a machine without one.
    network = build_network(dataclasses.replace(run.config, device="auto"))
    step = 0
    if not untrained:
        Stages(network, run.config.growths()).restore(run.step)
        state = run.load(network.adapters)
        assert state is not None
        step = state.step
        found = network.backbone.checksum()
        if found != state.backbone_checksum:
            raise ValueError(
                f"--backbone {run.config.backbone} has other weights now (checksum {found}) than run {path} was trained on "
                f"({state.backbone_checksum}); restore the backbone that the run had"
            )
    config = run.config.task
    task = from_config(dataclasses.replace(config, data=data) if data else config)
    return LoadedRun(run, network, task, step)
