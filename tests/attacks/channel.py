"""Programs that write into the pipe to their judge what no worker writes, or read and signal what is at its other end."""

from attacks.base import CRASHED, FAILED, INVALID, OUTPUT, REFUSED, Attack
from neuromas.sandbox import Status

PIPE = r"""
from struct import pack

frame = sys._getframe()
while "writing" not in frame.f_locals:
    frame = frame.f_back
OUT, IN = frame.f_locals["writing"], frame.f_locals["reading"]
encode = frame.f_globals["encode"]

def put(data, times=1):
    for _ in range(times):
        rest = memoryview(pack("<I", len(data)) + data)
        while rest:
            rest = rest[os.write(OUT, rest) :]
"""
UNREADABLE = "^unreadable answer"


def forged(name: str, payload: str, detail: str) -> Attack:
    """Return a program that answers with the bytes of an expression."""
    return Attack(name, f"{PIPE}\ndef solve(a, b):\n    put({payload})\n    return 5\n", FAILED, detail)


VALUE = r'b"t\2\0\0\0s\5\0\0\0value" + '
CHANNEL = [
    forged("empty answer", 'b""', UNREADABLE),
    forged("a lone value", "encode(5)", UNREADABLE),
    forged("an answer with two values", 'encode(("value", 5, 5))', UNREADABLE),
    forged("an answer of another kind", 'encode(("verdict", 5))', UNREADABLE),
    forged("an exception that is no text", 'encode(("raise", 10 ** 6000, ["x"]))', UNREADABLE),
    forged("bytes after the answer", 'encode(("value", 5)) + b"N"', UNREADABLE + ": ValueError"),
    forged("an unknown tag", VALUE + r'b"q\0\0\0\0"', UNREADABLE + ": ValueError"),
    forged("a count beyond the end", VALUE + r'b"l\xff\xff\xff\xff"', UNREADABLE + ": ValueError"),
    forged("a number cut short", VALUE + r'b"f123"', UNREADABLE + ": error"),
    forged("text that is no UTF-8", VALUE + r'b"s\1\0\0\0\xff"', UNREADABLE + ": UnicodeDecodeError"),
    forged("a type of another name", VALUE + r'b"y\4\0\0\0eval"', UNREADABLE + ": KeyError"),
    forged("a set of lists", VALUE + r'b"e\1\0\0\0l\0\0\0\0"', UNREADABLE + ": TypeError"),
    forged("numbers beyond the end", VALUE + r'b"Il\xff\xff\xff\x7f12345678"', UNREADABLE + ": ValueError"),
    forged("numbers in a dict", VALUE + r'b"Id\0\0\0\0"', UNREADABLE + ": KeyError"),
    forged("a range of texts", VALUE + r'b"rs\0\0\0\0NN"', UNREADABLE + ": TypeError"),
    forged("slices of slices", VALUE + r'b"x" * 100000', UNREADABLE + ": RecursionError"),
    forged("an exit as an exception", 'encode(("raise", "SystemExit", "E", "x", ()))', "^ProgramError: E: x"),
    forged("a group of no exceptions", 'encode(("raise", "ExceptionGroup", "E", "x", ("x", [5])))', "^ProgramError: E: x"),
    forged(
        # Python's own description reads at that place, in the judge's memory.
        "an exception at a place outside of its text",
        'encode(("raise", "UnicodeDecodeError", "E", "x", ("utf-8", b"a", -(10**15), 1 - 10**15, "x")))',
        "^ProgramError: E: x",
    ),
    forged("a handle of nothing", VALUE + r'b"h\xff\xff\xff\xff"', "an object of its own"),
    forged("a job of its own", 'b"T" + encode(("", ("x",), "x", "s", 1 << 40, 99, 64))', UNREADABLE),
    forged("a verdict with a line end", r'b"passed\nsecret-" + b"0" * 32', UNREADABLE),
    Attack(
        "zeros as frames, then a job",
        PIPE
        + r"""
def solve(a, b):
    put(b"\0" * 1000000 + pack("<I", 99) + b"T" * 99)
    return 5
""",
        FAILED,
        UNREADABLE,
    ),
    Attack(
        "a thousand right answers in advance",
        PIPE
        + """
def solve(a, b):
    put(encode(("value", 7)), 1000)
    return 7
""",
        FAILED,
        "AssertionError: 7",
    ),
    Attack(
        "a complaint of 1 GiB",
        PIPE
        + """
os.write(OUT, pack("<I", 1 << 30) + b"x" * 99)
""",
        OUTPUT,
    ),
    Attack(
        "half a complaint, then the end",
        PIPE
        + """
os.write(OUT, pack("<I", 99) + b"x")
os._exit(0)
""",
        CRASHED,
    ),
    Attack(
        "half an answer, then the end",
        PIPE
        + """
def solve(a, b):
    os.write(OUT, pack("<I", 99) + b"x")
    os._exit(0)
""",
        CRASHED,
    ),
    Attack(
        "a complaint that looks like a verdict",
        """
raise type("passed\\nsecret-" + "0" * 32, (Exception,), {})("passed\\n")
""",
        INVALID,
        r"^passed\\nsecret",
    ),
    Attack(
        "an exception that looks like a verdict",
        """
def solve(a, b):
    raise type("passed\\nsecret-" + "0" * 32, (Exception,), {})("passed\\n")
""",
        FAILED,
        r"^ProgramError: passed\\nsecret",
    ),
    Attack(
        "reads the questions itself",
        PIPE
        + """
def solve(a, b):
    return os.read(IN, 99)
""",
        (Status.TIMEOUT,),
    ),
    Attack(
        "closes the questions",
        PIPE
        + """
def solve(a, b):
    os.close(IN)
    return 5
""",
        CRASHED,
    ),
    Attack(
        "pipe that does not block",
        PIPE
        + """
def solve(a, b):
    os.set_blocking(OUT, False)
    return "x" * 10000000
""",
        FAILED,
        "Function not implemented",
    ),
    Attack(
        "signals by the owner of a pipe",
        PIPE
        + """
import fcntl

def solve(a, b):
    return tried(
        **{f"owner{p}": lambda p=p: fcntl.fcntl(OUT, fcntl.F_SETOWN, p) for p in (PID, os.getppid(), os.getpid())},
        group=lambda: call(72, OUT, 15, ctypes.create_string_buffer(16)),
        signal=lambda: fcntl.fcntl(OUT, 10, 9),
        size=lambda: fcntl.fcntl(OUT, 1031, 1 << 20),
        lease=lambda: fcntl.fcntl(OUT, 1024, 1),
        notify=lambda: fcntl.fcntl(IN, 1026, 1),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "memory, signals and limits of its judge",
        """
def solve(a, b):
    room, judge = ctypes.create_string_buffer(64), os.getppid()
    return tried(
        **{f"signal {n}": lambda n=n: os.kill(judge, n) for n in range(32)},
        **{n: lambda n=n: open(f"/proc/{judge}/{n}", "rb").read(9) for n in ("mem", "maps", "environ", "status")},
        **{f"file {n}": lambda n=n: os.open(f"/proc/{judge}/fd/{n}", os.O_WRONLY | os.O_NONBLOCK) for n in range(12)},
        group=lambda: os.kill(-1, 9),
        trace=lambda: call(101, 16, judge, 0, 0),
        read=lambda: call(310, judge, room, 1, room, 1, 0),
        write=lambda: call(311, judge, room, 1, room, 1, 0),
        handle=lambda: call(434, judge, 0),
        compare=lambda: call(312, judge, os.getpid(), 0, 3, 3),
        limits=lambda: call(302, judge, 9, room, None),
        cores=lambda: os.sched_setaffinity(judge, {0}),
        nice=lambda: os.setpriority(os.PRIO_PROCESS, judge, 19),
        group_of=lambda: os.setpgid(0, 0),
        session=lambda: os.setsid(),
        pages=lambda: call(279, judge, 0, None, None, None, 0),
    )
""",
        FAILED,
        REFUSED,
    ),
]
