"""Programs that end before their tests do."""

from attacks.base import CRASHED, FAILED, INVALID, Attack

ENDING = [
    Attack(
        "sys.exit(0) while loading",
        """
sys.exit(0)
""",
        INVALID,
        "SystemExit: 0",
    ),
    Attack(
        "os._exit(0) while loading",
        """
os._exit(0)
""",
        CRASHED,
    ),
    Attack(
        "sys.exit(0) in the function",
        """
def solve(a, b):
    sys.exit(0)
""",
        CRASHED,
        "ended itself: SystemExit: 0",
    ),
    Attack(
        "os._exit(0) in the function",
        """
def solve(a, b):
    os._exit(0)
""",
        CRASHED,
    ),
    Attack(
        "raise KeyboardInterrupt",
        """
def solve(a, b):
    raise KeyboardInterrupt
""",
        CRASHED,
        "ended itself",
    ),
    Attack(
        "os.abort()",
        """
def solve(a, b):
    os.abort()
""",
        CRASHED,
    ),
    Attack(
        "null pointer",
        """
def solve(a, b):
    return ctypes.string_at(0)
""",
        CRASHED,
    ),
    Attack(
        "atexit handler prints success",
        """
import atexit

atexit.register(print, "passed")

def solve(a, b):
    return 0
""",
        FAILED,
        ": 0",
    ),
    Attack(
        "exceptions named like ours",
        """
class ProgramEnded(Exception):
    pass

class SystemExit(Exception):
    pass

def solve(a, b):
    raise SystemExit(0)
""",
        FAILED,
        "ProgramError: SystemExit: 0",
    ),
    Attack(
        "exception that cannot be described",
        """
class E(Exception):
    def __str__(self):
        os._exit(0)

def solve(a, b):
    raise E
""",
        CRASHED,
    ),
]
