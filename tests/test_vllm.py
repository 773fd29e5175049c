"""vLLM samples what the learner learns, on its CPU build: `make test-vllm` gets it into an environment of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from models import randomise
from runs import wait_for_steps
from torch import Tensor

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.rollout.vllm_engine import VllmEngine
from neuromas.tasks import get_task
from neuromas.training import reinforce
from neuromas.training.reinforce import Credits
from neuromas.types import Group

# The package and what it imports warn of their own doings.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

NODES = (1, 2, 3)
BOUND = 1e-4
"""Of a token's log-probability in float32, natural log. Measured: 1e-5."""
QUESTIONS = get_task("navigate").examples("test", 8)


@pytest.fixture(scope="module")
def network() -> Network:
    backbone = Backbone.load("bundled", device="cpu")
    network = Network(Topology.layered([1, 1, 1]), backbone, adapter=AdapterConfig(rank=12), max_new_tokens=40)
    randomise(network.adapters, 0.05)
    network.engine = VllmEngine(network.policy, 3)
    return network


def gaps(network: Network, groups: list[Group]) -> Tensor:
    """Return how far each token's log-probability as sampled is from the learner's."""
    credits = Credits.of(groups, dict.fromkeys(NODES, torch.ones(len(groups), len(groups[0]))))
    policy = network.policy
    batch = reinforce.build_batch(credits, routing=policy.routing, adapter_version=policy.version, temperature=0.8)
    with torch.no_grad():
        found = [
            (policy.logprobs(part.rows) - part.sampled_logprobs_K).abs() for part in batch.split(10_000, torch.device("cpu"))
        ]
    return torch.cat(found)


def texts(groups: list[Group]) -> list[str]:
    return [completion.text for group in groups for rollout in group for completion in rollout.completions]


def test_it_samples_with_the_learners_log_probabilities(network: Network) -> None:
    groups = network.rollout(QUESTIONS, 4, seed=(0, 0), temperature=0.8)
    found = gaps(network, groups)
    assert len(found) > 1000
    assert found.max() < BOUND
    assert len(set(texts(groups))) > 40


def test_a_draw_depends_on_its_own_seed(network: Network) -> None:
    whole = network.rollout(QUESTIONS, 2, seed=(0, 1))
    alone = network.rollout(QUESTIONS[3:4], 2, seed=(0, 1))
    assert texts(alone) == texts(whole[3:4])
    assert texts(network.rollout(QUESTIONS, 2, seed=(0, 2))) != texts(whole)


def test_an_update_reaches_it(network: Network) -> None:
    before = network.rollout(QUESTIONS, 1, seed=(0, 3), temperature=0.8)
    with torch.no_grad():
        for parameter in network.adapters.parameters().values():
            parameter.mul_(1.2)
    network.adapters.version += 1
    # The learner sees the change, so that old adapters or their keys and values would show.
    assert gaps_of_old(network, before) > 100 * BOUND
    assert gaps(network, network.rollout(QUESTIONS, 1, seed=(0, 3), temperature=0.8)).max() < BOUND


def gaps_of_old(network: Network, groups: list[Group]) -> float:
    """Return the largest gap of rollouts that an older version has written."""
    network.adapters.version -= 1
    largest = gaps(network, groups).max().item()
    network.adapters.version += 1
    return largest


def test_greedy_texts_are_those_of_torch(network: Network) -> None:
    by_vllm = texts(network.rollout(QUESTIONS, 1, seed=(0,), temperature=0.0))
    engine, network.engine = network.engine, TorchEngine(network.policy)
    by_torch = texts(network.rollout(QUESTIONS, 1, seed=(0,), temperature=0.0))
    network.engine = engine
    assert by_vllm == by_torch


def start_training(run: Path, *more: str) -> "subprocess.Popen[bytes]":
    """Start a short run in a process group of its own, as a shell does."""
    command = [
        sys.executable, "-m", "neuromas.cli", "train", "--engine", "vllm", "--run-dir", str(run), "--num-steps", "6",
        "--examples-per-step", "4", "--group-size", "4", "--eval-size", "4", "--eval-every", "0", "--save-every", "1",
        "--device", "cpu", *more,
    ]  # fmt: skip
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ), start_new_session=True)


def test_a_run_goes_on_whatever_was_killed_or_interrupted(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run.log"
    process = start_training(run)
    wait_for_steps(process, run, 1, log)
    (worker,) = [child for child in psutil.Process(process.pid).children(recursive=True) if "Worker" in child.cmdline()[0]]
    worker.kill()
    assert process.wait(120) == 2
    assert "vLLM has stopped" in log.read_text()
    assert "with --resume goes on from step-00000" in log.read_text()
    # Ctrl-C, which a terminal sends to all processes of the group, ends a step and saves.
    process = start_training(run, "--resume")
    wait_for_steps(process, run, 2, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()
    saved = json.loads((run / "adapters" / ".." / "state.json").read_text())["step"]
    assert saved >= 2
    assert log.read_text().count("vLLM has stopped") == 1
    # A run that is killed itself leaves no process behind.
    process = start_training(run, "--resume")
    wait_for_steps(process, run, saved + 1, log)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    assert start_training(run, "--resume").wait(300) == 0, log.read_text()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in metrics] == list(range(6))
    assert all(step.get("logprob_gap/max", 0.0) < BOUND for step in metrics)
    assert "after training, test: " in log.read_text()
