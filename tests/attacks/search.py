"""Programs that look for the tests, the expected values or the secret."""

from attacks.base import FAILED, REFUSED, Attack

SEARCH = [
    Attack(
        "search of the heap for the secret and the tests",
        """
import gc, re

def solve(a, b):
    seen, found, todo = set(), set(), list(gc.get_objects())
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, (str, bytes)):
            x = x if isinstance(x, str) else x.decode("latin1")
            found |= set(re.findall("sec" + "ret-[0-9a-f]{32}", x))
            if "solve([1]" + ", [2])" in x:
                found.add("tests")
        elif isinstance(x, (list, tuple, dict, set)):
            todo += gc.get_referents(x)
    return sorted(found) or "nothing found"
""",
        FAILED,
        "nothing found",
    ),
    Attack(
        "search of frames, arguments and environment",
        """
import inspect, re

def solve(a, b):
    texts = [*sys.argv, *sys.orig_argv, *os.environ.values()]
    for info in inspect.stack(0):
        texts += [repr(v) for v in info.frame.f_locals.values()]
    return [t for t in texts if re.search("sec" + "ret-[0-9a-f]{32}|ass" + "ert ", t)] or "nothing found"
""",
        FAILED,
        "nothing found",
    ),
    Attack(
        "search of files for the tests",
        """
def solve(a, b):
    names = {n: lambda n=n: os.listdir(n) for n in ("/proc", FOLDER, os.path.dirname(FOLDER))}
    return tried(**names, tests=lambda: open("tests.py").read())
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "/proc/self",
        """
def solve(a, b):
    return tried(
        **{
            n: lambda n=n: open("/proc/self/" + n, "rb").read(99)
            for n in ("environ", "cmdline", "maps", "mem", "fd")
        }
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "/proc of the parent",
        """
def solve(a, b):
    pids = {os.getppid(), 1, PID}
    return tried(
        **{
            f"{n}{p}": lambda n=n, p=p: open(f"/proc/{p}/{n}", "rb").read(99)
            for p in pids
            for n in ("environ", "cmdline", "maps", "mem")
        }
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "ptrace and memory of other processes",
        """
def solve(a, b):
    room = ctypes.create_string_buffer(64)
    return tried(
        trace=lambda: call(101, 16, os.getppid(), 0, 0),
        seize=lambda: call(101, 0x4206, PID, 0, 0),
        read=lambda: call(310, PID, room, 1, room, 1, 0),
        write=lambda: call(311, PID, room, 1, room, 1, 0),
        fd=lambda: call(434, PID, 0),
    )
""",
        FAILED,
        REFUSED,
    ),
]
