"""One run by several workers, which here are threads: what they share out, what they agree on, and what all get to know.

1. N workers write the rollouts that one writes, and learn the adapters that one learns but for rounding.
2. Only the first worker writes; what stops one of them stops all, and says why.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import Call, assert_refused
from models import make_model, save_model
from runs import train_run
from safetensors.torch import load_file
from torch import Tensor

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig, TaskConfig, TopologyConfig, TrainConfig
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.system import cluster
from neuromas.system.engines import EngineConfig
from neuromas.training.loop import begin, train_and_score
from neuromas.training.on_ray import _cause, _check_alike, _fit, check_workers
from neuromas.training.plan import resolve
from neuromas.training.progress import Progress
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import set_up
from neuromas.training.sharding import Announced, Exchange, ShardedEngine, SharedRun, shard
from neuromas.training.signals import Interrupted
from neuromas.types import Example, Request

pytestmark = pytest.mark.runs

CONFIG = TrainConfig(
    topology=TopologyConfig(widths=(1, 1)), num_steps=3, examples_per_step=4, group_size=4, max_new_tokens=3, eval_size=4,
    eval_every=2, validation_size=3, save_every=2, lr=0.01, device="cpu",
)  # fmt: skip
SMALL = AdapterConfig(rank=1, target_modules=("q_proj",))


class Table:
    """Where threads meet: each leaves what it tells and waits for all others."""

    def __init__(self, workers: int) -> None:
        self.left: list[Any] = [None] * workers
        self.barrier = threading.Barrier(workers, timeout=60)

    def meet(self, rank: int, value: Any) -> list[Any]:
        self.left[rank] = value
        self.barrier.wait()
        told = list(self.left)
        self.barrier.wait()
        return told


class AtTable(Exchange):
    """The exchange of a thread."""

    __slots__ = ("table",)
    table: Table

    def tell(self, value: Any) -> list[Any]:
        return self.table.meet(self.rank, value)

    def sum(self, numbers: Tensor) -> None:
        numbers.copy_(torch.stack(self.tell(numbers.clone())).sum(0))


LOADING = threading.Lock()


def by_workers(count: int, work: Callable[[Exchange], Any]) -> list[Any]:
    """Let each of `count` threads do its part; return what each returned or raised."""
    table, ended = Table(count), list[Any]([None] * count)

    def run(rank: int) -> None:
        exchange = AtTable(rank=rank, workers=count)
        exchange.table = table
        try:
            ended[rank] = work(exchange)
        except Exception as error:
            ended[rank] = error
            if not isinstance(error, ValueError | Interrupted):
                table.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3", says=("Yes", "No")), tmp_path_factory.mktemp("speaker"))


def train_sharded(config: TrainConfig, exchange: Exchange) -> Any:
    plan = resolve(config)
    run = SharedRun(RunDirectory(config.run_path, config, plan.topology), exchange)
    # While transformers loads a model it replaces methods of all models, which no two threads may do at once.
    with LOADING:
        made = set_up(plan)
    setup = shard(made, exchange)
    with run.locked(), Progress(config.num_steps) as progress:
        run.initialise(plan.questions.task.held_out, plan.questions.checksums())
        trainer = begin(setup, run, progress)
        try:
            return train_and_score(trainer, progress, exchange.stop)
        except Announced:
            raise
        except ValueError as mistake:
            exchange.announce(mistake)


def adapters_of(run: RunDirectory) -> dict[str, Tensor]:
    files = sorted((run.path / "adapters").glob("*/*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def ledger_of(run: RunDirectory) -> dict[str, Any]:
    return json.loads((run.newest()[0] / "ledger.json").read_text())


# What follows from the other batches that rows meet in.


def test_three_workers_train_what_one_trains(folder: Path, tmp_path: Path) -> None:
    # A scheme that samples beyond the rollouts.
    config = replace(CONFIG, backbone=str(folder), credit="replay")
    alone, shared = replace(config, run_dir=tmp_path / "alone"), replace(config, run_dir=tmp_path / "shared")
    scores = train_run(alone)
    assert by_workers(3, lambda exchange: train_sharded(shared, exchange)) == [scores] * 3
    one, three = RunDirectory.open(tmp_path / "alone"), RunDirectory.open(tmp_path / "shared")
    assert three.rollouts() == one.rollouts()
    assert ledger_of(three) == ledger_of(one)
    for got, expected in zip(three.metrics(), one.metrics(), strict=True):
        assert got.keys() == expected.keys()
        timed = {name for name in got if "second" in name}
        assert {k: v for k, v in got.items() if k not in timed} == pytest.approx(
            {k: v for k, v in expected.items() if k not in timed}, abs=1e-4
        )
    found, expected = adapters_of(three), adapters_of(one)
    assert any(tensor.abs().max() > 0.01 for name, tensor in expected.items() if "lora_B" in name)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=1e-5, msg=name)
    assert three.best() is not None


def test_continuations_that_share_their_draws_are_told_apart(tiny_backbone: Backbone) -> None:
    """Node 3 goes on from two prompts with the draws of one rollout: without node 1's message, and without node 2's."""
    topology = Topology.layered([1, 1, 1])
    examples = [Example(name, f"Question {name}?", "Yes", "Write the answer.") for name in "ab"]

    def say(request: Request) -> str:
        lacks = "(nothing)" in tiny_backbone.detokenize(request.prompt.suffix_ids)
        return f"TO node {request.node + 1}: hm" if request.node < 3 else f"Answer: {'No' if lacks else 'Yes'}"

    def answers(exchange: Exchange | None) -> list[str]:
        with LOADING:
            network = Network(topology, tiny_backbone, adapter=SMALL, engine=ScriptedEngine(say))
        if exchange:
            network.engine = ShardedEngine(network.engine, exchange)
        groups = network.rollout(examples, 1, seed=(0, 0))
        texts = [(group[0], node, 0) for group in groups for node in topology.nodes]
        return [each.rollout.answer for each in network.replay(texts, seed=(0, 0), temperature=1.0, remove=True)]

    # Node 2 writes as it did without node 1's message, so only where its own is left out node 3 reads nothing.
    alone = answers(None)
    assert alone == ["Answer: Yes", "Answer: No", ""] * 2
    assert by_workers(2, answers) == [alone] * 2


def test_a_stop_that_the_first_worker_hears_stops_all_after_saving(folder: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, backbone=str(folder), run_dir=tmp_path / "run", num_steps=50, save_every=50, eval_every=0)
    run = RunDirectory(config.run_path, config, config.topology.build())

    def work(exchange: Exchange) -> Any:
        exchange.is_asked = lambda: len(run.metrics()) >= 3
        return train_sharded(config, exchange)

    ended = by_workers(2, work)
    assert [str(error) for error in ended] == ["stopped after step 3; continue with the same command and --resume"] * 2
    assert run.step == 3
    # One worker alone goes on from there.
    assert "after step 4" in str(by_workers(1, work)[0])


def test_workers_whose_clocks_differ_save_by_the_first_ones(folder: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, backbone=str(folder), run_dir=tmp_path / "run")
    run = RunDirectory(config.run_path, config, config.topology.build())
    assert by_workers(2, lambda exchange: SharedRun(run, exchange).agreed(exchange.rank == 0)) == [True, True]
    assert by_workers(2, lambda exchange: SharedRun(run, exchange).agreed(exchange.rank == 1)) == [False, False]


def test_what_stops_one_worker_stops_all_with_its_words(folder: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, backbone=str(folder), run_dir=tmp_path / "run")

    def work(exchange: Exchange) -> Any:
        if exchange.rank == 1:
            # The first worker is in the midst of a step then.
            log_rollouts = SharedRun.log_rollouts

            def full(self: SharedRun, *args: Any) -> None:
                if self.exchange.rank == 0 and args[0] == 1:
                    raise ValueError("the disk is full")
                log_rollouts(self, *args)

            monkeypatch.setattr(SharedRun, "log_rollouts", full)
        return train_sharded(config, exchange)

    with pytest.MonkeyPatch.context() as monkeypatch:
        ended = by_workers(2, work)
    assert [type(error) for error in ended] == [Announced, Announced]
    assert {str(error) for error in ended} == {"the disk is full"}


def test_a_users_reward_that_fails_is_the_same_mistake_for_all(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from neuromas.tasks import Navigate\n\n\nclass Own(Navigate):\n    def reward(self, example, text):\n"
        "        raise KeyError('gone')\n"
    )
    config = replace(CONFIG, backbone=str(folder), run_dir=tmp_path / "run", task=TaskConfig(name=f"class:{own}:Own"))
    ended = by_workers(2, lambda exchange: train_sharded(config, exchange))
    assert [type(error) for error in ended] == [Announced, Announced]
    assert all("KeyError: 'gone'" in str(error) for error in ended)


def test_workers_that_differ_are_told(folder: Path, tmp_path: Path) -> None:
    ended = by_workers(2, lambda exchange: _check_alike(exchange, backbone="same", questions=str(exchange.rank)))
    assert all("has another version of questions than node" in str(error) for error in ended)

    config = replace(CONFIG, backbone=str(folder), run_dir=tmp_path / "run")

    def work(exchange: Exchange) -> None:
        run = SharedRun(RunDirectory(config.run_path, config, config.topology.build()), exchange)
        run.initialise()
        run.save(3, {}, {"adapter": bytes([exchange.rank])})

    ended = by_workers(2, work)
    assert all("after step 3 the workers' adapters differ" in str(error) for error in ended)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))

    def elsewhere(exchange: Exchange) -> None:
        own = replace(config, run_dir=tmp_path / f"run{exchange.rank}")
        SharedRun(RunDirectory(own.run_path, own, own.topology.build()), exchange).initialise()

    ended = by_workers(2, elsewhere)
    assert ended[0] is None
    assert "is not seen by all workers; name a folder that their machines share" in str(ended[1])


@pytest.mark.parametrize(
    ("workers", "changes", "message"),
    [
        ((0,), {}, r"--workers must be a number, or the fewest and the most, at least 1, got \[0\]"),
        ((3, 2), {}, r"got \[3, 2\]"),
        ((1, 2, 3), {}, r"got \[1, 2, 3\]"),
        ((2, 5), {}, "--workers must be at most --examples-per-step 4, for a question is one worker's, got 5"),
        ((2,), {"engine": EngineConfig(name="vllm")}, "--workers goes with --engine torch, .* got vllm"),
        ((2,), {"credit": "value"}, "--workers goes with no --credit that learns a critic, got value"),
    ],
)
def test_runs_that_cannot_be_shared_out(workers: tuple[int, ...], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_workers(replace(CONFIG, **changes), workers)


def test_a_cluster_that_is_too_small_is_told() -> None:
    cluster.require_cores({"CPU": 4.0}, "cpu", 4, "worker")
    for device, found in (("cpu", {"CPU": 4.0}), ("cuda", {"CPU": 8.0, "GPU": 4.0})):
        kind = "GPU" if device == "cuda" else "CPU"
        with pytest.raises(ValueError, match=f"--workers needs 5 or more {kind}s, one for each worker, and the cluster has 4"):
            cluster.require_cores(found, device, 5, "worker")


def test_what_ray_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    parts = SimpleNamespace(
        TorchTrainer=lambda _, **settings: SimpleNamespace(fit=lambda: asked.update(settings)),
        TorchConfig=dict, ScalingConfig=dict, RunConfig=dict, FailureConfig=dict,
    )  # fmt: skip
    for variable in ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setattr("neuromas.training.on_ray.load_ray", lambda _: parts)
    failures: list[BaseException] = []
    # Ray hides no GPU from workers that have none of their own.
    for device, own in (("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cuda")):
        _fit(replace(CONFIG, device=device), (2, 3), None, str(tmp_path), failures)
        assert json.loads(asked["train_loop_config"]["config"])["device"] == own
        assert asked["scaling_config"]["use_gpu"] == (own == "cuda")
    # Where a node does not come back, Ray looks for its cores some times and not for ever.
    assert asked["run_config"]["failure_config"] == {"max_failures": 3, "controller_failure_limit": 3}
    assert failures == []
    # Another version of Ray, or RAY_TRAIN_V2_ENABLED=0.
    parts.ScalingConfig = int
    _fit(CONFIG, (2, 2), None, str(tmp_path), failures)
    assert "keyword argument" in _cause(failures)


def test_why_ray_has_given_up_is_one_line() -> None:
    assert _cause([]) == "Ray says no more"
    lost = RuntimeError("Training failed due to worker errors:\n[rank 0]\nConnection closed by peer\n")
    assert _cause([lost]) == "Connection closed by peer"
    short = RuntimeError("[rank 1]\nray.exceptions.OutOfMemoryError: Task was killed\n[rank 0]\nConnection closed by peer")
    assert _cause([short]).startswith("a worker ran out of memory; lower --tokens-per-micro-batch")


def test_ray_is_an_extra_and_addresses_are_checked_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"--workers must be ray or ray://HOST:PORT, got 'ray:/x'"),
        cluster.joined("--workers", "ray:/x"),
    ):
        pass

    def missing(module: str = "ray") -> None:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(cluster, "load_ray", missing)
    missed = r"--workers needs Ray \(No module named 'ray'\); install it by: pip install 'neuromas\[ray\]'"
    with pytest.raises(ValueError, match=missed), cluster.joined("--workers"):
        pass
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gone = type("GetTimeoutError", (Exception,), {})
    ended: list[str] = []
    ray = SimpleNamespace(
        exceptions=SimpleNamespace(RayError=gone), init=lambda *_, **__: None, shutdown=lambda: ended.append("ended")
    )
    monkeypatch.setattr(cluster, "load_ray", lambda: ray)
    failed = r"--workers: the cluster has failed \(GetTimeoutError: no\b.*answer\); where it runs again, the same"
    with pytest.raises(ValueError, match=failed), cluster.joined("--workers"):
        raise gone("no\nanswer")
    assert ended == ["ended"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--workers: a node of the cluster has no folder /no/such"):
        cluster.enter("/no/such")


def test_flags_that_do_not_go_together(call: Call) -> None:
    message = "--jobs and --workers exclude each other: a cluster makes as many cells at a time as it has cores$"
    assert_refused(call("compare", "x.toml", "--jobs", 2, "--workers", "ray"), message)
    message = "--workers is for `neuromas train`: agents that debate learn in one process$"
    assert_refused(call("finetune", "--workers", 2), message)
