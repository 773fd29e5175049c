"""Mirrors of metrics.jsonl for the eyes of TensorBoard, Trackio or Weights & Biases.

metrics.jsonl is the truth. A mirror lies in the run's folder, and a process that begins writes it anew from the file: so a
resumed run doubles no point and loses none. A tracker that fails is left out from then on, and training goes on.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from neuromas.config import Tracker
from neuromas.system.terminal import one_line
from neuromas.training.run_directory import RunDirectory

PROJECT = "neuromas"


def require_tracker(name: Tracker) -> None:
    """Raise ValueError that names the extra if a tracker's package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"--track {name} needs the package {name}, which is not installed: pip install {name} (extra: track)")


class Mirror(Protocol):
    """Takes the points of a run in the order of their steps."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, run: RunDirectory) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A TensorBoard that is looking on drops what it had: the new file begins at step 0.
        self.writer = SummaryWriter(str(folder), purge_step=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A local database in RUN/trackio: `TRACKIO_DIR=RUN/trackio trackio show`. Nothing is sent anywhere."""

    def __init__(self, folder: Path, run: RunDirectory) -> None:
        self.trackio = open_trackio(folder, run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self.trackio.finish()


class WandB:
    """An offline run in RUN/wandb, for `wandb sync`; with WANDB_MODE=online a run of the server, a new one for each process."""

    def __init__(self, folder: Path, run: RunDirectory) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # type: ignore[reportMissingImports]  # an extra

        folder.mkdir()
        settings = wandb.Settings(console="off", x_disable_stats=True, disable_git=True, disable_code=True)
        self.run = wandb.init(
            project=PROJECT, name=run.path.name, dir=str(folder.parent), config=_settings(run), settings=settings
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


MIRRORS: dict[Tracker, Callable[[Path, RunDirectory], Mirror]] = {
    "tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB,
}  # fmt: skip


def open_trackio(folder: Path, run: RunDirectory) -> Any:
    """Return the module trackio with an empty run of its own, in a database in this folder."""
    # It reads the variable when it is loaded, and never again.
    loaded = sys.modules.get("trackio.utils")
    if loaded and (taken := Path(loaded.TRACKIO_DIR).resolve()) != folder.resolve():
        raise ValueError(f"trackio writes into one folder a process, here {taken}; write {folder} in a process of its own")
    os.environ["TRACKIO_DIR"] = str(folder.resolve())
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        os.environ.pop(name, None)
    import trackio  # type: ignore[reportMissingImports]  # an extra

    trackio.init(
        project=PROJECT, name=run.path.name, config=_settings(run), embed=False, auto_log_gpu=False, auto_log_cpu=False
    )
    return trackio


def write_traces(run: RunDirectory, folder: Path) -> int:
    """Write a run's rollouts as traces into a new Trackio database in this folder; return their number."""
    with contextlib.redirect_stdout(io.StringIO()):
        trackio = open_trackio(folder, run)
        by_step: dict[int, list[Any]] = {}
        for record in (rollouts := run.rollouts()):
            by_step.setdefault(record["step"], []).append(trackio.Trace(_messages(record), _about(record)))
        for step, traces in sorted(by_step.items()):
            trackio.log({"rollouts": traces}, step=step)
        trackio.finish()
    return len(rollouts)


def _messages(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a rollout as a chat: the question, and what each node wrote."""
    texts = record["texts"].items() if isinstance(record["texts"], dict) else record["texts"]
    said = [{"role": "assistant", "name": f"node {node}", "content": f"node {node}: {text}"} for node, text in texts]
    return [{"role": "user", "content": record["question"]}, *said]


def _about(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("split", "example", "gold", "rollout", "reward", "faults") if name in record}


def _settings(run: RunDirectory) -> dict[str, Any]:
    return {name: value if isinstance(value, int | float) else str(value) for name, value in asdict(run.config).items()}


@contextmanager
def tracked(name: Tracker, run: RunDirectory, tell: Callable[[str], None]) -> Iterator[None]:
    """Mirror what a run has logged and what it logs inside."""
    if name == "none":
        yield
        return
    mirror: Mirror | None = None

    def attempt(work: Callable[[], None]) -> None:
        """Do a tracker's work; whatever it raises ends the mirror and not the training."""
        nonlocal mirror
        try:
            # Standard output is for results.
            with contextlib.redirect_stdout(io.StringIO()):
                work()
        except Exception as error:
            mirror, run.on_metrics = None, _ignore
            tell(f"--track {name} has failed and is left out: {type(error).__name__}: {one_line(str(error))}")

    def begin() -> None:
        nonlocal mirror
        folder = run.path / name
        shutil.rmtree(folder, ignore_errors=True)
        mirror = MIRRORS[name](folder, run)
        for record in run.metrics():
            mirror.log(int(record["step"]), {key: value for key, value in record.items() if key != "step"})
        run.on_metrics = lambda step, metrics: attempt(lambda: mirror.log(step, metrics) if mirror else None)

    attempt(begin)
    try:
        yield
    finally:
        run.on_metrics = _ignore
        attempt(lambda: mirror.close() if mirror else None)


def _ignore(step: int, metrics: Mapping[str, float]) -> None:
    """Take a point for nobody."""
