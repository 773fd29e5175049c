"""Runs as tests train them."""

import subprocess
import time
from pathlib import Path

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


DEADLINE = 300.0
"""Seconds that a subprocess may take to get anywhere."""


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(process: "subprocess.Popen[bytes]", run: Path, steps: int, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while steps_logged(run) < steps:
        assert process.poll() is None, f"the run ended before step {steps}: {log.read_text()}"
        assert time.monotonic() < deadline, f"no step {steps} after {DEADLINE} s: {log.read_text()}"
        time.sleep(0.005)
