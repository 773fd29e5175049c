"""Tasks of reasoning-gym (an extra), with its own verifier as the reward."""

import random
from typing import Any

from neuromas.tasks.answers import read_open
from neuromas.tasks.task import GeneratedTask, Problem, question_id
from neuromas.types import Example


class ReasoningGym(GeneratedTask):
    """Endless problems from a generator of reasoning-gym; its score, which may be partial, is the reward."""

    answer_format = 'Write "Answer: " and the answer.'
    verifier = "its own"

    def __init__(self, name: str) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ValueError(f"--task reasoning_gym:{name} needs the extra 'tasks': pip install 'neuromas[tasks]'") from error
        if name not in DATASETS:
            raise ValueError(f"--task reasoning_gym: must be followed by one of {sorted(DATASETS)}, got {name!r}")
        super().__init__()
        self.name = f"reasoning_gym:{name}"
        # Items are made when indexed, each from the sum of this seed and its index.
        self._dataset: Any = reasoning_gym.create_dataset(name, seed=0, size=1 << 30)
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

    def reward(self, example: Example, text: str) -> float:
        answer = self.parse_answer(text)
        if answer is None:
            return 0.0
        try:
            return float(self._dataset.score_answer(answer=answer, entry=self._entries[example.id]))
        except Exception:
            # The verifiers of 100 tasks get any text: an answer on which one raises is wrong.
            return 0.0
