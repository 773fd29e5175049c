"""What holds against a real service: SkyRL's JAX server on a CPU, which `make test-tinker` installs and these tests start."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import steps_logged, wait_for_steps
from safetensors.torch import load as load_tensors

from neuromas import Backbone, Network
from neuromas.bundled import BUNDLED
from neuromas.config import AdapterConfig, TopologyConfig, TrainConfig
from neuromas.rollout.tinker_service import TinkerService
from neuromas.system.engines import EngineConfig
from neuromas.tasks import get_task
from neuromas.training.learner import TorchLearner
from neuromas.training.reinforce import Credits, build_batch
from neuromas.training.tinker_learner import TinkerLearner, plug_service
from neuromas.types import Group

pytestmark = pytest.mark.tinker

PYTHON = os.environ.get("NEUROMAS_SERVICE_PYTHON", ".venv-skyrl/bin/python")
SERVER = Path(__file__).parent / "tinker_server.py"
BOUND = 1e-4
"""Of log-probabilities, in nats."""
GRADIENT_BOUND = 2e-3
"""Of a gradient next to its largest number, with which JAX and torch agree up to 4.4e-4 (docs/engines.md)."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that SkyRL computes as one: they have one matrix A together."""
NEW_TOKENS = 12


class Server:
    """A service in processes of its own; `kill` and `start` as often as one likes."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            command = [PYTHON, str(SERVER), str(self.port), str(BUNDLED), str(self.folder)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 600
        while True:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            try:
                urllib.request.urlopen(f"{self.url}/api/v1/healthz", timeout=5).close()
            except OSError:
                time.sleep(0.2)
            else:
                return

    def kill(self) -> None:
        """Kill the service and its engine at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if url := os.environ.get("NEUROMAS_SERVICE_URL"):
        running = object.__new__(Server)
        running.url = url
        yield running
        return
    started = Server(tmp_path_factory.mktemp("service"))
    yield started
    started.kill()


@pytest.fixture(scope="module")
def plugged(server: Server) -> tuple[Network, TinkerLearner]:
    config = TrainConfig(
        engine=EngineConfig(name="tinker", url=server.url), adapter=AdapterConfig(rank=4, alpha=32.0), max_grad_norm=0.0,
        topology=TopologyConfig(widths=(1, 1)), max_new_tokens=NEW_TOKENS, device="cpu",
    ).check()  # fmt: skip
    network = Network(config.topology.build(), Backbone.load("bundled", device="cpu"), adapter=config.adapter,
                      max_new_tokens=NEW_TOKENS)  # fmt: skip
    network.engine, learner = plug_service(config, network.policy)
    assert isinstance(learner, TinkerLearner)
    return network, learner


def roll_out(network: Network, seed: int = 0) -> list[Group]:
    return network.rollout(get_task("navigate").examples("test", 1), 4, seed=(seed, 0))


def credits_of(groups: list[Group]) -> Credits:
    values = torch.tensor([[1.0, -0.5, 0.25, -2.0]])
    return Credits.of(groups, {1: values, 2: -values})


def test_the_loss_is_a_mean_over_the_tokens_of_each_row(plugged: tuple[Network, TinkerLearner]) -> None:
    assert plugged[1].reduction == "row_mean"


