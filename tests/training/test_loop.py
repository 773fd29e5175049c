"""The loop: single-model REINFORCE as its smallest case, runs that stop and go on bit for bit, other model families.

Backbones are tiny and random, made to say little but Yes, No or nothing, so that some answers are right from the start.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from commands import run_cli
from models import (
    FAMILIES,
    export_peft,
    load_backbone,
    load_peft,
    make_model,
    plain_logprobs,
    randomise,
    save_model,
    suffix_logprobs,
)
from runs import DEADLINE, steps_logged, train_run, wait_for_steps
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Categorical
from transformers import AutoTokenizer

from neuromas import Network, Topology
from neuromas.config import AdapterConfig, GrowthConfig, PromptConfig, TaskConfig, TopologyConfig, TrainConfig
from neuromas.model.backbone import Backbone
from neuromas.model.policy import Policy, Rows
from neuromas.rollout.engine import EngineFault, uniforms
from neuromas.rollout.network import Diverged
from neuromas.tasks import get_task
from neuromas.training import checkpoint, reinforce
from neuromas.training.learning_rate import learning_rate
from neuromas.training.load_run import load_network, load_run
from neuromas.training.loop import train, train_step, train_to_end
from neuromas.training.plan import resolve
from neuromas.training.progress import Progress
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import build_network, check_memory, set_up
from neuromas.training.signals import Interrupted, Stop
from neuromas.training.trainer import Trainer
from neuromas.types import Completion, Example, Prompt, Sample

pytestmark = pytest.mark.runs

NUM_STEPS = 16
FLAGS = [
    "--widths", "1", "1", "--num-steps", str(NUM_STEPS), "--examples-per-step", "4", "--group-size", "4",
    "--max-new-tokens", "3", "--eval-size", "2", "--eval-every", "0", "--save-every", "3", "--lr", "0.003",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("speakers")
    return {family: save_model(make_model(family, says=("Yes", "No")), parent / family) for family in FAMILIES}


def make_config(backbone: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "topology": TopologyConfig(widths=(1, 1)), "task": TaskConfig(), "adapter": AdapterConfig(), "num_steps": 4,
        "examples_per_step": 4, "group_size": 4, "max_new_tokens": 3, "eval_size": 2, "eval_every": 0, "lr": 0.01,
        "prompt": PromptConfig(wording="terse"),
    }  # fmt: skip
    return TrainConfig(backbone=str(backbone), run_dir=run_dir, device="cpu", **{**settings, **changes}).check()


def start(config: TrainConfig, *, resume: bool = False) -> Trainer:
    run = RunDirectory.find(config, resume=resume)
    setup = set_up(resolve(config))
    run.initialise()
    return Trainer(setup, run)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return adapters and the optimizer's moments, by name."""
    state: dict[str, Tensor] = {}
    for name, parameter in trainer.bank.parameters().items():
        state[name] = parameter.detach()
    return state | trainer.learner.state()


def assert_bit_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)] == []


def without_clock(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]


def test_of_long_texts_those_that_decode_at_once_have_to_fit_into_memory(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folders["qwen3"], tmp_path / "run", max_new_tokens=999_999, group_size=32)
    network = build_network(config)
    text = 999_999 * network.backbone.token_bytes
    together = r"^training \(weights 0\.0, .* texts 0\.5, a forward and backward pass 0\.\d GiB\) would need 0\.\d GiB"
    for memory, error in ((2**30, ""), (2**29, together), (2**29 - 1, "keys and values of texts .* need 0\\.5 GiB")):
        monkeypatch.setattr("neuromas.model.adapters.total_memory", lambda memory=memory: memory)
        assert 4 * config.group_size * text > 2**30 > 2**29 > text
        with pytest.raises(ValueError, match=error) if error else nullcontext():
            check_memory(config, network, 2)


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, False),
        ({"tokens_per_micro_batch": 10**9}, False),
        ({"tokens_per_micro_batch": 64}, True),
        ({"grad_checkpoint": True}, True),
    ],
)
def test_what_a_pass_keeps_is_asked_for_where_it_is_known(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], fits: bool
) -> None:
    config = make_config(folders["qwen3"], tmp_path / "run", **changed)
    network = build_network(config)
    at_once = network.backbone.tokens_per_micro_batch
    monkeypatch.setattr(Backbone, "bytes_per_trained_token", 2**30 // at_once)
    monkeypatch.setattr("neuromas.model.adapters.total_memory", lambda: 2**30)
    with nullcontext() if fits else pytest.raises(ValueError, match=r"a forward and backward pass 1\.0 GiB"):
        check_memory(config, network, 2)


# Single-model REINFORCE


def sample_plainly(model: Any, prompt: tuple[int, ...], draws: Any, stop: int) -> list[int]:
    """Draw token after token by inverting the distribution function, with a whole forward for each."""
    written: list[int] = []
    while len(written) < len(draws) and stop not in written:
        logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, -1]
        cumulative = logits.double().softmax(-1).cumsum(-1)
        written.append(int((cumulative > draws[len(written)] * cumulative[-1]).nonzero()[0]))
    return written


