"""Runs by workers of a Ray cluster, as tests and `docs/scale.md` start them."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FLAGS = [
    "--widths", "1", "1", "--num-steps", "8", "--examples-per-step", "4", "--group-size", "4", "--max-new-tokens", "16",
    "--eval-size", "4", "--eval-every", "0", "--save-every", "2",
]  # fmt: skip


def adapters_of(run: Path) -> dict[str, Tensor]:
    files = sorted((run / "adapters").glob("*/*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def farthest(first: Path, second: Path) -> float:
    """Return the largest difference between the adapters of two runs."""
    of_first, of_second = adapters_of(first), adapters_of(second)
    assert of_first.keys() == of_second.keys()
    assert of_first
    return max((tensor - of_second[name]).abs().max().item() for name, tensor in of_first.items())


def rollouts_of(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: "subprocess.Popen[str]", run: Path, steps: int) -> None:
    """Wait until a run has done so many steps."""
    while steps_of(run) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
