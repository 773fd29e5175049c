"""Multiagent finetuning: who is called with what, what goes into which set, what is learned; a run goes on bit for bit.

1. Three agents, two rounds, worked by hand on scripted texts: question A is voted right, question B wrong.
2. An adapter learns the mean -log p of its own texts' tokens and nothing else.
3. A run that dies goes on to the same bits.
"""

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Call, assert_refused
from matplotlib import pyplot
from models import load_backbone, make_model, randomise, save_model

from neuromas import Backbone, Topology
from neuromas.cli.finetune import SOCIETY
from neuromas.cli.plot import plot_run
from neuromas.compare.iterations import iterations_of, rows_of, write_run_report
from neuromas.compare.methods import METHODS, CellSpec
from neuromas.compare.methods.finetuned import Finetuned, spread
from neuromas.config import AdapterConfig, PromptConfig, TaskConfig, TopologyConfig, TrainConfig
from neuromas.graph.society import SocietyConfig
from neuromas.model.sizes import sizes
from neuromas.rollout.network import Diverged
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.rollout.society import Society
from neuromas.system import files
from neuromas.system.files import write_file
from neuromas.tasks import Navigate, with_repeats
from neuromas.training import diversity
from neuromas.training.diversity import distinct_bigrams, measure
from neuromas.training.finetune import finetune, finetuner_of, iterate_to_end, read_iterations
from neuromas.training.learner import TorchLearner
from neuromas.training.plan import resolve
from neuromas.training.pseudo_labels import Sets, collect, schedule
from neuromas.training.run_directory import RunDirectory
from neuromas.training.signals import Interrupted
from neuromas.types import Completion, Example, Request, Rollout

TASK = Navigate()
A = Example("a", "Question a?", "Yes", TASK.answer_format)
B = Example("b", "Question b?", "Yes", TASK.answer_format)
SMALL = AdapterConfig(rank=2, target_modules=("q_proj", "v_proj"))
SAID = {
    ("a", 1): ["Answer: Yes", "Answer: No", "It is. Answer: Yes"],
    ("a", 2): ["Still Answer: Yes", "I see. Answer: Yes", "Answer: No"],
    ("b", 1): ["Answer: No", "It is not. Answer: No", "Answer: Yes"],
    ("b", 2): ["Answer: No", "Answer: No", "You are right. Answer: No"],
}
"""What each agent says, by question and round."""


def say(request: Request) -> str:
    example, _, key = request.seed[-3:]
    kind, agent = str(key).split("/")[2:]
    number = int(str(key).split("/")[1])
    return f"Summary {agent} of {example}." if kind == "summary" else SAID[str(example), number][int(agent)]


def make_society(backbone: Backbone, *, widths: tuple[int, ...] = (3, 3), **settings: Any) -> tuple[Society, ScriptedEngine]:
    engine = ScriptedEngine(say)
    config = SocietyConfig(**{"rounds": 2, "corrections": 0.5, **settings})
    topology = Topology.layered(widths, vote=True)
    return Society(config, topology, backbone, read=TASK.parse_answer, adapter=SMALL, engine=engine), engine


def debated(society: Society) -> list[Rollout]:
    return [group[0] for group in society.rollout([A, B], 1, seed=("x",), temperature=1.0)]


def texts_of(by_node: dict[int, list[Any]]) -> dict[int, list[str]]:
    """Return texts, of a dialogue the last one."""
    return {n: [t.text if isinstance(t, Completion) else t[-1].text for t in found] for n, found in by_node.items()}


# 1. The debate


def read_by(society: Society, engine: ScriptedEngine) -> list[tuple[int, str]]:
    """Return who was called, in order, and what each read."""
    detokenize = society.backbone.detokenize
    return [(r.node, detokenize((*r.prompt.prefix_ids, *r.prompt.suffix_ids)).strip()) for r in engine.requests]


