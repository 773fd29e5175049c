"""A run from disk, ready to answer."""

from dataclasses import dataclass
from pathlib import Path

from neuromas.checkpoint import RunDirectory
from neuromas.network import Network
from neuromas.tasks import Task, get_task
from neuromas.train import build_network


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run's network and task; `step` is the checkpoint's, 0 for the untrained network."""

    run: RunDirectory
    network: Network
    task: Task
    step: int


def load_run(path: Path, *, untrained: bool = False) -> LoadedRun:
    """Load the newest checkpoint of a run, or its network before training.

    Raises ValueError if there is no run or checkpoint, a file is damaged, or the backbone has other weights than it had.
    """
    run = RunDirectory.open(path)
    if not untrained and not run.checkpoints():
        raise ValueError(f"{path} holds no checkpoint yet; train it first")
    network = build_network(run.config)
    step = 0
    if not untrained:
        state = run.load(network.adapters)
        assert state is not None
        step = state.step
        found = network.backbone.checksum()
        if found != state.backbone_checksum:
            raise ValueError(
                f"--backbone {run.config.backbone} has other weights now (checksum {found}) than run {path} was trained on "
                f"({state.backbone_checksum}); restore the backbone that the run had"
            )
    return LoadedRun(run, network, get_task(run.config.task.name, run.config.task.difficulty), step)
