"""A service that samples and learns, by the torch engine behind the client's interface: what we send, and what we refuse.

`tests/test_tinker_service.py` does the same against a real service.
"""

import dataclasses
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_tinker import FakeClient, FakeSampler, FakeTinker, done, serving
from models import load_backbone, make_model, save_model
from runs import train_run
from safetensors.torch import load as load_tensors

from neuromas import Network
from neuromas.config import AdapterConfig, GrowthConfig, TopologyConfig, TrainConfig
from neuromas.rollout import tinker_service
from neuromas.rollout.engine import EngineFault
from neuromas.rollout.row import Row
from neuromas.rollout.tinker_service import LoraShape, TinkerService
from neuromas.system.engines import EngineConfig, describe_engine
from neuromas.tasks import get_task
from neuromas.training.exported import collect, make_run
from neuromas.training.learner import TorchLearner
from neuromas.training.load_run import load_run
from neuromas.training.reinforce import Credits
from neuromas.training.run_directory import RunDirectory
from neuromas.training.tinker_learner import TinkerLearner, plug_service
from neuromas.types import Group, Prompt, Request

BOUND = 1e-5
"""Of log-probabilities, and of a gradient next to its norm."""
SHAPE = LoraShape(base_model="m", rank=2, target_modules=("q_proj",), seed=0)
MATRIX = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3", ("Yes", "No", ":", ".")), tmp_path_factory.mktemp("model"))


@pytest.fixture
def service(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTinker]:
    with serving(load_backbone(folder), str(folder)) as fake:
        monkeypatch.setattr(tinker_service, "_import_tinker", lambda: fake)
        yield fake