def test_who_is_called_with_what(tiny_backbone: Backbone) -> None:
    society, engine = make_society(tiny_backbone)
    first, second = debated(society)
    calls = read_by(society, engine)
    assert [node for node, _ in calls] == [1, 2, 3] * 2 + [0] * 6 + [4, 5, 6] * 2
    alone = f"Question a?\n\nWork in a few short steps, then answer.\n{TASK.answer_format}"
    assert [text for _, text in calls[:3]] == [alone] * 3
    assert calls[6] == (
        0,
        "Question a?\n\nAnswers of other agents:\n1. Answer: No\n2. It is. Answer: Yes\nSummarise the different opinions of "
        "these agents and explain their reasoning.",
    )
    assert calls[13] == (
        5,
        "Question a?\n\nYour answer: Answer: No\nSummary of the answers of other agents: Summary 1 of a.\nExamine this as "
        f"additional advice and give an updated answer.\n{TASK.answer_format}",
    )
    # The vote: Yes by two of three; the first of them is the answer.
    assert (first.answer, second.answer) == ("Still Answer: Yes", "Answer: No")
    assert [[c.text for c in of_round] for of_round in society.answers_of(first)] == [SAID["a", 1], SAID["a", 2]]
    assert society.config.calls(3) == 9 == len(first.completions)


def test_without_summary_and_critics_agents_read_each_other_in_full(tiny_backbone: Backbone) -> None:
    society, engine = make_society(tiny_backbone, widths=(3,), summary=False)
    debates = debated(society)
    calls = read_by(society, engine)
    assert [node for node, _ in calls] == [1, 2, 3] * 4
    assert calls[6] == (
        1,
        "Question a?\n\nYour answer: Answer: Yes\nAnswers of other agents:\n1. Answer: No\n2. It is. Answer: Yes\nExamine this "
        f"as additional advice and give an updated answer.\n{TASK.answer_format}",
    )
    assert society.config.calls(3) == 6
    sets = collect(society, TASK, debates, seed=())
    assert (sorted(sets.by_node()), sets.corrections, sets.keeps) == ([1, 2, 3], {}, {})


def test_a_single_agent_votes_with_itself_and_goes_on_alone(tiny_backbone: Backbone) -> None:
    society, engine = make_society(tiny_backbone, widths=(1,), rounds=1, samples=3)
    first, _ = debated(society)
    assert [request.node for request in engine.requests] == [1] * 6
    assert (first.answer, society.config.calls(1)) == ("Answer: Yes", 3)
    assert texts_of(collect(society, TASK, [first], seed=()).first_answers) == {1: ["Answer: Yes", "It is. Answer: Yes"]}
    # One generation agent with one critic has no others to read.
    society, engine = make_society(tiny_backbone, widths=(1, 1))
    debated(society)
    assert read_by(society, engine)[2] == (2, f"Question a?\n\nYour answer: Answer: Yes\n{TASK.answer_format}")


def test_an_answer_may_be_begun_and_that_is_not_sampled(tiny_backbone: Backbone) -> None:
    engine = ScriptedEngine(lambda request: " Yes")
    society = Society(
        SocietyConfig(rounds=2), Topology.layered((2, 2), vote=True), tiny_backbone, read=TASK.parse_answer, engine=engine,
        prompt=PromptConfig(begin_answer="Answer:"),
    )  # fmt: skip
    (rollout,) = society.rollout([A], 1, seed=(), temperature=1.0)[0]
    assert [c.text for c in rollout.completions] == ["Answer: Yes"] * 2 + [" Yes"] * 2 + ["Answer: Yes"] * 2
    assert read_by(society, engine)[0][1].endswith("Answer:")


def test_a_question_that_is_debated_again_is_drawn_anew(tiny_backbone: Backbone) -> None:
    society, engine = make_society(tiny_backbone)
    engine._script = lambda request: "Answer: Yes"
    society.rollout(with_repeats([A, B, A]), 1, seed=("x",), temperature=1.0)
    seeds = [request.seed for request in engine.requests]
    assert len(set(seeds)) == len(seeds) == 3 * 9
    debated(society)
    assert {request.seed for request in engine.requests[27:]} == {seed for seed in seeds if seed[-3] in ("a", "b")}


# 2. The sets


def test_sets_hold_what_agrees_with_the_vote(tiny_backbone: Backbone) -> None:
    society, _ = make_society(tiny_backbone)
    sets = collect(society, TASK, debated(society), seed=(0,))
    first = {1: ["Answer: Yes", "Answer: No"], 2: ["It is not. Answer: No"], 3: ["It is. Answer: Yes"]}
    assert texts_of(sets.first_answers) == first
    # Agent 2 was turned to Yes by A, agent 3 to No by B: both are corrections, as nobody knows that B is voted wrong.
    assert texts_of(sets.corrections) == {5: ["I see. Answer: Yes"], 6: ["You are right. Answer: No"]}
    # As many keeps as corrections: agent 1 kept both its answers but has corrected none.
    assert texts_of(sets.keeps) == {4: [], 5: ["Answer: No"]}
    assert texts_of(sets.by_node())[5] == ["I see. Answer: Yes", "Answer: No"]
    assert sets.right == 3 / 7


