"""What the speed benchmark promises: everybody gets the same rows, and nobody who fails goes missing."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environments import PEERS, Peer
from benchmarks.report import agreement, memory, ratios, scaling, spread, table
from benchmarks.run import set_up_fastest
from benchmarks.workers import PeerFailed, Worker
from benchmarks.workloads import Case, cases, rows_of, smoke

ALL = ("W1", "W2", "W3", "W4", "W5")


def record(case: Case, **results: Any) -> dict[str, Any]:
    return {"name": case.name, "case": asdict(case), "results": results}


def result(*seconds: float, tokens: int = 100, **extra: Any) -> dict[str, Any]:
    return {"rounds": [{"seconds": s, "tokens": tokens, "peak_mib": 300.0} for s in seconds], "loaded_mib": 200.0, **extra}


@pytest.mark.parametrize("quick", [True, False])
def test_every_workload_has_cases_of_its_own_name(quick: bool) -> None:
    made = cases(quick, ALL)
    assert {case.workload for case in made} == set(ALL)
    assert len({case.name for case in made}) == len(made)
    assert len({case.name for case in smoke(made)}) == len(smoke(made))


def test_scaling_in_nodes_is_at_equal_rows() -> None:
    nodes = [
        case for case in cases(False, ["W4"]) if case.model == "bundled" and case.questions * case.group * case.nodes == 420
    ]
    assert {case.nodes for case in nodes} == {1, 3, 5, 7, 15}
    assert {len(rows_of(case, 500)["rows"]) for case in nodes} == {420}


def test_rows_wait_for_their_senders_and_are_the_same_each_time() -> None:
    case = Case(workload="W1", kind="rollout", model="bundled", widths=(2, 1), questions=1, group=2, prefix=8, own=4, new=3)
    data = rows_of(case, 500)
    assert data == rows_of(case, 500)
    assert [row["waits_for"] for row in data["rows"]] == [[], [], [0, 1], [], [], [3, 4]]
    # Two messages of three tokens, each in a frame of six.
    assert all(18 + 3 <= len(row["prompt"]) <= 18 + 5 for row in data["rows"] if row["waits_for"])


def test_ratios_are_of_rounds_that_followed_each_other() -> None:
    found = record(Case(workload="W1", kind="rollout", model="bundled"), ours=result(1.0, 2.0), peft_loop=result(3.0, 8.0))
    assert ratios(found, "peft_loop") == pytest.approx([3.0, 4.0])
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.00 (1.00, 2.00 to 4.00, 5.00)"


def test_a_peer_that_fails_has_a_row_that_says_why() -> None:
    case = Case(workload="W1", kind="rollout", model="bundled")
    lines = table([record(case, ours=result(1.0), vllm_lora={"rounds": [], "error": "cannot be installed: no wheel"})])
    assert "**did not run**: cannot be installed: no wheel" in lines[-1]


def test_of_two_ways_of_a_peer_the_faster_has_the_row() -> None:
    case = Case(workload="W1", kind="rollout", model="bundled")
    for loop, merged, slower in ((2.0, 3.0, "merge_adapter"), (3.0, 2.0, "set_adapter")):
        found = record(case, ours=result(1.0), peft_loop=result(loop), peft_merged=result(merged))
        lines = [line for line in table([found]) if "PEFT" in line]
        assert len(lines) == 1
        assert slower not in lines[0]
        assert "2.00 (2.00" in lines[0]
    # One that has failed says so beside the other.
    found = record(case, ours=result(1.0), peft_loop=result(2.0), peft_merged={"rounds": [], "error": "no memory"})
    assert "no memory" in table([found])[-1]


def test_other_work_is_marked() -> None:
    case = Case(workload="W2", kind="update", model="bundled")
    ours = result(1.0, check={"loss": 1.0, "grad_norms": [2.0]})
    same = record(case, ours=ours, peft_loop=result(1.0, check={"loss": 1.0, "grad_norms": [2.0001]}))
    other = record(case, ours=ours, peft_loop=result(1.0, check={"loss": 1.0, "grad_norms": [2.1]}))
    assert agreement(same, "peft_loop") == "loss and gradients 5e-05 apart"
    assert agreement(other, "peft_loop").startswith("**DIFFERS")


def test_growth_of_time_and_memory_is_against_the_first_case() -> None:
    small = Case(workload="W4", kind="update", model="bundled", widths=(1,), questions=105, group=4)
    large = Case(workload="W4", kind="update", model="bundled", widths=(2, 2, 2, 1), questions=15, group=4)
    lines = scaling([record(small, ours=result(1.0)), record(large, ours=result(1.1))])
    assert "nodes 7 | 1.10" in lines[-1]
    one = Case(workload="W5", kind="update", model="bundled", widths=(1,))
    seven = Case(workload="W5", kind="update", model="bundled", widths=(2, 2, 2, 1))
    assert memory([record(one, ours=result(1.0)), record(seven, ours=result(1.0))])[-1].endswith("| 300 | 1.00 |")


def test_a_worker_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.workers.interpreter", lambda peer, folder, install: sys.executable)
    monkeypatch.setitem(PEERS, "nobody", Peer("?"))
    worker = Worker("nobody", tmp_path, threads=1, install=False)
    with pytest.raises(PeerFailed, match=r"died with exit code 1, see .*nobody\.log"):
        worker.ask({"do": "round"}, 60)
    worker.stop()


def test_losses_in_bfloat16_may_be_further_apart_and_the_format_is_named() -> None:
    case = Case(workload="W2", kind="update", model="smollm2-135m")
    found = record(
        case, ours=result(1.0, dtype="bfloat16", check={"loss": 1.0, "grad_norms": [2.0]}),
        peft_loop=result(3.0, dtype="float32", check={"loss": 1.01, "grad_norms": [2.02]}),
    )  # fmt: skip
    assert agreement(found, "peft_loop") == "loss and gradients 1e-02 apart"
    ours, theirs = table([found])[-2:]
    assert "NeuroMAS, bfloat16" in ours
    assert "bfloat16" not in theirs


def test_each_peer_is_measured_in_the_format_in_which_it_is_faster() -> None:
    class Answering:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def worker(self, name: str) -> "Answering":
            return self

        def ask(self, message: dict[str, Any], patience: float) -> dict[str, Any]:
            if message["do"] == "setup":
                self.asked.append(message["spec"]["dtype"])
                return {"loaded_mib": 1.0}
            return {"seconds": 1.0 if self.asked[-1] == "float32" else 2.0, "tokens": 1, "peak_mib": 1.0}

    crew: Any = Answering()
    found: dict[str, Any] = {"rounds": []}
    set_up_fastest("peft_loop", found, crew, {"kind": "update"})
    assert crew.asked == ["float32", "bfloat16", "float32"]
    assert found == {"rounds": [], "dtype": "float32", "loaded_mib": 1.0}


def test_smollm2_is_measured_in_three_nodes() -> None:
    made = [case for case in cases(True, ["W1", "W2"]) if case.model == "smollm2-135m"]
    assert [(case.workload, case.questions * case.group, case.nodes) for case in made] == [("W1", 32, 3), ("W2", 8, 3)]
