"""Parses the flags of every command."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import tyro


def parse_flags(kind: Any, args: Sequence[str], command: str, **kwargs: Any) -> Any:
    """Return the parsed flags; a mistake in them is a ValueError of one line, as every other mistake."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=args, prog=f"neuromas {command}", **kwargs)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = (line.strip("│╰╭─╮╯ ") for line in complaint.getvalue().splitlines() if not line.startswith("╭"))
        raise ValueError(" ".join(line for line in lines if line.strip("-"))) from stop
