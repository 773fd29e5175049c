"""Tasks of one's own: a JSONL file with a named verifier, or a Python class in a file."""

import ast
import builtins
import importlib.util
from functools import cached_property, partial
from pathlib import Path

from neuromas.sandbox import Program
from neuromas.tasks import files
from neuromas.tasks.base import SPLITS, DatasetTask, Problem, Task, split_of
from neuromas.tasks.code import CodeTask
from neuromas.tasks.files import Record
from neuromas.tasks.verifiers import Verifier, VerifierName, make_verifier
from neuromas.types import Example


class JsonlTask(DatasetTask):
    """Lines with `question`, `answer` and, in all of them or in none, `split`; without, questions are split by their hash."""

    _verifier: VerifierName

    def __init__(self, path: Path, verifier: VerifierName = "exact", *, train_on_evaluation: bool = False) -> None:
        self.path, self.train_on_evaluation = path, train_on_evaluation
        self.verifier, self._verifier = verifier, verifier
        self.name = f"jsonl:{path}"
        self.training_source = "lines of split train"

    @cached_property
    def records(self) -> list[Record]:
        records = list(files.read_json_lines(self.path, "task jsonl:"))
        if not records:
            raise ValueError(f"task jsonl: {self.path} holds no lines")
        return records

    @cached_property
    def form(self) -> Verifier:
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
        has_splits = "split" in self.records[0].data
        splits: dict[str, list[Example]] = {}
        for record in self.records:
            example = self.example_of(record)
            split = record.data.get("split") if has_splits else split_of(example.question)
            if has_splits is not ("split" in record.data) or split not in SPLITS:
                raise record.error(
                    f"'split' must be one of {list(SPLITS)} in every line or in none, got {record.data.get('split')!r}"
                )
            splits.setdefault(split, []).append(example)
        return splits

    def example_of(self, record: Record) -> Example:
        question, answer = record.texts("question", "answer")
        try:
            gold = self.form.normal_gold(answer)
        except ValueError as error:
            raise record.error(f"answer for verifier {self.verifier}: {error}") from error
        return self.example(Problem(question, gold))

    def load(self, path: Path) -> list[Example]:
        return [self.example_of(record) for record in files.read_question_file(path, "task.file")]


class JsonlCodeTask(CodeTask, JsonlTask):
    """The same where the answer is tests, in Python, of the one function that they call and do not define."""

    def __init__(self, path: Path, *, train_on_evaluation: bool = False) -> None:
        JsonlTask.__init__(self, path, "python", train_on_evaluation=train_on_evaluation)
        self.programs = {}

    def example_of(self, record: Record) -> Example:
        question, tests = record.texts("question", "answer")
        entry_point = _function_under_test(record, tests)
        example = self.example(Problem(question, tests))
        self.programs[example.id] = partial(Program, tests=tests, entry_point=entry_point)
        return example


def _function_under_test(record: Record, tests: str) -> str:
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


def load_class(place: str) -> Task:
    """Make a task of `FILE.py:CLASS`; ValueError says what is wrong with it. The file is run: it is the user's own."""
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not path.is_file() or not name.isidentifier():
        raise ValueError(f"--task class: must be followed by FILE.py:CLASS of a file that is there, got {place!r}")
    spec = importlib.util.spec_from_file_location(f"task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--task class: must name a Python file, got {file!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind = getattr(module, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Task):
        raise ValueError(f"{file} has no class {name} derived from neuromas.tasks.Task")
    return kind()
