"""`neuromas traces`: write a run's rollouts as traces of Trackio."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from neuromas.cli.flags import parse_flags
from neuromas.training.exported import check_out
from neuromas.training.run_directory import RunDirectory
from neuromas.training.tracking import require_tracker, write_traces


@dataclass(frozen=True, kw_only=True, slots=True)
class TracesArguments:
    """Write every rollout that a run has recorded as a trace, into a local database for `TRACKIO_DIR=DIR trackio show`."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """Folder of the database; it must not be there yet."""


def run(args: Sequence[str]) -> None:
    """Run the command `traces`."""
    parsed = parse_flags(TracesArguments, args, "traces")
    opened = RunDirectory.open(parsed.run)
    check_out(parsed.out)
    require_tracker("trackio")
    print(f"{parsed.out}: {write_traces(opened, parsed.out)} rollouts")
