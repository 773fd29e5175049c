"""Programs that take time, memory, processes and output until something gives."""

from attacks.base import FAILED, MEMORY, REFUSED, TIMEOUT, Attack
from neuromas.sandbox import Status

RESOURCES = [
    Attack(
        "fork bomb",
        """
def solve(a, b):
    while True:
        os.fork()
""",
        FAILED,
        "OSError.*Function not implemented",
    ),
    Attack(
        "processes by raw system calls",
        """
def solve(a, b):
    return tried(
        fork=lambda: call(57),
        vfork=lambda: call(58),
        clone=lambda: call(56, 17, 0, 0, 0, 0),
        clone3=lambda: call(435, ctypes.create_string_buffer(88), 88),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "system calls by their x32 numbers",
        """
def solve(a, b):
    return tried(fork=lambda: call(0x40000000 + 57))
""",
        (Status.FAILED, Status.CRASHED),
    ),
    Attack(
        "subprocess, os.system, exec",
        """
import subprocess

def solve(a, b):
    return tried(
        run=lambda: subprocess.run([sys.executable, "-c", ""]),
        popen=lambda: os.popen("id").read(),
        spawn=lambda: os.posix_spawn(sys.executable, [sys.executable], {}),
        execv=lambda: os.execv(sys.executable, ["python", "-c", ""]),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "os.system",
        """
def solve(a, b):
    return os.system("true")
""",
        FAILED,
        "AssertionError: (-1|32512)",
    ),
    Attack(
        "thread that outlives the program",
        """
import threading, time

def solve(a, b):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return 5
""",
        FAILED,
        "can't start new thread",
    ),
    Attack(
        "memory bomb",
        """
def solve(a, b):
    x = []
    while True:
        x.append(bytearray(1 << 20))
""",
        MEMORY,
    ),
    Attack(
        "memory bomb while loading",
        """
x = bytearray(4 << 30)
""",
        MEMORY,
    ),
    Attack(
        "limits lifted",
        """
import resource

def solve(a, b):
    return tried(
        **{
            n: lambda n=n: resource.setrlimit(getattr(resource, n), (-1, -1))
            for n in ("RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CPU")
        },
        prlimit=lambda: resource.prlimit(0, resource.RLIMIT_AS, (-1, -1)),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "memory outside of its own",
        """
from multiprocessing import shared_memory

def solve(a, b):
    return tried(
        memfd=lambda: os.memfd_create("x"),
        shm=lambda: shared_memory.SharedMemory(create=True, size=9),
        sysv=lambda: call(29, 1, 1 << 20, 0o1666),
        queue=lambda: call(240, b"/q", 66, 0o600, None),
        keys=lambda: call(248, b"user", b"k", b"v", 1, -3),
    )
""",
        FAILED,
        REFUSED,
    ),
    Attack(
        "endless loop",
        """
def solve(a, b):
    while True:
        pass
""",
        TIMEOUT,
    ),
    Attack(
        "endless loop that ignores signals",
        """
import signal

for n in range(1, 65):
    try:
        signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
""",
        TIMEOUT,
    ),
    Attack(
        "sleep",
        """
import time

def solve(a, b):
    time.sleep(10000)
""",
        TIMEOUT,
    ),
    Attack(
        "endless output",
        """
def solve(a, b):
    while True:
        print("x" * 10000)
        os.write(2, b"y" * 10000)
""",
        TIMEOUT,
    ),
    Attack(
        "recursion bomb",
        """
sys.setrecursionlimit(1 << 30)

def solve(a, b):
    return solve([a], [b])
""",
        (Status.CRASHED, Status.MEMORY, Status.FAILED, Status.TIMEOUT),
    ),
    Attack(
        "regular expression that never ends",
        """
import re

def solve(a, b):
    return re.match("(a+)+$", "a" * 64 + "b")
""",
        TIMEOUT,
    ),
]
