"""What a worker and the benchmark say to each other: a line of JSON each way. Imports nothing that a peer might lack.

    -> {"do": "setup", "spec": {...}}    <- {"loaded_mib": 301.2, "check": {...}}   after one round that is not counted
    -> {"do": "round"}                   <- {"seconds": 1.25, "tokens": 3072, "peak_mib": 355.0}
    -> {"do": "quit"}

A failure is a line {"error": "..."}; what libraries print goes to stderr. The clock runs around `Work.run` and nothing else.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Work(Protocol):
    """A workload that is loaded and can be done again and again."""

    def run(self) -> int:
        """Do it once and return the tokens sampled or trained."""
        ...

    def check(self) -> dict[str, Any]:
        """Return what every peer must agree on: losses, gradient norms or greedy tokens."""
        ...


def serve(setup: Callable[[dict[str, Any]], Work]) -> None:
    """Answer the benchmark on stdin and stdout until it says quit or goes away."""
    replies = os.fdopen(os.dup(1), "w")
    # A library that prints would break the protocol.
    os.dup2(2, 1)
    work: Work | None = None
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "quit":
            break
        try:
            if message["do"] == "setup":
                # The one before goes first, or two would be in memory.
                work = None
                gc.collect()
                work, reply = _set_up(setup, message["spec"])
            else:
                assert work is not None
                reply = _round(work)
        except Exception as error:  # whatever a peer raises is a line in the table
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(reply), file=replies, flush=True)


def _set_up(setup: Callable[[dict[str, Any]], Work], spec: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    work = setup(spec)
    loaded = memory_mib("VmRSS")
    # What is checked is the state before any update.
    check = work.check()
    work.run()
    return work, {"loaded_mib": loaded, "check": check}


def _round(work: Work) -> dict[str, Any]:
    forget_peak()
    started = time.perf_counter()
    tokens = work.run()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": tokens, "peak_mib": memory_mib("VmHWM")}


def memory_mib(field: str) -> float:
    """Return a line of /proc/self/status, in MiB; 0 where there is no such file."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    found = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(found[0].split()[1]) / 1024 if found else 0.0


def forget_peak() -> None:
    """Start the high-water mark of resident memory anew (Linux; elsewhere it stays that of the whole process)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
