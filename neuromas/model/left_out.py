"""The way out where a GPU, its driver or a version of torch fails at a part: the slower way, which computes the same."""

import os
from typing import Literal, get_args

from neuromas.system.terminal import in_short

Part = Literal["flex", "graphs", "groups"]
"""Flex attention (`flex.py`), recorded steps (`rollout/fixed_decoding.py`), and grouped products of adapters (`grouped.py`)."""
WITHOUT = "NEUROMAS_WITHOUT"


def is_left_out(part: Part) -> bool:
    """Say whether the environment variable NEUROMAS_WITHOUT names a part; ValueError if it names anything else."""
    named = os.environ.get(WITHOUT, "").replace(",", " ").split()
    if unknown := sorted({*named} - {*get_args(Part)}):
        raise ValueError(f"the environment variable {WITHOUT} must name parts among flex, graphs and groups, got {unknown}")
    return part in named


def way_out(part: Part, error: BaseException) -> str:
    """Return in one line how to go on without a part that has failed, and what it says."""
    return f"set the environment variable {WITHOUT}={part}: torch fails at this part of the GPU's path ({in_short(error)})"