def test_labels_take_the_place_of_the_vote(tiny_backbone: Backbone) -> None:
    society, _ = make_society(tiny_backbone, labels=True)
    sets = collect(society, TASK, debated(society), seed=(0,))
    assert texts_of(sets.first_answers) == {1: ["Answer: Yes"], 3: ["It is. Answer: Yes", "Answer: Yes"]}
    assert (texts_of(sets.corrections), texts_of(sets.keeps)) == ({5: ["I see. Answer: Yes"]}, {4: []})
    assert sets.right == 1


@pytest.mark.parametrize(("share", "drawn"), [(0.5, 2), (0.667, 1), (1.0, 0), (0.2, 3), (5e-324, 3)])
def test_the_weight_is_the_share_of_corrections(tiny_backbone: Backbone, share: float, drawn: int) -> None:
    society, _ = make_society(tiny_backbone, corrections=share)
    debates = debated(society)
    # Agent 2: a correction in A, a keep in B. Two of one and three of the other.
    sets = collect(society, TASK, [debates[0]] * 2 + [debates[1]] * 3, seed=(0,))
    assert (len(sets.corrections[5]), len(sets.keeps[5])) == (2, drawn)


def test_nothing_is_learned_from_debates_without_an_answer(tiny_backbone: Backbone) -> None:
    society, engine = make_society(tiny_backbone)
    engine._script = lambda request: "?"
    assert collect(society, TASK, debated(society), seed=()) == Sets({}, {}, {}, 0.0)


def test_a_schedule_goes_through_a_set_evenly() -> None:
    parts = schedule(5, 2, 4, (0,))
    assert [len(part) for part in parts] == [2, 3, 2, 3]
    order = [index for part in parts for index in part]
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:]


# 3. What is learned, and what is measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a backbone that rarely writes anything but Yes, No or nothing."""
    return save_model(make_model("qwen3", says=("Yes", "No")), tmp_path_factory.mktemp("speaker"))


def speaking(folder: Path, **adapter: Any) -> Society:
    society = Society(
        SocietyConfig(rounds=2), Topology.layered((2, 2), vote=True), load_backbone(folder), read=TASK.parse_answer,
        adapter=dataclasses.replace(SMALL, **adapter), max_new_tokens=3,
    )  # fmt: skip
    randomise(society.adapters)
    return society


def test_an_adapter_learns_the_mean_of_its_own_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    society = speaking(folder)
    (rollout,) = society.rollout([A], 1, seed=("y",), temperature=1.0)[0]
    texts = [c for c in rollout.completions if c.node in (1, 4)] * 2
    learner = TorchLearner(society.policy, TrainConfig(max_grad_norm=0.0))
    before = {name: p.detach().clone() for name, p in society.adapters.parameters().items()}
    monkeypatch.setattr(learner, "optimizer", torch.optim.SGD(society.adapters.parameters().values()))
    found = learner.imitate(texts, lr=1.0)
    after = {name: p.detach().clone() for name, p in society.adapters.parameters().items()}
    with torch.no_grad():
        for name, parameter in society.adapters.parameters().items():
            parameter.copy_(before[name])
    # By hand: the mean of -log p over the node's tokens, one node at a time.
    for index, node in ((0, 1), (3, 4)):
        own = [text for text in texts if text.node == node]
        batch = finetune_batch(society, own)
        logprobs_K = society.policy.logprobs(batch)
        assert found[index] == pytest.approx(-logprobs_K.mean().item(), rel=1e-5)
        (-logprobs_K.mean()).backward()
    for name, parameter in society.adapters.parameters().items():
        assert parameter.grad is not None
        torch.testing.assert_close(before[name] - after[name], parameter.grad, rtol=1e-3, atol=1e-6)
        assert torch.equal(before[name][1:3], after[name][1:3])
        assert not torch.equal(before[name][0], after[name][0])


