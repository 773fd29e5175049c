"""Benchmarks from their files: counts, gold and wrong answers, splits, training data; and tasks of the user."""

import gzip
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from paths import DATA, DOCS, ROOT

from neuromas.cli import task_list
from neuromas.config import TaskConfig, TrainConfig
from neuromas.graph.wording import WORDINGS
from neuromas.sandbox import ISOLATIONS, choose_isolation
from neuromas.tasks import BENCHMARKS, TASKS, DatasetTask, from_config, get_task, question_id
from neuromas.tasks.code import HumanEval, HumanEvalPlus, Mbpp
from neuromas.tasks.item_files import Record
from neuromas.tasks.published import BBH, PHYSICS, SUBJECTS, Benchmark
from neuromas.tasks.user_tasks import JsonlCodeTask

CODE = ("humaneval", "humaneval_plus", "mbpp")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not next to the repository")


def has_sandbox() -> bool:
    try:
        choose_isolation(ISOLATIONS)
    except ValueError:
        return False
    return True


needs_sandbox = pytest.mark.skipif(not has_sandbox(), reason="no isolation on this machine")


def published() -> dict[str, Counter[str]]:
    """Return counts of items by task and split from the README of the data: its tables of files and of MMLU subjects."""
    counts: dict[str, Counter[str]] = {}
    text = (DATA / "README.md").read_text()
    for path, said in re.findall(r"\| `((?:bbh|gsm8k|humaneval|arc_challenge)/[^`]+)` \| ([a-z, ]+: \d+) \|", text):
        name, split = path.split("/")[0], said.split(":")[0].split(",")[0].replace("dev", "validation")
        if name == "bbh":
            name = f"bbh:{Path(path).stem.removesuffix('_even')}"
        counts.setdefault(name, Counter())[split] += int(said.split(":")[1])
    for line in text.splitlines():
        if match := re.match(r"\| `mmlu/(test|val|dev)/([a-z_]+)_\1\.csv` \| (\d+) \|", line):
            counts.setdefault(f"mmlu:{match[2]}", Counter())[match[1].replace("val", "validation")] += int(match[3])
    return counts


def there() -> list[str]:
    tasks = {name: get_task(name, data=DATA) for name in BENCHMARKS}
    return [name for name, task in tasks.items() if task_list.has_items(task)] if DATA.is_dir() else []


THERE = there()


def task_of(name: str) -> Benchmark:
    task = get_task(name, data=DATA)
    assert isinstance(task, Benchmark)
    return task


@needs_data
def test_every_file_is_of_a_task_and_holds_as_many_items_as_its_readme_says() -> None:
    counts = published()
    assert len(counts) > 20
    for name, expected in counts.items():
        read = {split: len(examples) for split, examples in task_of(name).read_splits().items()}
        assert read == expected, name
    read = {split: len(examples) for split, examples in task_of("mbpp").read_splits().items()}
    assert read == {"dev": 10, "test": 500, "validation": 90, "train": 374}
    names = {f"{path.stem.removesuffix('_even')}" for path in (DATA / "bbh").glob("*.json")}
    names |= {path.stem.removesuffix("_test") for path in (DATA / "mmlu" / "test").glob("*.csv")}
    assert names <= {name.partition(":")[2] for name in THERE}
    for name in ("HumanEvalPlus.jsonl.gz", "HumanEvalPlus-Mini.jsonl.gz"):
        assert len(HumanEvalPlus(DATA / "humaneval_plus" / name).splits["test"]) == 164


@needs_data
@pytest.mark.parametrize("name", [name for name in THERE if name not in CODE])
def test_gold_answers_score_1_and_wrong_ones_0(name: str) -> None:
    task = task_of(name)
    for examples in task.splits.values():
        assert task.rewards([(e, e.answer) for e in examples]) == [1.0] * len(examples)
        labelled = task.rewards([(e, f"Let us see.\nAnswer: {e.answer}") for e in examples])
        assert labelled == [1.0] * len(examples)
        others = [next((o.answer for o in examples if o.answer != e.answer), "other") for e in examples]
        assert task.rewards([(e, f"Answer: {other}") for e, other in zip(examples, others, strict=True)]) == [0.0] * len(
            examples
        )
        for malformed in (
            "{0} or {1}",
            "Answer: not {0}",
            "",
            "Answer: {0}. Answer: {1}",
            "Answer: {1}, {0}",
            "\x00",
            "Answer:",
        ):
            pairs = [(e, malformed.format(e.answer, other)) for e, other in zip(examples, others, strict=True)]
            assert task.rewards(pairs) == [0.0] * len(examples), malformed


