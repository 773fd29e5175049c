"""The interface of a task, and what tasks share: generated problems, lists of examples, splits, the floor."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from neuromas.tasks import item_files
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
    """Where examples come from, how an answer is written and checked; the floor comes from examples, see `floor`."""

    name: str
    answer_format: str
    """The sentence that tells the output node how to answer."""
    answers: tuple[str, ...] = ()
    """All answers, where they are few."""
    verifier = "exact"
    """Which of `neuromas.tasks.verifiers` its answers are checked as."""
    held_out: frozenset[str] = frozenset()
    """Ids of examples that training never draws: a generator now and then meets an item of a file to be scored on."""

    remark = ""
    """What to tell whoever trains or scores on it of where its questions come from; empty: nothing."""

    def check_ready(self) -> None:  # noqa: B027  # most tasks need nothing
        """Raise ValueError if something that rewards need is missing on this machine: asked before any long work."""

    @abstractmethod
    def parse_answer(self, text: str) -> str | None:
        """Return the answer that a text gives in normal form, None if it gives none or several."""

    def reward(self, example: Example, text: str) -> float:
        """Return 1.0 if the text's answer is the gold answer, else 0.0 (terminal, binary: arXiv 2605.16757)."""
        return float(self.parse_answer(text) == example.answer)

    def rewards(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
        """Return the reward of each (example, text), in order; one by one unless a task can do better."""
        return [self.reward(example, text) for example, text in pairs]

    @abstractmethod
    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        """Return the `count` training examples of a step: a function of (seed, step) alone, so a run can resume."""

    def examples(self, split: str, count: int) -> list[Example]:
        """Return the first `count` examples of a split, the same in every run; `first200` are the first 200 of test.

        Raises ValueError if there are none to give: the split is not there, or a generator seems to have fewer.
        """
        if split == "first200":
            return self._examples("test", min(count, 200))
        return self._examples(split, count)

    @abstractmethod
    def _examples(self, split: str, count: int) -> list[Example]: ...

    def has(self, split: str) -> bool:
        """Say whether there is such a split."""
        return split in SPLITS

    def example(self, problem: Problem) -> Example:
        return Example(question_id(problem.question), problem.question, problem.answer, self.answer_format)

    def load(self, path: Path) -> list[Example]:
        """Read examples from a file: BIG-Bench-Hard JSON (`examples` with `input` and `target`) or JSONL
        (`question` and `answer` a line).

        Raises ValueError that names the file, and the line or item, if it can't be read or an answer is none of the task's.
        """
        examples = []
        for record in item_files.read_question_file(path, "task.file"):
            question, answer = record.texts("question", "answer")
            gold = self.parse_answer(answer)
            if gold is None:
                raise record.error(f"{answer!r} is no answer of task {self.name}")
            # In normal form: `reward` compares with that, so a file's "yes" would never be matched.
            examples.append(self.example(Problem(question, gold)))
        if not examples:
            raise ValueError(f"task.file {path} holds no examples")
        return examples


class GeneratedTask(Task):
    """Problems without end, split by hash. Subclasses give a name, an answer format, `generate` and `parse_answer`.

    Where `answers` are given, validation and test sets hold each equally often.
    """

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

    @abstractmethod
    def generate(self, rng: random.Random) -> Problem:
        """Draw one problem."""

    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        return [self._draw("train", f"{seed}/{step * count + index}") for index in range(count)]

    def _examples(self, split: str, count: int) -> list[Example]:
        """Return distinct examples; ValueError if there seem to be fewer: there may be few problems of little difficulty."""
        if split not in SPLITS:
            raise ValueError(f"task {self.name} has no split {split}; it has {', '.join(SPLITS)}")
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

    def _draw(self, split: str, seed: str) -> Example:
        rng = random.Random(f"{self.name}/{split}/{seed}")
        while True:
            problem = self.generate(rng)
            example = self.example(problem)
            if split_of(problem.question) == split and not (split == "train" and example.id in self.held_out):
                return example


class DatasetTask(Task):
    """A list of examples for each split, read when first needed; subclasses give `read_splits`.

    Splits are disjoint: what is in test is taken out of the others, and so on down `ORDER`. Within a split, repeats stay.
    """

    ORDER: tuple[str, ...] = ("test", "validation", "dev", "train")
    train_on_evaluation = False
    """Train on the test items where there is nothing else to train on; scores then say nothing about new questions."""
    training_source = ""
    """What a split named train would be, or which other data trains the task; for messages."""

    @abstractmethod
    def read_splits(self) -> dict[str, list[Example]]:
        """Return the examples of each split as they are published."""

    @cached_property
    def splits(self) -> dict[str, list[Example]]:
        published, seen = self.read_splits(), set()
        splits: dict[str, list[Example]] = {}
        for split in self.ORDER:
            if kept := [example for example in published.get(split, ()) if example.id not in seen]:
                splits[split] = kept
                seen |= {example.id for example in kept}
        return splits

    def has(self, split: str) -> bool:
        return split in self.splits

    def _examples(self, split: str, count: int) -> list[Example]:
        """Return the first `count`, or all where there are fewer; ValueError if there is no such split."""
        if split not in self.splits:
            there = ", ".join(f"{name} ({len(examples)})" for name, examples in self.splits.items())
            raise ValueError(f"task {self.name} has no split {split} here; --task.split may be one of: {there}")
        return self.splits[split][:count]

    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        """Go through the training examples in a new order each epoch."""
        pool = self.training_examples()
        picked, order = [], []
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, len(pool))
            if place == 0 or not order:
                order = random.Random(f"{self.name}/{seed}/{epoch}").sample(range(len(pool)), len(pool))
            picked.append(pool[order[place]])
        return picked

    @property
    def generates(self) -> bool:
        """Whether training problems are generated, and not drawn from the examples."""
        return False

    def training_examples(self) -> list[Example]:
        """Return what training draws from; ValueError if that would be what the task is evaluated on."""
        if self.train_on_evaluation:
            return self.splits["test"]
        pool = [example for example in self.splits.get("train", ()) if example.id not in self.held_out]
        if not pool:
            raise ValueError(
                f"task {self.name} has nothing to train on here but what it is evaluated on"
                f"{f' (it trains on {self.training_source})' if self.training_source else ''}: give --task.data that holds "
                "training items, or --task.train-on-evaluation if that is what you want"
            )
        return pool


def question_id(question: str) -> str:
    return hashlib.blake2b(question.encode(), digest_size=8).hexdigest()


def checksum_of(examples: Iterable[Example]) -> str:
    """Return a checksum of questions and their gold answers, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(f"{example.id} {len(example.answer)} {example.answer}\n".encode())
    return digest.hexdigest()


def split_of(question: str) -> Split:
    """Assign a question to train (80%), validation (10%) or test (10%) by its hash: disjoint by construction."""
    bucket = int(question_id(question), 16) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def floor(examples: Sequence[Example]) -> tuple[str, float]:
    """Return the best constant answer on exactly these examples and the accuracy that it scores."""
    answer, count = Counter(example.answer for example in examples).most_common(1)[0]
    return answer, count / len(examples)
