"""The benchmark for a GPU runs every line on a CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.processes
def test_smoke_runs_everything_and_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu"
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--rounds", "1", "--out", str(out)])
    gpu.main()
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["limits"]["tflops"] > 0
    assert told["limits"]["gap_tokens"] > 10
    assert told["limits"]["gap_max"] < 1e-4
    assert len(told["records"]) == 6
    for record in told["records"]:
        expected = {"ours", "limit", *gpu.CHANGES[record["case"]["kind"]]}
        expected |= {"peft_loop", "peft_mixed"} if record["case"]["scope"] == "all" else set()
        expected |= {"peft_merged"} if record["case"]["scope"] == "all" and record["case"]["kind"] == "rollout" else set()
        assert set(record["results"]) == expected
        for result in record["results"].values():
            assert "error" not in result
            assert len(result["rounds"]) == 1
        checks = {json.dumps(result["check"]) for name, result in record["results"].items() if name != "limit"}
        assert record["case"]["kind"] == "update" or len(checks) == 1
    assert "ours, without graphs" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_what_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no NVIDIA GPU found; --smoke runs all of it on a CPU, at a tiny size" in capsys.readouterr().err