@needs_data
@needs_sandbox
@pytest.mark.parametrize(("name", "step"), [("humaneval", 30), ("mbpp", 160)])
def test_gold_programs_pass_and_others_do_not(name: str, step: int) -> None:
    task = task_of(name)
    examples = [e for split in task.splits.values() for e in split][2::step]
    prompts = [e.question.partition("function:\n")[2] for e in examples]
    whole = [f"Here:\n```python\n{p}{e.answer}\n```\nDone." for p, e in zip(prompts, examples, strict=True)]
    answers = {1.0: [[e.answer for e in examples], whole], 0.0: [["    pass\n"] * len(examples), [""] * len(examples)]}
    answers[0.0].append([f"{text}\n{text}" for text in whole])
    for reward, columns in answers.items():
        for texts in columns:
            assert task.rewards(list(zip(examples, texts, strict=True))) == [reward] * len(examples)
    assert task.reward(examples[0], examples[0].answer) == 1.0


# A function of two numbers that adds them, and the same as its body.
FORMS = {
    "assigned": "import operator\nadd = operator.add",
    "annotated": "from typing import Callable\nadd: Callable = lambda x, y: x + y",
    "lambda": "add = lambda x, y: x + y",
    "imported": "from operator import add",
    "imported as": "from operator import sub, __add__ as add",
    "decorated": "from functools import cache\n@cache\ndef add(x, y):\n    return x + y",
    "from the future": "from __future__ import annotations\ndef add(x: Unknown, y):\n    return x + y",
    "indented as a whole": "    def add(x, y):\n        return x + y",
    "after a form feed": "\fdef add(x, y):\n    return x + y",
    "body": "    return x + y",
    "body without indentation": "if x:\n    return x + y\nreturn y",
    "body whose first line lost it": "z = x\n    return z + y",
    "body whose first line lost it, a block": "if x:\n        return x + y\n    return y",
    "body whose first line lost it, a comment": "# The sum.\n    return x + y",
    "body whose first line lost it, brackets": "return (x\n            + y)",
    "body of one block": "if x != 'no':\n    return x + y",
    "body with tabs": "\tif x:\n\t\treturn x + y\n\treturn y",
    "body of two spaces": "  return x + y",
    "body with a function of its own name": "def add(a, b):\n    return a + b\nreturn add(x, y)",
}
NOT_READ = (
    "def add(x, y):\n    return x - y",
    "def sub(x, y):\n    return x + y",
    "async def add(x, y):\n    return x + y",
    "pass",
)
INJECTED = "from __future__ import annotations; check = candidate = print\ndef add(x, y):\n    return x - y"


@needs_sandbox
def test_programs_are_read_in_the_forms_that_models_write() -> None:
    record = {
        "prompt": 'def add(x: int, y: int):\n    """Add."""\n',
        "canonical_solution": "    return x + y\n",
        "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(0, 3) == 3\n    assert candidate(2, 3) == 5\n",
    }
    task = HumanEval()
    example = task.example_of(Record("row 1", record))
    fenced = {
        name: f"So:\n```python\n{text}\n```\nIt gives:\n```\n5\n```" for name, text in FORMS.items() if "body" not in name
    }
    answers = {**FORMS, **{f"{name}, fenced": text for name, text in fenced.items()}}
    rewards = task.rewards([(example, text) for text in answers.values()])
    assert [name for name, reward in zip(answers, rewards, strict=True) if reward != 1.0] == []
    twice = "```\ndef add(x, y):\n    return x + y\n```\n" * 2
    assert task.rewards([(example, text) for text in (*NOT_READ, INJECTED, twice)]) == [0.0] * (len(NOT_READ) + 2)


@needs_data
@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("name", CODE)
def test_all_gold_programs_pass(name: str) -> None:
    task = task_of(name)
    for examples in task.splits.values():
        assert task.rewards([(e, e.answer) for e in examples]) == [1.0] * len(examples)


