"""Tasks of reasoning-gym (an extra), with its own verifier as the reward."""

import random
from ast import literal_eval
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from statistics import fmean
from typing import Any

from neuromas.tasks.answers import read_open
from neuromas.tasks.task import MOST_CONSTANTS, GeneratedTask, Problem, question_id
from neuromas.types import Example


def _value(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class ReasoningGym(GeneratedTask):
    """Endless problems from a generator of reasoning-gym; its score, which may be partial, is the reward."""

    answer_format = 'Write "Answer: " and the answer.'
    verifier = "its own"

    def __init__(self, spec: str) -> None:
        """`spec` is a generator's name, then its settings if any: `chain_sum,max_terms=2,max_digits=2`."""
        name, *pairs = spec.split(",")
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ValueError(f"--task reasoning_gym:{name} needs the extra 'tasks': pip install 'neuromas[tasks]'") from error
        if name not in DATASETS:
            raise ValueError(f"--task reasoning_gym: must be followed by one of {sorted(DATASETS)}, got {name!r}")
        super().__init__()
        self.name = f"reasoning_gym:{spec}"
        # Items are made when indexed, each from the sum of this seed and its index.
        settings: dict[str, Any] = {"seed": 0, "size": 1 << 30}
        known = {field.name for field in fields(DATASETS[name][1])} - set(settings)
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in known:
                raise ValueError(f"--task reasoning_gym:{name}: its settings are {sorted(known)}, got {pair!r}")
            settings[key] = _value(value)
        try:
            self._dataset: Any = reasoning_gym.create_dataset(name, **settings)
        # A generator checks its settings by assertions, some only by using them.
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"--task {self.name}: reasoning-gym refuses these settings: {error}") from error
        self._entries: dict[str, dict[str, Any]] = {}
        self._of_last_step: set[str] = set()

    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        # Scored problems are kept; those of a step only until the next step, or a long run would fill the memory.
        for key in self._of_last_step:
            del self._entries[key]
        kept = set(self._entries)
        batch = super().training_batch(seed, step, count)
        self._of_last_step = self._entries.keys() - kept
        return batch

    def generate(self, rng: random.Random) -> Problem:
        entry = self._dataset[rng.getrandbits(30)]
        problem = Problem(entry["question"], str(entry["answer"]))
        self._entries[question_id(problem.question)] = entry
        return problem

    def parse_answer(self, text: str) -> str | None:
        # An answer may have several lines, as grids have, but there must be only one.
        *_, answer = parts = text.split("Answer:")
        is_one = all(part.strip() == answer.strip() for part in parts[1:])
        return read_open(text) if "\n" not in text.strip() else answer.strip("\n ") or None if is_one else None

    def floor(self, examples: Sequence[Example]) -> tuple[str, float]:
        # With partial credit, an answer that is never right may be the best constant one.
        most_frequent = Counter(example.answer for example in examples).most_common(MOST_CONSTANTS)
        scores = {answer: fmean(self._score(example, answer) for example in examples) for answer, _ in most_frequent}
        best = max(scores, key=scores.__getitem__)
        return best, scores[best]

    def reward(self, example: Example, text: str) -> float:
        answer = self.parse_answer(text)
        return 0.0 if answer is None else self._score(example, answer)

    def _score(self, example: Example, answer: str) -> float:
        try:
            return float(self._dataset.score_answer(answer=answer, entry=self._entries[example.id]))
        except Exception:
            # The verifiers of 100 tasks get any text: an answer on which one raises is wrong.
            return 0.0
