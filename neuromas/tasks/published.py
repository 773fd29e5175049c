"""The public benchmarks of the paper, from the Hugging Face hub or from files.

Splits, items and targets are the published ones, defects included. Where a benchmark has no training split, `training_source`
names the data that trains it instead; training on evaluated items needs the flag --task.train-on-evaluation.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from neuromas.config import VerifierName
from neuromas.tasks import dataset_hub, item_files
from neuromas.tasks.answers import bracket_form, read_exact, read_open
from neuromas.tasks.item_files import Record
from neuromas.tasks.task import DatasetTask, Problem, Task
from neuromas.tasks.verifiers import Reader, Verifier, choice, make_verifier, words
from neuromas.types import Example

DATA_FLAG = "task.data"


class Benchmark(DatasetTask):
    """A published benchmark; subclasses define its source and how a record becomes a problem."""

    hub_id: ClassVar[str]
    config: str | None = None
    """Name of the hub's configuration."""
    hub_splits: ClassVar[Mapping[str, str]]
    """Our name of a split -> the hub's."""
    file_names: ClassVar[Mapping[str, tuple[str, ...]]]
    """Our name of a split -> names of its file below --task.data, of which the first that exists is read."""
    form: Verifier
    trainer: Task | None = None
    """The task that provides training and validation problems where the benchmark publishes none."""

    def __init__(self, data: Path | None = None, *, train_on_evaluation: bool = False) -> None:
        """Set the source of the items, a file or folder, or the hub if `data` is None; they are read when first needed."""
        self.data, self.train_on_evaluation = data, train_on_evaluation
        self.answer_format = self.form.answer_format

    @abstractmethod
    def problem(self, record: Record) -> Problem:
        """Return the question with its answer; ValueError if the record has not the form of this benchmark."""

    def paths(self) -> Mapping[str, tuple[str, ...]]:
        """Return the file names of each split; subclasses override it where they depend on more than the class."""
        return self.file_names

    def parse_answer(self, text: str) -> str | None:
        return self.form.read(text)

    @property
    def generates(self) -> bool:
        return self.trainer is not None and not self.train_on_evaluation

    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        if self.trainer is None or self.train_on_evaluation:
            return super().training_batch(seed, step, count)
        self.trainer.held_out = self.held_out | self.evaluated
        return self.trainer.training_batch(seed, step, count)

    def has(self, split: str) -> bool:
        return super().has(split) or (split == "validation" and self.trainer is not None)

    def _examples(self, split: str, count: int) -> list[Example]:
        if split == "validation" and self.trainer is not None and not super().has(split):
            return [e for e in self.trainer.examples(split, count) if e.id not in self.evaluated]
        return super()._examples(split, count)

    @cached_property
    def evaluated(self) -> frozenset[str]:
        """Ids of all items that the benchmark publishes for evaluation."""
        return frozenset(e.id for split, examples in self.splits.items() if split != "train" for e in examples)

    def read_splits(self) -> dict[str, list[Example]]:
        records = self._records()
        return {split: [self.example_of(record) for record in found] for split, found in records.items()}

    def example_of(self, record: Record) -> Example:
        """Return the example of a record."""
        return self.example(self.problem(record))

    def _records(self) -> dict[str, list[Record]]:
        if self.data is None:
            return dataset_hub.load(self.name, self.hub_id, self.config, self.hub_splits)
        if self.data.is_file():
            return self.split_file(self.data, self.read_file(self.data))
        found = {split: path for split in self.paths() if (path := self._find(split))}
        if not found:
            names = ", ".join(name for names in self.paths().values() for name in names)
            problem = "holds no file of" if self.data.exists() else "is not there, which should be a file or folder for"
            raise ValueError(f"{DATA_FLAG} {self.data} {problem} task {self.name}; looked for {names}")
        records: dict[str, list[Record]] = {}
        for split, path in found.items():
            for name, part in self.split_file(path, self.read_file(path), split).items():
                records.setdefault(name, []).extend(part)
        return records

    def _find(self, split: str) -> Path | None:
        assert self.data is not None
        paths = (self.data / name for name in self.paths()[split])
        return next((path for path in paths if path.is_file()), None)

    def read_file(self, path: Path) -> Iterator[Record]:
        """Yield the records of one file."""
        return item_files.read_json_lines(path, DATA_FLAG)

    def split_file(self, path: Path, records: Iterator[Record], split: str | None = None) -> dict[str, list[Record]]:
        """Return a file's records by split: `split`, or the split that lists the file's name, else test."""
        named = (s for s, names in self.paths().items() if any(Path(name).name == path.name for name in names))
        return {split or next(named, "test"): list(records)}

    def load(self, path: Path) -> list[Example]:
        """Read examples from a file of this benchmark; ValueError names the file and the line."""
        return [self.example_of(record) for record in self.read_file(path)]