@needs_data
@pytest.mark.parametrize("name", [*TASKS, *THERE])
def test_splits_and_training_are_disjoint(name: str) -> None:
    task = get_task(name, data=DATA)
    splits = ("train", "validation", "dev", "test")
    # Generated problems have no end, also where a family stands in for a benchmark's validation split.
    drawn = [s for s in splits if not isinstance(task, DatasetTask) or s not in task.splits]
    ids = {s: {e.id for e in task.examples(s, 10 if s in drawn else 10**6)} for s in splits if task.has(s)}
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    if isinstance(task, Benchmark) and task.trainer is None and not task.has("train"):
        with pytest.raises(ValueError, match="has nothing to train on here"):
            task.training_batch(0, 0, 1)
        return
    trained = {e.id for step in range(4) for e in task.training_batch(0, step, 5)}
    assert trained.isdisjoint(set().union(*(found for split, found in ids.items() if split != "train")))


@pytest.mark.parametrize("has_splits", [True, False])
@pytest.mark.parametrize("verifier", ["exact", "python"])
def test_splits_of_a_file_of_ones_own_are_disjoint(verifier: str, has_splits: bool, tmp_path: Path) -> None:
    # Half of the questions stand twice; with splits of their own, mostly in two of them.
    numbers = [*range(60), *range(30)]
    lines = [
        {"question": f"q{n}", "answer": f"assert f(1) == {n}"}
        | ({"split": ("train", "validation", "test")[k % 7 % 3]} if has_splits else {})
        for k, n in enumerate(numbers)
    ]
    task = own(tmp_path / "a.jsonl", *lines, verifier=verifier)
    splits = {split: {e.id for e in task.examples(split, 100)} for split in ("train", "validation", "test")}
    assert all(splits.values())
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 60
    assert {e.id for step in range(20) for e in task.training_batch(0, step, 8)} == splits["train"]


def test_splits_of_a_task_of_reasoning_gym_are_disjoint() -> None:
    pytest.importorskip("reasoning_gym")
    task = get_task("reasoning_gym:basic_arithmetic")
    splits = {split: {e.id for e in task.examples(split, 30)} for split in ("validation", "test")}
    splits["train"] = {e.id for step in range(10) for e in task.training_batch(0, step, 16)}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values()))
    assert len(splits["train"]) > 100


@needs_data
def test_the_page_of_tasks_holds_the_table_that_the_command_prints() -> None:
    page = (DOCS / "tasks.md").read_text()
    # Families are left to the command: with types checked at run time, drawing thousands of problems takes a minute.
    rows = task_list.table([task_list.describe(name, task_of(name)) for name in THERE]).splitlines()
    assert [row for row in rows if row not in page] == []
    listed = set(re.findall(r"^\| `([^`]+)` \|.* \| (?:exact|choice|number|math|python) \|$", page, re.MULTILINE))
    assert listed == {*TASKS, *THERE}


@needs_data
def test_a_training_batch_is_a_new_order_each_epoch_of_all_that_is_not_held_out() -> None:
    task, size = task_of("mbpp"), 374
    first = task.training_batch(seed=1, step=0, count=size)
    second = task.training_batch(seed=1, step=1, count=size)
    assert {e.id for e in first} == {e.id for e in second} == {e.id for e in task.splits["train"]}
    assert first != second
    across = task.training_batch(seed=1, step=3, count=100)
    assert across[:74] == first[300:]
    assert across[74:] == second[:26]
    assert task.training_batch(seed=2, step=0, count=size) != first
    task.held_out = frozenset(e.id for e in first[:370])
    assert {e.id for e in task.training_batch(1, 0, 8)} == {e.id for e in first[370:]}


@needs_data
def test_other_data_trains_what_has_no_training_split() -> None:
    human = task_of("humaneval")
    batch = human.training_batch(0, 0, 4)
    assert {e.id for e in batch} <= {e.id for e in task_of("mbpp").splits["train"]}
    assert human.has("validation")
    assert len(human.examples("validation", 90)) == 90
    navigate = task_of("bbh:navigate")
    assert navigate.training_batch(0, 0, 2) == get_task("navigate").training_batch(0, 0, 2)
    for name in ("bbh:snarks", "mmlu:virology"):
        message = rf"^task {name} has nothing to train on here but what it is evaluated on \(it trains on .*--task.data"
        with pytest.raises(ValueError, match=message):
            task_of(name).training_batch(0, 0, 1)
    told = from_config(TaskConfig(name="bbh:snarks", data=DATA, train_on_evaluation=True))
    assert {e.id for e in told.training_batch(0, 0, 178)} == {e.id for e in told.examples("test", 178)}


