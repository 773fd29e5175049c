"""What tests of the command line share."""

import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from neuromas.cli import main as cli

FLAGS = [
    "--widths", "1", "1", "--num-steps", "1", "--examples-per-step", "1", "--group-size", "2", "--max-new-tokens", "4",
    "--eval-size", "2", "--eval-every", "0", "--device", "cpu",
]  # fmt: skip


class Outcome(NamedTuple):
    """What a command left: exit status, standard output, standard error."""

    status: int | str | None
    out: str
    err: str


Call = Callable[..., Outcome]


def run_cli(*args: object) -> None:
    """Run the command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["neuromas", *map(str, args)])
        cli.main()


def assert_refused(outcome: Outcome, message: str) -> None:
    """One line on standard error that starts with `error:` and says `message`, and nothing else."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome.err
    assert re.search(message, lines[0]), lines[0]
