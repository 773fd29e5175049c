"""`neuromas ask`: put one question to a trained run."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from neuromas.cli.flags import parse_flags, require_best
from neuromas.model.sources import find_backbone
from neuromas.training.questions import open_run

MAX_QUESTION = 1_000_000
"""Longest question in characters: standard input may have no end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskArguments:
    """Put one question to a trained run and print every message on its edge, then the answer."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    question: tyro.conf.Positional[str]
    """The question; `-` reads it from standard input."""
    untrained: bool = False
    """Ask the network before training."""
    best: bool = False
    """Take the adapters of the run's best validation, not its last ones."""
    allow_code: bool = False
    """Execute the Python file that holds the run's task (class:FILE.py:CLASS)."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(args: Sequence[str]) -> None:
    """Run the command `ask`."""
    parsed = parse_flags(AskArguments, args, "ask")
    if parsed.question == "-":
        question = sys.stdin.buffer.read(4 * MAX_QUESTION + 1).decode(errors="surrogateescape")
    else:
        question = parsed.question
    if len(question) > MAX_QUESTION:
        raise ValueError(f"QUESTION must be at most {MAX_QUESTION:,} characters")
    if not question.strip():
        raise ValueError("QUESTION must not be empty")
    if not question.isascii() and question.encode(errors="replace").decode() != question:
        raise ValueError("QUESTION must be UTF-8 text, got bytes that are none")
    if parsed.best and parsed.untrained:
        raise ValueError("--best and --untrained exclude each other; give one of them")
    opened, task = open_run(parsed.run, untrained=parsed.untrained, allow_code=parsed.allow_code)
    if parsed.best:
        require_best(opened)
    find_backbone(opened.config.backbone)
    from neuromas.cli.describe import print_rollout, rollout_json
    from neuromas.training.load_run import load_network

    network, _ = load_network(opened, untrained=parsed.untrained, best=parsed.best)
    rollout = network.ask(question.strip(), answer_format=task.answer_format)
    if parsed.json:
        print(json.dumps(rollout_json(rollout, task)))
    else:
        print_rollout(rollout, task)
