"""What the workers have in common: a case's rows, padded tensors, threads. Imports torch and nothing that a peer might lack."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One completion of a case: what a node reads, whom it waits for, and in an update what it wrote."""

    place: int
    node: int
    layer: int
    rollout: int
    question: int
    prefix: tuple[int, ...]
    prompt: tuple[int, ...]
    waits_for: tuple[int, ...]
    written: tuple[int, ...]
    advantage: float


def read_rows(spec: dict[str, Any]) -> list[Row]:
    data = json.loads(Path(spec["data"]).read_text())
    prefixes = [tuple(ids) for ids in data["questions"]]
    return [
        Row(
            place, row["node"], row["layer"], row["rollout"], row["question"], prefixes[row["question"]], tuple(row["prompt"]),
            tuple(row["waits_for"]), tuple(row["written"]), row["advantage"],
        )
        for place, row in enumerate(data["rows"])
    ]  # fmt: skip


def prepare(spec: dict[str, Any]) -> torch.device:
    """Set threads and seed as the case says and return its device."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    return torch.device(spec.get("device", "cpu"))


def of_first_layer(rows: Sequence[Row], count: int = 8) -> list[Row]:
    """Return the rows whose greedy tokens are compared: they wait for nobody."""
    return [row for row in rows if not row.waits_for][:count]


def chunks(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


def pad(sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and mask, padded with 0 in front (`left`) or behind."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[i, where], mask[i, where] = torch.tensor(sequence), 1
    return ids.to(device), mask.to(device)


def score(text: str) -> float:
    """Return the reward of whole steps: a number of the text that differs between rollouts, so that no row drops out."""
    return sum(map(ord, text)) % 997 / 997
