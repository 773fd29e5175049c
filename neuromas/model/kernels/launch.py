"""Runs the compiled loops, on as many threads as torch uses."""

import contextlib
import fcntl
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_threads = threading.local()
"""The number of threads that Numba is set to, which it keeps per thread; asking it takes as long as a small loop."""
_one_at_a_time = threading.Lock()
"""Held while a loop runs: without OpenMP and TBB, Numba's own threads end a process that runs two loops at once."""


@functools.cache
def _most_threads() -> int:
    """Start Numba's threads and return their number, without changing torch's.

    Starting them sets the number of OpenMP's threads, which torch uses too, so it is set back.
    """
    of_torch = torch.get_num_threads()
    most = numba.get_num_threads()
    torch.set_num_threads(of_torch)
    return most


COMPILING = "NEUROMAS_COMPILES_LOOPS"


@functools.cache
def prepare() -> None:
    """Have another process compile the loops if they are not all kept on disk yet; `compile_kernels` says why.

    A file beside them says which Numba has compiled them all, from which source, for which processor: in another environment of
    the same checkout another version may have thrown them away, and a process that was killed has kept a part.
    """
    from neuromas.model.kernels import loops

    loop: Any = loops.weigh
    kept = loop.stats.cache_path
    if COMPILING in os.environ or kept is None:
        return
    made_by = f"{numba.__version__} {Path(loops.__file__).stat().st_mtime_ns} {loop.targetctx.codegen().magic_tuple()}"
    with (Path(kept) / f"loops.{sys.implementation.cache_tag}.compiled").open("a+") as file:
        # Processes that compile at once would lose each other's entries in Numba's index. Not every disk has locks.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if file.read() == made_by:
            return
        print("compiling loops for this machine's processor, once: half a minute or more", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "neuromas.training.compile_kernels"], env=os.environ | {COMPILING: "1"}, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        if done.returncode == 0:
            file.truncate(0)
            file.write(made_by)
        else:
            why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            told = f"compiling ahead failed ({why}); this process compiles them, and its sums may have other last bits"
            print(told, file=sys.stderr, flush=True)


def run(loop: Callable[..., None], *arguments: Tensor | np.ndarray | float | int) -> None:
    """Call a loop on as many threads as torch uses."""
    prepare()
    most, threads = _most_threads(), torch.get_num_threads()
    if getattr(_threads, "set", None) != threads:
        numba.set_num_threads(min(threads, most))
        _threads.set = threads
    with _one_at_a_time:
        loop(*[_array(a) if isinstance(a, Tensor) else np.float32(a) if isinstance(a, float) else a for a in arguments])


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's memory as an array; NumPy has no bfloat16, and the loops read it as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
