"""Says how to go on with a run of which the disk has refused a file."""

from pathlib import Path


def make_room(run: Path) -> str:
    """Return what to do once a run's files do not fit: `grow` makes a run, and `train` goes on with it."""
    grown = (run / "parent.json").exists()
    return f"Make room and run {f'neuromas train --resume --run-dir {run}' if grown else 'the same command with --resume'}"
