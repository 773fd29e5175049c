"""Runs that were never trained: folders with the rollouts that a test wants to see."""

from pathlib import Path
from typing import Any

from neuromas.config import PromptConfig, TaskConfig, TopologyConfig, TrainConfig
from neuromas.training.run_directory import RunDirectory

SCORE = {
    "accuracy": 0.5, "n": 2, "distinct": 2, "low": 0.1, "high": 0.9, "floor": 0.5, "floor_answer": "Yes", "parse_rate": 1.0,
    "calls_per_answer": 3.0, "tokens_per_answer": 10.0, "prompt_tokens_per_answer": 99.0, "answers": {"Yes": 2},
}  # fmt: skip


def rollout(texts: dict[int, str], *, gold: str = "Yes", split: str = "train", step: int = 0, **other: Any) -> dict[str, Any]:
    """Return a record of rollouts.jsonl."""
    question = other.pop("question", "Is 2 even?")
    record = {
        "step": step, "split": split, "example": f"id of {question}", "question": question, "gold": gold, "rollout": 0,
        "texts": {str(node): text for node, text in texts.items()}, "faults": [],
    }  # fmt: skip
    return record | other


def record_run(path: Path, records: list[dict[str, Any]], **settings: Any) -> Path:
    """Make a run's folder with these rollouts, and return it."""
    widths, wording = settings.pop("widths", (1, 1)), settings.pop("wording", "terse")
    vote, task = settings.pop("vote", False), settings.pop("task", "navigate")
    config = TrainConfig(
        topology=TopologyConfig(widths=widths, vote=vote), prompt=PromptConfig(wording=wording), task=TaskConfig(name=task),
        run_dir=path, **settings,
    )  # fmt: skip
    run = RunDirectory.create(config)
    run.initialise()
    for record in records:
        run.log_rollouts(record["step"], [record])
    return path
