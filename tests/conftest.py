"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

# Before torch is loaded, and inherited by subprocesses: on models this small more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from commands import FLAGS, Call, Outcome, run_cli

from neuromas import Backbone


@pytest.fixture
def tiny_backbone() -> Backbone:
    """A random Qwen3 of two layers; every test gets its own, because a backbone carries one bank of adapters."""
    return Backbone.tiny(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone as a model folder on disk. Copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("tiny-model")
    backbone = Backbone.tiny(0)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Calls the command line in this process, from the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Outcome:
        status: int | str | None = 0
        try:
            run_cli(*args)
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two nodes. Copy it before changing anything in it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    run_cli("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", run)
    return run
