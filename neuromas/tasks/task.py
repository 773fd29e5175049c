"""The interface of a task, and its two kinds: generated problems and lists of examples; splits and the floor."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Literal

from neuromas.tasks import item_files
from neuromas.types import Example

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

EVALUATION_SEED = 0
"""Seed of generated validation and test items, the same in every run, so that runs can be compared."""

MOST_CONSTANTS = 50
"""Gold answers that are tried as a constant answer to all questions, the most frequent first."""

MAX_TRIES = 2000
"""Draws without a new problem after which a split counts as exhausted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its gold answer, before it becomes an `Example` of a task."""

    question: str
    answer: str


class Task(ABC):
    """Provides examples, parses answers and rewards them."""

    name: str
    answer_format: str
    """The sentence that tells the output node how to answer."""
    answers: tuple[str, ...] = ()
    """All answers, if they are few."""
    verifier = "exact"
    """Name of the verifier (`neuromas.tasks.verifiers`) that checks its answers."""
    held_out: frozenset[str] = frozenset()
    """Ids of examples that training never draws: a generator may produce an item of a file that is scored."""

    remark = ""
    """A remark for the user on the source of its questions; may be empty."""

    def check_ready(self) -> None:  # noqa: B027  # most tasks need nothing
        """Raise ValueError if rewards need something that this machine lacks; called before any long work."""

    @abstractmethod
    def parse_answer(self, text: str) -> str | None:
        """Return the answer that a text gives in normal form, None if it gives none or several."""

    def reward(self, example: Example, text: str) -> float:
        """Return 1.0 if the text's answer is the gold answer, else 0.0 (terminal, binary: arXiv 2605.16757)."""
        return float(self.parse_answer(text) == example.answer)

    def rewards(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
        """Return the reward of each (example, text), in order; tasks that reward in batches override it."""
        return [self.reward(example, text) for example, text in pairs]

    def floor(self, examples: Sequence[Example]) -> tuple[str, float]:
        """Return the best constant answer on exactly these examples, and its score.

        Counts how often each is the gold answer. A reward of the user's own may pay other answers too: it is asked what each
        of the most frequent gold answers gets everywhere.
        """
        most_frequent = Counter(example.answer for example in examples).most_common(MOST_CONSTANTS)
        if all(_is_ours(method) for method in (type(self).reward, type(self).rewards)):
            return most_frequent[0][0], most_frequent[0][1] / len(examples)
        scores = {answer: fmean(rewards_of(self, [(example, answer) for example in examples])) for answer, _ in most_frequent}
        best = max(scores, key=scores.__getitem__)
        return best, scores[best]

    @abstractmethod
    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        """Return the `count` training examples of a step: a function of (seed, step) alone, so a run can resume."""

    def examples(self, split: str, count: int) -> list[Example]:
        """Return the first `count` examples of a split, the same in every run; `first200` are the first 200 of test.

        Raises ValueError if the split does not exist, or if a generator seems to have fewer problems.
        """
        if split == "first200":
            return self._examples("test", min(count, 200))
        return self._examples(split, count)

    @abstractmethod
    def _examples(self, split: str, count: int) -> list[Example]: ...

    def has(self, split: str) -> bool:
        """Return whether there is such a split."""
        return split in SPLITS

    def example(self, problem: Problem) -> Example:
        """Return the example of a problem."""
        return Example(question_id(problem.question), problem.question, problem.answer, self.answer_format)

    def load(self, path: Path) -> list[Example]:
        """Return the examples of a file: BIG-Bench-Hard JSON (`examples` with `input` and `target`) or JSONL (`question` and
        `answer` in each line).

        Raises ValueError that names the file, and the line or item, if it can't be read or an answer is none of the task's.
        """
        examples = []
        for record in item_files.read_question_file(path, "task.file"):
            question, answer = record.texts("question", "answer")
            gold = self.parse_answer(answer)
            if gold is None:
                raise record.error(f"{answer!r} is no answer of task {self.name}")
            # In normal form, with which `reward` compares: a file's "yes" would never match "Yes".
            examples.append(self.example(Problem(question, gold)))
        if not examples:
            raise ValueError(f"task.file {path} holds no examples")
        return examples


class GeneratedTask(Task):
    """Endless problems, split by hash. Subclasses define a name, an answer format, `generate` and `parse_answer`.

    If `answers` are defined, every set holds each equally often, a training step too: a surplus of one answer among a
    step's questions would move all answers towards it.
    """

    difficulties = range(0)
    """Allowed values of the difficulty; empty if a task has none."""
    difficulty_unit = ""
    """The unit of the difficulty."""

    def __init__(self, difficulty: int | None = None) -> None:
        """Set the difficulty; None draws problems like the published ones. ValueError for a value that is not allowed."""
        if difficulty is not None and difficulty not in self.difficulties:
            values = self.difficulties
            expected = f"{values[0]} to {values[-1]} {self.difficulty_unit}, or left out," if values else "left out"
            raise ValueError(f"--task.difficulty must be {expected} for task {self.name}, got {difficulty!r}")
        self.difficulty = difficulty

    @abstractmethod
    def generate(self, rng: random.Random) -> Problem:
        """Draw one problem."""

    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        return [self._draw_wanted(f"{seed}/{number}", number) for number in range(step * count, (step + 1) * count)]

    def _draw_wanted(self, seed: str, number: int) -> Example:
        example = self._draw("train", seed)
        for tries in range(MAX_TRIES if self.answers else 0):
            if example.answer == self.answers[number % len(self.answers)]:
                break
            example = self._draw("train", f"{seed}/{tries}")
        return example

    def _examples(self, split: str, count: int) -> list[Example]:
        """Return distinct examples; ValueError if there seem to be fewer, as there may be few problems of little difficulty."""
        if split not in SPLITS:
            raise ValueError(f"task {self.name} has no split {split}; it has {', '.join(SPLITS)}")
        found: dict[str, Example] = {}
        for index in range(count):
            wanted = self.answers[index % len(self.answers)] if self.answers else None
            tries = 0
            while True:
                example = self._draw(split, f"{EVALUATION_SEED}/{index}/{tries}")
                tries += 1
                # A repeated problem is replaced by one with the same answer: dropping it would change the balance of answers,
                # since one answer may have fewer distinct short problems. An open answer may have no other problem.
                wanted = wanted or example.answer
                if example.id not in found and (example.answer == wanted or tries > 200):
                    break
                if tries > MAX_TRIES:
                    others = "difficult ones by --task.difficulty" if self.difficulties else "varied ones by its settings"
                    raise ValueError(
                        f"task {self.name} seems to have only {len(found)} distinct problems in split {split}, "
                        f"asked for {count}; ask for fewer, or for more {others}"
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
    """A list of examples for each split, read when first needed; subclasses define `read_splits`.

    Splits are disjoint: items of test are removed from the others, and so on in `ORDER`. Within a split, repeats stay.
    """

    ORDER: tuple[str, ...] = ("test", "validation", "dev", "train")
    train_on_evaluation = False
    """Whether the task trains on its test items; scores then say nothing about new questions."""
    training_source = ""
    """Description of the data that trains the task, for error messages."""

    @abstractmethod
    def read_splits(self) -> dict[str, list[Example]]:
        """Return the examples of each split as they are published."""

    @cached_property
    def splits(self) -> dict[str, list[Example]]:
        """The disjoint splits."""
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
        """Return the first `count` examples, or all if there are fewer; ValueError if there is no such split."""
        if split not in self.splits:
            there = ", ".join(f"{name} ({len(examples)})" for name, examples in self.splits.items())
            raise ValueError(f"task {self.name} has no split {split} here; --task.split may be one of: {there}")
        return self.splits[split][:count]

    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        """Return the examples of a step; each epoch goes through the training examples in a new order."""
        pool = self.training_examples()
        picked, order = [], []
        for index in range(step * count, (step + 1) * count):
            epoch, position = divmod(index, len(pool))
            if position == 0 or not order:
                order = random.Random(f"{self.name}/{seed}/{epoch}").sample(range(len(pool)), len(pool))
            picked.append(pool[order[position]])
        return picked

    @property
    def generates(self) -> bool:
        """Whether training problems are generated instead of drawn from the examples."""
        return False

    def training_examples(self) -> list[Example]:
        """Return the examples that training draws from; ValueError if only evaluated ones are left."""
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


def _is_ours(thing: object) -> bool:
    """Return whether a class or function is this package's, not the user's."""
    return thing.__module__.partition(".")[0] == __name__.partition(".")[0]


def rewards_of(task: Task, pairs: Sequence[tuple[Example, str]]) -> list[float]:
    """Return the rewards that a task gives; ValueError that names it if they are none, or if its own class fails."""
    try:
        rewards = [float(reward) for reward in task.rewards(pairs)]
    except Exception as error:
        if _is_ours(type(task)):
            raise
        raise ValueError(f"task {task.name}: its rewards fail: {type(error).__name__}: {error}") from error
    if len(rewards) != len(pairs):
        raise ValueError(f"task {task.name} gave {len(rewards)} rewards for {len(pairs)} answers, expected one for each")
    if wrong := [reward for reward in rewards if not 0 <= reward <= 1]:
        raise ValueError(f"task {task.name} gave the reward {wrong[0]}, expected a number from 0 to 1")
    return rewards


def with_repeats(examples: Iterable[Example]) -> list[Example]:
    """Return a step's questions, each of which says how often it has been asked before: a list may be shorter than a step."""
    seen = Counter[str]()
    found = []
    for example in examples:
        found.append(replace(example, repeat=seen[example.id]))
        seen[example.id] += 1
    return found


def question_id(question: str) -> str:
    """Return the id of a question: a hash of 16 hexadecimal digits."""
    return hashlib.blake2b(question.encode(), digest_size=8).hexdigest()


def checksum_of(examples: Iterable[Example]) -> str:
    """Return a checksum of questions and their gold answers, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(f"{example.id} {len(example.answer)} {example.answer}\n".encode())
    return digest.hexdigest()


def split_of(question: str) -> Split:
    """Return the split of a question by its hash: train (80%), validation (10%) or test (10%), disjoint by construction."""
    bucket = int(question_id(question), 16) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"