def test_mmlu_trains_on_auxiliary_train_where_it_is(tmp_path: Path) -> None:
    for folder, name, rows in (
        ("test", "virology_test", ["q,a,b,c,d,A"]),
        ("auxiliary_train", "x", ["q,a,b,c,d,A", "r,a,b,c,d,B"]),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.csv").write_text("\n".join(rows))
    task = get_task("mmlu:virology", data=tmp_path)
    (example,) = task.training_batch(0, 0, 1)
    assert (example.question, example.answer) == ("r\nOptions:\n(A) a\n(B) b\n(C) c\n(D) d", "(B)")


@needs_data
def test_first200_is_the_head_of_test() -> None:
    task = task_of("gsm8k")
    assert task.examples("first200", 500) == task.splits["test"][:200]
    assert task.examples("first200", 3) == task.splits["test"][:3]
    with pytest.raises(
        ValueError, match=r"^task gsm8k has no split dev here; --task.split may be one of: test \(1319\), train"
    ):
        task.examples("dev", 1)
    with pytest.raises(ValueError, match=r"^task navigate has no split dev; it has train, validation, test$"):
        get_task("navigate").examples("dev", 1)


@needs_data
def test_physics_is_its_three_subjects() -> None:
    parts = [task_of(f"mmlu:{subject}").read_splits() for subject in PHYSICS]
    assert task_of("mmlu:physics").read_splits() == {
        s: [e for part in parts for e in part[s]] for s in ("test", "validation", "dev")
    }


HUB_RECORDS = [
    ("arc_challenge", {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}, "(B)"),
    ("mmlu:virology", {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2}, "(C)"),
    ("mmlu:virology", {"train": {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0}}, "(A)"),
    ("bbh:snarks", {"input": "q", "target": "(A)"}, "(A)"),
    ("gsm8k", {"question": "q", "answer": "so\n#### 1,080"}, "1080"),
]


@pytest.mark.parametrize(("name", "record", "gold"), HUB_RECORDS)
def test_records_of_the_hub_read_as_those_of_files(name: str, record: dict[str, object], gold: str) -> None:
    task = get_task(name)
    assert isinstance(task, Benchmark)
    example = task.example_of(Record("hub, row 1", record))
    assert (example.id, example.answer) == (question_id(example.question), gold)
    with pytest.raises(ValueError, match=r"^hub, row 2: expected "):
        task.example_of(Record("hub, row 2", {"question": "q"}))


@needs_sandbox
def test_humaneval_plus_of_the_hub_has_its_inputs_in_its_test() -> None:
    test = "def check(candidate):\n    inputs = [[1], [2]]\n    for i in inputs:\n        assertion(candidate(*i), 0, 1e-6)\n"
    record = {"prompt": 'def f(x):\n    "d"\n', "canonical_solution": "    return x\n", "entry_point": "f", "test": test}
    task = HumanEvalPlus()
    example = task.example_of(Record("row 1", record))
    assert task.rewards([(example, "    return x"), (example, "return 1"), (example, "def f(y):\n    return y")]) == [
        1.0,
        0.0,
        1.0,
    ]
    for broken, message in ((test.replace("[[1], [2]]", "g()"), "does not have the form"), ("pass", "has no list 'inputs'")):
        example = task.example_of(Record("row 1", {**record, "prompt": f"# {message}\n", "test": broken}))
        with pytest.raises(ValueError, match=rf"^row 1: its test {message}"):
            task.reward(example, "    return x")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = r"^task mbpp: google-research-datasets/mbpp cannot be read .*\(.*\); give its files instead: --task.data"
    with pytest.raises(ValueError, match=message) as caught:
        get_task("mbpp").examples("test", 1)
    assert "\n" not in str(caught.value)


@pytest.mark.processes
def test_a_hub_that_takes_the_call_and_stays_silent_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
        command = [sys.executable, "-m", "neuromas.cli", "train", "--task", "gsm8k", "--run-dir", str(tmp_path / "run")]
        # Most of it is the start of Python with torch; without an end of its own the hub's silence would last for ever.
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    message = (
        r"error: task gsm8k: openai/gsm8k cannot be read from the Hugging Face hub \(.*\); give its files instead: --task.data"
    )
    assert re.match(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("arc_challenge", "train.json", "{}", "expected a JSON list"),
        ("arc_challenge", "train.json", '[{"instruction": "q", "answer": "answer1"}]', "item 1: expected an instruction"),
        ("arc_challenge", "ARC-Challenge-Dev.jsonl", "{}\n", "line 1: expected a question with a stem"),
        ("mmlu:virology", "virology_test.csv", "q,a,b\n", "row 1: expected 6 columns, got 3"),
        ("mmlu:virology", "virology_test.csv", "q,a,b,c,d,E\n", "row 1: expected a question, four options"),
        ("gsm8k", "test.jsonl", '\n{"question": "q", "answer": "18"}', "line 2: expected an answer that ends in ####"),
        ("mbpp", "mbpp.jsonl", "{}", "line 1: expected a whole number 'task_id'"),
        ("mbpp", "mbpp.jsonl", '{"task_id": 1, "text": "t", "code": "c"}', "line 1: expected a list 'test_list'"),
        ("humaneval", "HumanEval.jsonl.gz", "plain", "cannot be read: Not a gzipped file"),
        ("bbh:snarks", "snarks.json", '{"examples": [{}]}', "item 1: expected an object with the texts 'input' and 'target'"),
    ],
)
def test_the_error_for_a_wrong_file_names_the_line(name: str, file: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"^task.data {re.escape(str(tmp_path / file))}.*{re.escape(message)}"):
        get_task(name, data=tmp_path / file).examples("test", 1)


