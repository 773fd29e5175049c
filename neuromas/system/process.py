"""Settings of a process that trains. Importing the package does not change them; the command line does."""

import contextlib
import ctypes
import math
import os
import re
from pathlib import Path

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20), "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1)}
"""Settings of glibc's allocator: environment variable -> (parameter of mallopt, bytes)."""
_MUCH = 3 * 2**29
"""Bytes of freed memory that a process keeps."""


def total_memory() -> int | None:
    """Return the most bytes of memory that this process may use: the machine's, or its container's limit; None if unknown."""
    found = [math.inf]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):  # no such file, or "max"
            found.append(int(Path(limit).read_text()))
    return int(least) if (least := min(found)) < math.inf else None


def configure_process() -> None:
    """Shorten the spinning of waiting threads and keep freed memory. Call it before torch is loaded; the user's settings stay.

    Threads that spin for long while they wait make a run ten times slower as soon as another process wants a core; threads that
    sleep at once make it half as fast on an idle machine. And each step frees and allocates the same large blocks: a block that
    goes back to the system costs a page fault for every 4 KiB.
    """
    for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        # OpenMP takes a list as well, one number for each level of nesting.
        if (value := os.environ.get(variable)) is not None and not re.fullmatch(r"\s*0*[1-9]\d*\s*(,.*)?", value):
            raise ValueError(f"{variable} must be a number of threads, at least 1, got {value!r}; set it so or unset it")
    if not re.fullmatch(r"0*[2-9]\d|0*[1-9]\d{2,5}", os.environ.get("COLUMNS", "")):
        # A terminal of no columns shows nothing, and the help never ends in one of a few columns.
        os.environ.pop("COLUMNS", None)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        # Another C library has no mallopt.
        return
    for variable, (parameter, size) in _MALLOC.items():
        if variable not in os.environ:
            mallopt(parameter, size)


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def return_freed_memory() -> None:
    """Give freed memory back to the system where it is much: tensors of ever other sizes leave holes that none fits.

    What is little stays (`configure_process`): the next step needs it again.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _Mallinfo
        if libc.mallinfo2().fordblks > _MUCH:
            libc.malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        # Another C library has neither.
        return
