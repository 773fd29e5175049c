"""Gold programs of HumanEval, HumanEval+ and MBPP pass in the sandbox, programs that do nothing fail."""

import gzip
import json
import math
from typing import Any

import pytest
from paths import DATA
from sandboxes import available

from neuromas.sandbox import Limits, Program, check_programs
from neuromas.sandbox.human_eval import humaneval_plus_program, humaneval_program, mbpp_program
from neuromas.sandbox.isolation import ISOLATIONS, IsolationName

if not any(map(available, ISOLATIONS)):
    pytest.skip("no isolation on this machine", allow_module_level=True)


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not beside the repository")


def records(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    lines = (gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()).splitlines()
    return [json.loads(line) for line in lines]


def humaneval(record: dict[str, Any], completion: str) -> Program:
    return humaneval_program(record["prompt"], completion, record["test"], record["entry_point"])


def plus(record: dict[str, Any], completion: str, inputs: list[list[object]]) -> Program:
    gold = record["canonical_solution"]
    return humaneval_plus_program(record["prompt"], completion, gold, record["entry_point"], inputs, record["atol"])


def mbpp(record: dict[str, Any], code: str) -> Program:
    return mbpp_program(code, record["code"], record["test_list"], record["test_setup_code"])


@needs_data
def test_some_gold_programs_pass_and_empty_ones_fail() -> None:
    every_tenth, sixth = records("humaneval/HumanEval.jsonl.gz")[2::30], records("mbpp/mbpp.jsonl")[::160]
    # HumanEval/32, /38, /50 use helpers of the prompt; MBPP 367, 601 objects, 533 a type, 596 an import of the gold program.
    gold = [humaneval(r, r["canonical_solution"]) for r in every_tenth] + [mbpp(r, r["code"]) for r in sixth]
    gold += [mbpp(r, r["code"]) for r in records("mbpp/mbpp.jsonl") if r["task_id"] in (126, 367, 533, 596, 601)]
    empty = [humaneval(r, "    pass\n") for r in every_tenth] + [mbpp(r, "def f(): pass") for r in sixth]
    outcomes = check_programs(gold + empty)
    assert [outcome.passed for outcome in outcomes] == [True] * len(gold) + [False] * len(empty), outcomes


@needs_data
def test_helpers_of_the_prompt_cannot_be_replaced() -> None:
    record = records("humaneval/HumanEval.jsonl.gz")[50]
    assert record["entry_point"] == "decode_shift"
    cheat = "    return s\n\ndef encode_shift(s):\n    return s\n"
    honest, cheating = check_programs([humaneval(record, record["canonical_solution"]), humaneval(record, cheat)])
    assert honest.passed
    assert not cheating.passed


def test_nothing_is_near_infinity_or_no_number() -> None:
    gold = "    return x if x < 3 else [x, -x, x - x]\n"
    right = "    return x + 1e-9 if x < 3 else [float('inf'), float('-inf'), float('nan')]\n"
    wrong = [
        "    return x + 1e-3\n" + right,
        *(
            f"    return x if x < 3 else {answer}\n"
            for answer in ("[0.0, -x, x - x]", "[x, x, x - x]", "[x, -x, 0.0]", "[x, -x, x]", "x")
        ),
    ]
    inputs = [[1.5], [math.inf]]
    programs = [humaneval_plus_program("def f(x):\n", answer, gold, "f", inputs, 0) for answer in (gold, right, *wrong)]
    assert [outcome.passed for outcome in check_programs(programs)] == [True, True, *[False] * len(wrong)]


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_gold_programs_pass(isolation: IsolationName) -> None:
    if not available(isolation):
        pytest.skip(f"{isolation} does not work here")
    human, tasks = records("humaneval/HumanEval.jsonl.gz"), records("mbpp/mbpp.jsonl")
    gold = [humaneval(r, r["canonical_solution"]) for r in human] + [mbpp(r, r["code"]) for r in tasks]
    wrong = [humaneval(r, "    return None\n") for r in human] + [mbpp(r, "import sys\nsys.exit(0)") for r in tasks]
    outcomes = check_programs(gold + wrong, Limits(seconds=60), isolation=isolation)
    assert [outcome for outcome in outcomes[: len(gold)] if not outcome.passed] == []
    assert [outcome for outcome in outcomes[len(gold) :] if outcome.passed] == []


@pytest.mark.slow
@needs_data
def test_gold_programs_pass_humaneval_plus() -> None:
    few, many = records("humaneval_plus/HumanEvalPlus-Mini.jsonl.gz"), records("humaneval_plus/HumanEvalPlus.jsonl.gz")
    programs = [plus(r, r["canonical_solution"], r["plus_input"]) for r in few]
    programs += [plus(r, r["canonical_solution"], r["base_input"] + r["plus_input"]) for r in many]
    programs += [plus(r, "    return None\n", r["plus_input"]) for r in few]
    outcomes = check_programs(programs, Limits(seconds=120, output_bytes=1 << 30, memory_mb=1024))
    assert [r["task_id"] for r, outcome in zip([*few, *many], outcomes, strict=False) if not outcome.passed] == []
    assert [outcome for outcome in outcomes[len(few) + len(many) :] if outcome.passed] == []