def plain_reinforce_step(
    model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, config: TrainConfig, step: int
) -> dict[str, float]:
    """Do one step of textbook REINFORCE with leave-one-out centring on one PEFT model; return its metrics.

    A divergence from the bare model is a part of the reward, the entropy of each token's softmax a part of the loss.
    """
    task, rewards, loss = get_task("navigate"), [], torch.zeros(())
    ratios, entropies = [], []
    for example in task.training_batch(config.seed, step, config.examples_per_step):
        text = f"{example.question}\n\nYou are node 1 in the output layer.\n{example.answer_format}"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        prompt = tuple(tokenizer(chat, add_special_tokens=False)["input_ids"])
        group = []
        for index in range(config.group_size):
            draws = uniforms((config.seed, step, example.id, index, 1), config.max_new_tokens)
            with torch.no_grad():
                group.append(sample_plainly(model, prompt, draws, tokenizer.eos_token_id))
        scores = [task.reward(example, tokenizer.decode(written, skip_special_tokens=True)) for written in group]
        samples = [Sample(tuple(written), (0.0,) * len(written), ("",), stopped=True, adapter_version=0) for written in group]
        texts = [Completion(1, Prompt((), prompt), sample, ()) for sample in samples]
        with torch.no_grad():
            learned = [plain_logprobs(model, text).sum().item() for text in texts]
            with model.disable_adapter():
                bare = [plain_logprobs(model, text).sum().item() for text in texts]
        ratios += [p - q for p, q in zip(learned, bare, strict=True)]
        paid = [score - config.kl_coef * (p - q) for score, p, q in zip(scores, learned, bare, strict=True)]
        for text, score in zip(texts, paid, strict=True):
            advantage = score - (sum(paid) - score) / (config.group_size - 1)
            logits = model(input_ids=torch.tensor([[*prompt, *text.sample.token_ids]])).logits[0, len(prompt) - 1 : -1]
            entropy = Categorical(logits=logits).entropy()
            loss = loss - advantage * plain_logprobs(model, text).sum() - config.entropy_coef * entropy.mean()
            entropies += entropy.tolist()
        rewards += scores
    optimizer.zero_grad()
    (loss / len(rewards)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    tokens = len(entropies)
    return {
        "reward/mean": sum(rewards) / len(rewards), "kl/mean": sum(ratios) / tokens, "entropy/mean": sum(entropies) / tokens,
    }  # fmt: skip


@pytest.mark.parametrize(("kl_coef", "entropy_coef"), [(0.0, 0.0), (0.3, 0.2)])
def test_one_node_is_single_model_reinforce(
    folders: dict[str, Path], tmp_path: Path, kl_coef: float, entropy_coef: float
) -> None:
    """Three steps of the loop equal three steps of a loop written with PEFT, torch and nothing of ours but the draws."""
    config = make_config(
        folders["qwen3"], tmp_path / "run", topology=TopologyConfig(widths=(1,)), adapter=AdapterConfig(rank=2), lr=1e-3,
        warmup_steps=0, final_lr=1.0, max_grad_norm=0.5, kl_coef=kl_coef, entropy_coef=entropy_coef,
    )  # fmt: skip
    trainer = start(config)
    model = load_peft(folders["qwen3"], export_peft(trainer.bank, 1, tmp_path / "start"))
    learned = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    optimizer = torch.optim.AdamW(learned.values(), lr=config.lr, weight_decay=0.0)
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen3"])
    before = {name: tensor.clone() for name, tensor in state_of(trainer).items()}
    for step in range(3):
        metrics = train_step(trainer)
        assert metrics["signal/frac"] > 0
        expected = plain_reinforce_step(model, tokenizer, optimizer, config, step)
        assert ("kl/mean" in metrics, "entropy/mean" in metrics) == (kl_coef > 0, entropy_coef > 0)
        found = {name: metrics.get(name, expected[name]) for name in expected}
        assert found == pytest.approx(expected, rel=0, abs=1e-5)
    for name, parameter in trainer.bank.parameters().items():
        assert (parameter - before[name]).abs().max() > 1e-3
        # AdamW divides by the gradient's size: where that is near 0, its last bits are seen.
        torch.testing.assert_close(parameter[0], learned[name], rtol=0, atol=2e-5)


# Divergence from the bare backbone, and entropy


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": AdapterConfig(rank=2, shared=True)},
        {"topology": TopologyConfig(widths=(1, 1), roles=("You plan.", "You answer."))},
        {"branches": 2},
        {"topology": TopologyConfig(widths=(1,)), "growth": (GrowthConfig(at_step=2, widths=(1, 1)),), "group_size": 2},
    ],
    ids=["shared", "roles", "branches", "grown"],
)
def test_where_nothing_is_right_entropy_rises_and_divergence_falls(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Every kind of network, on a task that nobody solves, resumed in between."""

    def measured(name: str, *, resumed: bool, **coefficient: float) -> list[float]:
        config = make_config(
            folders["qwen3"], tmp_path / f"{name}{resumed}", num_steps=10, warmup_steps=0, lr=0.005,
            **{**changes, **coefficient},
        )  # fmt: skip
        values, trainer = [], start(config)
        trainer.task.parse_answer = lambda text: None
        if "kl_coef" in coefficient:
            randomise(trainer.bank, 0.3)
        for step in range(10):
            if resumed and step == 3:
                trainer.save()
                trainer = start(config, resume=True)
                trainer.task.parse_answer = lambda text: None
            metrics = train_step(trainer)
            assert metrics["reward/mean"] == 0.0
            values.append(metrics[name])
        return values

    entropies = measured("entropy/mean", resumed=False, entropy_coef=1.0)
    divergences = measured("kl/mean", resumed=False, kl_coef=1.0)
    # From step 2 on the network that grows has its size.
    assert sum(entropies[-4:]) > sum(entropies[2:6])
    assert sum(divergences[-4:]) < sum(divergences[2:6])
    assert measured("kl/mean", resumed=True, kl_coef=1.0) == divergences
    assert measured("entropy/mean", resumed=True, entropy_coef=1.0) == entropies


def test_without_a_coefficient_the_bare_backbone_is_not_asked(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    logprobs = Policy.logprobs

    def counted(policy: Policy, rows: Rows) -> Tensor:
        asked.append(policy.adapters is None)
        return logprobs(policy, rows)

    monkeypatch.setattr(Policy, "logprobs", counted)
    for number, coefficient in enumerate((0.0, 0.1)):
        asked.clear()
        trainer = start(make_config(folders["qwen3"], tmp_path / str(number), kl_coef=coefficient))
        metrics = train_step(trainer)
        lower = "--lr or --kl-coef" if coefficient else "--lr"
        assert str(trainer.diverged("step 1", Diverged("x"))).endswith(f"in another --run-dir, with a lower {lower}")
        assert ("kl/mean" in metrics) == (coefficient > 0)
        assert asked.count(True) == (coefficient > 0)


# What one step must not do


def test_a_gpu_that_is_full_is_told_with_what_needs_less(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("neuromas.training.learner.TorchLearner.gradient", full)
    config = make_config(folders["qwen3"], tmp_path / "run")
    told = "after step 0: CUDA out of memory. Tried to allocate 2.00 GiB. The same command with --resume and --grad-checkpoint "
    with pytest.raises(ValueError, match=f"{told}begins again, for there is no checkpoint yet, and needs less"):
        train(resolve(config), RunDirectory.create(config))


def test_what_cuts_a_grown_run_short_names_the_command_that_goes_on_with_it(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = start(make_config(folders["qwen3"], tmp_path / "run"))
    trainer.run.write_json("parent.json", {})
    told = str(trainer.without_engine("step 1", EngineFault("the service is gone")))
    command = f"`neuromas train --resume --run-dir {tmp_path / 'run'}`"
    assert told.endswith(f"step 1: the service is gone. {command} begins again, for there is no checkpoint yet")


def test_a_step_without_a_right_answer_moves_nothing_and_can_be_resumed(tmp_path: Path) -> None:
    """A model of pure noise earns no reward; the optimizer has no moments yet when the checkpoint is written."""
    folder = save_model(make_model("qwen3"), tmp_path / "noise")
    trainer = start(make_config(folder, tmp_path / "run"))
    before = {name: parameter.detach().clone() for name, parameter in trainer.bank.parameters().items()}
    metrics = train_step(trainer)
    assert (metrics["reward/mean"], metrics["signal/frac"]) == (0.0, 0.0)
    # No token was computed again, so there is no gap that was measured to be 0.
    assert "logprob_gap/max" not in metrics
    assert_bit_equal(dict(trainer.bank.parameters()), before)
    trainer.save()
    resumed = start(make_config(folder, tmp_path / "run"), resume=True)
    assert resumed.step == 1
    assert_bit_equal(state_of(resumed), before)
    train_step(resumed)


def test_momentum_alone_moves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = start(make_config(folders["qwen3"], tmp_path / "run", examples_per_step=16))
    assert train_step(trainer)["signal/frac"] > 0
    # A task that nobody can solve: every group's rewards are equal.
    trainer.task.parse_answer = lambda text: None
    before = {name: tensor.clone() for name, tensor in state_of(trainer).items()}
    assert train_step(trainer)["signal/frac"] == 0
    assert_bit_equal(state_of(trainer), before)


def test_a_question_that_a_step_asks_again_is_drawn_anew(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    splits = ("train", "train", "test")
    records = [{"question": f"Is {n} even?", "answer": "Yes", "split": split} for n, split in enumerate(splits)]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    trainer = start(make_config(folders["qwen3"], tmp_path / "run", task=TaskConfig(name=f"jsonl:{file}"), eval_size=1))
    questions = trainer.draw_questions(0)
    assert [question.repeat for question in questions] == [0, 0, 1, 1]

    def said(asked: list[Example]) -> dict[tuple[str, int], list[tuple[int, ...]]]:
        groups = zip(asked, trainer.roll_out(asked, 0), strict=True)
        return {(q.id, q.repeat): [c.sample.token_ids for rollout in group for c in rollout.completions] for q, group in groups}

    drawn, alone = said(questions), said(questions[:2])
    assert {key: texts for key, texts in drawn.items() if key[1] == 0} == alone
    assert all(drawn[question.id, 0] != drawn[question.id, 1] for question in questions)
    # It is the same question for all else, such as a task that keeps its solutions by it.
    assert len(set(questions)) == 2


def test_a_step_leaves_the_backbone_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = start(make_config(folders["qwen3"], tmp_path / "run"))
    train_step(trainer)
    assert trainer.backbone.checksum() == load_backbone(folders["qwen3"]).checksum()


def test_a_step_that_ends_long_after_the_last_checkpoint_is_saved(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folders["qwen3"], tmp_path / "run", save_every=50, num_steps=9)
    clock = {"seconds": 0.0}
    monkeypatch.setattr("neuromas.training.trainer.time.monotonic", lambda: clock["seconds"])
    trainer = start(config)
    # The steps end at these seconds; a checkpoint is two minutes old at 130 and at 260, not at 240.
    for clock["seconds"] in (60.0, 110.0, 130.0, 240.0, 260.0):
        trainer.step += 1
        trainer.save_if_due(Stop())
    assert [folder.name for folder in trainer.run.checkpoints()] == ["step-000003", "step-000005"]


@pytest.mark.parametrize("during", ["agreed", "save"])
def test_who_asks_to_stop_at_any_moment_loses_no_step(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    trainer = start(make_config(folders["qwen3"], tmp_path / "run", save_every=2, num_steps=9))
    stop, plain = Stop(), getattr(RunDirectory, during)

    def asked_meanwhile(run: RunDirectory, *args: Any, **options: Any) -> Any:
        done = plain(run, *args, **options)
        stop.asked = True
        return done

    monkeypatch.setattr(RunDirectory, during, asked_meanwhile)
    step = {"agreed": 1, "save": 3}[during]
    with Progress(9) as progress, pytest.raises(Interrupted, match=f"^stopped after step {step};"):
        train_to_end(trainer, progress, stop)
    assert trainer.run.step == step


def test_training_that_diverges_stops_with_the_last_good_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(folders["qwen3"], tmp_path / "run", lr=1e30, save_every=1, warmup_steps=0, num_steps=6)
    message = (
        r"^--run-dir .*/run: (step \d|scoring after training): .* not finite.*\. Training has diverged and is stopped; "
        r"(the last good checkpoint is step-00000\d|there is no good checkpoint)\. Start again, in another --run-dir, "
    )
    with pytest.raises(ValueError, match=message):
        train_run(config)
    run = RunDirectory.open(config.run_path)
    # Those that are left write finite numbers.
    if run.checkpoints():
        load_run(run.path).network.ask("Question?")
    assert not run.checkpoints() or run.step < len(run.metrics())
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_gradient_that_is_no_number_moves_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folders["qwen3"], tmp_path / "run", save_every=1, num_steps=3)
    loss = reinforce.loss

    def late(logprobs_K: Tensor, advantages_K: Tensor, num_rollouts: int) -> Tensor:
        # After two checkpoints.
        bad = RunDirectory.open(config.run_path).step == 2
        return loss(logprobs_K, advantages_K, num_rollouts) * (float("inf") if bad else 1.0)

    monkeypatch.setattr(reinforce, "loss", late)
    message = r"step 3: the loss is \S+, the largest gradient norm \S+\. .*; the last good checkpoint is step-000002\. Start"
    with pytest.raises(ValueError, match=message):
        train_run(config)
    assert [folder.name for folder in RunDirectory.open(config.run_path).checkpoints()] == ["step-000001", "step-000002"]
    assert len(RunDirectory.open(config.run_path).metrics()) == 2


@pytest.mark.exact
@pytest.mark.parametrize(("scope", "coefficient"), [("all", 0.0), ("suffix", 0.0), ("all", 0.2)])
def test_micro_batches_make_the_same_step(
    folders: dict[str, Path], tmp_path: Path, scope: Literal["all", "suffix"], coefficient: float
) -> None:
    """The optimizer's first moment is 0.1 times the clipped gradient: equal within 1e-5 of its largest entry."""
    moments = []
    for tokens in (1, 100_000):
        config = make_config(
            folders["gemma3"], tmp_path / f"run{tokens}", adapter=AdapterConfig(scope=scope), tokens_per_micro_batch=tokens,
            kl_coef=coefficient, entropy_coef=coefficient,
        )  # fmt: skip
        trainer = start(config)
        train_step(trainer)
        moments.append({name: value for name, value in state_of(trainer).items() if name.endswith("exp_avg")})
    for name, moment in moments[1].items():
        torch.testing.assert_close(moments[0][name], moment, rtol=0, atol=max(1e-5 * moment.abs().max().item(), 1e-9))


def test_micro_batches_of_a_large_model_have_fewer_tokens(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(folders["qwen3"])
    assert backbone.tokens_per_micro_batch == 10_000
    monkeypatch.setattr(backbone.model.config, "num_hidden_layers", 30)
    monkeypatch.setattr(backbone.model.config, "hidden_size", 576)
    monkeypatch.setattr(backbone.model.config, "intermediate_size", 1536)
    # A token takes 30 x (40 x 576 + 24 x 1,536) bytes.
    assert backbone.tokens_per_micro_batch == 896


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = TrainConfig(lr=1.0, warmup_steps=2, num_steps=6, final_lr=0.2)
    # 1/2, 2/2; then 0.2 + 0.8 * (1 + cos(pi * k / 4)) / 2 for k = 0 to 3
    expected = [0.5, 1.0, 1.0, 0.882843, 0.6, 0.317157]
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx(expected, abs=1e-6)


# Growth needs this


def test_a_nodes_draws_do_not_depend_on_other_nodes(folders: dict[str, Path]) -> None:
    """Nodes 3 and 4 join; node 1 writes to node 2 as before, token by token, and node 2's prefix stays the same."""

    def texts(edges: tuple[tuple[int, int], ...], seed: int = 0) -> dict[int, list[tuple[int, ...]]]:
        backbone = load_backbone(folders["llama"])
        network = Network(Topology.from_edges(edges), backbone, adapter=AdapterConfig(rank=2), max_new_tokens=6)
        randomise(network.adapters)
        groups = network.rollout(get_task("navigate").examples("test", 3), 4, seed=(seed, 0))
        completions = [completion for group in groups for rollout in group for completion in rollout.completions]
        return {node: [c.sample.token_ids for c in completions if c.node == node] for node in network.topology.nodes}

    parent, grown = texts(((1, 2),)), texts(((1, 2), (3, 2), (4, 2)))
    assert grown[1] == parent[1]
    assert len(set(parent[1])) > 3
    # New nodes draw numbers of their own, and so does another run.
    assert grown[3] != grown[1]
    assert texts(((1, 2),), seed=1)[1] != parent[1]


# Stopping and going on


@pytest.mark.parametrize("centring", ["leave_one_out", "ema"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    folders: dict[str, Path], tmp_path: Path, centring: str
) -> None:
    alone = start(make_config(folders["qwen3"], tmp_path / "alone", centring=centring))
    for _step in range(4):
        train_step(alone)
    broken = start(make_config(folders["qwen3"], tmp_path / "broken", centring=centring))
    for _step in range(2):
        train_step(broken)
    broken.save()
    # A third step is logged and lost: no checkpoint holds it.
    train_step(broken)
    resumed = start(make_config(folders["qwen3"], tmp_path / "broken", centring=centring), resume=True)
    assert (resumed.step, resumed.bank.version) == (2, 2)
    for _step in range(2, 4):
        train_step(resumed)
    assert any(tensor.any() for name, tensor in state_of(alone).items() if name.endswith("lora_B"))
    assert_bit_equal(state_of(resumed), state_of(alone))
    assert resumed.ledger == alone.ledger
    assert resumed.running_mean == alone.running_mean
    assert without_clock(resumed.run.metrics()) == without_clock(alone.run.metrics())
    rollouts = [(trainer.run.path / "rollouts.jsonl").read_bytes() for trainer in (resumed, alone)]
    assert rollouts[0] == rollouts[1]


def run_here(*args: object) -> None:
    run_cli("train", *FLAGS, *args)


def run_elsewhere(folder: Path, *args: object) -> "subprocess.Popen[bytes]":
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "neuromas.cli", "train", *FLAGS, *map(str, args)]
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=dict(os.environ))


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_here("--backbone", folders["qwen3"], "--run-dir", run)
    return run


def assert_same_run(run: Path, alone: Path) -> None:
    """Adapters, optimizer, ledger, scores and every logged number are equal, bit for bit."""
    newest = f"checkpoints/step-{NUM_STEPS:06d}"
    names = [f"adapters/{node}/adapter_model.safetensors" for node in (1, 2)] + ["optimizer.safetensors", "ledger.json"]
    for name in (*(f"{newest}/{name}" for name in names), "evaluation.json"):
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    assert (run / "adapters").resolve() == (run / newest / "adapters").resolve()
    logs = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, alone)]
    assert without_clock(logs[0]) == without_clock(logs[1])
    assert [record["step"] for record in logs[0]] == list(range(NUM_STEPS))
    assert sum(record["grad_norm/node/1/max"] > 0 for record in logs[0]) > NUM_STEPS // 2