def test_an_adapter_without_a_text_in_a_step_keeps_its_weights_and_its_moments(folder: Path) -> None:
    society = speaking(folder)
    (rollout,) = society.rollout([A], 1, seed=("y",), temperature=1.0)[0]
    of_first, of_last = rollout.completions[0], rollout.completions[-1]
    learner = TorchLearner(society.policy, TrainConfig())

    def held(index: int) -> list[torch.Tensor]:
        moments = [tensor for name, tensor in learner.state().items() if not name.endswith(".step")]
        return [stack[index].detach().clone() for stack in (*learner.bank.parameters().values(), *moments)]

    learner.imitate([of_first, of_last], lr=0.1)
    first, last = held(0), held(3)
    learner.imitate([of_first], lr=0.1)
    assert all(map(torch.equal, last, held(3)))
    assert not any(map(torch.equal, first, held(0)))
    learner.imitate([of_last], lr=0.1)
    assert not any(map(torch.equal, last, held(3)))


def finetune_batch(society: Society, texts: list[Completion]) -> Any:
    from neuromas.training.reinforce import Batch

    batch = Batch(tuple((text, 1.0) for text in texts), 1, society.policy.routing, 1.0)
    (part,) = batch.split(10_000, society.backbone.device)
    return part.rows


def test_an_update_that_is_no_number_changes_nothing(folder: Path) -> None:
    society = speaking(folder)
    (rollout,) = society.rollout([A], 1, seed=("y",), temperature=1.0)[0]
    with torch.no_grad():
        next(iter(society.adapters.parameters().values())).fill_(float("nan"))
    with pytest.raises(Diverged, match="the loss is nan, the largest gradient norm"):
        TorchLearner(society.policy, TrainConfig()).imitate(rollout.completions[:2], lr=0.1)
    with pytest.raises(Diverged, match="agent 1 samples tokens from log-probabilities that are not finite"):
        society.rollout([A], 1, seed=("y",), temperature=1.0)


def test_diversity_by_hand(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    society, _ = make_society(tiny_backbone)
    monkeypatch.setattr(diversity, "_likelihoods", lambda *args: (1.0, 1.5))
    found = measure(society, TASK, debated(society), tokens_per_micro_batch=1000)
    # First answers: two of three right in A, one in B. Right pairs: "Answer: Yes" and "It is. Answer: Yes" in A, none in B.
    assert (found.first_accuracy, found.different_texts) == (0.5, 1.0)
    # ^Answer: Answer:-Yes Yes$ | ^It It-is. is.-Answer: Answer:-Yes Yes$: 6 of 8 are distinct.
    assert found.distinct_bigrams == distinct_bigrams("Answer: Yes", "It is. Answer: Yes") == 6 / 8
    # Last round: one pair of three agrees in A, all three in B.
    assert found.consensus == pytest.approx((1 / 3 + 1) / 2)


def test_likelihood_under_others_is_that_of_their_adapters(folder: Path) -> None:
    society = speaking(folder)
    debates = [group[0] for group in society.rollout([A, B], 1, seed=("y",), temperature=1.0)]
    found = measure(society, TASK, debates, tokens_per_micro_batch=1000)
    firsts = [text for debate in debates for text in society.answers_of(debate)[0]]
    own = [lp for text in firsts for lp in text.sample.logprobs]
    assert found.nll_own == pytest.approx(-sum(own) / len(own), rel=1e-3)
    swapped = [dataclasses.replace(text, node=3 - text.node) for text in firsts]
    assert found.nll_other == pytest.approx(diversity.mean_nll(society.policy, swapped, 1000))
    assert found.nll_other != pytest.approx(found.nll_own)
    shared = speaking(folder, shared=True)
    assert measure(shared, TASK, debates, tokens_per_micro_batch=1000).nll_other is None


# 4. Runs


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> TrainConfig:
    return dataclasses.replace(
        SOCIETY, topology=TopologyConfig(widths=(2, 2), vote=True), backbone=str(folder), device="cpu", adapter=SMALL,
        num_steps=2, examples_per_step=4, max_new_tokens=3,
        eval_size=2, validation_size=2, run_dir=tmp_path / "run", lr=0.01,
        society=SocietyConfig(rounds=2, batch=12), prompt=PromptConfig(wording="chat", begin_answer="Answer:"),
    )  # fmt: skip


def run_to_end(config: TrainConfig, run: str) -> Path:
    config = dataclasses.replace(config, run_dir=config.run_path.parent / run)
    with finetuner_of(resolve(config), RunDirectory.find(config, resume=True)) as (finetuner, progress):
        iterate_to_end(finetuner, progress)
    return config.run_path


def left_by(run: Path) -> tuple[dict[str, bytes], list[Any]]:
    """Return what must be equal of two runs: adapters bit for bit, and all that was measured and logged but seconds."""
    adapters = {
        str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "checkpoints").glob("*/adapters/*/*.safetensors"))
    }
    logs = [json.loads((run / "iterations.json").read_text()), (run / "rollouts.jsonl").read_text()]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return adapters, [*logs, [{k: v for k, v in line.items() if "second" not in k} for line in lines]]


