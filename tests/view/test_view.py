"""The page of a run holds what the run has recorded, and nothing of it is more than data."""

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import Call, assert_refused
from recorded_runs import DIAGNOSIS, SCORE, record_run, rollout

from neuromas.config import GrowthConfig
from neuromas.graph.society import SocietyConfig
from neuromas.training.questions import open_run
from neuromas.training.run_directory import RunDirectory
from neuromas.view import page
from neuromas.view.page import FOLDER, SCRIPTS, STYLES, build_page
from neuromas.view.recorded import Recorded, RunRecord

TWO = {1: "TO node 2: start", 2: "Answer: Yes"}


def record_of(path: Path) -> RunRecord:
    return RunRecord(*open_run(path, untrained=True))


def heard(path: Path) -> list[Recorded]:
    return record_of(path).rollouts()


def unpack(html: bytes) -> list[Any]:
    """Return the index of a page, and its chunks of rollouts."""
    packed = re.findall(rb'<script type="application/gzip" id="chunk-(\d+)">([^<]*)</script>', html)
    assert [int(number) for number, _ in packed] == list(range(len(packed)))
    return [json.loads(gzip.decompress(base64.b64decode(data))) for _, data in packed]


def test_messages_are_what_was_delivered(tmp_path: Path) -> None:
    texts = {1: "Hm. TO node 3: a TO node 9: lost", 2: "all of it", 3: "Answer: No"}
    faults = [[2, 3, "unaddressed"]]
    (found,) = heard(record_run(tmp_path / "r", [rollout(texts, faults=faults, reward=0.0)], widths=(2, 1)))
    assert found.said["messages"] == [[1, 3, "a", "ok"], [2, 3, "all of it", "unaddressed"]]
    assert found.said["written"] == {1: texts[1]}
    assert found.said["answer"] == {"node": 3, "text": "Answer: No", "read": "No"}
    assert (found.when, found.reward, found.malformed) == ("train", 0.0, True)


def test_headers_that_were_given_are_told_from_those_that_a_node_wrote(tmp_path: Path) -> None:
    texts = {1: "TO node 2: a TO node 3: b\nTO node 3: c\nd", 2: "TO node 4: e", 3: "TO node 4:", 4: "Answer: Yes"}
    records = [rollout(texts, faults=[[3, 4, "empty"]], reward=1.0)]
    (given,) = heard(record_run(tmp_path / "given", records, widths=(1, 2, 1), wording="chat"))
    assert given.said["messages"] == [
        [1, 2, "a TO node 3: b", "ok"], [1, 3, "c\nd", "ok"], [2, 4, "e", "ok"], [3, 4, "(nothing)", "empty"],
    ]  # fmt: skip
    (written,) = heard(record_run(tmp_path / "written", records, widths=(1, 2, 1)))
    assert written.said["messages"][:2] == [[1, 2, "a", "ok"], [1, 3, "b\nc\nd", "ok"]]
    assert given.said["written"] == {}
    # The bundled backbone under another name: it writes all messages in one line.
    records = [rollout({1: "TO node 2: a TO node 3: b", 2: "TO node 4: e", 3: "TO node 4: f", 4: "Answer: Yes"}, reward=1.0)]
    (copy,) = heard(record_run(tmp_path / "copy", records, widths=(1, 2, 1), backbone="copies/bundled"))
    assert copy.said["messages"][:2] == [[1, 2, "a", "ok"], [1, 3, "b", "ok"]]


def test_evaluations_are_rewarded_and_told_before_from_after(tmp_path: Path) -> None:
    records = [
        rollout(TWO, split="test"),
        rollout(TWO, reward=1.0),
        rollout({1: "TO node 2: x", 2: "who knows"}, split="test", step=1),
    ]
    found = heard(record_run(tmp_path / "r", records, num_steps=1))
    assert [(each.when, each.reward, each.malformed) for each in found] == [
        ("before", 1.0, False), ("train", 1.0, False), ("after", 0.0, True),
    ]  # fmt: skip


def test_the_vote_names_the_node_whose_answer_won(tmp_path: Path) -> None:
    texts = {1: "Answer: No", 2: "Answer: Yes", 3: "Answer: Yes"}
    (found,) = heard(record_run(tmp_path / "r", [rollout(texts, split="test")], widths=(3,), vote=True))
    assert found.said["answer"] == {"node": 2, "text": "Answer: Yes", "read": "Yes"}
    assert found.said["written"] == {1: "Answer: No", 3: "Answer: Yes"}
    assert found.reward == 1


