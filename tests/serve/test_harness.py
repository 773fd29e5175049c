"""lm-evaluation-harness scores a served run as `neuromas eval` does."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import FLAGS

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs pip install 'lm_eval[api]'"),
]


def test_the_harness_gives_the_score_of_eval(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ["neuromas.cli", "train", *FLAGS, "--widths", "1", "--max-new-tokens", "60", "--run-dir", str(run)]
    harness = ["benchmarks.serve", "lm-eval", str(run), "--questions", "16", "--out", str(tmp_path)]
    for words in (train, harness):
        subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    accuracy = json.loads((tmp_path / "lm_eval.json").read_text())["accuracy"]
    assert len(accuracy) == 3
    assert len(set(accuracy.values())) == 1
    assert 0 < accuracy["neuromas eval"] < 1
