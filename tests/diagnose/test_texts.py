"""What texts alone tell, by arithmetic done by hand; and the command, from a run's folder to its files."""

import json
import math
import shutil
from pathlib import Path

import pytest
from commands import Call, assert_refused
from recorded_runs import record_run, rollout

from neuromas.diagnose.history import history
from neuromas.diagnose.texts import joined, specialisation, variety
from neuromas.graph.society import SocietyConfig
from neuromas.training.intervals import paired
from neuromas.training.questions import open_run
from neuromas.view.recorded import RunRecord


def test_nodes_are_told_by_their_words() -> None:
    different = [{1: f"left {n}", 2: f"right {n}", 3: ""} for n in range(10)]
    told = specialisation(different)
    assert told
    # An empty text says nothing: it may be of any of three nodes.
    assert told["by_node"] == {"1": 1.0, "2": 1.0, "3": pytest.approx(1 / 3)}
    assert (told["accuracy"], told["chance"]) == (pytest.approx(7 / 9), pytest.approx(1 / 3))
    alike = specialisation([{1: f"same {n}", 2: f"same {n}"} for n in range(10)])
    assert alike
    assert (alike["accuracy"], alike["chance"], alike["questions"]) == (0.5, 0.5, 10)
    assert alike["low"] < 0.5 < alike["high"]
    assert specialisation([{1: "alone"}] * 4) is None
    assert specialisation([{1: "one", 2: "question"}]) is None


def test_variety_is_counted_in_words_and_pairs() -> None:
    # ^a ab b$ | ^a ac c$: five of six bigrams are distinct. "a b" and "c" have no word in common.
    found = variety([["a b", "a c"], ["c"]])
    assert found["distinct_2"] == pytest.approx(5 / 6)
    assert found["self_similarity"] == 0
    assert found["entropy"] == pytest.approx(-(0.4 * math.log2(0.4) * 2 + 0.2 * math.log2(0.2)))
    assert variety([["x y"], ["y x"]])["self_similarity"] == pytest.approx(1)
    assert variety([[""], [""]]) == {"distinct_2": None, "self_similarity": 1.0, "entropy": None}
    assert joined([("a", "ok"), ("a", "unaddressed"), ("(nothing)", "empty"), ("b", "ok")]) == "a\nb"


def test_an_interval_of_no_change_has_a_width() -> None:
    # Two questions more: variance (1 gained + 1 lost half each) 1 / 10, over 10 questions.
    assert paired([0.0] * 8) == (pytest.approx(-1.96 / 10, rel=1e-4), pytest.approx(1.96 / 10, rel=1e-4))
    # Mean -3 / 10, variance 4 / 10 - 9 / 100.
    reach = 1.96 * math.sqrt((0.4 - 0.09) / 10)
    assert paired([-1.0] * 3 + [0.0] * 5) == (pytest.approx(-0.3 - reach, abs=1e-4), pytest.approx(-0.3 + reach, abs=1e-4))
    assert paired([-1.0])[0] == -1


def test_history_is_by_node_and_step(tmp_path: Path) -> None:
    texts = {1: "TO node 2: a b", 2: "Answer: Yes"}
    lost = {1: "who", 2: "what"}
    records = [
        rollout(texts, reward=1.0), rollout(texts, reward=1.0, rollout=1), rollout(texts, split="test"),
        rollout(lost, step=1, reward=0.0, faults=[[1, 2, "unaddressed"]]), rollout(texts, step=1, reward=1.0, rollout=1),
    ]  # fmt: skip
    run = RunRecord(*open_run(record_run(tmp_path / "r", records), untrained=True))
    found = history(run.rollouts(training_only=True), run.task)
    assert found["steps"] == [1, 2]
    assert found["nodes"]["1"]["distinct_2"] == [0.5, 1.0]
    assert [found["nodes"][node]["faults"] for node in ("1", "2")] == [[0, 0.5], [0, 0.5]]
    assert found["nodes"]["1"]["self_similarity"] == [None, None]
    assert history([], run.task) == {"steps": [], "nodes": {}}


def test_the_command_writes_into_the_run(call: Call, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    outcome = call("diagnose", run, "--limit", 3, "--interventions", "drop", "exchange", "--temperature", 0.7)
    assert outcome.status == 0, outcome.err
    assert "intervention 2 of 2: exchange adapters of 1 and 2, " in outcome.err
    assert "undisturbed, validation: " in outcome.out
    diagnosis = json.loads((run / "diagnosis.json").read_text())
    assert [effect["kind"] for effect in diagnosis["effects"]] == ["drop", "exchange"]
    assert (diagnosis["questions"], diagnosis["split"], diagnosis["step"]) == (3, "validation", 1)
    assert diagnosis["temperature"] == 0.7
    assert (run / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_its_rollouts_is_diagnosed_and_a_damaged_one_refused_at_once(
    call: Call, trained: Path, tmp_path: Path
) -> None:
    """An import has none, unless it was exported with them."""
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (run / "rollouts.jsonl").unlink()
    outcome = call("diagnose", run, "--limit", 2, "--interventions", "drop")
    assert outcome.status == 0, outcome.err
    assert json.loads((run / "diagnosis.json").read_text())["training"] == {"steps": [], "nodes": {}}
    (run / "rollouts.jsonl").write_text("{}\n")
    assert_refused(call("diagnose", run), r"rollouts.jsonl is damaged: a line is no record with a step")


def test_mistakes_are_one_line(call: Call, trained: Path, tmp_path: Path) -> None:
    for flags, message in {
        ("--limit", "0"): r"--limit must be 1 to 999,999, got 0$",
        ("--seed", "-1"): r"--seed must be at least 0, got -1$",
        ("--temperature", "-1"): r"--temperature must be 0 \(greedy\) or at least 0.001, got -1.0$",
        ("--interventions", "stir"): r"invalid choice 'stir' for argument '--interventions'\. Expected one of .'silence', ",
        ("--data", "x"): r"--data must be left out for task navigate, which is no benchmark",
    }.items():
        assert_refused(call("diagnose", trained, *flags), message)
    assert_refused(call("diagnose", tmp_path), r"is no run: expected config.json in it")
    fresh = record_run(tmp_path / "fresh", [])
    assert_refused(call("diagnose", fresh), r"fresh holds no checkpoint yet; train it first$")
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (run / "diagnosis.json.new").mkdir()
    assert_refused(call("diagnose", run), r"RUN .*diagnosis.json cannot be written: Is a directory$")
    society = record_run(
        tmp_path / "society", [], widths=(3,), vote=True, group_size=1, centring="none", society=SocietyConfig(rounds=2)
    )
    (society / "checkpoints/step-000001").mkdir(parents=True)
    assert_refused(call("diagnose", society), r"society is a society that debates, and only networks have")