def config_on(service: FakeTinker, **changes: Any) -> TrainConfig:
    """Settings that fit a service."""
    plain = TrainConfig(
        backbone=service.model, engine=EngineConfig(name="tinker", url=service.url), adapter=AdapterConfig(rank=2, alpha=32.0),
        max_grad_norm=0.0, topology=TopologyConfig(widths=(1, 1)), num_steps=3, examples_per_step=2, group_size=4,
        max_new_tokens=5, eval_size=4, eval_every=0, warmup_steps=0, save_every=1, device="cpu",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def plugged(service: FakeTinker, **changes: Any) -> tuple[Network, TinkerLearner]:
    config = config_on(service, **changes).check()
    network = Network(config.topology.build(), load_backbone(Path(service.model)), adapter=config.adapter,
                      max_new_tokens=config.max_new_tokens)  # fmt: skip
    network.engine, learner = plug_service(config, network.policy)
    assert isinstance(learner, TinkerLearner)
    return network, learner


def roll_out(network: Network) -> list[Group]:
    return network.rollout(get_task("navigate").examples("test", 2), 3, seed=(0, 0))


def credits_of(groups: Sequence[Group]) -> Credits:
    """Advantages that differ between nodes and rollouts; one is 0."""
    values = torch.tensor([[1.0, -0.5, 0.0], [0.25, -2.0, 0.75]])
    return Credits.of(groups, {1: values, 2: -3 * values})


# What is sent and learned.


def test_a_step_that_learns_nothing_measures_no_gap(service: FakeTinker) -> None:
    network, learner = plugged(service)
    alike = torch.zeros(2, 3)
    credits = Credits.of(roll_out(network), {1: alike, 2: alike})
    assert learner.update(credits, learning={1, 2}, lr=0.01).logprob_gap is None


@pytest.mark.parametrize("reduction", ["token_sum", "row_mean"])
def test_the_gradient_in_the_service_is_that_of_the_torch_learner(service: FakeTinker, reduction: str) -> None:
    service.reduction = reduction
    network, learner = plugged(service)
    assert learner.reduction == reduction
    groups = roll_out(network)
    learner.state()  # the bank is now what the service has
    update = learner.update(credits_of(groups), learning={1, 2}, lr=0.01)
    assert update.logprob_gap is not None
    assert update.logprob_gap < BOUND

    ours = TorchLearner(network.policy, dataclasses.replace(learner.config, engine=EngineConfig()))
    network.adapters.version = 0
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({name: p.grad.clone() for name, p in network.adapters.parameters().items() if p.grad is not None})

    ours.optimizer.register_step_pre_hook(keep)
    expected = ours.update(credits_of(groups), learning={1, 2}, lr=0.01)
    assert update.loss == pytest.approx(expected.loss, abs=1e-5)
    for index, node in enumerate((1, 2)):
        assert update.grad_norms[node] == pytest.approx(expected.grad_norms[node], rel=1e-4)
        theirs = learner.service.client(node).gradient
        most = max((theirs[name][0] - gradients[name][index]).abs().max().item() for name in theirs)
        assert most < BOUND * expected.grad_norms[node]


def test_a_step_of_the_nodes_that_learn_changes_what_is_sampled_and_is_numbered(service: FakeTinker) -> None:
    network, learner = plugged(service)
    before = roll_out(network)
    assert roll_out(network) == before
    update = learner.update(credits_of(before), learning={2}, lr=0.5)
    assert update.grad_norms[1] == 0 < update.grad_norms[2]
    after = roll_out(network)
    samples = [[c.sample for group in groups for r in group for c in r.completions] for groups in (before, after)]
    assert {s.adapter_version for s in samples[0]} == {0}
    assert {s.adapter_version for s in samples[1]} == {1}
    assert [s.token_ids for s in samples[0]] != [s.token_ids for s in samples[1]]


def test_seeds_and_stops_are_of_the_request(service: FakeTinker) -> None:
    network, _ = plugged(service)
    roll_out(network)
    once = [(params.seed, params.stop, params.temperature) for params in service.requests]
    roll_out(network)
    # Texts end in any order, and so their recipients' requests come.
    again = [params.seed for params in service.requests[len(once) :]]
    assert sorted(again) == sorted(seed for seed, _, _ in once)
    assert len({seed for seed, _, _ in once}) == len(once)
    assert all(0 <= seed < 2**31 for seed, _, _ in once)
    assert {(tuple(stop), temperature) for _, stop, temperature in once} == {
        (tuple(sorted(network.policy.frame.stop_ids)), 1.0)
    }


def test_each_text_after_a_header_is_asked_for_with_all_before_it(service: FakeTinker) -> None:
    network, _ = plugged(service)
    row = Row(0, Request(1, Prompt((5,), (6, 7)), ("s",), headers=((8, 9),)), max_new_tokens=7)
    assert (row.prompt, row.limit, row.texts_left) == ([5, 6, 7], 3, 2)
    first = row.seed(31)
    row.record(network.policy, [10, 11, 12], [-1.0, -2.0, -3.0])  # cut off
    end = network.policy.frame.end
    assert row.prompt == [5, 6, 7, 10, 11, 12, *end, 8, 9]
    assert (row.limit, row.texts_left) == (4, 1)
    assert row.seed(31) != first
    row.record(network.policy, [13, min(network.policy.frame.stop_ids)], [-1.0, -1.0])
    sample = row.sample(4)
    assert sample.given == tuple(range(3, 3 + len(end) + 2))
    assert len(sample.texts) == 2
    assert (len(sample.logprobs), sample.stopped, sample.adapter_version) == (5, False, 4)


# What a service may be.


@pytest.mark.parametrize(
    ("way", "error"),
    [
        ({"alpha": 16.0}, "trains adapters with lora_alpha 16.0, --adapter has 32"),
        ({"most_rank": 1}, r"creates a client of rank 2 \(--adapter.rank\), and fails: LoRA rank 2 must be between 1 and 1"),
        ({"modules": ("q_proj", "v_proj")}, "trains other modules than --adapter.target-modules names"),
        ({"model": "other"}, "serves other, not '.*'; --engine.base-model says what it calls the backbone"),
        ({"reduction": "row_sum"}, r"reduces the loss in a way that is not known.* 1.5 times the gradient.* 2 \(token_sum\)"),
        ({"metrics": ()}, r"steps on a probe, and fails: its step names no gradient norm among \[\]"),
    ],
)
def test_a_service_that_does_not_fit_is_one_line(service: FakeTinker, way: dict[str, Any], error: str) -> None:
    config = config_on(service)
    network = Network(config.topology.build(), load_backbone(Path(service.model)), adapter=config.adapter)
    for name, value in way.items():
        setattr(service, name, value)
    with pytest.raises(EngineFault, match=error) as raised:
        plug_service(config, network.policy)
    assert "\n" not in str(raised.value)


def test_a_service_with_another_model_is_refused(service: FakeTinker, tmp_path: Path) -> None:
    service.backbone = load_backbone(save_model(make_model("llama"), tmp_path))
    with pytest.raises(EngineFault, match=r"at http.* is another model than --backbone .*, or rounds otherwise: a token's"):
        plugged(service)


@pytest.mark.parametrize(
    ("sequence", "error"),
    [
        (([9, 9], None, "length"), "gives 0 log-probabilities with 2 tokens"),
        (([2, 9], [0.0, 0.0], "length"), "samples on after an end token: it ignores `stop`"),
        (([9], [0.0], "stop"), "leaves the end token out of its samples, so that no node can learn to end a text"),
        (([9] * 6, [0.0] * 6, "length"), "samples 6 tokens where at most 5 are asked for"),
    ],
)
def test_a_sample_that_cannot_be_learned_from_ends_the_run(
    service: FakeTinker, monkeypatch: pytest.MonkeyPatch, sequence: tuple[Any, Any, str], error: str
) -> None:
    network, _ = plugged(service)
    end = min(network.policy.frame.stop_ids)
    tokens, logprobs, reason = sequence
    answer = SimpleNamespace(tokens=[end if t == 2 else t for t in tokens], logprobs=logprobs, stop_reason=reason)
    monkeypatch.setattr(FakeSampler, "sample", lambda *_, **__: done(SimpleNamespace(sequences=[answer])))
    with pytest.raises(EngineFault, match=re.escape(error)):
        roll_out(network)


def test_a_service_that_is_gone_is_waited_for_and_then_given_up(service: FakeTinker, monkeypatch: pytest.MonkeyPatch) -> None:
    network, learner = plugged(service)
    learner.service.samplers([1, 2])
    monkeypatch.setattr(tinker_service, "PATIENCE", 0.1)
    monkeypatch.setattr(tinker_service, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(FakeSampler, "sample", lambda *_, **__: Future())
    learner.service.url = "http://127.0.0.1:9"
    with pytest.raises(EngineFault, match=r"at http://127.0.0.1:9 has not answered for 0 s \(it samples\)"):
        roll_out(network)


def test_sampler_and_learner_far_apart_stop_the_run(service: FakeTinker, monkeypatch: pytest.MonkeyPatch) -> None:
    network, learner = plugged(service)
    groups = roll_out(network)
    learner.service.client(2).bank.modules["model.layers.0.mlp.down_proj"].lora_B.data.add_(0.05)
    with pytest.raises(EngineFault, match="as tinker sampled it and as the learner recomputes it differ by"):
        learner.update(credits_of(groups), learning={1, 2}, lr=0.01)
    assert network.policy.version == 0
    # What is left in the service goes into the step of whoever comes next.
    assert all(client.rows == 0 for client in service.clients)


# Settings.


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"temperature": 0.5}, "--temperature must be 1.0 with --engine tinker, which gives log-probabilities of untempered"),
        (
            {"max_grad_norm": 1.0},
            "--max-grad-norm must be 0.0 with --engine tinker, which clips gradients in one service and silently",
        ),
        ({"entropy_coef": 0.1}, "--entropy-coef must be 0.0 with --engine tinker, which has no loss with an entropy"),
        (
            {"adapter": AdapterConfig(rank=2)},
            "--adapter.alpha must be 32.0 with --engine tinker, which fixes it there, got None",
        ),
        ({"engine": EngineConfig(name="tinker")}, "--engine.url must be the address of a service with --engine tinker"),
        ({"engine": EngineConfig(url="http://x")}, "--engine.url must be left out with --engine torch"),
        ({"engine": EngineConfig(base_model="x")}, "--engine.base_model must be left out with --engine torch"),
        (
            {"growth": (GrowthConfig(at_step=1, widths=(2, 1), start=("copy:1",)),)},
            "growth.start must be zero with --engine tinker, which cannot be given an adapter to begin with",
        ),
    ],
)
def test_settings_that_no_service_has_are_refused(service: FakeTinker, changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        config_on(service, **changes).check()


def test_single_modules_are_refused(service: FakeTinker) -> None:
    with pytest.raises(
        ValueError, match=r"--adapter.target_modules must be k_proj o_proj.*which names no single modules, got q_proj"
    ):
        plugged(service, adapter=AdapterConfig(rank=2, alpha=32.0, target_modules=("q_proj",)))


# Runs.


def test_a_run_goes_on_from_the_states_of_the_service(service: FakeTinker, tmp_path: Path) -> None:
    config = config_on(service, run_dir=tmp_path / "run", num_steps=2, examples_per_step=1, eval_size=2, lr=0.05,
                       centring="none", format_bonus=1.0)  # fmt: skip
    train_run(config)
    newest = tmp_path / "run/checkpoints/step-000002"
    adapters = [newest / "adapters" / str(node) / "adapter_model.safetensors" for node in (1, 2)]
    ended = [path.read_bytes() for path in adapters]
    shutil.rmtree(newest)
    (tmp_path / "run/evaluation.json").unlink()
    train_run(config, resume=True)
    assert [path.read_bytes() for path in adapters] == ended
    # They are the service's adapters, which every other command reads as its own.
    learned = [load_tensors(data)[MATRIX].norm().item() for data in ended]
    assert 0.0 not in learned
    assert set(learned) <= {
        load_tensors(client.bank.peft_files(0, "")["adapter_model.safetensors"])[MATRIX].norm().item()
        for client in service.clients
    }
    assert load_run(tmp_path / "run").step == 2

    shutil.rmtree(newest)
    service.states.clear()
    lost = (
        "restores node 1 from tinker://run-1/weights/step-000001, which the newest checkpoint names, and fails: Error code: 404"
    )
    with pytest.raises(EngineFault, match=lost):
        train_run(config, resume=True)


def test_a_service_that_saves_no_state_ends_the_run_in_one_line(
    service: FakeTinker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def save_state(client: FakeClient, name: str) -> "Future[Any]":
        raise ValueError("Error code: 507 - the disk is full")

    monkeypatch.setattr(FakeClient, "save_state", save_state)
    config = config_on(service, run_dir=tmp_path / "run", num_steps=1, examples_per_step=1, eval_size=2)
    line = (
        r"^--run-dir .*/run: step 1: the service at http\S+ saves its state, and fails: Error code: 507 - the disk is full\. "
        "The same command with --resume begins again, for there is no checkpoint yet$"
    )
    with pytest.raises(ValueError, match=line):
        train_run(config)


def test_imported_adapters_are_not_replaced_by_new_ones(service: FakeTinker, tmp_path: Path) -> None:
    config = config_on(service, run_dir=tmp_path / "run", num_steps=1, examples_per_step=1, eval_size=2)
    train_run(config)
    made = make_run(collect(RunDirectory.open(tmp_path / "run")), tmp_path / "made")
    with pytest.raises(ValueError, match="/made: these adapters were imported, and a service cannot be given an adapter to"):
        train_run(made.config, resume=True)


def test_what_is_kept_is_one_line() -> None:
    assert describe_engine("tinker").startswith("engine tinker: tinker samples and learns; kept: none; not kept: bit-exact")


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(ValueError, match=r"--engine tinker needs the package tinker .*: pip install 'neuromas\[tinker\]'"):
        TinkerService("http://127.0.0.1:9", SHAPE)


def test_an_address_where_no_service_answers_is_one_line(service: FakeTinker) -> None:
    def greet() -> None:
        with other.accept()[0] as caller:
            caller.send(b"SSH-2.0-other\r\n")

    with socket.create_server(("127.0.0.1", 0)) as other:
        greets = Thread(target=greet)
        greets.start()
        for url in ("http://127.0.0.1:9", f"http://127.0.0.1:{other.getsockname()[1]}", "http://127.0.0.1:80x"):
            with pytest.raises(EngineFault, match=f"no Tinker service answers at --engine.url {url}: start it there, or"):
                TinkerService(f"{url}/", SHAPE)
        greets.join()