@pytest.mark.processes
def test_killed_at_any_moment_a_run_resumes_to_the_same_adapters(folders: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    run, args = tmp_path / "run", ("--backbone", folders["qwen3"], "--run-dir", tmp_path / "run")
    moment = random.SystemRandom()
    steps, delay = moment.randint(1, NUM_STEPS // 2), moment.uniform(0, 0.1)
    process = run_elsewhere(tmp_path, *args)
    try:
        wait_for_steps(process, run, steps, tmp_path / "log")
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    print(f"killed {delay:.3f} s after step {steps}, with {steps_logged(run)} steps logged")
    run_here(*args, "--resume")
    assert_same_run(run, alone)


@pytest.mark.processes
def test_ctrl_c_saves_and_the_run_goes_on(folders: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    run, args = tmp_path / "run", ("--backbone", folders["qwen3"], "--run-dir", tmp_path / "run")
    process = run_elsewhere(tmp_path, *args)
    try:
        wait_for_steps(process, run, 4, tmp_path / "log")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130, (tmp_path / "log").read_text()
    finally:
        process.kill()
    done = steps_logged(run)
    assert f"stopped after step {done}; continue with the same command and --resume" in (tmp_path / "log").read_text()
    # The last step is saved although no checkpoint was due.
    assert (run / f"checkpoints/step-{done:06d}/state.json").is_file()
    run_here(*args, "--resume")
    assert_same_run(run, alone)


# Other families, and what the files are good for


@pytest.mark.parametrize(("family", "scope"), [("qwen3", "all"), ("llama", "all"), ("gemma3", "all"), ("gemma3", "suffix")])
def test_every_family_trains_from_the_command_line_and_loads_in_plain_peft(
    folders: dict[str, Path], tmp_path: Path, family: str, scope: str
) -> None:
    run = tmp_path / "run"
    run_here(
        "--backbone", folders[family], "--run-dir", run, "--num-steps", 2, "--adapter.scope", scope,
        "--wording", "terse",
    )  # fmt: skip
    loaded = load_run(run)
    assert loaded.step == 2
    groups = loaded.network.rollout(loaded.task.examples("test", 2), 2, seed=("plain",))
    compute = plain_logprobs if scope == "all" else suffix_logprobs
    for place, node in enumerate((1, 2)):
        trained = load_file(run / "adapters" / str(node) / "adapter_model.safetensors")
        assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
        model = load_peft(folders[family], run / "adapters" / str(node))
        with torch.no_grad():
            for rollout in (rollout for group in groups for rollout in group):
                completion = rollout.completions[place]
                expected = compute(model, completion).tolist()
                assert completion.sample.logprobs == pytest.approx(expected, rel=0, abs=1e-5)


# It learns


def test_reward_goes_up(folders: dict[str, Path], tmp_path: Path) -> None:
    """Untrained, an answer is Yes, No, nothing or neither; to write just one of the words doubles the reward."""
    config = make_config(
        folders["qwen3"], tmp_path / "run", num_steps=14, examples_per_step=8, lr=0.005, max_new_tokens=2, warmup_steps=0
    )  # fmt: skip
    trainer = start(config)
    metrics = [train_step(trainer) for step in range(config.num_steps)]
    first, last = ([m["reward/mean"] for m in part] for part in (metrics[:3], metrics[-5:]))
    # Measured: 0.19 and 0.46; with all answers readable half of them are right.
    assert sum(last) / 5 > sum(first) / 3 + 0.2
    assert metrics[0]["answer_parsed/frac"] < 0.6
    assert sum(m["answer_parsed/frac"] for m in metrics[-5:]) / 5 > 0.85


def test_in_bfloat16_an_importance_weight_corrects_the_gap(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folders["qwen3"], tmp_path / "run", dtype="bfloat16", examples_per_step=12)
    metrics = train_step(start(config))
    assert 0.5 < metrics["importance_weight/max"] <= math.exp(metrics["logprob_gap/max"]) + 1e-6
    assert metrics["grad_norm/node/1/max"] > 0
    # It multiplies every token's term.
    monkeypatch.setattr(reinforce, "importance_weights", lambda logprobs_K, sampled_K: (torch.zeros_like(logprobs_K), 3.0))
    metrics = train_step(start(dataclasses.replace(config, run_dir=tmp_path / "none")))
    assert metrics["grad_norm/node/1/max"] == 0
    # The largest is told as it was before its bound.
    assert metrics["importance_weight/max"] == 3.0 > reinforce.MOST_WEIGHT
    trainer = start(dataclasses.replace(config, run_dir=tmp_path / "unlearned"))
    trainer.task.parse_answer = lambda text: None
    assert not {"logprob_gap/max", "importance_weight/max"} & train_step(trainer).keys()
    assert "importance_weight/max" not in train_step(start(make_config(folders["qwen3"], tmp_path / "float32")))


# How long training lasts, and which adapters are the best


def test_a_budget_of_tokens_ends_training_and_the_learning_rate_falls_along_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(folders["qwen3"], tmp_path / "run", train_tokens=150, num_steps=1, warmup_steps=0, save_every=2)
    trainer = start(config)
    spent, rates = [0], []
    while not trainer.finished:
        rates.append(train_step(trainer)["lr/value"])
        spent.append(trainer.ledger.sampled_tokens)
        if trainer.step == 2:
            trainer.save()
    assert trainer.step > config.num_steps
    assert spent[-2] < 150 <= spent[-1]
    assert rates == [learning_rate(config, step, tokens) for step, tokens in enumerate(spent[:-1])]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(config, 99, 75) == pytest.approx(config.lr * 0.55)
    resumed = start(config, resume=True)
    while not resumed.finished:
        train_step(resumed)
    assert resumed.step == trainer.step
    assert_bit_equal(state_of(resumed), state_of(trainer))


def test_the_ledger_counts_steps_that_had_a_gradient(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = start(make_config(folders["qwen3"], tmp_path / "run", examples_per_step=16))
    train_step(trainer)
    trainer.task.parse_answer = lambda text: None
    train_step(trainer)
    assert (trainer.ledger.steps, trainer.ledger.optimizer_steps, trainer.ledger.questions) == (2, 1, 32)


def test_the_best_validation_is_kept_beside_the_last_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(folders["qwen3"], tmp_path / "run", num_steps=4, eval_every=1, validation_size=4)
    trainer = start(config)
    seen = iter([0.25, 0.5, 0.5, 0.25])
    trainer.task.rewards = lambda pairs: [accuracy] * len(pairs) if len(pairs) == 4 else [0.0, 1.0] * (len(pairs) // 2)
    at: dict[int, dict[str, Tensor]] = {}
    for step in range(4):
        accuracy = next(seen)
        train_step(trainer)
        at[step + 1] = {name: tensor.detach().clone() for name, tensor in trainer.bank.parameters().items()}
        if step == 2:
            trainer.save()
    # The first of equals, and nothing of those before it.
    trainer.save()
    assert [folder.name for folder in sorted((config.run_path / "checkpoints").glob("best-*"))] == ["best-000002"]
    version = trainer.bank.version
    assert checkpoint.load_best(trainer.run, trainer.bank) == 2
    # An engine with copies of its own takes these over.
    assert trainer.bank.version > version
    assert_bit_equal(dict(trainer.bank.parameters()), at[2])
    network, step = load_network(trainer.run, best=True)
    assert step == 2
    assert_bit_equal(dict(network.adapters.parameters()), at[2])
    assert start(config, resume=True).validation.best_accuracy == 0.5


def test_a_best_checkpoint_behind_the_last_save_comes_again(folders: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(folders["qwen3"], tmp_path / "run", num_steps=3, eval_every=1, validation_size=4)
    trainer = start(config)
    trainer.task.rewards = lambda pairs: [float(trainer.step) / 4] * len(pairs)
    train_step(trainer)
    trainer.save()
    train_step(trainer)
    assert trainer.validation.best_accuracy == 0.5
    resumed = start(config, resume=True)
    # The run stands at step 1: what was best at step 2 has not happened, and what was best before counts again.
    assert (resumed.step, resumed.validation.best_accuracy) == (1, 0.25)
    assert [folder.name for folder in (config.run_path / "checkpoints").glob("best-*")] == ["best-000001"]
    resumed.task.rewards = lambda pairs: [float(resumed.step) / 4] * len(pairs)
    train_step(resumed)
    assert resumed.validation.best_accuracy == 0.5
    resumed.save()
    (best,) = (config.run_path / "checkpoints").glob("best-*")
    assert best.name == "best-000002"
    (best / "ledger.json").write_text("{}")
    with pytest.raises(
        ValueError, match=rf"checkpoint {best}: ledger.json is truncated .*; delete {best} to go on without this"
    ):
        start(config, resume=True)
    shutil.rmtree(best)
    assert start(config, resume=True).step == 2
