"""The first wall: processes that see the standard library and nothing else of the host.

`bubblewrap` (namespaces, and a copy of the files in memory) is the first choice, `sandlock` (Landlock rules and a system call
filter in the kernel) the second: it leaves open what `docs/sandbox.md` lists. There is no third: without one of them nothing
runs.
"""

import contextlib
import importlib.util
import os
import re
import select
import shutil
import signal
import subprocess
from typing import IO, TYPE_CHECKING, Literal, Protocol, runtime_checkable

from neuromas.sandbox.files import DEVICES, HERE, copy_into_memory, environment, hidden, interpreter, readable

if TYPE_CHECKING:
    import sandlock

IsolationName = Literal["sandlock", "bubblewrap"]
ISOLATIONS: tuple[IsolationName, ...] = ("bubblewrap", "sandlock")

_NOBODY = 65534
_INFO_SECONDS = 30.0
# The modules below are found without running `neuromas/__init__.py`, which the isolated process need not see.
_BOOT = """
import sys
for name in ("neuromas", "neuromas.sandbox"):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [sys.argv[1]] if "." in name else []
from neuromas.sandbox.judge import main
main()
"""


@runtime_checkable
class Process(Protocol):
    """An isolated process with two pipes of ours."""

    @property
    def stdin(self) -> IO[bytes] | None: ...
    @property
    def stdout(self) -> IO[bytes] | None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> object: ...


class Sandlock:
    """Landlock rules and a system call filter. Raises ValueError with the reason if this machine has no such thing."""

    name: IsolationName = "sandlock"

    def __init__(self) -> None:
        if importlib.util.find_spec("sandlock") is None:
            raise ValueError("the Python package sandlock is not installed")
        # Its import looks for a home folder: a user without an entry in the passwd file has none, which is no reason to stop.
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
        # It compares the paths that links lead to.
        self._readable, self._hidden = sorted({os.path.realpath(name) for name in readable()}), hidden()

    def start(self) -> Process:
        """Start `neuromas.sandbox.judge` in isolation, alone with its two pipes."""
        from sandlock import Sandbox, StdioMode

        sandbox = Sandbox(
            fs_readable=self._readable,
            # Of /proc it would show what belongs to the process itself: its open files, which are no business of the program's.
            fs_denied=["/proc", *self._hidden],
            fs_writable=[os.devnull],
            clean_env=True,
            env=environment(),
            cwd="/",
            # In a user namespace: whoever starts it, it has no privilege to lift its own limits.
            uid=_NOBODY,
            gid=_NOBODY,
            no_coredump=True,
        )
        return _Group(sandbox.popen(_command(), stdin=StdioMode.PIPED, stdout=StdioMode.PIPED, stderr=StdioMode.NULL))


class _Group:
    """The judge as the leader of a process group; its worker comes to us when it is killed and is reaped as well."""

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
    """Namespaces of its own. Raises ValueError if there is no such program."""

    name: IsolationName = "bubblewrap"

    def __init__(self, program: str = "bwrap") -> None:
        path = shutil.which(program)
        if path is None:
            raise ValueError(f"there is no program {program!r}")
        self._path = path
        self._options: list[str] = []

    def start(self) -> Process:
        """Start `neuromas.sandbox.judge` in isolation, alone with its two pipes. The first start copies what it needs."""
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
    """bubblewrap's process outside of the namespace and the first one inside: whichever ends first, both are ended and reaped.

    The outer one does not wait for the inner one, which then needs a process that adopts and reaps it (`runner.adopt_orphans`).
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
    """Return what bubblewrap says of its child; None if it says nothing. Its JSON comes in pieces and the pipe stays open."""
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
    # No site-packages (-s, -S), nothing written (-B), nothing imported from the working directory (-P).
    return [interpreter(), "-s", "-S", "-B", "-P", "-c", _BOOT, str(HERE)]
