"""Settings of a process that trains, which a library must not change behind its user's back; the command line makes them."""

import ctypes
import os

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20), "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1)}
"""Settings of glibc's allocator: the variable that sets one, its number for mallopt, and bytes."""


def settle() -> None:
    """Keep waiting threads cheap and freed memory at hand. To be called before torch is loaded; what is set by hand stays.

    Threads that spin for long while they wait make a run ten times slower as soon as anything else wants a core; threads that
    sleep at once make it half as fast on a machine of one's own. And a step frees and asks for the same large blocks again
    and again: given back to the system, each costs a page fault for every 4 KiB.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        # Another C library: its allocator does what it does.
        return
    for variable, (parameter, size) in _MALLOC.items():
        if variable not in os.environ:
            mallopt(parameter, size)