def test_the_error_for_data_without_the_benchmark_names_the_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file of task gsm8k; looked for test.jsonl, gsm8k/test.jsonl, train"):
        get_task("gsm8k", data=tmp_path).examples("test", 1)
    with pytest.raises(ValueError, match="is not there, which should be a file or folder for task gsm8k"):
        get_task("gsm8k", data=tmp_path / "none").examples("test", 1)
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b"{}\n")[:-9])
    with pytest.raises(ValueError, match="is damaged: "):
        get_task("humaneval", data=tmp_path).examples("test", 1)


def test_names_and_settings_that_are_none() -> None:
    for name, message in (
        ("mmlu:cooking", r"^--task mmlu: must be followed by one of \['physics', 'abstract_algebra', .*, got 'cooking'$"),
        ("bbh:chess", r"^--task bbh: must be followed by one of \['boolean_expressions', .*, got 'chess'$"),
        ("class:none.py:A", r"^--task class: must be followed by FILE.py:CLASS of a file that is there, got 'none.py:A'$"),
    ):
        with pytest.raises(ValueError, match=message):
            get_task(name)
    with pytest.raises(ValueError, match=r"^--task.difficulty must be left out for task gsm8k, got 3: it has no generator$"):
        get_task("gsm8k", 3)
    assert (len(BBH), len(SUBJECTS)) == (27, 57)
    assert TrainConfig(task=TaskConfig(name="jsonl:a/b c.jsonl")).run_path.name == "jsonl-a-b-c.jsonl-1-1-1-seed0"


# --- reasoning-gym -------------------------------------------------------------------------------------------------------


def test_a_task_of_reasoning_gym_is_scored_by_its_own_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    task = get_task("reasoning_gym:chain_sum")
    batches = [task.training_batch(0, step, 4) for step in range(3)]
    held = task.examples("test", 8)
    again = get_task("reasoning_gym:chain_sum")
    assert (again.training_batch(0, 2, 4), again.examples("test", 8)) == (batches[2], held)
    for examples in (batches[2], held):
        assert task.rewards([(e, f"Answer: {e.answer}") for e in examples]) == [1.0] * len(examples)
        assert task.rewards([(e, text) for e in examples for text in ("Answer: 123456789", "", "\x00")]) == [0.0] * 3 * len(
            examples
        )
    with pytest.raises(ValueError, match=r"^--task reasoning_gym: must be followed by one of \['ab', .*, got 'chess'$"):
        get_task("reasoning_gym:chess")


