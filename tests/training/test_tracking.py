"""Mirrors of metrics.jsonl: equal to the file after a run that was killed, and no run's end if they fail."""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from commands import FLAGS, Call, assert_refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neuromas.config import TrainConfig
from neuromas.training import tracking
from neuromas.training.run_directory import RunDirectory
from neuromas.training.tracking import tracked

Points = dict[str, list[tuple[int, float]]]


def points_of_log(run: Path) -> Points:
    found: Points = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for name, value in record.items():
            found.setdefault(name, []).append((step, value))
    return found


def points_of_events(run: Path) -> Points:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_equal(found: Points, expected: Points) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points]
        # Event files hold float32.
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(TrainConfig(run_dir=tmp_path / "run"))
    made.initialise()
    return made


def test_event_files_hold_what_the_log_holds_after_a_run_that_was_killed(run: RunDirectory) -> None:
    told: list[str] = []
    with tracked("tensorboard", run, told.append):
        for step in range(3):
            run.log_metrics(step, {"reward/mean": step / 3, "grad_norm/node/1/max": 1.0})
            # Nothing is held back: a process may be killed at any time.
            assert_equal(points_of_events(run.path), points_of_log(run.path))
    # The steps after the last checkpoint are done again, and one of them anew.
    run.forget_after(1)
    run.log_metrics(1, {"reward/mean": 0.5})
    with tracked("tensorboard", run, told.append):
        run.log_metrics(2, {"reward/mean": 0.75})
    assert_equal(points_of_events(run.path), points_of_log(run.path))
    assert points_of_events(run.path)["reward/mean"] == [(0, 0.0), (1, 0.5), (2, 0.75)]
    run.log_metrics(3, {"reward/mean": 1.0})
    assert len(points_of_events(run.path)["reward/mean"]) == 3
    assert told == []


class Failing:
    """Fails from its second point on, and when it is closed."""

    def __init__(self, folder: Path, run: RunDirectory) -> None:
        self.points = 0

    def log(self, step: int, metrics: object) -> None:
        self.points += 1
        if self.points > 1:
            raise RuntimeError("no room")

    def close(self) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_left_out_with_one_line(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setitem(tracking.MIRRORS, "tensorboard", Failing)
    with tracked("tensorboard", run, told.append):
        for step in range(4):
            run.log_metrics(step, {"reward/mean": 1.0})
    assert len(run.metrics()) == 4
    assert told == ["--track tensorboard has failed and is left out: RuntimeError: no room"]
    told.clear()
    (run.path / "wandb").write_text("in the way")
    monkeypatch.setitem(tracking.MIRRORS, "wandb", lambda folder, run: folder.mkdir() or Failing(folder, run))
    with tracked("wandb", run, told.append):
        run.log_metrics(4, {"reward/mean": 1.0})
    assert len(told) == 1
    assert "--track wandb has failed and is left out: FileExistsError" in told[0]


def test_trackio_mirrors_one_run_a_process(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ModuleType("trackio.utils")
    loaded.__dict__["TRACKIO_DIR"] = tmp_path / "first/trackio"
    monkeypatch.setitem(sys.modules, "trackio.utils", loaded)
    told: list[str] = []
    with tracked("trackio", run, told.append):
        run.log_metrics(0, {"reward/mean": 1.0})
    assert len(run.metrics()) == 1
    assert told == [
        "--track trackio has failed and is left out: ValueError: trackio writes into one folder a process, here "
        f"{tmp_path}/first/trackio; write {run.path}/trackio in a process of its own"
    ]


def test_a_run_is_tracked_from_the_command_line_and_when_it_goes_on(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    made = call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", path, "--num-steps", 2, "--track", "tensorboard")
    assert made.status == 0, made.err
    assert_equal(points_of_events(path), points_of_log(path))
    # Another tracker is no other run.
    assert call("train", "--resume", "--run-dir", path, "--track", "none").status == 0


def test_a_tracker_that_is_not_installed_is_named(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused = call("train", "--track", "wandb", "--run-dir", tmp_path / "run")
    assert_refused(refused, "--track wandb needs the package wandb, .* pip install wandb .extra: track.")


PROGRAM = """
import sys
from pathlib import Path
from neuromas.config import TrainConfig
from neuromas.training.run_directory import RunDirectory
from neuromas.training.tracking import tracked
run = RunDirectory.create(TrainConfig(run_dir=Path(sys.argv[1])))
run.initialise()
for process in range(2):
    with tracked(sys.argv[2], run, print):
        for step in (2 * process, 2 * process + 1):
            run.log_metrics(step, {"reward/mean": step / 4})
other = RunDirectory.create(TrainConfig(run_dir=run.path.with_name("other")))
other.initialise()
told = []
with tracked(sys.argv[2], other, told.append):
    other.log_metrics(0, {"reward/mean": 0.5})
# A second run has a mirror of its own, or a line that says why not, and never writes into the first one's.
assert (sys.argv[2] == "trackio") == any("in a process of its own" in text for text in told), told
said = {"split": "test", "example": "a", "question": "Is it?", "gold": "Yes", "rollout": 0, "texts": {"1": "No"}, "faults": []}
run.log_rollouts(4, [said, said])
"""


def points_of_trackio(run: Path) -> Points:
    with sqlite3.connect(run / "trackio/neuromas.db") as opened:
        rows = opened.execute("select step, metrics from metrics order by step").fetchall()
    return {"reward/mean": [(step, json.loads(metrics)["reward/mean"]) for step, metrics in rows]}


def points_of_wandb(run: Path) -> Points:
    """Read the one offline run: LevelDB's log format, a header of 7 bytes, then blocks of records (crc, length, kind)."""
    from wandb.proto import wandb_internal_pb2  # type: ignore[reportMissingImports]  # an extra

    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    data, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""  # type: ignore[reportAttributeAccessIssue]  # made at run time
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                found.append((items["_step"], items["reward/mean"]))
    return {"reward/mean": found}


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO"))}


@pytest.mark.processes
@pytest.mark.parametrize(("name", "points"), [("trackio", points_of_trackio), ("wandb", points_of_wandb)])
def test_other_trackers_mirror_offline(name: str, points: Callable[[Path], Points], tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: it is an extra that the gate leaves out for its size")
    run = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, str(run), name]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert_equal(points(run), points_of_log(run))
    if name == "trackio":
        command = [sys.executable, "-m", "neuromas.cli", "traces", str(run), "--out", str(tmp_path / "traces")]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.stdout == f"{tmp_path / 'traces'}: 2 rollouts\n", done.stderr
        with sqlite3.connect(tmp_path / "traces/neuromas.db") as opened:
            rows = opened.execute("select step, messages, metadata from traces order by trace_index").fetchall()
        assert [step for step, _, _ in rows] == [4, 4]
        assert [message["content"] for message in json.loads(rows[1][1])] == ["Is it?", "node 1: No"]
        assert json.loads(rows[1][2])["gold"] == "Yes"


def test_traces_without_their_package_are_refused(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_refused(call("traces", trained, "--out", "t"), "--track trackio needs the package trackio")
    assert_refused(call("traces", trained, "--out", trained), "--out .* exists already")
