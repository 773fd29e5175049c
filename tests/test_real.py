"""What holds on the bundled backbone holds on a real language model, SmolLM2-135M-Instruct: `make test-real` gets it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import load_peft, plain_logprobs, randomise
from runs import steps_logged, wait_for_steps

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig
from neuromas.graph.growth import Growth, grow_to
from neuromas.model.gguf_file import converted
from neuromas.model.sources import find_backbone
from neuromas.tasks import BooleanExpressions
from neuromas.training.load_run import load_run
from neuromas.types import Group

pytestmark = pytest.mark.real

NAME = "smollm2-135m"
STEPS = 3
LOGPROB_BOUND = 1e-4
"""Of float32 through 30 layers."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(NAME, device="cpu")


def start_training(run: Path, *more: str) -> "subprocess.Popen[bytes]":
    """Start a short run of two nodes in a process of its own."""
    command = [
        sys.executable, "-m", "neuromas.cli", "train", "--backbone", NAME, "--run-dir", str(run), "--widths", "1", "1",
        "--task", "boolean_expressions", "--num-steps", str(STEPS), "--examples-per-step", "2", "--group-size", "4",
        "--max-new-tokens", "12", "--eval-size", "2", "--eval-every", "0", "--save-every", "1", "--warmup-steps", "0",
        "--centring", "none", "--format-bonus", "1", "--device", "cpu", *more,
    ]  # fmt: skip
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start_training(run).wait() == 0, run.with_suffix(".log").read_text()
    return run


def test_it_answers(backbone: Backbone) -> None:
    assert backbone.has_own_decoder
    assert backbone.tokenizer.chat_template
    network = Network(Topology.layered([1]), backbone, max_new_tokens=24)
    assert "Paris" in network.ask("What is the capital of France?", answer_format="Answer the question.").answer


def written(groups: list[Group]) -> list[tuple[Any, ...]]:
    return [(c.node, c.prompt, c.sample) for group in groups for rollout in group for c in rollout.completions]


def test_a_closed_growth_writes_what_its_parent_writes(backbone: Backbone) -> None:
    parent = Topology.layered([1, 1])
    network = Network(parent, backbone, adapter=AdapterConfig(rank=4), max_new_tokens=12)
    randomise(network.adapters, 0.01)
    examples = BooleanExpressions().examples("validation", 2)
    before = network.rollout(examples, 2, seed=(0,))
    network.grow(Growth(parent, grow_to(parent, (2, 1, 1)), ((3, None), (4, None))))
    assert written(network.rollout(examples, 2, seed=(0,))) == written(before)
    network.open_probability = 1.0
    opened = network.rollout(examples, 2, seed=(0,))
    assert {c.node for c in opened[0][0].completions} == {1, 2, 3, 4}


def test_a_run_that_is_killed_resumes_to_the_same_adapters(alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_training(run)
    try:
        wait_for_steps(process, run, 1, run.with_suffix(".log"))
    finally:
        process.kill()
    process.wait()
    assert 1 <= steps_logged(run) < STEPS
    assert start_training(run, "--resume").wait() == 0, run.with_suffix(".log").read_text()
    newest = Path("checkpoints") / f"step-{STEPS:06d}"
    names = [f"adapters/{node}/adapter_model.safetensors" for node in (1, 2)] + ["optimizer.safetensors", "ledger.json"]
    for name in (*(newest / name for name in names), Path("evaluation.json")):
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert any(step["grad_norm/node/2/max"] > 0 for step in steps)


def test_trained_adapters_are_the_same_in_plain_peft(alone: Path) -> None:
    loaded = load_run(alone)
    examples = loaded.task.examples("validation", 1)
    groups = loaded.network.rollout(examples, 2, seed=("peft",))
    for place, node in enumerate((1, 2)):
        model = load_peft(converted(Path(find_backbone(NAME))), alone / "adapters" / str(node))
        with torch.no_grad():
            for rollout in groups[0]:
                completion = rollout.completions[place]
                expected = plain_logprobs(model, completion).tolist()
                assert completion.sample.logprobs == pytest.approx(expected, rel=0, abs=LOGPROB_BOUND)