def test_a_seed_decides_a_text_and_the_end_token_comes_back(plugged: tuple[Network, TinkerLearner]) -> None:
    network, _ = plugged
    stops = network.policy.frame.stop_ids
    first, again, other = (
        [[c.sample.token_ids for c in rollout.completions] for rollout in roll_out(network, seed)[0]] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len({texts[0] for texts in first}) > 1
    short = network.rollout(get_task("navigate").examples("test", 1), 2, seed=(0, 0), temperature=0.0)[0]
    assert all(c.sample.stopped == (c.sample.token_ids[-1] in stops) for rollout in short for c in rollout.completions)


def plain_step(service: TinkerService, learner: TinkerLearner, groups: list[Group], node: int) -> dict[str, torch.Tensor]:
    """Do a step along the gradient and return the gradient that it went along."""
    client, sdk = service.client(node), service.sdk
    batch = build_batch(
        credits_of(groups), routing=learner.policy.routing, adapter_version=learner.policy.version, temperature=1.0
    )
    own = [text for text in batch.completions if text[0].node == node]
    rows = [learner._row(*text, len(own), batch.num_rollouts) for text in own]
    before = load_tensors(service.export(client).tensors)
    client.forward_backward(rows, "importance_sampling").result()
    # lr * g / (|g| + eps) is 0.1 g up to one part in 10,000.
    client.optim_step(sdk.AdamParams(learning_rate=1e3, beta1=0.0, beta2=0.0, eps=1e4, weight_decay=0.0)).result()
    after = load_tensors(service.export(client).tensors)
    service.changed([node])
    return {name: (before[name] - after[name]) / 0.1 for name in before}


def test_the_gradient_is_that_of_the_torch_learner(plugged: tuple[Network, TinkerLearner]) -> None:
    network, learner = plugged
    service, bank = learner.service, network.adapters
    for _ in range(2):  # in the first B is zero, and so the gradient of A
        for node in (1, 2):
            learner._take_over(node, service.export(service.client(node)))
        groups = roll_out(network)
        gradients: dict[str, torch.Tensor] = {}
        ours = TorchLearner(network.policy, TrainConfig(max_grad_norm=0.0))

        def keep(*_: object, into: dict[str, torch.Tensor] = gradients) -> None:
            into.update({name: p.grad.clone() for name, p in bank.parameters().items() if p.grad is not None})

        ours.optimizer.register_step_pre_hook(keep)
        gap = ours.update(credits_of(groups), learning={1, 2}, lr=0.0).logprob_gap
        assert gap is not None
        assert gap < BOUND
        bank.version -= 1
        for index, node in enumerate((1, 2)):
            theirs = plain_step(service, learner, groups, node)
            most = max(gradient[index].abs().max().item() for gradient in gradients.values())
            for name, gradient in theirs.items():
                module, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
                expected = gradients[f"{module}.{half}"][index]
                parent, _, leaf = module.rpartition(".")
                if half == "lora_A":
                    together = next((names for names in FUSED if leaf in names), (leaf,))
                    expected = sum((gradients[f"{parent}.{other}.{half}"][index] for other in together), torch.tensor(0.0))
                assert (gradient - expected).abs().max().item() < GRADIENT_BOUND * most, (name, node)


def train(server: Server, run: Path, *more: object) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable, "-m", "neuromas.cli", "train", "--engine", "tinker", "--engine.url", server.url, "--adapter.alpha", 32,
        "--adapter.rank", 4, "--max-grad-norm", 0, "--widths", 1, 1, "--examples-per-step", 2, "--group-size", 4,
        "--max-new-tokens", NEW_TOKENS, "--eval-size", 2, "--eval-every", 0, "--warmup-steps", 0, "--save-every", 1,
        "--device", "cpu", "--run-dir", run, *more,
    ]  # fmt: skip
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)


def test_a_service_that_is_killed_ends_the_run_in_one_line_and_it_goes_on(server: Server, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run.log"
    first = train(server, run, "--num-steps", 4)
    wait_for_steps(first, run, 2, log)
    server.kill()
    assert first.wait(timeout=600) == 2
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "The same command with --resume goes on from step-00000" in line
    saved = len(list((run / "checkpoints").glob("step-*")))
    assert saved
    server.start()
    again = train(server, run, "--num-steps", 4, "--resume")
    assert again.wait(timeout=900) == 0, log.read_text()
    assert steps_logged(run) == 4


def test_a_rank_that_the_service_refuses_is_one_line(server: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(server, run, "--adapter.rank", 16).wait(timeout=600) == 2
    (line,) = [line for line in run.with_suffix(".log").read_text().splitlines() if line.startswith("error:")]
    assert "creates a client of rank 16 (--adapter.rank), and fails" in line
    assert "LoRA rank 16 must be between 1 and 8" in line
