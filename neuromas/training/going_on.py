"""Says how to go on with a run that has been cut short."""

from pathlib import Path


def command_for(run: Path) -> str:
    """Return the command that goes on with a run: `grow` makes a run, and `train` goes on with it."""
    return f"`neuromas train --resume --run-dir {run}`" if (run / "parent.json").exists() else "the same command with --resume"


def make_room(run: Path) -> str:
    """Return what to do once a run's files do not fit."""
    return f"Make room and run {command_for(run)}"
