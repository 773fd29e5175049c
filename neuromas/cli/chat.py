"""`neuromas chat`: talk to a trained run in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from neuromas.cli.flags import parse_flags, require_best
from neuromas.model.sources import find_backbone
from neuromas.training.questions import open_run


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatArguments:
    """Talk to a trained run: every message stands on its edge as it is written. The page of `neuromas serve` does the same."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    best: bool = False
    """Take the adapters of the run's best validation, not its last ones."""
    allow_code: bool = False
    """Execute the Python file that holds the run's task (class:FILE.py:CLASS)."""


def run(args: Sequence[str]) -> None:
    """Run the command `chat`."""
    parsed = parse_flags(ChatArguments, args, "chat")
    opened, task = open_run(parsed.run, allow_code=parsed.allow_code)
    if parsed.best:
        require_best(opened)
    find_backbone(opened.config.backbone)
    from neuromas.serve.talk import Talk, read_line
    from neuromas.training.load_run import load_network

    network, _ = load_network(opened, best=parsed.best)
    Talk(network, task, read_line).run()
