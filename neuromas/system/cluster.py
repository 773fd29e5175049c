"""A Ray cluster (docs.ray.io): joined where it runs, or started on this machine. Ray is an extra, and large."""

import importlib
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from neuromas.system.terminal import in_short

ADDRESS = r"ray(://[^\s/:]+:\d{1,5})?"
RETRIES = 3
"""How often work is begun again whose process or node has died."""


def load_ray(module: str = "ray") -> Any:
    """Return Ray, or a part of it, which few have installed."""
    return importlib.import_module(module)


@contextmanager
def joined(flag: str, address: str = "ray") -> Iterator[None]:
    """Be connected to a cluster while inside; ValueError, with the flag that asked for it, if there is none.

    `ray` is the cluster that the environment variable RAY_ADDRESS names, or else one that is started on this machine and ends
    with it. `ray://HOST:PORT` is another machine's, joined through its client port.
    """
    if not re.fullmatch(ADDRESS, address):
        raise ValueError(f"{flag} must be ray or ray://HOST:PORT, got {address!r}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A cell or worker that needs more memory than a node has would be begun again for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    # Processes of a cluster that this process starts find the package where this one has found it.
    paths = dict.fromkeys([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(Path(__file__).parents[2])])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        ray = load_ray()
    except ImportError as error:
        raise ValueError(f"{flag} needs Ray ({error}); install it by: pip install 'neuromas[ray]'") from error
    where = address if address != "ray" else os.environ.get("RAY_ADDRESS", "")
    _require_listener(flag, where)
    try:
        ray.init(where or None, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
    # Ray raises these where it finds no cluster, or one of another version of Ray or of Python.
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ValueError(
            f"{flag}: Ray {ray.__version__} on Python {sys.version.split()[0]} cannot join {where or 'a cluster of its own'}: "
            f"{in_short(error)}"
        ) from error
    try:
        yield
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"{flag}: the cluster has failed ({type(error).__name__}: {in_short(error)}); where it runs again, the "
            "same command goes on from what is on disk (`train` with --resume)"
        ) from error
    finally:
        ray.shutdown()


def _require_listener(flag: str, where: str) -> None:
    """Raise ValueError if nobody listens at an address: Ray itself would wait for minutes, and then end this process."""
    if not (found := re.fullmatch(r"(?:ray://)?([^\s/]+):(\d{1,5})", where)):
        return
    try:
        with socket.create_connection((found[1], int(found[2])), timeout=10):
            return
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"{flag}: nobody answers at {where} ({error}); start a cluster there by `ray start --head`, or name another as "
            "ray://HOST:PORT or in RAY_ADDRESS"
        ) from error


def require_cores(resources: Mapping[str, float], device: str, count: int, of: str) -> None:
    """Raise ValueError if a cluster is too small for so many `of`, e.g. workers: Ray would wait for more, and say nothing."""
    kind = "GPU" if device == "cuda" else "CPU"
    if (there := int(min(resources.get("CPU", 0), resources.get(kind, 0)))) < count:
        raise ValueError(f"--workers needs {count} or more {kind}s, one for each {of}, and the cluster has {there}")


def device_of(device: str) -> Literal["cpu", "cuda"]:
    """Return where work on a cluster runs: `auto` on a CPU. Ray gives a GPU to what asks for one, and hides none from the rest,
    all of which would take the first one of their machine."""
    return "cuda" if device == "cuda" else "cpu"


def enter(folder: str) -> None:
    """Make `folder` the working folder of a process on a node, so that relative paths mean what they mean where the user is.

    Raises ValueError if the node has no such folder.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise ValueError(
            f"--workers: a node of the cluster has no folder {folder} ({error.strerror}); start the command in a folder that "
            "all nodes share"
        ) from error
