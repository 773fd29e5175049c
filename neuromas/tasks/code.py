"""Tasks whose answers are programs, judged by their tests in the sandbox: HumanEval, HumanEval+, MBPP."""

import ast
import atexit
import re
import textwrap
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from neuromas.sandbox import Limits, Program, Sandbox
from neuromas.sandbox.human_eval import humaneval_plus_program, humaneval_program, mbpp_program
from neuromas.tasks.item_files import Record
from neuromas.tasks.published import Benchmark
from neuromas.tasks.task import DatasetTask, Problem
from neuromas.tasks.verifiers import Python, defines
from neuromas.types import Example

PYTHON = Python()


@cache
def _sandbox(limits: Limits) -> Sandbox:
    sandbox = Sandbox(limits)
    atexit.register(sandbox.close)
    return sandbox


class CodeTask(DatasetTask):
    """Rewards 1.0 for a program that passes its tests; all programs of a step run at once."""

    verifier = "python"
    limits = Limits()

    programs: dict[str, Callable[[str], Program | None]]
    """Id of an example -> function that returns the program of a text with its tests; filled when examples are read."""

    def check_ready(self) -> None:
        _sandbox(self.limits)

    def parse_answer(self, text: str) -> str | None:
        return PYTHON.read(text)

    def reward(self, example: Example, text: str) -> float:
        return self.rewards([(example, text)])[0]

    def rewards(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
        found = [self.programs[example.id](text) for example, text in pairs]
        programs = [program for program in found if program is not None]
        outcomes = iter(_sandbox(self.limits).check(programs) if programs else ())
        return [0.0 if program is None else float(next(outcomes).passed) for program in found]


def with_answer(program: Program, text: str) -> Program | None:
    """Return `program` with the source that a text gives, and the same tests; None if the text gives no program."""
    source = PYTHON.read(text, program.entry_point)
    return None if source is None else replace(program, source=textwrap.dedent(source))


class CodeBenchmark(CodeTask, Benchmark):
    """A benchmark of programs. Its gold answer is the published program."""

    form = PYTHON

    def __init__(
        self,
        data: Path | None = None,
        *,
        train_on_evaluation: bool = False,
        programs: dict[str, Callable[[str], Program | None]] | None = None,
    ) -> None:
        super().__init__(data, train_on_evaluation=train_on_evaluation)
        self.programs = {} if programs is None else programs

    @abstractmethod
    def program(self, record: Record, text: str) -> Program | None:
        """Return the program that a text gives with the tests of its record; None if the text gives none."""

    def example_of(self, record: Record) -> Example:
        example = super().example_of(record)
        self.programs[example.id] = partial(self.program, record)
        return example


class Mbpp(CodeBenchmark):
    """Short Python functions from a sentence and the first of three tests, which names the function; all three are run."""

    name, hub_id, config = "mbpp", "google-research-datasets/mbpp", "full"
    hub_splits: ClassVar = {"test": "test", "validation": "validation", "dev": "prompt", "train": "train"}
    file_names: ClassVar = {"test": ("mbpp.jsonl", "mbpp/mbpp.jsonl")}

    def split_file(self, path: Path, records: Iterator[Record], split: str | None = None) -> dict[str, list[Record]]:
        """Split by task_id as published: 1-10 (prompt) dev, 11-510 test, 511-600 validation, 601-974 train."""
        splits: dict[str, list[Record]] = {"test": [], "validation": [], "dev": [], "train": []}
        for record in records:
            number = record.data.get("task_id")
            if not isinstance(number, int):
                raise record.error("expected a whole number 'task_id'")
            name = "dev" if number <= 10 else "test" if number <= 510 else "validation" if number <= 600 else "train"
            splits[name].append(record)
        return splits

    def problem(self, record: Record) -> Problem:
        text, code = record.texts("text", "code")
        tests = record.data.get("test_list")
        if not isinstance(tests, list) or not tests:
            raise record.error("expected a list 'test_list' of asserts")
        return Problem(f"{text}\nYour code has to pass tests such as:\n{tests[0]}", code)

    def program(self, record: Record, text: str) -> Program | None:
        data = record.data
        gold = data["code"]
        return with_answer(mbpp_program(gold, gold, data["test_list"], data.get("test_setup_code") or ""), text)


class HumanEval(CodeBenchmark):
    """Python functions from their signature and docstring. Trains on MBPP."""

    name, hub_id = "humaneval", "openai/openai_humaneval"
    hub_splits: ClassVar = {"test": "test"}
    file_names: ClassVar = {"test": tuple(f"{d}HumanEval.jsonl{z}" for d in ("", "humaneval/") for z in (".gz", ""))}
    training_source = "MBPP, in files: mbpp.jsonl next to its own"

    @cached_property
    def trainer(self) -> Mbpp:  # type: ignore[override]  # resolved when first used
        roots = [] if self.data is None else [self.data, self.data.parent, self.data.parent.parent]
        here = (root for root in roots for name in Mbpp.file_names["test"] if (root / name).is_file())
        # Both tasks share `programs`, so that this task can reward the examples of either.
        return Mbpp(next(here, None), programs=self.programs)

    def problem(self, record: Record) -> Problem:
        prompt, solution, _ = record.texts("prompt", "canonical_solution", "entry_point")
        return Problem(f"Complete this Python function:\n{prompt}", solution)

    def program(self, record: Record, text: str) -> Program | None:
        entry_point = record.data["entry_point"]
        answer = PYTHON.read(text, entry_point)
        if answer is None:
            return None
        first, completion = _completion(answer, entry_point)
        program = self.completed(record, completion)
        return replace(program, source=first + program.source)

    def completed(self, record: Record, completion: str) -> Program:
        """Return the program of a prompt and its completion, with its tests."""
        data = record.data
        return humaneval_program(data["prompt"], completion, data["test"], data["entry_point"])


class HumanEvalPlus(HumanEval):
    """HumanEval with many more inputs for each function."""

    name, hub_id = "humaneval_plus", "evalplus/humanevalplus"
    file_names: ClassVar = {
        "test": tuple(
            f"{folder}{name}.jsonl{z}"
            for folder in ("", "humaneval_plus/")
            for name in ("HumanEvalPlus", "HumanEvalPlus-Mini")
            for z in (".gz", "")
        )
    }
    # The tests make 750 calls on average, and as many of the published program.
    limits = Limits(seconds=120, memory_mb=1024, output_bytes=1 << 30)

    def completed(self, record: Record, completion: str) -> Program:
        data = record.data
        if "plus_input" in data:
            inputs, tolerance = data["base_input"] + data["plus_input"], data["atol"]
        else:
            inputs, tolerance = _inputs_of(record)
        return humaneval_plus_program(
            data["prompt"], completion, data["canonical_solution"], data["entry_point"], inputs, tolerance
        )


_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import\b[^\n]*$", re.MULTILINE)


def _completion(answer: str, entry_point: str) -> tuple[str, str]:
    """Return the text before the prompt and the text after it: a complete program, or the body of the prompt's function.

    An answer is a program if it defines the function's name and does not return at top level, else a body, which is indented.
    Imports from __future__ in a program have to come first.
    """
    whole = textwrap.dedent(answer)
    if not defines(answer, entry_point) or re.search(r"^return\b", whole, re.MULTILINE):
        return "", _body(answer)
    return "\n".join([*_FUTURE.findall(whole), ""]), "\n" + _FUTURE.sub("", whole)


def _body(answer: str) -> str:
    """Return a function's body indented by four spaces, also where its first line has lost its indentation."""
    lines = [line for line in answer.split("\n") if line.strip()]
    margins = [line[: len(line) - len(line.lstrip())] for line in lines]
    if len(lines) > 1 and not margins[0] and all(margins[1:]):
        least = min(margins[1:], key=len)
        # The other lines are the block of the first line, or the first line has lost the indentation of the least indented one.
        if not re.search(r":\s*(?:#.*)?$", lines[0]) or margins[1] != least:
            return _body(least + answer.lstrip())
    return answer if margins[0] == "    " else textwrap.indent(textwrap.dedent(answer), "    ")


def _inputs_of(record: Record) -> tuple[list[Any], float]:
    """Return the inputs and the tolerance in the test of the hub's HumanEval+, which holds them as Python text."""
    (test,) = record.texts("test")
    inputs, tolerance = None, 0.0
    try:
        for node in ast.walk(ast.parse(test)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "inputs":
                inputs = ast.literal_eval(node.value)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "assertion":
                tolerance = float(ast.literal_eval(node.args[-1]))
    except (ValueError, SyntaxError) as error:
        raise record.error(f"its test does not have the form of evalplus/humanevalplus: {error}") from error
    if not isinstance(inputs, list):
        raise record.error("its test has no list 'inputs'")
    return inputs, tolerance
