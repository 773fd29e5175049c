"""`neuromas view`: make a page that shows what the nodes of one or several runs say."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from neuromas.cli.flags import parse_flags
from neuromas.system.files import require_writable
from neuromas.training.questions import open_run
from neuromas.view.page import build_page, check_out, write_page
from neuromas.view.recorded import RunRecord

WATCH_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewArguments:
    """Write one HTML file that shows what the nodes of runs of one task say before and after training, and how they learned."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs; several are shown side by side."""
    out: Path | None = None
    """The page. None: view.html in the folder of the first run."""
    watch: bool = False
    """Rewrite the page whenever a run has recorded more, until Ctrl-C; an open page loads itself again."""
    allow_code: bool = False
    """Execute the Python file that holds the runs' task (class:FILE.py:CLASS)."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(args: Sequence[str]) -> None:
    """Run the command `view`."""
    parsed = parse_flags(ViewArguments, args, "view")
    if not parsed.runs:
        raise ValueError("RUN must be the folder of at least one run, got none")
    records = [RunRecord(*open_run(path, untrained=True, allow_code=parsed.allow_code)) for path in parsed.runs]
    out = parsed.out or parsed.runs[0] / "view.html"
    check_out(out)
    require_writable(out, "--out")
    if parsed.watch:
        _watch(records, out)
    page = build_page(records)
    write_page(out, page)
    print(json.dumps({"page": str(out), "bytes": len(page)}) if parsed.json else f"{out}: {len(page) / 1e6:.1f} MB")


def _watch(records: Sequence[RunRecord], out: Path) -> None:
    """Keep the page as new as the runs until Ctrl-C."""
    seen = None
    try:
        for record in records:
            if not record.has_rollouts():
                print(f"{record.run.path} has no rollouts yet; waiting for its first", file=sys.stderr)
            while not record.has_rollouts():
                time.sleep(WATCH_SECONDS)
        while True:
            if (state := [record.state() for record in records]) != seen:
                write_page(out, build_page(records, watched=True))
                print(f"{out}: rewritten; Ctrl-C ends this", file=sys.stderr)
                seen = state
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return