def test_the_floor_of_partial_credit_is_what_a_constant_answer_earns() -> None:
    pytest.importorskip("reasoning_gym")
    task = get_task("reasoning_gym:spell_backward")
    examples = task.examples("test", 30)
    answer, share = task.floor(examples)
    # Letters that stand at their place earn credit: no two words are the same, but a constant answer is not worth 1/30.
    assert share == pytest.approx(sum(task.rewards([(example, f"Answer: {answer}") for example in examples])) / 30)
    assert 2 / 30 < share < 0.3


def test_a_task_of_reasoning_gym_takes_its_settings() -> None:
    pytest.importorskip("reasoning_gym")
    task = get_task("reasoning_gym:chain_sum,max_terms=2,max_digits=2")
    for example in task.training_batch(0, 1, 20):
        assert len(re.findall(r"\d+", example.question)) == 2
    with pytest.raises(
        ValueError, match=r"^--task reasoning_gym:chain_sum: its settings are \['allow_negation', .*got 'terms=2'$"
    ):
        get_task("reasoning_gym:chain_sum,terms=2")
    refused = (
        r"^--task reasoning_gym:chain_sum,max_terms=1: reasoning-gym refuses these settings: max_terms must be >= min_terms$"
    )
    with pytest.raises(ValueError, match=refused):
        get_task("reasoning_gym:chain_sum,max_terms=1")


def test_without_reasoning_gym_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"^--task reasoning_gym:ab needs the extra 'tasks': pip install 'neuromas\[tasks\]'$"):
        get_task("reasoning_gym:ab")


# --- Tasks of one's own --------------------------------------------------------------------------------------------------


def own(path: Path, *lines: object, verifier: str = "exact") -> DatasetTask:
    path.write_text("\n".join(map(json.dumps, lines)))
    task = from_config(TaskConfig(name=f"jsonl:{path}", verifier=verifier))  # type: ignore[arg-type]  # a verifier's name
    assert isinstance(task, DatasetTask)
    return task


