"""The first wall: processes that can read the standard library and no other file of the host.

`bubblewrap` (namespaces, and a copy of the files in memory) is the first choice, `sandlock` (Landlock rules and a system call
filter in the kernel) the second: `docs/sandbox.md` lists the channels that it leaves open. Without either of them no program
is run.
"""

import contextlib
import importlib.util
import os
import re
import select
import shutil
import signal
import subprocess
from typing import IO, TYPE_CHECKING, Literal, Protocol

from neuromas.sandbox.files import DEVICES, HERE, copy_into_memory, environment, hidden, interpreter, readable

if TYPE_CHECKING:
    import sandlock

IsolationName = Literal["sandlock", "bubblewrap"]
ISOLATIONS: tuple[IsolationName, ...] = ("bubblewrap", "sandlock")

_NOBODY = 65534
_INFO_SECONDS = 30.0
# These modules are imported without running `neuromas/__init__.py`, which the isolated process need not read.
_BOOT = """
import sys
for name in ("neuromas", "neuromas.sandbox"):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [sys.argv[1]] if "." in name else []
from neuromas.sandbox.judge import main
main()
"""


class Process(Protocol):
    """An isolated process with pipes to its standard input and output."""

    @property
    def stdin(self) -> IO[bytes] | None: ...
    @property
    def stdout(self) -> IO[bytes] | None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> object: ...


class Sandlock:
    """Landlock rules and a system call filter. Raises ValueError with the reason if this machine lacks them."""

    def __init__(self) -> None:
        if importlib.util.find_spec("sandlock") is None:
            raise ValueError("the Python package sandlock is not installed")
        # Its import needs a home folder, which a user without an entry in the passwd file does not have.
        has_home = "HOME" in os.environ
        os.environ.setdefault("HOME", "/")
        try:
            import sandlock
        finally:
            if not has_home:
                del os.environ["HOME"]
        got, needed = sandlock.landlock_abi_version(), sandlock.min_landlock_abi()
        if got < needed:
            raise ValueError(f"the kernel has Landlock version {got}, sandlock needs {needed} (Linux 6.12 or later)")
        # It compares resolved paths.
        self._readable, self._hidden = sorted({os.path.realpath(name) for name in readable()}), hidden()

    def start(self) -> Process:
        """Start `neuromas.sandbox.judge` in isolation, with only its two pipes open."""
        from sandlock import Sandbox, StdioMode

        sandbox = Sandbox(
            fs_readable=self._readable,
            # Of /proc it would show the process's own part, with its open files.
            fs_denied=["/proc", *self._hidden],
            fs_writable=[os.devnull],
            clean_env=True,
            env=environment(),
            cwd="/",
            # In a user namespace: the process has no privilege to raise its own limits, even if root starts it.
            uid=_NOBODY,
            gid=_NOBODY,
            no_coredump=True,
        )
        return _Group(sandbox.popen(_command(), stdin=StdioMode.PIPED, stdout=StdioMode.PIPED, stderr=StdioMode.NULL))


class _Group:
    """The judge as the leader of a process group; when it is killed, this process adopts and reaps its worker too."""

    def __init__(self, leader: "sandlock.Process") -> None:
        self._leader, self._number = leader, leader.pid
        self.stdin, self.stdout = leader.stdin, leader.stdout

    def kill(self) -> None:
        self._leader.kill()

    def wait(self, timeout: float | None = None) -> object:
        result = self._leader.wait(timeout)
        assert self._number is not None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-self._number, 0)
        return result


class Bubblewrap:
    """Own namespaces, by the program `bwrap`. Raises ValueError if it is not installed."""

    def __init__(self, program: str = "bwrap") -> None:
        path = shutil.which(program)
        if path is None:
            raise ValueError(f"there is no program {program!r}")
        self._path = path
        self._options: list[str] = []

    def start(self) -> Process:
        """Start `neuromas.sandbox.judge` in isolation, with only its two pipes open. The first start copies the files."""
        if not self._options:
            self._options = self._make_options(copy_into_memory())
        return _Bubble(self._path, [*self._options, *_command()])

    def _make_options(self, folder: str) -> list[str]:
        # fmt: off
        options = [
            "--unshare-user", "--unshare-all", "--disable-userns", "--uid", str(_NOBODY), "--gid", str(_NOBODY),
            "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv", "--ro-bind", folder, "/", "--chdir", "/",
        ]
        # fmt: on
        for name in DEVICES:
            options += ["--dev-bind", name, name]
        for name, value in environment().items():
            options += ["--setenv", name, value]
        return options


class _Bubble:
    """bubblewrap's process outside of the namespace and the first one inside: when either ends, both are ended and reaped.

    The outer one does not wait for the inner one, which another process has to adopt and reap (`runner.adopt_orphans`).
    """

    def __init__(self, path: str, arguments: list[str]) -> None:
        reading, writing = os.pipe()
        try:
            self._outer = subprocess.Popen(
                [path, "--info-fd", str(writing), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                pass_fds=[writing],
            )
            os.close(writing)
            inner = _child_pid(reading)
        finally:
            os.close(reading)
        self.stdin, self.stdout = self._outer.stdin, self._outer.stdout
        self._inner = inner
        self._handle: int | None = None
        if inner is not None:
            with contextlib.suppress(ProcessLookupError):
                self._handle = os.pidfd_open(inner)

    def kill(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            os.close(self._handle)
            self._handle = None
        else:
            self._outer.kill()

    def wait(self, timeout: float | None = None) -> object:
        try:
            self._outer.wait(timeout)
        except subprocess.TimeoutExpired:
            self._outer.kill()
            self._outer.wait()
        if self._inner is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._inner, 0)
            self._inner = None
        return self._outer.returncode


def _child_pid(reading: int) -> int | None:
    """Return the child's pid that bubblewrap writes; None if it writes none. Its JSON comes in parts on an open pipe."""
    said = b""
    while b"}" not in said and select.select([reading], [], [], _INFO_SECONDS)[0]:
        piece = os.read(reading, 4096)
        if not piece:
            break
        said += piece
    found = re.search(rb'"child-pid": (\d+)', said)
    return None if found is None else int(found[1])


Isolation = Sandlock | Bubblewrap


def make_isolation(name: IsolationName) -> Isolation:
    return Sandlock() if name == "sandlock" else Bubblewrap()


def _command() -> list[str]:
    # No site-packages (-s, -S), no compiled files (-B), no imports from the working directory (-P).
    return [interpreter(), "-s", "-S", "-B", "-P", "-c", _BOOT, str(HERE)]
