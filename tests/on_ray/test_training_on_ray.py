"""Runs by workers of a Ray cluster: the curve of one worker, and the adapters of an undisturbed run whatever dies.

One test, for a cluster takes its time to start and a run's workers as long.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import add_node, cluster, kill_node, start
from workers_of import FLAGS, farthest, rollouts_of, steps_of, wait_for

pytestmark = [
    pytest.mark.ray,
    # Ray leaves processes and files of its own to the end of this one.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
TOLERANCE = 1e-4
"""Of a weight, after eight steps at a learning rate of 1e-3: N workers add up in another order than one."""


def finish(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """Wait for a command and return what it told."""
    _, err = process.communicate(timeout=900)
    assert process.returncode == status, err
    return err


def workers_of_ray() -> list[int]:
    """Return the processes of the workers of a run, by rank."""
    found = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True).stdout.split()
    return sorted(map(int, found))


def test_two_and_four_workers_and_what_dies(tmp_path: Path) -> None:
    def train(name: str, *flags: str) -> "subprocess.Popen[str]":
        return start(nodes.address, "train", *FLAGS, "--run-dir", name, *flags, cwd=tmp_path)

    one, two, four, killed = (tmp_path / name for name in ("one", "two", "four", "killed"))
    subprocess.run([sys.executable, "-m", "neuromas.cli", "train", *FLAGS, "--run-dir", one], check=True)
    with cluster(2, cpus=2) as (nodes, (_, second)):
        for run, count in ((two, 2), (four, 4)):
            told = finish(train(run.name, "--workers", str(count)))
            assert "engine torch: torch samples and learns; kept: bit-exact resume" in told
            assert rollouts_of(run) == rollouts_of(one)
            assert farthest(run, one) < TOLERANCE

        process = train("killed", "--workers", "2")
        wait_for(process, killed, 3)
        os.kill(workers_of_ray()[-1], signal.SIGKILL)
        time.sleep(3)
        wait_for(process, killed, 5)
        kill_node(second)
        add_node(nodes, 2)
        told = finish(process)
        assert re.search(r"going on by 2 workers from the checkpoint of step \d; (no finished step is|steps \d)", told), told
        assert rollouts_of(killed) == rollouts_of(two)
        assert farthest(killed, two) == 0.0

        # The user's Ctrl-C saves its step, and one worker goes on.
        process = train("stopped", "--workers", "2")
        wait_for(process, tmp_path / "stopped", 2)
        process.send_signal(signal.SIGINT)
        assert "continue with the same command and --resume" in finish(process, status=130)
        saved = steps_of(tmp_path / "stopped")
        assert "are done again" not in finish(train("stopped", "--workers", "1", "--resume"))
        assert saved < steps_of(tmp_path / "stopped") == steps_of(one)
        assert farthest(tmp_path / "stopped", one) < TOLERANCE

        assert "--workers needs 5 or more CPUs, one for each worker, and the cluster has 4" in finish(
            train("many", "--workers", "5", "--examples-per-step", "8"), status=2
        )
