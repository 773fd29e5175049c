"""Programs that change the interpreter or the channel they are asked through."""

from attacks.base import CRASHED, FAILED, OUTPUT, TIMEOUT, Attack
from neuromas.sandbox import Status

INTERPRETER = [
    Attack(
        "patched builtins",
        """
import builtins

for name in ("all", "any", "abs", "len", "isinstance", "print", "compile", "exec"):
    setattr(builtins, name, lambda *a, **k: True)

def solve(a, b):
    return 0
""",
        (Status.FAILED, Status.CRASHED, Status.TIMEOUT),
    ),
    Attack(
        "AssertionError replaced",
        """
import builtins

builtins.AssertionError = type("Quiet", (BaseException,), {})
sys.excepthook = lambda *a: None

def solve(a, b):
    return 0
""",
        FAILED,
        "AssertionError: 0",
    ),
    Attack(
        "sys.settrace rewrites results",
        """
def trace(frame, event, arg):
    frame.f_locals.update(status="passed", verdict=True)
    return trace

sys.settrace(trace)

def solve(a, b):
    return 0
""",
        FAILED,
        "AssertionError: 0",
    ),
    Attack(
        "import hook",
        """
class Hook:
    def find_spec(self, name, path=None, target=None):
        import importlib.machinery as m

        return m.ModuleSpec(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__dict__.update(check=lambda *a: None)

sys.meta_path.insert(0, Hook())
sys.modules["judge"] = sys.modules["tests"] = sys

def solve(a, b):
    return 0
""",
        FAILED,
        "AssertionError: 0",
    ),
    Attack(
        "prints what a judge might print",
        """
def solve(a, b):
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        print("passed", "0" * 32, file=stream, flush=True)
    for fd in (0, 1, 2):
        os.write(fd, b"V" + b"passed")
    return 0
""",
        FAILED,
        "AssertionError: 0",
    ),
    Attack(
        "worker's functions replaced through frames",
        """
frame = sys._getframe()
while frame:
    names = frame.f_globals
    if "_answer" in names:
        names["_answer"] = lambda *a, names=names: b"V" + names["encode"](("passed", "0" * 32))
    frame = frame.f_back

def solve(a, b):
    return 0
""",
        FAILED,
    ),
    Attack(
        "a verdict written into every open file",
        r"""
from struct import pack

def solve(a, b):
    frame = b"V" + b"t\2\0\0\0s\6\0\0\0passeds\40\0\0\0" + b"0" * 32
    for fd in range(32):
        try:
            os.write(fd, pack("<I", len(frame)) + frame)
        except OSError:
            pass
    return 0
""",
        FAILED,
    ),
    Attack(
        "answers without being asked",
        """
def solve(a, b):
    return 0

frame = sys._getframe()
while frame and "writing" not in frame.f_locals:
    frame = frame.f_back
out, put, code = frame.f_locals["writing"], frame.f_globals["write_frame"], frame.f_globals["encode"]
put(out, b"")
for n in range(100):
    put(out, code(("value", (5,))))
""",
        FAILED,
    ),
    Attack(
        "all files closed",
        """
def solve(a, b):
    os.closerange(0, 32)
    return 5
""",
        CRASHED,
    ),
    Attack(
        "4 GiB announced",
        r"""
def solve(a, b):
    for fd in range(3, 32):
        try:
            os.write(fd, b"\xff" * 4)
        except OSError:
            pass
    return 5
""",
        OUTPUT,
    ),
    Attack(
        "half an answer",
        r"""
import time

def solve(a, b):
    for fd in range(3, 32):
        try:
            os.write(fd, b"\x09\0\0\0v")
        except OSError:
            pass
    time.sleep(100)
""",
        TIMEOUT,
    ),
    Attack(
        "answer nested a million deep",
        r"""
def solve(a, b):
    frame = b"l\1\0\0\0" * 1000000 + b"N"
    for fd in range(3, 32):
        try:
            os.write(fd, len(frame).to_bytes(4, "little"))
            rest = memoryview(frame)
            while rest:
                rest = rest[os.write(fd, rest) :]
        except OSError:
            pass
    return 5
""",
        FAILED,
        "RecursionError",
    ),
]