def _lettered(question: str, options: list[str]) -> str:
    listed = "\n".join(f"({chr(ord('A') + k)}) {option}" for k, option in enumerate(options))
    return f"{question}\nOptions:\n{listed}"


class ArcChallenge(Benchmark):
    """Grade-school science questions with 3 to 5 options."""

    name, hub_id, config = "arc_challenge", "allenai/ai2_arc", "ARC-Challenge"
    hub_splits: ClassVar = {"test": "test", "validation": "validation", "train": "train"}
    file_names: ClassVar = {
        split: tuple(
            f"{folder}{name}"
            for folder in ("", "arc_challenge/", "arc_challenge/llm_adapters/", "llm_adapters/")
            for name in names
        )
        for split, names in {
            "test": ("ARC-Challenge-Test.jsonl", "test.json"),
            "validation": ("ARC-Challenge-Dev.jsonl",),
            "train": ("ARC-Challenge-Train.jsonl", "train.json"),
        }.items()
    }
    verifier = "choice"
    form = choice("ABCDE")

    def read_file(self, path: Path) -> Iterator[Record]:
        return item_files.read_json_list(path, DATA_FLAG) if path.suffix == ".json" else super().read_file(path)

    def problem(self, record: Record) -> Problem:
        data = record.data
        if "instruction" in data:
            return _read_llm_adapters(record)
        inner = data.get("question")
        stem, choices = (inner.get("stem"), inner.get("choices")) if isinstance(inner, dict) else (inner, data.get("choices"))
        if isinstance(choices, list) and all(isinstance(option, dict) for option in choices):
            choices = {key: [option.get(key) for option in choices] for key in ("text", "label")}
        if not isinstance(stem, str) or not isinstance(choices, dict) or data.get("answerKey") not in choices["label"]:
            raise record.error("expected a question with a stem, choices and an answerKey among their labels")
        # Some items are labelled 1 to 4 instead.
        index = choices["label"].index(data["answerKey"])
        return Problem(_lettered(stem, choices["text"]), f"({chr(ord('A') + index)})")


_ADAPTERS = re.compile(
    r"Please choose the correct answer to the question: (.*?)\n\n(Answer1: .*?)\n\nAnswer format: [answer0-9/]+", re.DOTALL
)


def _read_llm_adapters(record: Record) -> Problem:
    """Return the problem of a record of LLM-Adapters, which holds the question and its options in one text."""
    instruction, answer = record.texts("instruction", "answer")
    match = _ADAPTERS.fullmatch(instruction)
    options = re.split(r"\s*Answer\d: ", match[2])[1:] if match else []
    number = answer.removeprefix("answer")
    if match is None or not number.isdigit() or not 1 <= int(number) <= len(options):
        raise record.error("expected an instruction with Answer1: to Answer5:, and an answer among them")
    return Problem(_lettered(match[1], options), f"({chr(ord('A') + int(number) - 1)})")


PHYSICS = ("college_physics", "high_school_physics", "conceptual_physics")
# fmt: off
SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology", "college_chemistry",
    "college_computer_science", "college_mathematics", "college_medicine", "college_physics", "computer_security",
    "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics", "formal_logic", "global_facts",
    "high_school_biology", "high_school_chemistry", "high_school_computer_science", "high_school_european_history",
    "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics", "high_school_mathematics",
    "high_school_microeconomics", "high_school_physics", "high_school_psychology", "high_school_statistics",
    "high_school_us_history", "high_school_world_history", "human_aging", "human_sexuality", "international_law",
    "jurisprudence", "logical_fallacies", "machine_learning", "management", "marketing", "medical_genetics", "miscellaneous",
    "moral_disputes", "moral_scenarios", "nutrition", "philosophy", "prehistory", "professional_accounting", "professional_law",
    "professional_medicine", "professional_psychology", "public_relations", "security_studies", "sociology",
    "us_foreign_policy", "virology", "world_religions",
)
# fmt: on


