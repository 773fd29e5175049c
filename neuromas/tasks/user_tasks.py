"""Tasks of the user: a JSONL file with a named verifier, or a class in a Python file."""

import ast
import builtins
import importlib.util
import sys
import traceback
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType

from neuromas.config import VerifierName
from neuromas.sandbox import Program
from neuromas.tasks import item_files
from neuromas.tasks.code import CodeTask, with_answer
from neuromas.tasks.item_files import Record
from neuromas.tasks.task import SPLITS, DatasetTask, Problem, Task, split_of
from neuromas.tasks.verifiers import Verifier, make_verifier
from neuromas.types import Example

OWN_CODE = "class:"
"""Start of the name of a task that is a class in a Python file."""


class JsonlTask(DatasetTask):
    """A file of lines with `question`, `answer` and, in all or in none, `split`; without it, questions are split by hash."""

    _verifier: VerifierName

    def __init__(self, path: Path, verifier: VerifierName, *, train_on_evaluation: bool) -> None:
        self.path, self.train_on_evaluation = path, train_on_evaluation
        self.verifier, self._verifier = verifier, verifier
        self.name = f"jsonl:{path}"
        self.training_source = "lines of split train"

    @cached_property
    def records(self) -> list[Record]:
        """The lines of the file."""
        records = list(item_files.read_json_lines(self.path, "task jsonl:"))
        if not records:
            raise ValueError(f"task jsonl: {self.path} holds no lines")
        return records

    @cached_property
    def form(self) -> Verifier:
        """The verifier of the answers."""
        golds = (record.texts("question", "answer")[1] for record in self.records)
        return make_verifier(self._verifier, golds)

    @property
    def answer_format(self) -> str:  # type: ignore[override]  # not known before the file is read
        return self.form.answer_format

    def parse_answer(self, text: str) -> str | None:
        return self.form.read(text)

    def reward(self, example: Example, text: str) -> float:
        return float(self.form.check(example.answer, text))

    def read_splits(self) -> dict[str, list[Example]]:
        named: dict[str | None, list[Example]] = {}
        for record in self.records:
            split = record.data.get("split")
            if ("split" in record.data) is not ("split" in self.records[0].data) or split not in (*SPLITS, None):
                raise record.error(f"'split' must be one of {list(SPLITS)} in every line or in none, got {split!r}")
            named.setdefault(split, []).append(self.example_of(record))
        splits = {split: examples for split, examples in named.items() if split is not None}
        if splits.keys() - {"train"}:
            return splits
        # The file names no questions to score on.
        return _by_hash(named.get(None, splits.get("train", [])))

    @property
    def remark(self) -> str:  # type: ignore[override]  # not known before the file is read
        """If the file names no questions to score on, says how many are held out by their hash; else empty."""
        if {record.data.get("split") for record in self.records} - {"train", None}:
            return ""
        counts = ", ".join(f"{len(examples)} for {split}" for split, examples in self.splits.items())
        return f"task {self.name} names no questions to score on: some are held out by their hash ({counts})"

    def example_of(self, record: Record) -> Example:
        """Return the example of a line."""
        question, answer = record.texts("question", "answer")
        try:
            gold = self.form.normal_gold(answer)
        except ValueError as error:
            raise record.error(f"answer for verifier {self.verifier}: {error}") from error
        return self.example(Problem(question, gold))

    def load(self, path: Path) -> list[Example]:
        return [self.example_of(record) for record in item_files.read_question_file(path, "task.file")]


def _by_hash(examples: list[Example]) -> dict[str, list[Example]]:
    """Return questions by split, assigned by their hash. If none of a few falls to test, the one with the largest hash does."""
    splits: dict[str, list[Example]] = {}
    chosen = {example.id: split_of(example.question) for example in examples}
    if len(chosen) > 1 and "test" not in chosen.values():
        chosen[max(chosen)] = "test"
    for example in examples:
        splits.setdefault(chosen[example.id], []).append(example)
    return splits


class JsonlCodeTask(CodeTask, JsonlTask):
    """A JSONL task whose answers are tests, in Python, of the one function that they call and do not define."""

    def __init__(self, path: Path, *, train_on_evaluation: bool) -> None:
        JsonlTask.__init__(self, path, "python", train_on_evaluation=train_on_evaluation)
        self.programs = {}

    def example_of(self, record: Record) -> Example:
        question, tests = record.texts("question", "answer")
        entry_point = _function_under_test(record, tests)
        example = self.example(Problem(question, tests))
        self.programs[example.id] = partial(with_answer, Program("", tests, entry_point))
        return example


def _function_under_test(record: Record, tests: str) -> str:
    """Return the name of the one function that the tests call and do not define."""
    try:
        nodes = list(ast.walk(ast.parse(tests)))
    except SyntaxError as error:
        raise record.error(f"answer for verifier python: not Python ({error.msg})") from error
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imported = {a.asname or a.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names}
    functions = called - stored - defined - imported - set(dir(builtins))
    if len(functions) != 1:
        raise record.error(f"answer for verifier python: tests must call one function of the program, got {sorted(functions)}")
    return functions.pop()


def load_class(location: str) -> Task:
    """Return the task of `FILE.py:CLASS`; ValueError names the mistake. The file is executed: it is the user's own."""
    file, _, name = location.rpartition(":")
    path = Path(file)
    if not path.is_file() or not name.isidentifier():
        raise ValueError(f"--task class: must be followed by FILE.py:CLASS of a file that is there, got {location!r}")
    kind = getattr(run_file(path, f"task_{path.stem}", f"--task {OWN_CODE}{location}"), name, None)
    if not isinstance(kind, type) or not issubclass(kind, Task):
        raise ValueError(f"{file} has no class {name} derived from neuromas.tasks.Task")
    try:
        return kind()
    except Exception as error:  # any error of the user's own class
        raise ValueError(f"--task {OWN_CODE}{location}: it cannot be made: {type(error).__name__}: {error}") from error


def run_file(path: Path, name: str, flag: str) -> ModuleType:
    """Return the module of that name from executing a Python file; ValueError names the line that fails."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{flag}: expected a Python file, got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses find their module by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # any error of the user's own file
        # A module's file is absolute.
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.absolute())]
        line = error.lineno if isinstance(error, SyntaxError) else next(reversed(frames), None)
        what = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{flag}: {path}, line {line}: {type(error).__name__}: {what}") from error
    return module
