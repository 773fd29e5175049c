"""Runs that grow: nothing old is touched, a killed run is before or after a growth, equal cost means equal cost.

The backbone is tiny and random, made to say little but Yes, No or nothing, so that some answers are right from the start.
"""

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Call, assert_refused
from models import make_model, save_model
from paths import ROOT
from products import listed
from runs import train_run
from torch import Tensor

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig, GrowthConfig, TopologyConfig, TrainConfig
from neuromas.training import checkpoint
from neuromas.training.config_file import load_toml
from neuromas.training.grown_run import check_descends, grown_config
from neuromas.training.learning_rate import learning_rate
from neuromas.training.ledger import Ledger, Pace
from neuromas.training.load_run import load_run
from neuromas.training.loop import train_step
from neuromas.training.plan import resolve
from neuromas.training.progress import Progress
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import set_up
from neuromas.training.signals import Stop
from neuromas.training.trainer import Trainer

pytestmark = pytest.mark.runs

FIVE = GrowthConfig(at_step=2, widths=(2, 2, 1), start=("4:copy:1",), opening="annealed", open_steps=2)
SEVEN = GrowthConfig(at_step=4, widths=(2, 2, 2, 1), warmup_new=1)
SCHEDULE = (FIVE, SEVEN)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3", says=("Yes", "No")), tmp_path_factory.mktemp("speaker") / "qwen3")


def make_config(speaker: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "adapter": AdapterConfig(rank=2, target_modules=("q_proj", "down_proj")), "num_steps": 6, "examples_per_step": 4,
        "group_size": 4, "max_new_tokens": 3, "eval_size": 4, "eval_every": 0, "validation_size": 6, "lr": 0.01,
        "growth": SCHEDULE, "save_every": 1,
    }  # fmt: skip
    return TrainConfig(backbone=str(speaker), run_dir=run_dir, device="cpu", **{**settings, **changes}).check()


def start(config: TrainConfig, *, resume: bool = False) -> Trainer:
    run = RunDirectory.find(config, resume=resume)
    setup = set_up(resolve(config))
    run.initialise(setup.plan.questions.task.held_out, setup.plan.questions.checksums())
    return Trainer(setup, run)


def state_of(trainer: Trainer, cohort: int | None = None) -> dict[str, Tensor]:
    """Return copies of adapters and of the optimizer's moments and steps, by name."""
    state: dict[str, Tensor] = {}
    for name, parameter in trainer.bank.parameters(cohort).items():
        state[name] = parameter.detach().clone()
        state |= {key: value.clone() for key, value in trainer.learner.state().items() if key.rpartition(".")[0] == name}
    return state


