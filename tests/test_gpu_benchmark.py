"""The benchmark for a GPU runs every line on a CPU."""

import json
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.report import agreement
from benchmarks.workloads import Case


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


class Fake:
    """A way that does nothing, and fails at its `fails`-th run."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.runs = fails, 0

    def run(self) -> int:
        self.runs += 1
        if self.runs == self.fails:
            raise RuntimeError("CUDA out of memory")
        return 8

    def check(self) -> dict[str, Any]:
        return {"loss": 1.02 if self.fails else 1.0, "grad_norms": []}


CASE = Case(workload="W2", kind="update", model="tiny", scope="suffix")
CPU = torch.device("cpu")


def measured(monkeypatch: pytest.MonkeyPatch, until: float, deadline: float, fails: int = 0) -> dict[str, Any]:
    ways: dict[str, Any] = {"ours": lambda spec: Fake(), "limit": lambda spec: Fake(fails)}
    monkeypatch.setattr(gpu, "SETUPS", ways)
    monkeypatch.setattr(gpu, "CHANGES", {"update": {}})
    return gpu.measure(CASE, {"dtype": "bfloat16"}, 3, until, deadline, CPU)["results"]


@pytest.mark.parametrize(("fails", "rounds"), [(1, 0), (2, 0), (3, 1), (0, 3)])
def test_a_way_that_fails_leaves_the_others_their_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: int, rounds: int
) -> None:
    found = measured(monkeypatch, inf, inf, fails)
    assert len(found["ours"]["rounds"]) == 3
    assert "error" not in found["ours"]
    assert len(found["limit"]["rounds"]) == rounds
    assert found["limit"].get("error") == ("RuntimeError: CUDA out of memory" if fails else None)
    assert ("Traceback" in capsys.readouterr().err) is bool(fails)


def test_when_the_time_is_up_nothing_is_set_up_and_no_second_round_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(result["rounds"]) for result in measured(monkeypatch, 0.0, inf).values()] == [1, 1]
    assert {result["error"] for result in measured(monkeypatch, 0.0, 0.0).values()} == {"the time was up before it was set up"}


def test_losses_are_compared_as_the_number_format_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"results": measured(monkeypatch, inf, inf, fails=9)}
    assert agreement(record, "limit") == "loss and gradients 2e-02 apart"


def test_what_fails_of_ours_alone_is_told() -> None:
    assert gpu.said("gap", {"error": "ValueError: no kernel"}) == "**gap did not run**: ValueError: no kernel"