class Mmlu(Benchmark):
    """Questions with four options; `physics` is the three physics subjects together. It trains on auxiliary_train."""

    hub_id = "cais/mmlu"
    hub_splits: ClassVar = {"test": "test", "validation": "validation", "dev": "dev"}
    training_source = "auxiliary_train of cais/mmlu, in files: auxiliary_train/*.csv"
    verifier = "choice"
    form = choice("ABCD")

    def __init__(self, subject: str, data: Path | None = None, *, train_on_evaluation: bool = False) -> None:
        if subject not in (*SUBJECTS, "physics"):
            raise ValueError(f"--task mmlu: must be followed by one of {['physics', *SUBJECTS]}, got {subject!r}")
        super().__init__(data, train_on_evaluation=train_on_evaluation)
        self.name, self.subject = f"mmlu:{subject}", subject
        self.subjects = PHYSICS if subject == "physics" else (subject,)

    def _records(self) -> dict[str, list[Record]]:
        records: dict[str, list[Record]] = {}
        for subject in self.subjects:
            self.config = subject
            for split, found in super()._records().items():
                records.setdefault(split, []).extend(found)
        return records

    def paths(self) -> Mapping[str, tuple[str, ...]]:
        names = {"test": "test", "validation": "val", "dev": "dev"}
        folders = ("", "mmlu/")
        return {split: tuple(f"{f}{name}/{self.config}_{name}.csv" for f in folders) for split, name in names.items()}

    @cached_property
    def auxiliary(self) -> list[Example]:
        """The items of auxiliary_train, which belong to no subject; they are read only for training."""
        if self.data is None:
            found = dataset_hub.load(self.name, self.hub_id, "auxiliary_train", {"train": "train"})["train"]
        else:
            folders = (self.data / folder for folder in ("auxiliary_train", "mmlu/auxiliary_train"))
            paths = sorted(path for folder in folders for path in folder.glob("*.csv"))
            found = [record for path in paths for record in self.read_file(path)]
        return [example for example in map(self.example_of, found) if example.id not in self.evaluated]

    def training_examples(self) -> list[Example]:
        if not self.train_on_evaluation and (pool := [e for e in self.auxiliary if e.id not in self.held_out]):
            return pool
        return super().training_examples()

    def read_file(self, path: Path) -> Iterator[Record]:
        return item_files.read_csv(path, DATA_FLAG, ("question", "A", "B", "C", "D", "answer"))

    def problem(self, record: Record) -> Problem:
        # The hub's auxiliary_train wraps each of its records in another.
        data = record.data.get("train", record.data)
        options = data.get("choices") or [data.get(letter) for letter in "ABCD"]
        answer = data.get("answer")
        letter = "ABCD"[answer] if isinstance(answer, int) and 0 <= answer < 4 else answer
        if not isinstance(data.get("question"), str) or len(options) != 4 or letter not in tuple("ABCD"):
            raise record.error("expected a question, four options and an answer A, B, C or D")
        return Problem(_lettered(data["question"], options), f"({letter})")


class Gsm8k(Benchmark):
    """Grade-school word problems; the answer is the number after #### in the worked solution."""

    name, hub_id, config = "gsm8k", "openai/gsm8k", "main"
    hub_splits: ClassVar = {"test": "test", "train": "train"}
    file_names: ClassVar = {split: (f"{split}.jsonl", f"gsm8k/{split}.jsonl") for split in ("test", "train")}
    verifier = "math"
    form = make_verifier("math")

    def problem(self, record: Record) -> Problem:
        question, solution = record.texts("question", "answer")
        gold = self.form.read(solution.rpartition("####")[2])
        if gold is None or "####" not in solution:
            raise record.error("expected an answer that ends in #### and a number")
        return Problem(question, gold)

    def reward(self, example: Example, text: str) -> float:
        return float(self.form.check(example.answer, text))


