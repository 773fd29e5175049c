"""The benchmark of credit schemes says in one line what it cannot measure, before any work."""

import sys
from pathlib import Path

import pytest
from commands import FLAGS, run_cli

from benchmarks import credit


def fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the line in which the benchmark refuses these options."""
    monkeypatch.setattr(sys, "argv", ["credit.py", *map(str, words)])
    with pytest.raises(SystemExit, match="2"):
        credit.main()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "least", "got"),
    [("estimates", 4, 1), ("warm", 0, -1), ("questions", 1, 0), ("group-size", 2, 1), ("replays", 1, 0)],
)
def test_options_are_refused(
    option: str, least: int, got: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = fault(monkeypatch, capsys, "runs/none", f"--{option}", got)
    assert told == f"credit.py: error: --{option} must be at least {least}, got {got}"


def test_folders_are_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{tmp_path} is no run: expected config.json" in fault(monkeypatch, capsys, tmp_path)
    (file := tmp_path / "file").touch()
    told = fault(monkeypatch, capsys, trained, "--out", file)
    assert told == f"credit.py: error: --out {file} must be a folder that can be written, got File exists"


def test_rollouts_of_a_run_of_trees_are_drawn_one_by_one(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    run_cli("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", run, "--branches", 2, "--group-size", 4)
    # Three rollouts are no tree.
    options = ["--estimates", "4", "--warm", "0", "--group-size", "3", "--questions", "1", "--schemes", "shared"]
    monkeypatch.setattr(sys, "argv", ["credit.py", str(run), *options, "--out", str(out)])
    # A tiny model is never right, so that there is no variance to divide by.
    with pytest.raises(SystemExit, match=r"^error: the rewards of no question differ, so no gradient varies; take a run"):
        credit.main()
    estimates = list[int]()
    monkeypatch.setattr(credit, "write", lambda _, schemes, *rest: estimates.append(len(schemes[0].tokens)))
    credit.main()
    assert estimates == [4]