def test_a_rollout_has_the_network_that_it_ran_through(tmp_path: Path) -> None:
    grown = {1: "TO node 2: a", 3: "TO node 2: b", 2: "Answer: Yes"}
    records = [rollout(TWO, split="test"), rollout(TWO, reward=1.0), rollout(grown, step=1, reward=1.0)]
    growth = (GrowthConfig(at_step=1, widths=(2, 1)),)
    path = record_run(tmp_path / "r", [*records, rollout(grown, split="test", step=2)], num_steps=2, growth=growth)
    assert [each.said["stage"] for each in heard(path)] == [0, 0, 1, 1]
    stages = record_of(path).summary("r")["stages"]
    assert [(stage["at_step"], stage["widths"], stage["edges"]) for stage in stages] == [
        (0, [1, 1], [[1, 2]]), (1, [2, 1], [[1, 2], [3, 2]]),
    ]  # fmt: skip
    early = record_run(tmp_path / "early", [rollout(grown, reward=1.0)], num_steps=2, growth=growth)
    with pytest.raises(ValueError, match=r"rollouts.jsonl is damaged \(nodes \[1, 2, 3\] are those of no network"):
        heard(early)


def test_curves_scores_and_labels(tmp_path: Path) -> None:
    path = record_run(tmp_path / "a/run", [rollout(TWO, reward=1.0)])
    run = RunDirectory.open(path)
    lines = [{"step": 0, "reward/mean": 1 / 3}, {"step": 1, "reward/mean": 0.5, "kl/mean": 2.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.write_json("evaluation.json", {"before": {"test": SCORE}})
    other = record_run(tmp_path / "b/run", [rollout(TWO, reward=1.0)])
    index, chunk = unpack(build_page([record_of(path), record_of(other)]))
    first, second = index["runs"]
    assert [first["label"], second["label"]] == ["a", "b"]
    assert first["curves"] == {"steps": [1, 2], "series": {"reward/mean": [0.333333, 0.5], "kl/mean": [None, 2.0]}}
    assert [(score["when"], score["set"], score["accuracy"], score["floor"]) for score in first["scores"]] == [
        ("before", "test", 0.5, 0.5)
    ]
    assert (first["ledger"], second["scores"], second["curves"]) == (None, [], {"steps": [], "series": {}})
    # The same question of two runs is one example.
    (example,) = index["examples"]
    assert example["runs"] == [[["train", 0, 0, 1.0, 0, 1, 0]], [["train", 0, 0, 1.0, 0, 1, 1]]]
    assert chunk[0] == chunk[1]
    run.write_json("evaluation.json", {"before": {"test": {"accuracy": 1}}})
    with pytest.raises(ValueError, match=r"evaluation.json is damaged \(a score lacks a part\)"):
        record_of(path).summary("a")


def test_a_diagnosis_is_shown_if_it_is_whole(tmp_path: Path) -> None:
    path = record_run(tmp_path / "r", [rollout(TWO, reward=1.0)])
    run, record = RunDirectory.open(path), record_of(path)
    assert record.summary("r")["diagnosis"] is None
    before = record.state()
    run.write_json("diagnosis.json", DIAGNOSIS)
    assert record.state() != before
    assert unpack(build_page([record]))[0]["runs"][0]["diagnosis"] == DIAGNOSIS
    for part in ({"effects": [{}]}, {"network": {}}, {"undisturbed": {}}, {"adapters": {}}, {"training": []}, {"split": 3}):
        run.write_json("diagnosis.json", DIAGNOSIS | part)
        with pytest.raises(
            ValueError, match=r"diagnosis.json is damaged \(a part is missing or no such part\); restore it, or"
        ):
            record.summary("r")


def test_every_rollout_is_in_one_chunk_or_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "CHUNK_CHARACTERS", 600)
    texts = [{1: f"TO node 2: message {number}", 2: "Answer: Yes"} for number in range(20)]
    records = [rollout(text, question=f"Is {number} even?", reward=1.0) for number, text in enumerate(texts)]
    records.append(rollout(TWO, split="test", question="Is 4 even?"))
    index, *chunks = unpack(build_page([record_of(record_run(tmp_path / "r", records))]))
    assert len(chunks) >= 5
    # What is evaluated comes first.
    assert [example["set"] for example in index["examples"]] == ["test"] + ["train"] * 20
    for number, example in enumerate(index["examples"][1:]):
        ((_, _, _, _, _, chunk, place),) = example["runs"][0]
        assert chunks[chunk - 1][place]["messages"][0][2] == f"message {number}"


def test_what_models_and_people_write_is_data(tmp_path: Path) -> None:
    bad = "</script><script>evil(1)</script><!-- \u2028 \x00 \ud800"
    records = [rollout({1: f"TO node 2: {bad}", 2: bad}, question=bad, gold=bad, reward=0.0)]
    path = record_run(tmp_path / "<script>evil(2)", records)
    html = build_page([record_of(path)])
    assert b"evil" not in html.replace(b"&lt;script&gt;evil(2)", b"")
    index, chunk = unpack(html)
    assert index["examples"][0]["question"] == bad
    assert chunk[0]["messages"][0][2] == bad
    assert build_page([record_of(path)]) == html


def test_the_page_allows_its_own_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    html = build_page([record_of(record_run(tmp_path / "r", [rollout(TWO, reward=1.0)]))]).decode()
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        checksum = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{checksum}'" in html
    assert "default-src 'none'" in html
    assert "MIT License" in html
    assert not re.search(r'(?:src|href)="(?!data:,")', html)
    for name in (*SCRIPTS, *STYLES):
        assert not re.search(r"</script|</style|<!--|innerHTML = (?!\")", (FOLDER / name).read_text())


def test_the_command_writes_the_page_into_the_run(call: Call, tmp_path: Path) -> None:
    path = record_run(tmp_path / "r", [rollout(TWO, reward=1.0)])
    assert call("view", path).out == f"{path}/view.html: 0.2 MB\n"
    again = json.loads(call("view", path, "--json").out)
    assert again == {"page": f"{path}/view.html", "bytes": (path / "view.html").stat().st_size}
    assert call("view", path, "--out", tmp_path / "other.html").status == 0
    assert (tmp_path / "other.html").read_bytes() == (path / "view.html").read_bytes()


def test_what_cannot_be_shown_is_one_error(call: Call, tmp_path: Path) -> None:
    path = record_run(tmp_path / "r", [rollout(TWO, reward=1.0)])
    assert_refused(call("view"), r"RUN must be the folder of at least one run, got none$")
    assert_refused(call("view", tmp_path), r"is no run: expected config.json in it, No such file or directory$")
    assert_refused(call("view", path, path), r"RUN must name each run once, got /")
    empty = record_run(tmp_path / "empty", [])
    assert_refused(
        call("view", empty),
        r"empty has no rollouts, so there is nothing to see; train it, or import what export --rollouts wrote$",
    )
    other = record_run(tmp_path / "other", [rollout(TWO, reward=1.0)], task="boolean_expressions")
    message = r"r and .*other have different tasks, navigate and boolean_expressions, so no example is in both; give"
    assert_refused(call("view", path, other), message)
    society = record_run(
        tmp_path / "society", [], widths=(3,), vote=True, group_size=1, centring="none", society=SocietyConfig(rounds=2)
    )
    assert_refused(
        call("view", society), r"society is a society that debates, and only networks have messages on edges: leave it out$"
    )
    note = tmp_path / "note.html"
    note.write_text("mine")
    assert_refused(call("view", path, "--out", note), r"--out .*note.html exists already and is no page of neuromas view; name")
    assert note.read_text() == "mine"
    assert_refused(call("view", path, "--out", path), r"--out .*r cannot be replaced: Is a directory$")
    assert_refused(call("view", path, "--out", tmp_path / "no/x.html"), r"--out .*x.html cannot be written: No such file")
    assert not (path / "view.html").exists()
    whole = rollout(TWO, reward=1.0)
    for part in ({"texts": {"a": "b"}}, {"texts": []}, {"faults": [[1]]}, {"faults": None}, {"gold": 3}, {"reward": "x"}):
        (path / "rollouts.jsonl").write_text(json.dumps(whole | part) + "\n")
        assert_refused(call("view", path), r"rollouts.jsonl is damaged \(a rollout lacks a part\); restore it, or delete it")


def test_a_watched_page_is_as_new_as_the_run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = record_run(tmp_path / "r", [rollout(TWO, split="test")])
    found: list[tuple[int, bool]] = []

    def look_and_go_on(seconds: float) -> None:
        html = (path / "view.html").read_bytes()
        found.append((len(unpack(html)[0]["examples"]), b"data-watched>" in html))
        if len(found) == 3:
            raise KeyboardInterrupt
        if len(found) == 1:
            RunDirectory.open(path).log_rollouts(0, [rollout(TWO, reward=1.0)])

    monkeypatch.setattr("time.sleep", look_and_go_on)
    outcome = call("view", path, "--watch")
    assert found == [(1, True), (2, True), (2, True)]
    assert outcome.err.count("rewritten; Ctrl-C ends this") == 2
    assert outcome.out == f"{path}/view.html: 0.2 MB\n"
    assert b"data-watched>" not in (path / "view.html").read_bytes()


def test_a_watched_run_may_have_no_rollouts_yet(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = record_run(tmp_path / "r", [])
    waited: list[bool] = []

    def wait(seconds: float) -> None:
        waited.append((path / "view.html").exists())
        if len(waited) == 2:
            RunDirectory.open(path).log_rollouts(0, [rollout(TWO, split="test")])
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", wait)
    outcome = call("view", path, "--watch")
    assert waited == [False, False, True]
    assert outcome.err.count(f"{path} has no rollouts yet; waiting for its first") == 1
    assert outcome.out == f"{path}/view.html: 0.2 MB\n"
