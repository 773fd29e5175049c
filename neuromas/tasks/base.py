"""The interface of a task, and what tasks share: splits by hash, files, the floor."""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neuromas.types import Example

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

EVALUATION_SEED = 0
"""Generated validation and test items are the same in every run, so that runs can be compared."""

MAX_TRIES = 2000
"""Draws without a new problem after which a split counts as used up."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its gold answer, before it becomes an `Example` of a task."""

    question: str
    answer: str


class Task(ABC):
    """Where examples come from, how an answer is written and checked. Subclasses give the four abstract members."""

    name: str
    answer_format: str
    """The sentence that tells the output node how to answer."""
    answers: tuple[str, ...] = ()
    """All answers, where they are few: generated validation and test sets then hold each equally often."""
    difficulties = range(0)
    """Values of the dial; empty where a task has none."""
    difficulty_unit = ""
    """What the dial counts."""

    def __init__(self, difficulty: int | None = None) -> None:
        """Set the dial; None draws problems like the published ones. Raises ValueError for a value that it does not have."""
        if difficulty is not None and difficulty not in self.difficulties:
            values = self.difficulties
            expected = f"{values[0]} to {values[-1]} {self.difficulty_unit}, or left out," if values else "left out"
            raise ValueError(f"--task.difficulty must be {expected} for task {self.name}, got {difficulty!r}")
        self.difficulty = difficulty
        self.held_out: frozenset[str] = frozenset()
        """Ids of examples that training never draws: a generator now and then meets an item of a file to be scored on."""

    @abstractmethod
    def generate(self, rng: random.Random) -> Problem:
        """Draw one problem."""

    @abstractmethod
    def parse_answer(self, text: str) -> str | None:
        """Return the answer that a text gives in normal form, None if it gives none or several."""

    def reward(self, example: Example, text: str) -> float:
        """Return 1.0 if the text's answer is the gold answer, else 0.0 (terminal, binary: arXiv 2605.16757)."""
        return float(self.parse_answer(text) == example.answer)

    def example(self, problem: Problem) -> Example:
        return Example(question_id(problem.question), problem.question, problem.answer, self.answer_format)

    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        """Return the `count` training examples of a step: a function of (seed, step) alone, so a run can resume."""
        return [self._draw("train", f"{seed}/{step * count + index}") for index in range(count)]

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first `count` distinct examples of a split, the same in every run.

        Raises ValueError if the split seems to have fewer: there may be few problems of little difficulty.
        """
        found: dict[str, Example] = {}
        for index in range(count):
            wanted = self.answers[index % len(self.answers)] if self.answers else None
            tries = 0
            while True:
                example = self._draw(split, f"{EVALUATION_SEED}/{index}/{tries}")
                tries += 1
                # A repeated problem gives way to one with the same answer: dropping it would tip the balance of answers,
                # since one kind of answer may have fewer distinct short problems. Where answers are open, none may be left.
                wanted = wanted or example.answer
                if example.id not in found and (example.answer == wanted or tries > 200):
                    break
                if tries > MAX_TRIES:
                    raise ValueError(
                        f"task {self.name} seems to have only {len(found)} distinct problems in split {split}, "
                        f"asked for {count}; ask for fewer, or for more difficult ones by --task.difficulty"
                    )
            found[example.id] = example
        return list(found.values())

    def _draw(self, split: Split, seed: str) -> Example:
        rng = random.Random(f"{self.name}/{split}/{seed}")
        while True:
            problem = self.generate(rng)
            example = self.example(problem)
            if split_of(problem.question) == split and not (split == "train" and example.id in self.held_out):
                return example

    def load(self, path: Path) -> list[Example]:
        """Read examples from a file: BIG-Bench-Hard JSON (`examples` with `input` and `target`) or JSONL
        (`question` and `answer` a line).

        Raises ValueError that names the file, and the line or item, if it can't be read or an answer is none of the task's.
        """
        records = _read_json_lines(path) if path.suffix == ".jsonl" else _read_bbh(path)
        examples = []
        for place, question, answer in records:
            gold = self.parse_answer(answer)
            if gold is None:
                raise ValueError(f"task.file {path}, {place}: {answer!r} is no answer of task {self.name}")
            # In normal form: `reward` compares with that, so a file's "yes" would never be matched.
            examples.append(self.example(Problem(question, gold)))
        if not examples:
            raise ValueError(f"task.file {path} holds no examples")
        return examples


def question_id(question: str) -> str:
    return hashlib.blake2b(question.encode(), digest_size=8).hexdigest()


def split_of(question: str) -> Split:
    """Assign a question to train (80%), validation (10%) or test (10%) by its hash: disjoint by construction."""
    bucket = int(question_id(question), 16) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def floor(examples: Sequence[Example]) -> tuple[str, float]:
    """Return the best constant answer on exactly these examples and the accuracy that it scores."""
    answer, count = Counter(example.answer for example in examples).most_common(1)[0]
    return answer, count / len(examples)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"task.file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"task.file {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def _read_json_lines(path: Path) -> list[tuple[str, str, str]]:
    records = []
    # Not splitlines(): a JSON text may hold other line separators, such as U+2028, as they are.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"task.file {path}, line {number}: not JSON ({error.msg})") from error
        records.append(_question_and_answer(path, f"line {number}", data, "question", "answer"))
    return records


def _read_bbh(path: Path) -> list[tuple[str, str, str]]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"task.file {path}, line {error.lineno}: not JSON ({error.msg})") from error
    items = data.get("examples") if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise ValueError(f"task.file {path}: expected a JSON object with a list 'examples', as BIG-Bench-Hard has it")
    return [_question_and_answer(path, f"item {number}", item, "input", "target") for number, item in enumerate(items, start=1)]


def _question_and_answer(path: Path, place: str, data: object, *keys: str) -> tuple[str, str, str]:
    if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in keys):
        raise ValueError(f"task.file {path}, {place}: expected an object with the texts {' and '.join(map(repr, keys))}")
    question, answer = (data[key] for key in keys)
    return place, question, answer
