"""Made-up methods for the tests of comparisons: they answer by coin, at a price, or die."""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from neuromas.compare.methods.method import Answer, CellResult, CellSpec, CurvePoint

GOLD = ("Yes", "No")


@dataclass
class Rival:
    """Answers right with a given chance; each run has its own luck."""

    name: str = "rival"
    title: str = "Rival"
    source: str = "tests"
    trained: bool = True
    skill: float = 0.7
    luck: float = 0.0
    parameters: int = 1000
    calls: int = 1
    tokens: int = 10
    always: str | None = None
    questions: int | None = None

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        config = spec.config
        rng = random.Random(f"{self.name}/{config.task.name}/{config.seed}")
        skill = self.skill + rng.uniform(-self.luck, self.luck)
        answers = []
        for index in range(self.questions or config.eval_size):
            gold = GOLD[index % 2]
            given = self.always or (gold if rng.random() < skill else GOLD[(index + 1) % 2] if rng.random() < 0.9 else None)
            answers.append(Answer(f"q{index}", gold, given, float(given == gold), self.calls, 50 * self.calls, self.tokens))
        rollouts = config.num_steps * config.examples_per_step * config.group_size
        ledger = {
            "trainable_parameters": self.parameters, "steps": config.num_steps, "optimizer_steps": config.num_steps,
            "questions": config.num_steps * config.examples_per_step, "rollouts": rollouts,
            "calls": rollouts * self.calls, "prompt_tokens": rollouts * 50, "sampled_tokens": rollouts * self.tokens,
        }  # fmt: skip
        curve = tuple(
            CurvePoint(step, step * 500 * self.tokens, min(1, 0.5 + (skill - 0.5) * step / config.num_steps))
            for step in range(0, config.num_steps + 1, max(1, config.num_steps // 6))
        )
        (folder / "made").write_text("yes")
        print("a method may print")
        return CellResult(
            spec.method, config.task.name, config.seed, {"test": tuple(answers)}, self.parameters if self.trained else 0,
            ledger if self.trained else None, curve if self.trained else (),
        )  # fmt: skip


class Fine(Rival):
    """A method of one's own, by file and class."""


@dataclass
class Dies(Rival):
    name: str = "dies"

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        raise RuntimeError("out of\n ideas")


@dataclass
class Killed(Rival):
    name: str = "killed"

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        if spec.config.seed == 1:
            os.kill(os.getpid(), 9)
        return super().run(spec, folder)


class Waits(Rival):
    """Says where it runs, then takes longer than anybody waits."""

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(600)
        return super().run(spec, folder)
