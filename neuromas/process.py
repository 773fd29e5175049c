"""Settings of a process that trains, which a library must not change behind its user's back; the command line makes them."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""


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
    mallopt(_MMAP_THRESHOLD, 32 << 20)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
