"""What the tests of the sandbox share."""

import ctypes
import os
import time
from pathlib import Path

from neuromas.sandbox import choose_isolation
from neuromas.sandbox.isolation import IsolationName


def available(name: IsolationName) -> bool:
    try:
        choose_isolation((name,))
    except ValueError:
        return False
    return True


def adopt_orphans() -> None:
    """Let orphans of a killed process come to this process instead of to the first one of the machine: none can hide."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def children() -> set[str]:
    """Return the numbers of this process's children; orphans that came to it are among them."""
    me = f"\nPPid:\t{os.getpid()}\n"
    return {path.parent.name for path in Path("/proc").glob("[0-9]*/status") if me in read(path)}


def newcomers(known: set[str], reap: bool) -> list[str]:
    """Return the command lines of children that are not known and are still there after five seconds.

    A dead orphan is one of them, unless they are to be reaped: nothing else may do that.
    """
    for _ in range(50):
        for pid in children() - known if reap else ():
            os.waitpid(int(pid), os.WNOHANG)
        if children() <= known:
            return []
        time.sleep(0.1)
    return [read(Path("/proc", pid, "status")) for pid in children() - known]


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