_YES_NO, _OPTIONS = words("Yes", "No"), choice("ABCDEFG")
_OPEN = Reader(read_exact, 'Write "Answer: " and the answer.')
_NUMBER = make_verifier("number")
BBH: dict[str, tuple[VerifierName, Verifier]] = {
    "boolean_expressions": ("exact", words("True", "False")),
    "causal_judgement": ("exact", _YES_NO),
    "date_understanding": ("choice", _OPTIONS),
    "disambiguation_qa": ("choice", _OPTIONS),
    "dyck_languages": ("exact", Reader(bracket_form().read, 'Write "Answer: " and the closing brackets.')),
    "formal_fallacies": ("exact", words("valid", "invalid")),
    "geometric_shapes": ("choice", choice("ABCDEFGHIJK")),
    "hyperbaton": ("choice", _OPTIONS),
    "logical_deduction_five_objects": ("choice", _OPTIONS),
    "logical_deduction_seven_objects": ("choice", _OPTIONS),
    "logical_deduction_three_objects": ("choice", _OPTIONS),
    "movie_recommendation": ("choice", _OPTIONS),
    "multistep_arithmetic_two": ("number", _NUMBER),
    "navigate": ("exact", _YES_NO),
    "object_counting": ("number", _NUMBER),
    "penguins_in_a_table": ("choice", _OPTIONS),
    "reasoning_about_colored_objects": ("choice", choice("ABCDEFGHIJKLMNOPQR")),
    "ruin_names": ("choice", _OPTIONS),
    "salient_translation_error_detection": ("choice", _OPTIONS),
    "snarks": ("choice", _OPTIONS),
    "sports_understanding": ("exact", words("yes", "no")),
    "temporal_sequences": ("choice", _OPTIONS),
    "tracking_shuffled_objects_five_objects": ("choice", _OPTIONS),
    "tracking_shuffled_objects_seven_objects": ("choice", _OPTIONS),
    "tracking_shuffled_objects_three_objects": ("choice", _OPTIONS),
    "web_of_lies": ("exact", _YES_NO),
    "word_sorting": ("exact", _OPEN),
}
"""Name of a task of BIG-Bench-Hard -> (name of its verifier, verifier)."""


class BigBenchHard(Benchmark):
    """A task of BIG-Bench-Hard, which has test items alone; the procedural family of that name trains it if there is one."""

    hub_id = "lukaemon/bbh"
    hub_splits: ClassVar = {"test": "test"}

    def __init__(
        self,
        task: str,
        data: Path | None = None,
        *,
        family: Callable[[int | None], Task] | None = None,
        train_on_evaluation: bool = False,
    ) -> None:
        if task not in BBH:
            raise ValueError(f"--task bbh: must be followed by one of {sorted(BBH)}, got {task!r}")
        self.verifier, self.form = BBH[task]
        super().__init__(data, train_on_evaluation=train_on_evaluation)
        self.name, self.config, self.trainer = f"bbh:{task}", task, family(None) if family else None
        self.training_source = f"the procedural family {task}" if family else "nothing: no procedural family has its name"
        if self.trainer:
            self.answer_format = self.trainer.answer_format

    def paths(self) -> Mapping[str, tuple[str, ...]]:
        # A file with half of the items, kept apart for a last evaluation, is named TASK_even.json.
        return {"test": tuple(f"{folder}{self.config}{half}.json" for folder in ("", "bbh/") for half in ("", "_even"))}

    def read_file(self, path: Path) -> Iterator[Record]:
        return item_files.read_question_file(path, DATA_FLAG)

    def problem(self, record: Record) -> Problem:
        keys = ("input", "target") if "input" in record.data else ("question", "answer")
        question, target = record.texts(*keys)
        return Problem(question, target)

    @cached_property
    def irregular_targets(self) -> frozenset[str]:
        """Published targets that have not the form of the task's answers, such as an option's text; only that text is right."""
        return frozenset(e.answer for e in self.splits.get("test", ()) if self.form.read(e.answer) is None)

    def parse_answer(self, text: str) -> str | None:
        answer = self.form.read(text)
        return read_open(text) if answer is None and read_open(text) in self.irregular_targets else answer