class Killed(BaseException):
    """What a test raises in the place of a kill."""


@pytest.mark.exact
def test_a_run_that_dies_while_it_learns_goes_on_to_the_same_bits(config: TrainConfig) -> None:
    whole = left_by(run_to_end(config, "whole"))
    assert len(whole[0]) >= 8
    assert [measured["iteration"] for measured in whole[1][0]] == [0, 1, 2]
    with pytest.MonkeyPatch.context() as patch:
        # In the first gradient step of the second iteration.
        patch.setattr(TorchLearner, "imitate", dying(TorchLearner.imitate, 1 + whole_steps(config)))
        with pytest.raises(Killed):
            run_to_end(config, "killed")
    assert RunDirectory.open(config.run_path.parent / "killed").step == 1
    assert left_by(run_to_end(config, "killed")) == whole


def whole_steps(config: TrainConfig) -> int:
    """Return the gradient steps of the first iteration of the run that was left alone."""
    lines = (config.run_path.parent / "whole" / "metrics.jsonl").read_text().splitlines()
    return int(json.loads(lines[0])["finetuning_steps/sum"])


def dying(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Return a function that raises Killed when it is called for the n-th time."""
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return function(*args, **kwargs)

    return call


def test_a_run_learns_counts_and_answers_as_before(config: TrainConfig, call: Call) -> None:
    run = config.run_path
    flags = ["--backbone", config.backbone, "--widths", 2, 2, "--num-steps", 2, "--examples-per-step", 4, "--max-new-tokens", 3,
             "--eval-size", 2, "--validation-size", 2, "--device", "cpu", "--adapter.rank", 2, "--lr", 0.01, "--run-dir", run,
             "--society.batch", 8, "--seed", 3, "--wording", "chat", "--prompt.begin-answer", "Answer:"]  # fmt: skip
    done = call("finetune", *flags)
    assert done.status == 0, done.err
    assert "after finetuning, test: " in done.out
    assert "society: rounds of a debate: 2" in call("show", run).out
    description = json.loads(call("show", run, "--json").out)
    ledger = description["ledger"]
    # Six calls a debate (2 answers, 2 summaries, 2 answers); evaluation is not training.
    assert (ledger["steps"], ledger["questions"], ledger["rollouts"], ledger["calls"]) == (2, 8, 8, 48)
    assert description["calls_per_answer"] == 6
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ledger["optimizer_steps"] == sum(line["finetuning_steps/sum"] for line in lines) > 0
    assert all(line["nll/last/mean"] > 0 for line in lines)
    # The same questions at the same seed and temperature: a score of the run, measured once more.
    again = json.loads(call("eval", run, "--size", 2, "--json").out)
    assert again == json.loads((run / "evaluation.json").read_text())["after"]["test"]
    page = (run / "iterations.md").read_text()
    assert [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| society")] == ["0", "1", "2"]
    assert (run / "iterations.svg").read_text().startswith("<?xml")
    for name in ("iterations.svg", "curve.png"):
        assert_keeps_its_picture(call, run, name)
    assert_refused(call("ask", run, "Why?"), "these settings are a society's .society.rounds., which debates and is no network")
    assert_refused(call("grow", run, "--to", 3, 3), "is a society, which does not grow; start a larger one")
    start, *later = read_iterations(RunDirectory.open(run))
    no_iteration = r"iterations.json is damaged \(an entry is no iteration\)"
    for damaged, message in (
        ([3], no_iteration),
        ([{"iteration": 0}], no_iteration),
        ([start | {"right": {}}], no_iteration),
        (
            [start | {"right": {"another": 1.0}}, *later],
            r"iterations.json is damaged \(its iterations have different questions",
        ),
    ):
        (run / "iterations.json").write_text(json.dumps(damaged))
        assert_refused(call("finetune", "--resume", "--run-dir", run), message)


def assert_keeps_its_picture(call: Call, run: Path, name: str) -> None:
    """Resume a complete run on a disk that is full when this picture is written, and look at what is left of it."""
    before = (run / name).read_bytes()

    def write(path: Path, data: bytes) -> None:
        if path.name.startswith(name):
            path.write_bytes(data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_file", write)
        outcome = call("finetune", "--resume", "--run-dir", run)
    assert (outcome.status, "after finetuning, test: " in outcome.out) == (2, True)
    assert outcome.err.splitlines()[-1] == (
        f"error: --run-dir {run}: the run is complete, but its pictures cannot be written (No space left on device). "
        "Make room and run the same command with --resume"
    )
    assert (run / name).read_bytes() == before


def test_a_single_agent_spends_its_tokens(config: TrainConfig) -> None:
    alone = dataclasses.replace(
        config, topology=TopologyConfig(widths=(1,)), society=SocietyConfig(rounds=1, samples=2, batch=12), train_tokens=160,
        eval_every=0,
    )  # fmt: skip
    run = RunDirectory.open(run_to_end(alone, "alone"))
    ledger = run.read_json(f"checkpoints/{run.newest()[0].name}/ledger.json", dict)
    # A pass over few questions at a time may exceed the budget by those.
    assert 160 <= ledger["sampled_tokens"] < 160 + 4 * 3
    records = [json.loads(line) for line in (run.path / "rollouts.jsonl").read_text().splitlines()]
    assert len(records) == ledger["questions"] == 8
    assert sum(len(record["texts"]) for record in records) == ledger["calls"] > 16
    assert "Nothing was validated" in write_run_report(run).read_text()


def test_a_run_ends_by_the_iteration_that_spends_its_tokens(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = dataclasses.replace(
        config, topology=TopologyConfig(widths=(1,)), society=SocietyConfig(rounds=1, batch=12), train_tokens=1, num_steps=3,
        eval_every=3,
    )  # fmt: skip
    run = RunDirectory.open(run_to_end(alone, "alone"))
    assert "--train-tokens are spent after 1 of 3 iterations" in capsys.readouterr().err
    assert (run.step, len(run.metrics())) == (1, 1)
    assert [measured["iteration"] for measured in read_iterations(run)] == [0, 1]
    drawn: list[Any] = []
    run.write_json("evaluation.json", {"after": {"test": {"accuracy": 0.5, "low": 0.25, "high": 0.75, "floor": 0.5, "n": 2}}})
    monkeypatch.setattr(pyplot, "close", drawn.append)
    run.log_metrics(1, {"loss/mean": 1.0})  # a line without a reward or a validation is no point
    plot_run(run)
    (axes,) = drawn[0].axes
    assert [line.get_xdata().tolist() for line in axes.lines[:2]] == [[1], [1]]
    points = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    assert "validation accuracy, by debate and vote, 95% interval" in points
    assert points["test (n 2)"].lines[0].get_xdata().tolist() == [1]


def test_a_validation_question_that_a_list_holds_twice_is_measured_once(config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "twice.jsonl"
    numbers, splits = (0, 1, 2, 3, 3, 4), ("train", "train", "validation", "validation", "validation", "test")
    records = [{"question": f"Is {n} even?", "answer": "Yes", "split": s} for n, s in zip(numbers, splits, strict=True)]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    config = dataclasses.replace(config, task=TaskConfig(name=f"jsonl:{file}"), validation_size=3)
    with finetuner_of(resolve(config), RunDirectory.find(config, resume=False)) as (finetuner, _):
        assert [example.question for example in finetuner.validation.examples] == ["Is 2 even?", "Is 3 even?"]


def test_a_run_that_diverges_says_what_to_do(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*args: object, **kwargs: object) -> None:
        raise Diverged("the loss is nan")

    monkeypatch.setattr(TorchLearner, "imitate", diverge)
    kept = "there is no good checkpoint. Start again, in another --run-dir, with a lower --lr"
    with pytest.raises(ValueError, match=f"iteration 1: the loss is nan. Finetuning has diverged and is stopped; {kept}"):
        run_to_end(config, "run")


@pytest.mark.parametrize(
    ("changes", "when"),
    [
        ({"num_steps": 1, "eval_every": 0}, "scoring after finetuning"),
        ({"num_steps": 1}, "validation after iteration 1"),
        ({"eval_every": 0}, "iteration 2"),
    ],
)
def test_adapters_that_cannot_answer_are_no_checkpoint(config: TrainConfig, changes: dict[str, Any], when: str) -> None:
    # One gradient step an iteration, whose loss is that of the adapters before it.
    society = SocietyConfig(rounds=2, epochs=1, batch=10_000)
    config = dataclasses.replace(config, society=society, lr=1e30, warmup_steps=0, **changes)
    message = f"{when}: agent 1 samples .* are not finite. Finetuning has diverged and is stopped; there is no good checkpoint"
    with pytest.raises(ValueError, match=message):
        finetune(resolve(config), RunDirectory.find(config, resume=False))
    assert RunDirectory.open(config.run_path).checkpoints() == []


def test_an_iteration_that_is_stopped_while_it_is_measured_is_not_counted(config: TrainConfig) -> None:
    with finetuner_of(resolve(config), RunDirectory.find(config, resume=False)) as (finetuner, _):
        finetuner.step, finetuner.stop.asked = 1, True
        with pytest.raises(Interrupted, match=r"^stopped after 0 of 2 iterations; continue with"):
            finetuner._measure()


def test_an_iteration_that_teaches_nothing_says_so(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Navigate, "parse_answer", lambda self, text: None)
    run_to_end(dataclasses.replace(config, num_steps=1, eval_every=0), "run")
    expected = "iteration 1: nothing is learned, for no first answer or correction agrees with a vote that can be read"
    assert expected in capsys.readouterr().err


# 5. Mistakes

ALONE = TopologyConfig(widths=(1,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"society": SocietyConfig(rounds=-1)}, "--society.rounds must be at least 1, got -1"),
        ({"society": SocietyConfig(rounds=2, epochs=0)}, "--society.epochs must be at least 1, got 0"),
        ({"society": SocietyConfig(rounds=2, batch=0)}, "--society.batch must be at least 1, got 0"),
        ({"society": SocietyConfig(rounds=2, epochs=1001)}, "--society.epochs must be at most 1,000, got 1001"),
        ({"society": SocietyConfig(rounds=10**9)}, "--examples-per-step x calls of an answer .* at most 100,000, got 2"),
        ({"credit": "replay"}, r"--credit must be shared with --society.rounds \(there are no advantages\), got 'replay'"),
        ({"prompt": PromptConfig(place="You are {node}.")}, "--prompt.place must be left out in a society, .* got 'You are"),
        ({"society": SocietyConfig(rounds=2, corrections=0.0)}, "--society.corrections must be above 0 and at most 1, got 0.0"),
        ({"society": SocietyConfig(rounds=2, samples=2)}, "--society.samples must be 1 with more than one round, got 2"),
        ({"society": SocietyConfig(rounds=1)}, r"--society.rounds must be at least 2 where there are critics .*\[3, 3\]"),
        ({"topology": TopologyConfig(widths=(3, 2), vote=True)},
         r"--topology.widths must be N N .* or N in a society, got \[3, 2\]"),
        ({"topology": ALONE}, r"--topology.widths must hold more than one agent to debate in several rounds, got \[1\]"),
        ({"topology": TopologyConfig(widths=(3, 3), vote=True, skip=True)}, "--topology.edges, --topology.skip and"),
        ({"train_tokens": 5}, "--train-tokens must be 0 with more than one round"),
        ({"replays": 3}, r"--replays must be 1 with --society.rounds \(there are no advantages\), got 3"),
        ({"critic_lr": 0.1}, r"--critic-lr must be 0.02 with --society.rounds \(there is no value head\), got 0.1"),
        ({"group_size": 8}, r"--group-size must be 1 with --society.rounds \(there is one debate of each question\), got 8"),
        ({"kl_coef": 0.5}, r"--kl-coef must be 0.0 with --society.rounds \(there is no reward in its loss\), got 0.5"),
    ],
)  # fmt: skip
def test_settings_that_make_no_society_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(SOCIETY, **settings).check()


def test_mistakes_are_told_before_any_work(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "society.toml"
    file.write_text("[society]\nrounds = 2\n[topology]\nwidths = [3, 3]\nvote = true\n")
    assert_refused(call("train", file), r"settings of a society \(\[society\], --society.\*\) are for `neuromas finetune`")
    assert_refused(
        call("train", "--labels"), r"settings of a society \(\[society\], --society.\*\) are for `neuromas finetune`"
    )
    assert_refused(call("finetune", "--society.rounds", 0), "--society.rounds must be at least 1 to finetune a society, got 0")
    long = ["--backbone", tiny_folder, "--device", "cpu", "--max-new-tokens", 20_000]
    assert_refused(
        call("finetune", *long), "a question of .* tokens .* and 2 texts of --max-new-tokens 20000 to read need up to"
    )
    begun = ["--backbone", tiny_folder, "--device", "cpu", "--max-new-tokens", 8, "--prompt.begin-answer", "So:"]
    assert_refused(call("finetune", *begun), "--prompt.begin-answer 'So:' begins no answer: only words of the task's answer")
    assert list(tmp_path.glob("runs/*")) == []


# 6. Rows of a comparison


def change(name: str) -> Callable[[TrainConfig], TrainConfig]:
    method = METHODS[name]
    assert isinstance(method, Finetuned)
    return method.change


NAMES = [name for name, method in METHODS.items() if isinstance(method, Finetuned)]


def test_all_rows_have_equal_parameters_and_single_agents_equal_calls() -> None:
    assert len(NAMES) == 7
    for adapter in (AdapterConfig(), AdapterConfig(rank=4, alpha=8.0)):
        changed = {name: change(name)(TrainConfig(adapter=adapter)).check() for name in NAMES}
        assert len({sizes(config).trainable for config in changed.values()}) == 1
        calls = {name: config.society.calls(config.topology.widths[0]) for name, config in changed.items()}
        assert calls == dict.fromkeys(NAMES, 9) | {"multiagent_ft_no_summary": 6}
    assert spread(AdapterConfig(rank=4, alpha=8.0), 6) == AdapterConfig(rank=2, alpha=4.0)
    with pytest.raises(ValueError, match=r"--adapter.rank must be such that 3 times it is a multiple of 6, .* got 3"):
        spread(AdapterConfig(rank=3), 6)


def test_a_cell_has_the_iterations_of_its_society(config: TrainConfig, tmp_path: Path) -> None:
    spec = CellSpec("multiagent_ft_shared", dataclasses.replace(config, num_steps=1))
    result = METHODS[spec.method].run(spec, tmp_path)
    assert [(m["iteration"], len(m["right"])) for m in result.iterations] == [(0, 2), (1, 2)]
    assert [(point.step, point.accuracy) for point in result.curve] == [(1, result.iterations[1]["accuracy"])]
    assert result.training is not None
    assert (result.training["questions"], result.training["calls"]) == (4, 4 * 9)
    assert [answer.calls for answer in result.answers["test"]] == [9, 9]
    assert result.best_answers == result.answers
    assert METHODS[spec.method].run(dataclasses.replace(spec, trial=True), tmp_path).answers == {}


def test_iterations_over_seeds_by_hand() -> None:
    def measured(seed: int, iteration: int, right: list[float], consensus: float | None) -> dict[str, Any]:
        names = ("first_accuracy", "different_texts", "distinct_bigrams", "nll_own")
        values = dict.fromkeys(names, 0.5) | {"consensus": consensus, "nll_other": None}
        accuracy, asked = sum(right) / len(right), dict(zip("pqrs", right, strict=False))
        return {"seed": seed, "iteration": iteration, "accuracy": accuracy, "floor": 0.5, "right": asked, **values}

    found = iterations_of(
        [
            measured(0, 0, [0, 0, 0, 1], None), measured(0, 1, [0, 0, 1, 1], 0.5), measured(0, 2, [1, 1, 1, 0], 0.75),
            measured(1, 0, [0, 0, 0, 1], None), measured(1, 1, [0, 1, 0, 0], 0.25), measured(1, 2, [1, 1, 0, 0], 0.25),
            # The other seed has not come so far.
            measured(0, 3, [1, 1, 1, 1], 0.5),
        ]
    )  # fmt: skip
    assert [(each.iteration, each.accuracy) for each in found] == [(0, 0.25), (1, 0.375), (2, 0.625)]
    assert (found[2].by_seed, found[2].measures["consensus"]) == ({0: 0.75, 1: 0.5}, [0.75, 0.25])
    changes = [{base: change.mean for base, change in each.since.items()} for each in found]
    assert changes == [{}, {0: 0.125}, {0: 0.375, 1: 0.25}]
    row = rows_of("Society", found)[2]
    assert (row[:2], row[3], row[7]) == (["Society", "2"], "0: 75.0, 1: 50.0", "50.0 (25.0 to 75.0)")
    assert row[-1] == rows_of("Society", found)[0][7] == "-"
    same = iterations_of([measured(0, number, [0, 1, 1, 0], None) for number in (1, 2)])
    assert rows_of("Society", same)[1][5] == "+0.0 (no interval: all differences are equal)"
    single = [measured(0, number, [number - 1], None) for number in (1, 2)]
    assert rows_of("Society", iterations_of(single))[1][5] == "+100.0 (-100.0 to +100.0)"
    assert iterations_of([]) == []
