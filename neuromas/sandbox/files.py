"""Lists the files that isolated processes may read, and copies them into memory, apart from the host's files.

Reading a file leaves traces that later readers can find: its access time changes, its pages stay in memory, and so do its
name and every name that was looked up in vain. A program could use them to leave notes for the next one. Reading a copy that is
completely in memory, on a read-only mount, leaves no traces.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEVICES = (os.devnull, "/dev/urandom")

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3"}
"""Folders of third-party packages, and the parts of the standard library that test it, need a screen, or install packages."""
_MEMORY = "/dev/shm"
_NEW_USER, _NEW_MOUNTS, _NO_SUID_NO_DEVICES = 0x10000000, 0x00020000, 0x2 | 0x4


def interpreter() -> str:
    # The interpreter itself, not a virtual environment's link to it: third-party packages are excluded.
    return os.path.realpath(sys.executable)


def environment() -> dict[str, str]:
    # A fixed seed makes the order of sets the same in every run, and rewards with it.
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"PYTHONHASHSEED": "0", **kept}


def readable() -> list[str]:
    """Return the host's files that Python needs: itself, standard and shared libraries, this folder; no /proc."""
    names = [interpreter(), *_standard_library(), *_shared_libraries(), "/etc/ld.so.cache", str(HERE), *DEVICES]
    return [name for name in names if Path(name).exists()]


def hidden() -> list[str]:
    """Return the folders inside the readable ones that must not be read."""
    found: list[str] = []
    for root in _standard_library():
        for folder, names, _ in os.walk(root):
            found += [f"{folder}/{name}" for name in names if _is_left_out(name)]
            names[:] = [name for name in names if not _is_left_out(name)]
    return found


def copy_into_memory() -> str:
    """Copy the readable files to a file system in memory that only this process and its children see; return its folder.

    It disappears with the last of them. The process must have one thread. OSError if the kernel does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            number = ctypes.get_errno()
            raise OSError(
                number, f"{name} failed: {os.strerror(number)}; programs are given a file system in memory of their own"
            )

    call("unshare", _NEW_USER | _NEW_MOUNTS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    call("mount", b"tmpfs", _MEMORY.encode(), b"tmpfs", ctypes.c_ulong(_NO_SUID_NO_DEVICES), b"mode=755")
    for name in readable():
        if not Path(name).is_dir():
            Path(_MEMORY + name).parent.mkdir(parents=True, exist_ok=True)
            _copy(name)
            continue
        for folder, names, files in os.walk(name):
            names[:] = [name for name in names if not _is_left_out(name)]
            Path(_MEMORY + folder).mkdir(parents=True, exist_ok=True)
            for file in files:
                # Compiled modules for python -O and -OO are not needed.
                if ".opt-" not in file:
                    _copy(f"{folder}/{file}")
    return _MEMORY


def _copy(name: str) -> None:
    source, place = Path(name), Path(_MEMORY + name)
    if name in DEVICES:
        # A file to mount the device on.
        place.touch()
        return
    shutil.copyfile(source, place)
    status = source.stat()
    place.chmod(status.st_mode & 0o555)
    # A compiled module is valid for one modification time of its source.
    os.utime(place, ns=(status.st_mtime_ns, status.st_mtime_ns))
    # The kernel marks a page at its first two reads, which take a little longer. Later reads all take the same time.
    for _ in range(3):
        place.read_bytes()


def _is_left_out(folder: str) -> bool:
    return folder in _LEFT_OUT or folder.startswith("config-")


def _standard_library() -> list[str]:
    base = {"platbase": sys.base_exec_prefix}
    return list(dict.fromkeys(sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")))


@cache
def _shared_libraries() -> list[str]:
    """Return the libraries that the interpreter and the standard library's compiled modules load, from the dynamic linker."""
    folders = [Path(root, "lib-dynload") for root in _standard_library()]
    modules = [str(path) for folder in folders for path in folder.glob("*.so") if not path.name.startswith("_tkinter.")]
    linker = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": ":".join(modules)}
    listed = subprocess.run(
        [interpreter(), "-c", "pass"],
        env={**environment(), **linker},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    names = re.findall(r"^\t(?:\S+ => )?(/.+) \(0x", listed.stdout.decode(), re.MULTILINE)
    return [name for name in dict.fromkeys(names) if name not in modules]
