"""What vLLM is asked, and what becomes of its answers: against a stand-in for the part of its interface that is used.

`make test-vllm` runs tests/test_vllm.py against vLLM itself.
"""

import math
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig, PromptConfig, TrainConfig
from neuromas.graph.society import SocietyConfig
from neuromas.rollout import vllm_engine
from neuromas.rollout.engine import EngineFault
from neuromas.rollout.vllm_engine import VllmEngine
from neuromas.system.engines import EngineConfig, describe_engine
from neuromas.training.loop import train, train_step
from neuromas.training.plan import resolve
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import set_up
from neuromas.training.trainer import Trainer
from neuromas.types import Example, Prompt, Request, Sample

SMALL = AdapterConfig(rank=2)


@dataclass
class Params:
    """vLLM's `SamplingParams`, as far as it is used."""

    temperature: float
    max_tokens: int
    seed: int
    logprobs: int
    detokenize: bool
    ignore_eos: bool
    stop_token_ids: list[int]
    output_kind: str


@dataclass
class Adapter:
    """vLLM's `LoRARequest`."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class StandIn:
    """vLLM's `LLMEngine`: ends every request at its next step, the newest first, with what `write` gives."""

    write: Callable[[Params], list[int]]
    arguments: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[list[int], Params, Adapter]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    waiting: dict[str, list[int]] = field(default_factory=dict)

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Params, *, lora_request: Adapter) -> None:
        assert (Path(lora_request.lora_path) / "adapter_model.safetensors").exists()
        self.asked.append((prompt["prompt_token_ids"], params, lora_request))
        self.waiting[name] = self.write(params)

    def step(self) -> list[Any]:
        name, ids = self.waiting.popitem()
        text = SimpleNamespace(token_ids=ids, logprobs=[{token: SimpleNamespace(logprob=-1.0)} for token in ids])
        return [
            SimpleNamespace(request_id="other", finished=False),
            SimpleNamespace(request_id=name, finished=True, outputs=[text]),
        ]

    def remove_lora(self, number: int) -> None:
        self.dropped.append(number)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Stands in for the package; what is written can be changed."""
    engine = StandIn(lambda params: [5, 6, params.stop_token_ids[0]][: params.max_tokens])
    package, lora, sampling = (ModuleType(name) for name in ("vllm", "vllm.lora.request", "vllm.sampling_params"))

    def start(arguments: dict[str, Any]) -> StandIn:
        engine.arguments = arguments
        return engine

    package.__dict__.update(EngineArgs=dict, LLMEngine=SimpleNamespace(from_engine_args=start), SamplingParams=Params)
    lora.__dict__.update(LoRARequest=Adapter)
    sampling.__dict__.update(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    for module in (package, lora, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return engine


def make(folder: Path, *widths: int, **settings: Any) -> Network:
    backbone = Backbone.load(str(folder), device="cpu")
    network = Network(Topology.layered(widths), backbone, adapter=SMALL, max_new_tokens=8, **settings)
    network.engine = VllmEngine(network.policy, len(network.topology.nodes))
    return network


EXAMPLES = [Example("a", "Question a?", "Yes", 'Write "Answer: Yes".'), Example("b", "Question b?", "No", "Write.")]


def test_each_request_carries_its_nodes_adapter_and_its_own_seed(tiny_folder: Path, vllm: StandIn) -> None:
    network = make(tiny_folder, 2, 1)
    groups = network.rollout(EXAMPLES, 2, seed=(0, 0), temperature=0.7)
    texts = [completion for group in groups for rollout in group for completion in rollout.completions]
    assert len(vllm.asked) == len(texts) == 12
    asked = {tuple(ids): (params, adapter) for ids, params, adapter in vllm.asked}
    for text in texts:
        params, adapter = asked[(*text.prompt.prefix_ids, *text.prompt.suffix_ids)]
        assert adapter.lora_name.startswith(f"node-{text.node}-version-0-")
        assert (params.temperature, params.max_tokens, params.logprobs) == (0.7, 8, 0)
        assert text.sample.token_ids == (5, 6, params.stop_token_ids[0])
        assert text.sample.logprobs == (-1.0, -1.0, -1.0)
        assert text.sample.stopped
    seeds = [params.seed for _, params, _ in vllm.asked]
    assert len(set(seeds)) == 12
    assert max(seeds) < 2**63
    # The same draws whatever else is in the batch, and others in another step.
    vllm.asked.clear()
    network.rollout(EXAMPLES[1:], 1, seed=(0, 0))
    assert {params.seed for _, params, _ in vllm.asked} < set(seeds)
    vllm.asked.clear()
    network.rollout(EXAMPLES, 2, seed=(0, 1))
    assert not {params.seed for _, params, _ in vllm.asked} & set(seeds)


def test_vllm_is_started_for_these_adapters(tiny_folder: Path, vllm: StandIn) -> None:
    make(tiny_folder, 2, 1)
    wanted = {"max_loras": 3, "max_lora_rank": 8, "logprobs_mode": "processed_logprobs", "dtype": "float32"}
    assert {name: vllm.arguments[name] for name in wanted} == wanted
    assert vllm.arguments["model"] == str(tiny_folder)


def test_a_new_version_has_new_names_and_the_old_one_goes(tiny_folder: Path, vllm: StandIn) -> None:
    network = make(tiny_folder, 1, 1)

    def adapters() -> dict[int, str]:
        vllm.asked.clear()
        network.rollout(EXAMPLES, 1, seed=(0,))
        return {adapter.lora_int_id: adapter.lora_path for _, _, adapter in vllm.asked}

    first = adapters()
    assert adapters() == first
    network.adapters.version = 1
    second = adapters()
    assert not first.keys() & second.keys()
    assert sorted(vllm.dropped) == sorted(first)
    assert not any(Path(path).exists() for path in first.values())
    assert network.rollout(EXAMPLES, 1, seed=(0,))[0][0].completions[0].sample.adapter_version == 1
    network.adapters.add_nodes({9: 1})
    network.rollout(EXAMPLES, 1, seed=(0,))
    assert len(vllm.dropped) == 4


def test_a_row_goes_on_behind_the_header_of_its_next_text(tiny_folder: Path, vllm: StandIn) -> None:
    network = make(tiny_folder, 1, 1, prompt=PromptConfig(wording="plain"))
    header, stop = (30, 31), min(network.policy.frame.stop_ids)
    written = iter([[5, 6], [7, stop], [8]])
    vllm.write = lambda params: next(written)
    request = Request(1, Prompt((1, 2), (3,)), ("seed",), (header, header))
    found: list[Sample] = []
    network.engine.generate([(0, request)], lambda key, sample: found.append(sample) or [], temperature=1.0, max_new_tokens=7)
    end = network.policy.frame.end
    tokens = (5, 6, *end, *header, 7, stop, *header, 8)
    (sample,) = found
    assert sample.token_ids == tokens
    assert sample.given == (*range(2, 4 + len(end)), 6 + len(end), 7 + len(end))
    assert len(sample.logprobs) + len(sample.given) == len(tokens)
    assert len(sample.texts) == 3
    assert not sample.stopped
    # A third of 7 tokens; then half of the 5 that are left; then all of the 3.
    assert [params.max_tokens for _, params, _ in vllm.asked] == [2, 2, 3]
    assert [ids for ids, _, _ in vllm.asked] == [[1, 2, 3], [1, 2, 3, *tokens[: 4 + len(end)]], [1, 2, 3, *tokens[:-1]]]
    assert len({params.seed for _, params, _ in vllm.asked}) == 3


# What cannot be done is one line


def test_a_missing_package_is_said_with_how_to_get_it(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    network = Network(Topology.layered([1]), tiny_backbone, adapter=SMALL)
    with pytest.raises(ValueError, match=r"--engine vllm needs the package vllm, .*pip install 'neuromas\[vllm\]'"):
        VllmEngine(network.policy, 1)


def test_a_rank_that_vllm_refuses(tiny_backbone: Backbone) -> None:
    network = Network(Topology.layered([1]), tiny_backbone, adapter=AdapterConfig(rank=513))
    with pytest.raises(ValueError, match=r"--adapter.rank must be at most 512 with --engine vllm, got 513"):
        VllmEngine(network.policy, 1)


def test_what_vllm_refuses_is_passed_on(tiny_folder: Path, vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make(tiny_folder, 1)
    monkeypatch.setattr(vllm, "write", lambda params: 1 / 0)
    with pytest.raises(EngineFault, match=r"vLLM refuses a prompt of \d+ tokens: division by zero"):
        network.rollout(EXAMPLES, 1, seed=(0,))
    monkeypatch.setitem(sys.modules["vllm"].__dict__, "EngineArgs", lambda **arguments: 1 / 0)
    with pytest.raises(ValueError, match=r"--engine vllm cannot serve --backbone .*: division by zero"):
        make(tiny_folder, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": AdapterConfig(scope="suffix")}, "--adapter.scope must be all with --engine vllm, .*got 'suffix'"),
        ({"temperature": 0.005}, "--temperature must be at least 0.01 with --engine vllm, .*got 0.005"),
        ({"engine": EngineConfig(logprob_bound=0.5)}, "--engine.logprob_bound must be left out with --engine torch, .*got 0.5"),
        ({"engine": EngineConfig(mismatch="weight")}, "--engine.mismatch must be left out with --engine torch, .*got 'weight'"),
        ({"engine": EngineConfig(name="vllm", logprob_bound=0.0)}, "--engine.logprob_bound must be above 0, got 0.0"),
    ],
)
def test_settings_that_do_not_go_with_an_engine(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"engine": EngineConfig(name="vllm"), **changes}).check()


def test_a_society_samples_with_torch() -> None:
    faults = list(
        EngineConfig(name="vllm").faults({"adapter": AdapterConfig(), "temperature": 1.0, "society": SocietyConfig(rounds=2)})
    )
    assert faults == ["--engine must be torch for a society (society.rounds 2), got 'vllm'"]


# In a run


def config_of(folder: Path, run_dir: Path, **engine: Any) -> TrainConfig:
    return TrainConfig(
        backbone=str(folder), run_dir=run_dir, device="cpu", adapter=SMALL, num_steps=2, examples_per_step=1, group_size=2,
        max_new_tokens=4, lr=1e-3, entropy_coef=0.01, eval_size=1, eval_every=0, save_every=1,
        engine=EngineConfig(name="vllm", **engine),
    )  # fmt: skip


def trainer_of(config: TrainConfig) -> Trainer:
    run, setup = RunDirectory.create(config), set_up(resolve(config))
    run.initialise()
    return Trainer(setup, run)


def test_log_probabilities_beyond_the_bound_stop_the_run_before_the_update(
    tiny_folder: Path, tmp_path: Path, vllm: StandIn
) -> None:
    trainer = trainer_of(config_of(tiny_folder, tmp_path / "run"))
    before = {name: parameter.clone() for name, parameter in trainer.bank.parameters().items()}
    with pytest.raises(
        EngineFault, match=r"as vllm sampled it .* differ by \d.*, engine.logprob_bound is 0.01: .*--engine.mismatch weight"
    ):
        train_step(trainer)
    assert all(parameter.equal(before[name]) for name, parameter in trainer.bank.parameters().items())
    assert all(parameter.grad is None for parameter in trainer.bank.parameters().values())
    assert train_step(trainer_of(config_of(tiny_folder, tmp_path / "wide", logprob_bound=50.0)))["logprob_gap/max"] > 0.01


def test_tokens_are_weighed_instead_if_that_is_chosen(tiny_folder: Path, tmp_path: Path, vllm: StandIn) -> None:
    metrics = train_step(trainer_of(config_of(tiny_folder, tmp_path / "run", mismatch="weight")))
    assert metrics["logprob_gap/max"] > 0.01
    assert 0 < metrics["importance_weight/max"] <= math.exp(metrics["logprob_gap/max"]) + 1e-6


def test_a_run_whose_engine_dies_names_its_last_checkpoint(
    tiny_folder: Path, tmp_path: Path, vllm: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_folder, tmp_path / "run", mismatch="weight")
    whole, steps = vllm.step, 0

    def step() -> list[Any]:
        nonlocal steps
        steps += 1
        if steps > 12:  # three of the score before, six of the first step
            raise RuntimeError("the device\nis gone.")
        return whole()

    monkeypatch.setattr(vllm, "step", step)
    with pytest.raises(
        ValueError,
        match=r"step 2: vLLM has stopped: the device is gone. The same command with --resume goes on from step-000001",
    ):
        train(resolve(config), RunDirectory.create(config))
    assert describe_engine("vllm") in capsys.readouterr().err.replace("\n", "")
    steps = -100
    scores = train(resolve(config), RunDirectory.resume(config))
    assert scores["after"]["test"].n == 1
    # Where there is no checkpoint yet, the run begins again.
    steps, fresh = 10, replace(config, run_dir=tmp_path / "fresh")
    with pytest.raises(ValueError, match=r"before training: vLLM has stopped: .*--resume begins again, for there is no"):
        train(resolve(fresh), RunDirectory.create(fresh))


def test_a_run_that_another_process_has_starts_no_engine(tiny_folder: Path, tmp_path: Path, vllm: StandIn) -> None:
    config = config_of(tiny_folder, tmp_path / "run")
    with RunDirectory.create(config).locked():
        with pytest.raises(ValueError, match=r"--run-dir .*run is in use by another process; wait for it or name another"):
            train(resolve(config), RunDirectory.create(config))
        assert not vllm.arguments
    # What an engine refuses leaves nothing that would keep the run from beginning.
    wide = replace(config, adapter=AdapterConfig(rank=513))
    with pytest.raises(ValueError, match=r"adapter\.rank must be at most 512"):
        train(resolve(wide), RunDirectory.create(wide))
    RunDirectory.create(config)


def test_an_engine_says_what_it_keeps() -> None:
    assert describe_engine("torch") == (
        "engine torch: torch samples and learns; kept: bit-exact resume, common random numbers, closed growth identical token "
        "by token, prefixes shared over nodes"
    )
    assert "kept: bit-exact resume (on a GPU: not tried), common random numbers," in describe_engine("torch", "cuda")
    assert describe_engine("vllm") == (
        "engine vllm: vllm samples, torch learns; kept: common random numbers; not kept: bit-exact resume, closed growth "
        "identical token by token, prefixes shared over nodes (docs/engines.md)"
    )


@pytest.mark.processes
def test_the_guard_kills_what_is_still_of_vllm_when_no_word_comes() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    engine, other, spared = (subprocess.Popen([*command, name]) for name in ("VLLM::EngineCore", "another", "VLLM::EngineCore"))
    try:
        for word, processes in ((b"word\n", [spared]), (b"", [engine, other])):
            vllm_engine._guard(processes).communicate(word)  # type: ignore[reportArgumentType]  # their numbers count
        assert engine.wait(timeout=10) == -signal.SIGKILL
        assert other.poll() is None
        assert spared.poll() is None
    finally:
        for process in (engine, other, spared):
            process.kill()
            process.wait()