def is_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def logged(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


def assert_same_run(run: Path, alone: Path) -> None:
    newest = sorted((alone / "checkpoints").iterdir())[-1]
    files = [path.relative_to(alone) for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 2 * 7 + 3
    for name in (*files, Path("evaluation.json"), Path("growth.json")):
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    assert logged(run) == logged(alone)
    assert logged(run, "rollouts.jsonl") == logged(alone, "rollouts.jsonl")


@pytest.fixture(scope="module")
def alone(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole schedule that nobody disturbs, with a budget of tokens for a step."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train_run(make_config(speaker, run, step_tokens=100))
    return run


# What a growth touches


@pytest.mark.exact
def test_a_closed_growth_trains_as_its_parent_would(speaker: Path, tmp_path: Path) -> None:
    """At opening probability 0 a step of the grown network is the step that the parent would have done, bit for bit."""
    grown = start(make_config(speaker, tmp_path / "grown", growth=(FIVE,)))
    parent = start(make_config(speaker, tmp_path / "parent", growth=()))
    before, metrics, computed = {}, [], []
    for _step in range(3):
        before, metrics, computed = state_of(grown, 0), [], []
        for trainer in (grown, parent):
            with listed() as products:
                metrics.append(train_step(trainer))
            computed.append(products)
        assert metrics[0]["reward/mean"] == metrics[1]["reward/mean"]
        assert computed[0] == computed[1]
    assert {"mm.default", "gate_backward", "weigh"} <= {name for name, _ in computed[0]}
    assert grown.bank.nodes == (1, 2, 3, 4, 5)
    assert not is_equal(state_of(grown, 0), before)
    assert is_equal(state_of(grown, 0), state_of(parent, 0))
    # No group was open: the new nodes have learned nothing, and their optimizer has not begun to count.
    assert metrics[0]["open_groups/frac"] == 0
    assert state_of(grown, 1).keys() == grown.bank.parameters(1).keys()
    assert not any(tensor[1].any() for name, tensor in state_of(grown, 1).items() if name.endswith("lora_B_1"))


def test_old_nodes_keep_adapters_and_moments_and_new_ones_start_fresh(speaker: Path, tmp_path: Path) -> None:
    entry = dataclasses.replace(FIVE, opening="immediate", warmup_new=1)
    trainer = start(make_config(speaker, tmp_path / "run", growth=(entry,), examples_per_step=16))
    for _step in range(2):
        train_step(trainer)
    old = state_of(trainer, 0)
    copied = {name: tensor[0] for name, tensor in old.items() if name.endswith(("lora_A", "lora_B"))}
    (growth,) = trainer.growths.all
    trainer._grow(growth)
    assert is_equal(state_of(trainer, 0), old)
    assert all(name in trainer.bank.parameters(1) for name in state_of(trainer, 1)), "new nodes have no moments"
    for name, tensor in copied.items():
        assert torch.equal(trainer.bank.parameters(1)[f"{name}_1"][0], tensor)
    # Warm-up: new nodes alone learn.
    fresh = state_of(trainer, 1)
    metrics = train_step(trainer)
    assert metrics["signal/frac"] > 0
    assert is_equal(state_of(trainer, 0), old)
    assert not is_equal({name: state_of(trainer, 1)[name] for name in fresh}, fresh)
    train_step(trainer)
    steps = [{int(t) for name, t in state_of(trainer, g).items() if name.endswith(".step")} for g in (0, 1)]
    assert steps == [{3}, {2}]


def test_the_record_of_an_immediate_growth_says_how_far_it_is_from_its_parent(alone: Path) -> None:
    five, seven = json.loads((alone / "growth.json").read_text())
    assert "changed_answers" not in five
    change = seven["changed_answers"]
    assert change["n"] == 6
    assert 0 <= change["share"] <= 1
    assert (change["share"] * 6).is_integer()
    assert change["share"] >= abs(change["accuracy_after"] - change["accuracy_before"]) - 1e-9


def test_metrics_and_ledger_follow_the_schedule(alone: Path) -> None:
    records = logged(alone)
    assert [r["open_probability/value"] for r in records] == [1.0, 1.0, 0.0, 0.5, 1.0, 1.0]
    assert ["completion_tokens/node/7/mean" in r for r in records] == [False] * 4 + [True] * 2
    assert all(r["grad_norm/node/1/max"] == 0 for r in records[4:5])  # the warm-up of nodes 6 and 7
    ledger = json.loads((alone / "checkpoints/step-000006/ledger.json").read_text())
    phases = ledger.pop("phases")
    assert [phase["steps"] for phase in phases] == [2, 2, 2]
    # q_proj 32+32, down_proj 48+32, two layers, rank 2.
    assert [phase["trainable_parameters"] for phase in phases] == [n * 2 * 2 * 144 for n in (3, 5, 7)]
    assert ledger.pop("trainable_parameters") == 7 * 2 * 2 * 144
    assert {key: sum(phase[key] for phase in phases) for key in ledger} == ledger


# Stopping and going on


@pytest.mark.parametrize("step", [2, pytest.param(3, marks=pytest.mark.exact), 5])
def test_resume_across_a_growth_is_bit_exact(speaker: Path, alone: Path, tmp_path: Path, step: int) -> None:
    """The run is lost one step after the checkpoint: before a growth, in the midst of an opening, after both."""
    config = make_config(speaker, tmp_path / "run", step_tokens=100)
    broken = start(config)
    with Progress(6) as progress:
        broken.evaluate_once("before", progress, Stop())
    for _done in range(step):
        train_step(broken)
    broken.save()
    train_step(broken)
    # What answers questions meanwhile is the network of the checkpoint.
    loaded = load_run(config.run_path)
    nodes, probability = {2: (3, 1.0), 3: (5, 0.5), 4: (5, 1.0), 5: (7, 1.0)}[step]
    assert (len(loaded.network.topology.nodes), loaded.network.open_probability) == (nodes, probability)
    train_run(config, resume=True)
    assert_same_run(config.run_path, alone)


class Killed(BaseException):
    """What a test raises in the place of a kill."""


@pytest.mark.parametrize(("moment", "number"), [("add_nodes", 1), ("begin_phase", 2), ("write_json", 1), ("tell", 2)])
def test_killed_in_a_growth_a_run_is_before_it(
    speaker: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    """Whatever a growth was doing, the checkpoint is the one before it, and the run goes on as if nothing had been."""
    config, growing = make_config(speaker, tmp_path / "run", step_tokens=100), [0]
    grow = Trainer._grow

    def kill(*args: object, **kwargs: object) -> None:
        raise Killed

    def grow_and_die(trainer: Trainer, growth: Any) -> None:
        growing[0] += 1
        if growing[0] == number:
            owner = {"add_nodes": trainer.bank, "begin_phase": Ledger, "write_json": trainer.run, "tell": trainer}[moment]
            monkeypatch.setattr(owner, moment, kill)
        grow(trainer, growth)

    with monkeypatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "_grow", grow_and_die)
        with pytest.raises(Killed):
            train_run(config)
    folder = RunDirectory.open(config.run_path)
    assert folder.step == 2 * number
    nodes = {int(path.name) for path in (folder.checkpoints()[-1] / "adapters").iterdir()}
    assert nodes == set(range(1, 2 * number + 2))
    train_run(config, resume=True)
    assert_same_run(config.run_path, alone)


DEADLINE = 120.0
PROGRAM = """
import sys; from pathlib import Path; from neuromas.training.config_file import load_toml
from runs import train_run
train_run(load_toml(Path(sys.argv[1])))
"""


@pytest.mark.processes
def test_killed_from_outside_a_growing_run_resumes_to_the_same(speaker: Path, alone: Path, tmp_path: Path) -> None:
    run, toml = tmp_path / "run", tmp_path / "run.toml"
    toml.write_text(
        f'backbone = "{speaker}"\nrun_dir = "{run}"\ndevice = "cpu"\nnum_steps = 6\nexamples_per_step = 4\ngroup_size = 4\n'
        "max_new_tokens = 3\neval_size = 4\neval_every = 0\nvalidation_size = 6\nlr = 0.01\nsave_every = 1\nstep_tokens = 100\n"
        '[adapter]\nrank = 2\ntarget_modules = ["q_proj", "down_proj"]\n'
        '[[growth]]\nat_step = 2\nwidths = [2, 2, 1]\nstart = ["4:copy:1"]\nopening = "annealed"\nopen_steps = 2\n'
        "[[growth]]\nat_step = 4\nwidths = [2, 2, 2, 1]\nwarmup_new = 1\n"
    )
    config = load_toml(toml)
    assert config == make_config(speaker, run, step_tokens=100)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(toml)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + DEADLINE
        while not (run / "growth.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.SystemRandom().uniform(0, 0.2))
    finally:
        process.send_signal(signal.SIGKILL)
    process.wait()
    train_run(config, resume=True)
    assert_same_run(run, alone)


# Growing a finished run


def digest(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def three(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three nodes. Copy it before changing anything in it."""
    run = tmp_path_factory.mktemp("three") / "run"
    train_run(make_config(speaker, run, growth=(), num_steps=2))
    return run


def test_grow_from_the_command_line(call: Call, three: Path, tmp_path: Path) -> None:
    before, child = digest(three), tmp_path / "child"
    flags = ("--to", 2, 2, 1, "--steps", 2, "--start", "4:copy:1", "--run-dir", child)
    status, out, _ = call("grow", three, *flags, "--opening", "annealed", "--open-steps", 2, "--dry-run")
    assert (status, child.exists()) == (0, False)
    assert "new: (4) in layer 1, copy of node 1; (5) in layer 2, zero" in out
    status, out, err = call("grow", three, *flags)
    assert status == 0, err
    assert "kept, with their adapters: (1) (2) (3)" in err
    assert re.search(r"opening at once changed \d+\.\d% of 6 greedy validation answers \(right before .*, floor 50\.0%\)", err)
    assert "before training, test: " in out
    assert digest(three) == before
    parent, ledger = (json.loads(next(r.glob("checkpoints/*-" + e)).joinpath("ledger.json").read_text())
                      for r, e in ((three, "000002"), (child, "000004")))  # fmt: skip
    assert f"trainable parameters from here on: {ledger['trainable_parameters']:,}\n" in err
    assert ledger["trainable_parameters"] == parent["trainable_parameters"] * 5 // 3
    assert ledger["phases"][0] == {key: value for key, value in parent.items() if key != "phases"}
    for key in ("steps", "rollouts", "calls", "sampled_tokens"):
        assert ledger[key] == parent[key] + ledger["phases"][1][key]
        assert ledger["phases"][1][key] > 0
    origin = json.loads((child / "parent.json").read_text())
    state = (three / "checkpoints/step-000002/state.json").read_bytes()
    assert origin == {
        "run": str(three), "checkpoint": "step-000002", "checksum": hashlib.blake2b(state, digest_size=16).hexdigest(),
    }  # fmt: skip
    scores = [json.loads((run / "evaluation.json").read_text()) for run in (three, child)]
    assert scores[1]["before"] == scores[0]["after"]
    assert [record["step"] for record in logged(child)] == [2, 3]
    status, out, _ = call("show", child)
    assert out.splitlines()[0].split() == ["question", "─▶", "(1)", "─▶", "(2)", "─▶", "(3)", "─▶", "answer"]
    assert out.splitlines()[1].split() == ["[4]", "[5]"]
    assert "drawing: (k) kept, [k] new in the last growth; all open" in out
    assert f"grown from: {three}, step-000002" in out
    assert "of that in phase 2: " in out
    # A grown run is a run: it grows on, answers and is shown.
    assert call("grow", child, "--connect", 1, 3, "--steps", 1, "--run-dir", tmp_path / "further")[0] == 0
    assert call("ask", tmp_path / "further", "Take 1 step.")[0] == 0
    nodes = json.loads(call("show", tmp_path / "further", "--json")[1])["nodes"]
    assert [node["writes_to"] for node in nodes if node["id"] == 1] == [[2, 3, 5]]


def test_a_grown_run_equals_the_schedule_in_one_run(speaker: Path, three: Path, tmp_path: Path) -> None:
    """Same adapters, same moments: the only thing between them is a copy of a checkpoint."""
    entry = dataclasses.replace(FIVE, opening="immediate", restart_lr=True)
    at_once = start(make_config(speaker, tmp_path / "at-once", num_steps=4, growth=(entry,)))
    for _step in range(4):
        train_step(at_once)
    parent = RunDirectory.open(three)
    config = grown_config(parent, dataclasses.replace(FIVE, opening="immediate"), steps=2, run_dir=tmp_path / "child")
    train_run(config, parent=parent)
    child = start(config, resume=True)
    # The learning rate of the first two steps: a warm-up of 5 that the end cut off, in both.
    assert is_equal(state_of(child), state_of(at_once))
    assert child.ledger == at_once.ledger


@pytest.mark.parametrize("shared", [False, True])
def test_a_finished_run_trains_on_as_it_is(call: Call, speaker: Path, tmp_path: Path, shared: bool) -> None:
    adapter = AdapterConfig(rank=2, target_modules=("q_proj",), shared=shared)
    config = make_config(speaker, tmp_path / "run", growth=(), num_steps=2, warmup_steps=0, final_lr=0.0, adapter=adapter)
    train_run(config)
    parent = RunDirectory.open(tmp_path / "run")
    status, _, err = call("grow", parent.path, "--steps", 3)
    assert status == 0
    assert "step 2: training goes on with the same network, [1, 1, 1]" in err
    child = RunDirectory.open(tmp_path / "run-to-1-1-1")
    assert (child.step, child.scores("before")) == (5, parent.scores("after"))
    # The schedule begins anew, where the parent's would have ended at 0.
    assert [record["lr/value"] for record in logged(child.path) if record["step"] == 2] == [0.01]
    assert len(drawn(child.path)) == 3 * 4
    assert drawn(child.path).isdisjoint(drawn(parent.path))
    assert call("show", child.path).status == 0


def drawn(run: Path) -> set[str]:
    """Return the questions of a run's training steps."""
    return {record["example"] for record in logged(run, "rollouts.jsonl") if record["split"] == "train"}


def test_show_of_a_network_half_open(call: Call, speaker: Path, tmp_path: Path) -> None:
    trainer = start(make_config(speaker, tmp_path / "run", growth=(FIVE,)))
    for _step in range(3):
        train_step(trainer)
    trainer.save()
    status, out, _ = call("show", tmp_path / "run")
    assert status == 0
    assert out.splitlines()[1].split() == ["<4>", "<5>"]
    assert "drawing: (k) kept, <k> new in the last growth, open for 50% of the questions" in out


def test_killed_while_it_is_made_a_child_is_no_run_and_is_made_again(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = RunDirectory.open(three)
    config = grown_config(parent, FIVE, steps=2, run_dir=tmp_path / "child")

    def kill(*args: object) -> None:
        raise Killed

    for name in ("write_json", "initialise"):
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, name, kill)
            with pytest.raises(Killed):
                train_run(config, parent=parent)
        assert not (tmp_path / "child/config.json").exists()
    train_run(config, parent=parent)
    assert RunDirectory.open(tmp_path / "child").step == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup-new", 1], r"growth changes nothing: .* widths \[1, 1, 1\] .*; without any flag of a growth a run"),
        (["--to", 1, 1], r"widths \[1, 1, 1\] does not fit into \[1, 1\]; nodes and layers are added, never removed$"),
        (["--to", 1, 0, 1], r"--to must be positive widths, e\.g\. 2 2 1, got 1 0 1$"),
        (["--to", 1, 1, 1], r"growth changes nothing: .* widths \[1, 1, 1\] .*; without any flag of a growth a run"),
        (["--edges", 1, 3, 2, 3], r"growth must keep every edge, it removes 1->2 and puts no new nodes between them$"),
        (["--edges", 1, 2, 2, 3, 1, 4], r"must lead to one output node, got 2 nodes that send to nobody: \[3, 4\]"),
        (["--edges", 1, 2], r"growth must keep every node, it removes \[3\]; a network never shrinks$"),
        (["--edges", 1, 2, "--to", 2, 2, 1], r"growth\.edges and growth\.widths, new_layers, connect exclude each other"),
        (["--connect", 1, 3, "--new-layers", 2], r"growth\.new_layers names layers of growth\.widths; give both$"),
        (["--connect", 1, 2], r"connect: the edge 1->2 is there already$"),
        (["--to", 2, 2, 1, "--start", "copy:9"], r"growth\.start 'copy:9': node 9 is none of the parent's nodes"),
        (["--to", 2, 2, 1, "--noise", -1], r"growth\.noise must be at least 0, got -1\.0$"),
        (["--to", 2, 2, 1, "--warmup-new", -1], r"growth\.warmup_new must be at least 0, got -1$"),
        (["--to", 2, 2, 1, "--opening", "annealed", "--open-steps", 0], r"growth\.open_steps must be at least 1, got 0$"),
        (
            ["--to", 2, 2, 1, "--opening", "annealed", "--open-steps", 9, "--steps", 3],
            r"growth\.open_steps must be such that it is open by step 5, got 9$",
        ),
        (["--to", 2, 2, 1, "--step-tokens", 100], r"--step-tokens: run .* has 0; with a budget a run draws other questions"),
        (["--to", 2, 2, 1, "--steps", 0], r"--steps must be at least 1, got 0$"),
        (["--to", 2, 2, 1, "--task", "web_of_lies"], r"another task, backbone .* it has task\.name = 'navigate' \(got "),
        (["--to", 2, 2, 1, "--backbone", "bundled"], r"another task, .* it has backbone = '.*' \(got 'bundled'\)$"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_no_run(
    call: Call, three: Path, tmp_path: Path, flags: list[object], message: str
) -> None:
    assert_refused(call("grow", three, "--run-dir", tmp_path / "child", *flags), message)
    assert not (tmp_path / "child").exists()


def test_only_a_finished_run_on_its_own_backbone_grows(call: Call, speaker: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "model", tmp_path / "run"
    save_model(make_model("qwen3", says=("Yes", "No")), folder)
    config = make_config(folder, run, growth=(), num_steps=2)
    trainer = start(config)
    train_step(trainer)
    trainer.save()
    status, _, err = call("grow", run, "--to", 2, 2, 1)
    assert status == 2
    assert f"run {run} has done 1 of 2 steps; finish it with neuromas train --resume --run-dir {run} first" in err
    train_step(trainer)
    trainer.save()
    save_model(make_model("qwen3", says=("Yes", ".")), folder)
    status, _, err = call("grow", run, "--to", 2, 2, 1)
    assert status == 2
    assert re.search(rf"--backbone {folder} has other weights now \(checksum \w+\) than run {run} was trained on", err)
    assert not (tmp_path / "run-to-2-2-1").exists()


def test_a_config_that_leaves_the_parent_out_is_no_child(three: Path, speaker: Path, tmp_path: Path) -> None:
    parent = RunDirectory.open(three)
    config = make_config(speaker, tmp_path / "child", growth=(), num_steps=2)
    with pytest.raises(ValueError, match=r"cannot be grown: the config leaves out its growths or its 2 steps$"):
        check_descends(parent, config)


def test_a_checkpoint_of_other_nodes_than_the_config_says_is_refused(speaker: Path, tmp_path: Path) -> None:
    trainer = start(make_config(speaker, tmp_path / "run", growth=()))
    train_step(trainer)
    trainer.save()
    backbone = Backbone.load(str(speaker), device="cpu")
    other = Network(Topology.layered([2, 1, 1]), backbone, adapter=AdapterConfig(rank=2)).adapters
    with pytest.raises(ValueError, match=r"step-000001 holds nodes \[1, 2, 3\], by the run's config it has \[1, 2, 3, 4\]"):
        checkpoint.load(trainer.run, other)


# Schedules


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        (
            (FIVE, dataclasses.replace(SEVEN, at_step=3)),
            r"^growth\.at_step must be 4 \(when the network before it is open\) to 5",
        ),
        ((dataclasses.replace(FIVE, at_step=6),), r"^growth\.at_step must be 0 .* to 5, got 6$"),
        ((dataclasses.replace(FIVE, open_steps=9),), r"^growth\.open_steps must be such that it is open by step 6, got 9$"),
        ((SEVEN, SEVEN), r"^growth\.at_step must be 5 .* to 5, got 4$"),
    ],
)
def test_a_schedule_that_cannot_be(growth: tuple[GrowthConfig, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(num_steps=6, growth=growth).check()


def test_a_growth_that_will_not_fit_is_said_before_the_run(speaker: Path, tmp_path: Path) -> None:
    entry = GrowthConfig(at_step=3, widths=(4, 4, 1))
    set_up(resolve(make_config(speaker, tmp_path / "run", max_new_tokens=64, growth=())))
    with pytest.raises(
        ValueError, match=r"4 messages to a node and --max-new-tokens 64 need up to \d+ tokens, the backbone reads 512"
    ):
        set_up(resolve(make_config(speaker, tmp_path / "run", max_new_tokens=64, growth=(entry,))))


def test_growth_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("num_steps = 6\n[[growth]]\nat_step = 3\nwidths = [2, 2, 1]\nconnect = [[1, 3]]\n")
    config = load_toml(path)
    assert config.growth == (GrowthConfig(at_step=3, widths=(2, 2, 1), connect=((1, 3),)),)
    assert config.run_path == Path("runs/navigate-1-1-1-to-2-2-1-seed0")
    for text, message in [
        ("[[growth]]\nwidth = [1]", r"run\.toml: growth\[0\]: unknown key 'width'; known are at_step, "),
        ("growth = [3]", r"run\.toml: growth\[0\] must be a table, got 3$"),
        ("[[growth]]\nat_step = 'now'", r"run\.toml: growth\[0\]: at_step must be of type int, got 'now'$"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_toml(path)


def test_the_learning_rate_begins_anew_where_a_growth_says_so() -> None:
    entry = GrowthConfig(at_step=6, widths=(2, 2, 1), restart_lr=True)
    config = TrainConfig(lr=1.0, warmup_steps=2, num_steps=12, final_lr=0.2, growth=(entry,))
    # 1/2, 2/2; then 0.2 + 0.8 * (1 + cos(pi * k / 4)) / 2 for k = 0 to 3; twice.
    expected = [0.5, 1.0, 1.0, 0.882843, 0.6, 0.317157] * 2
    assert [learning_rate(config, step) for step in range(12)] == pytest.approx(expected, abs=1e-6)
    alone = dataclasses.replace(config, growth=(dataclasses.replace(entry, restart_lr=False),))
    assert learning_rate(alone, 6) == learning_rate(dataclasses.replace(config, growth=()), 6) < 0.9


# Equal cost


def test_the_number_of_questions_by_hand() -> None:
    assert Pace().questions(1000, 16, 24.0) == 16
    # 1000 tokens at 10 a completion and 24 completions a question: 4.17.
    assert Pace(owed=0, tokens_per_call=10.0).questions(1000, 16, 24.0) == 4
    assert Pace(owed=200, tokens_per_call=10.0).questions(1000, 16, 24.0) == 5
    # At least half and at most twice of the budget, at least 1 and at most 4 times the first: 500, 2000 tokens.
    assert Pace(owed=-900, tokens_per_call=10.0).questions(1000, 16, 24.0) == 2
    assert Pace(owed=9000, tokens_per_call=10.0).questions(1000, 16, 24.0) == 8
    assert Pace(owed=-900, tokens_per_call=100.0).questions(1000, 16, 24.0) == 1
    assert Pace(owed=0, tokens_per_call=1.0).questions(1000, 2, 24.0) == 8


@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 2, 2, 1)])
def test_networks_of_unlike_size_sample_equally_many_tokens(speaker: Path, tmp_path: Path, widths: tuple[int, ...]) -> None:
    budget, steps = 400, 6
    config = make_config(
        speaker, tmp_path / "run", growth=(), topology=TopologyConfig(widths=widths), step_tokens=budget, num_steps=steps,
        examples_per_step=8,
    )  # fmt: skip
    trainer = start(config)
    for _step in range(steps):
        train_step(trainer)
    records = logged(config.run_path)
    # One question more or less is at most 4 rollouts of 3 tokens a node.
    assert trainer.ledger.sampled_tokens == pytest.approx(steps * budget, abs=2 * 4 * 3 * sum(widths))
    assert len({record["questions/sum"] for record in records}) > 1
    assert trainer.ledger.rollouts == sum(4 * record["questions/sum"] for record in records)
