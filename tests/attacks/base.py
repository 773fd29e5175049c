"""What attacks are made of, and what stands before and after each of them."""

from dataclasses import dataclass

from neuromas.sandbox import Status

TESTS = """
got = solve(2, 3)
assert got == 5, got
assert solve([1], [2]) == [1, 2]
assert abs(candidate(0.5, 0.25) - 0.75) < 1e-9
assert candidate("a", "b") == "ab"
"""

HONEST = "def solve(a, b):\n    return a + b\n"

HELP = '''
import ctypes, os, sys

def tried(**ways):
    """Return which of the ways worked, and how."""
    worked = {}
    for name, way in ways.items():
        try:
            worked[name] = repr(way())[:60]
        except (Exception, SystemExit) as error:
            pass
    return worked or "all refused"

def call(number, *arguments):
    """Make a system call by its number on x86_64; raise if it is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
'''


@dataclass(frozen=True, slots=True)
class Attack:
    name: str
    source: str
    status: tuple[Status, ...]
    detail: str = ""
    """A regular expression found in the outcome's detail: shows that the attack ran and what it met."""
    tests: str = TESTS


FAILED, INVALID, CRASHED = (Status.FAILED,), (Status.INVALID,), (Status.CRASHED,)
TIMEOUT, MEMORY, OUTPUT = (Status.TIMEOUT,), (Status.MEMORY,), (Status.OUTPUT,)
REFUSED = "all refused"
