"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

# Before torch is loaded, and inherited by subprocesses: on models this small more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