def test_a_file_of_ones_own_is_split_by_hash_or_as_it_says(tmp_path: Path) -> None:
    task = own(tmp_path / "a.jsonl", *({"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(100)), verifier="number")
    assert {split: len(examples) for split, examples in task.splits.items()}.keys() == {"train", "validation", "test"}
    assert len(task.splits["train"]) > 60
    (example,) = task.examples("test", 1)
    assert task.rewards([(example, f"Answer: {example.answer}"), (example, "Answer: -1")]) == [1.0, 0.0]
    task = own(
        tmp_path / "b.jsonl",
        {"question": "q", "answer": "a b", "split": "test"},
        {"question": "r", "answer": "c", "split": "train"},
    )
    assert {split: [e.question for e in examples] for split, examples in task.splits.items()} == {"test": ["q"], "train": ["r"]}
    assert [e.question for e in task.training_batch(0, 5, 2)] == ["r", "r"]
    assert [e.answer for e in task.load(tmp_path / "b.jsonl")] == ["a b", "c"]


@pytest.mark.parametrize(
    ("verifier", "line", "message"),
    [
        ("exact", {"question": "q"}, "expected an object with the texts 'question' and 'answer'"),
        ("exact", {"question": "q", "answer": "a", "split": "dev"}, r"'split' must be one of \['train', .*got 'dev'"),
        (
            "number",
            {"question": "q", "answer": "a"},
            "answer for verifier number: 'a' is no answer that the verifier can parse",
        ),
        ("regex", {"question": "q", "answer": "("}, r"answer for verifier regex: '\(' is no regular expression"),
        ("python", {"question": "q", "answer": "assert"}, "answer for verifier python: not Python"),
        (
            "python",
            {"question": "q", "answer": "assert f(g(1))"},
            r"tests must call one function of the program, got \['f', 'g'\]",
        ),
    ],
)
def test_a_line_that_is_wrong_is_named(verifier: str, line: object, message: str, tmp_path: Path) -> None:
    good = {"question": "q0", "answer": "assert f(1) == 1" if verifier == "python" else "1"}
    with pytest.raises(ValueError, match=rf"^task jsonl: {re.escape(str(tmp_path))}/a.jsonl, line 2: .*{message}"):
        own(tmp_path / "a.jsonl", good, line, verifier=verifier).examples("test", 1)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.jsonl holds no lines$"):
        own(tmp_path / "a.jsonl").examples("test", 1)


@needs_sandbox
def test_programs_for_tests_of_ones_own(tmp_path: Path) -> None:
    task = own(
        tmp_path / "a.jsonl",
        {"question": "Write double(x).", "answer": "assert double(2) == 4", "split": "test"},
        verifier="python",
    )
    assert isinstance(task, JsonlCodeTask)
    (example,) = task.examples("test", 1)
    texts = ["def double(x):\n    return 2 * x", "def double(x):\n    return x", "import os\nos._exit(0)", "", "\ud800", "\x00"]
    assert task.rewards([(example, text) for text in texts]) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_the_class_of_the_page_is_a_task_of_under_40_lines(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "tasks.md").read_text(), re.DOTALL)
    assert code.count("\n") < 40
    (tmp_path / "parity.py").write_text(code)
    task = get_task(f"class:{tmp_path}/parity.py:Parity")
    examples = task.examples("test", 20)
    assert task.floor(examples)[1] == 0.5
    for example in [*examples, *task.training_batch(0, 0, 4)]:
        ones = re.findall(r"[01]{12}", example.question)[0].count("1")
        assert example.answer == ("odd" if ones % 2 else "even")
        assert task.reward(example, f"Answer: {example.answer}") == 1.0
        assert task.reward(example, "Answer: even or odd") == 0.0
    with pytest.raises(ValueError, match=r"parity.py has no class Other derived from neuromas.tasks.Task$"):
        get_task(f"class:{tmp_path}/parity.py:Other")
    (tmp_path / "parity.txt").write_text("")
    with pytest.raises(ValueError, match=r"^--task class:.*: expected a Python file, got "):
        get_task(f"class:{tmp_path}/parity.txt:Parity")


def test_a_reward_of_ones_own_decides_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", (DOCS / "how_to/own_task.md").read_text(), re.DOTALL)
        if "Sums" in code
    ]
    (tmp_path / "sums.py").write_text(code)
    lines = [json.dumps({"question": f"{n} + 0?", "answer": str(n % 4)}) for n in range(100)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    task = get_task("class:sums.py:Sums")
    # Gold answers are 0, 1, 2, 3 equally often: always 1 earns 1/2, 1, 1/2 and 0.
    assert task.floor(task.examples("test", 20)) == ("1", 0.5)


def test_a_mistake_in_a_file_of_ones_own_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text("import json\n\njson.dump()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--task class:own.py:A: own.py, line 3: TypeError: "):
        get_task("class:own.py:A")


# --- The listing ---------------------------------------------------------------------------------------------------------


def test_the_listing_without_data_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuromas.tasks.dataset_hub.load", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr(task_list, "FLOOR_SIZE", 20)
    rows = {row["task"]: row for row in task_list.listing()}
    assert set(rows) == {*TASKS, *BENCHMARKS}
    assert (rows["gsm8k"]["floor"], rows["gsm8k"]["splits"], rows["gsm8k"]["verifier"]) == (None, {}, "math")
    assert rows["navigate"]["floor"] == 0.5
    assert "| `gsm8k` | - | - | - | - | - | - | math |" in task_list.table(list(rows.values())).splitlines()


def test_an_example_reads_as_each_node_of_a_chain_gets_it() -> None:
    reading = task_list.example_prompts(TaskConfig(name="navigate"), WORDINGS["terse"])
    first, second, third = (node["reads"] for node in reading["nodes"])
    assert all(text.startswith(reading["question"]) for text in (first, second, third))
    assert first.endswith('You are node 1 in layer 1.\nWrite "TO node 2:" and your message.')
    assert "From node 1: (what node 1 writes)" in second
    assert third.endswith('Write "Answer: Yes" or "Answer: No".')


def test_mbpp_splits_do_not_depend_on_the_order_of_the_file() -> None:
    numbers = random.Random(0).sample(range(1, 975), 974)
    splits = Mbpp(Path("none")).split_file(Path("mbpp.jsonl"), iter(Record("", {"task_id": n}) for n in numbers))
    assert {name: (min(r.data["task_id"] for r in s), max(r.data["task_id"] for r in s)) for name, s in splits.items()} == {
        "dev": (1, 10),
        "test": (11, 510),
        "validation": (511, 600),
        "train": (601, 974),
    }
