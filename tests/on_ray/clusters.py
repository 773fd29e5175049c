"""Ray clusters of several nodes on one machine, and what their tests share."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from neuromas.compare.methods.method import CellResult, CellSpec

ray = pytest.importorskip("ray", reason="make test-ray installs Ray")
Cluster = pytest.importorskip("ray.cluster_utils").Cluster

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent))
from rivals import Rival  # noqa: E402  # processes of a cluster load this file by its path

OBJECTS = 80_000_000
"""Bytes of a node's object store, about the least that Ray takes."""


class Placed(Rival):
    """Leaves the node that it was made on, and takes its time."""

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        with (folder / "nodes").open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()}\n")
        time.sleep(0.7)
        return super().run(spec, folder)


@contextmanager
def cluster(nodes: int, cpus: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """Yield a cluster and its nodes, so many processors each; the head has none."""
    # Ray's workers have the lowest priority of all processes otherwise: on a busy machine they would start for minutes.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    started = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECTS}
    )
    try:
        yield started, [add_node(started, cpus) for _ in range(nodes)]
    finally:
        started.shutdown()


def add_node(cluster: Any, cpus: int = 1) -> Any:
    return cluster.add_node(num_cpus=cpus, object_store_memory=OBJECTS)


def kill_node(node: Any) -> None:
    """Kill a node's processes as a power cut would: Ray's own and all that they have started."""
    (raylet,) = node.all_processes["raylet"]
    listed = subprocess.run(["pgrep", "-P", str(raylet.process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [raylet.process.pid, *map(int, listed)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start(address: str, *args: str, cwd: Path) -> "subprocess.Popen[str]":
    """Start a command as a user of the cluster at this address does."""
    return subprocess.Popen(
        [sys.executable, "-m", "neuromas.cli", *args], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"RAY_ADDRESS": address},
    )  # fmt: skip
