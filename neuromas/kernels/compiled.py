"""How loops are compiled and run, and what all of them use."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import float32
from torch import Tensor

_MATH = {"reassoc", "contract", "arcp", "nsz"}
"""What sums need to be several at a time. Infinities and NaN stay what they are."""

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

# What is compiled is kept on disk, by the time of its own file: after a change here, that of the loops that use it is to go.
function: Compile = numba.njit(fastmath=_MATH, cache=True, inline="always")
ordered: Compile = numba.njit(fastmath=_MATH | {"nnan"}, cache=True)
"""For a maximum, which is taken several at a time only where NaN need not be kept."""
kernel: Compile = numba.njit(fastmath=_MATH, cache=True, parallel=True, nogil=True)


def fit(x: Tensor) -> bool:
    """Say whether these loops can do what is asked of a tensor like this one."""
    return x.dtype == torch.float32 and x.is_cpu


_threads = threading.local()
"""How many of them Numba has been told to use; it keeps that by thread, and asking it takes as long as a small loop."""
_one_at_a_time = threading.Lock()
"""Where Numba finds neither OpenMP nor TBB, its own threads end a process in which two loops run at once."""


@functools.cache
def _most_threads() -> int:
    """Start Numba's threads and return how many there are. It takes OpenMP's setting with it, which is torch's too."""
    of_torch = torch.get_num_threads()
    most = numba.get_num_threads()
    torch.set_num_threads(of_torch)
    return most


def run(kernel: Callable[..., None], *arguments: Tensor | np.ndarray | float | int) -> None:
    """Call a kernel on as many threads as torch uses."""
    most, threads = _most_threads(), torch.get_num_threads()
    if getattr(_threads, "set", None) != threads:
        numba.set_num_threads(min(threads, most))
        _threads.set = threads
    with _one_at_a_time:
        kernel(*[a.numpy() if isinstance(a, Tensor) else np.float32(a) if isinstance(a, float) else a for a in arguments])


@function
def exp(x: Any) -> Any:
    """e^x in float32, 2^k times a polynomial: one that a loop does several at a time (Cephes' expf)."""
    x = min(max(x, float32(-87)), float32(88))
    k = np.floor(x * float32(1.4426950408889634) + float32(0.5))
    r = x - k * float32(0.693359375) + k * float32(2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    p = p * r * r + r + float32(1)
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
