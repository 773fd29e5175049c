"""Runs that were never trained: folders with the rollouts that a test wants to see."""

from pathlib import Path
from typing import Any

from neuromas.config import PromptConfig, TaskConfig, TopologyConfig, TrainConfig
from neuromas.training.run_directory import RunDirectory

SCORE = {
    "accuracy": 0.5, "n": 2, "distinct": 2, "low": 0.1, "high": 0.9, "floor": 0.5, "floor_answer": "Yes", "parse_rate": 1.0,
    "calls_per_answer": 3.0, "tokens_per_answer": 10.0, "prompt_tokens_per_answer": 99.0, "answers": {"Yes": 2},
}  # fmt: skip


def effect(
    name: str, kind: str, change: float, *, edge: tuple[int, int] | None = None, node: int | None = None
) -> dict[str, Any]:
    """Return one effect of a diagnosis."""
    reading = "loss" if change < 0 else "no answer changes"
    return {
        "name": name, "kind": kind, "nodes": [node] if node else [], "edges": [list(edge)] if edge else [],
        "accuracy": 0.5 + change, "change": change, "low": change - 0.1, "high": change + 0.05,
        "answers_changed": abs(change), "disturbed": 1.0,
        "reading": reading,
    }  # fmt: skip


DIAGNOSIS = {
    "step": 1, "split": "validation", "questions": 2, "temperature": 0.0, "seed": 0,
    "network": {"widths": [1, 1], "layers": [[1, 1], [2, 2]], "edges": [[1, 2]]},
    "undisturbed": SCORE,
    "effects": [
        effect("drop 1 to 2", "drop", -0.25, edge=(1, 2)), effect("shuffle 1 to 2", "shuffle", -0.5, edge=(1, 2)),
        effect("bare node 1", "bare", 0.0, node=1), effect("bare node 2", "bare", -0.375, node=2),
    ],
    "adapters": {"norms": {"1": 1.0, "2": 2.0}, "pairs": [{"nodes": [1, 2], "cosine": None, "distance": 2.0}]},
    "specialisation": {
        "trained": {"accuracy": 0.9, "low": 0.5, "high": 1.0, "chance": 0.5, "questions": 2, "by_node": {"1": 1.0, "2": 0.8}},
        "bare": None,
    },
    "faults": {"1": 0.25, "2": 0.0},
    "training": {
        "steps": [1, 2],
        "nodes": {
            node: {"distinct_2": [1.0, 0.5], "self_similarity": [None, 0.5], "entropy": [3.0, 2.0], "faults": [0.0, 0.5]}
            for node in ("1", "2")
        },
    },
}  # fmt: skip
"""What `neuromas diagnose` writes of a run of two nodes."""


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
