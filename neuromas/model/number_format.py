"""Which number format the products of a backbone are faster in, on this processor."""

import time

import torch
from torch.nn.functional import linear

AT_LEAST = 1.5
"""bfloat16 has fewer digits: it is chosen where its products are at least so many times as fast."""
_SMALL = 2**18
"""Products with fewer weights take no longer than what is around them, in either format."""
_TOKENS = (32, 1024)
"""Of a decoding step, and of a micro-batch."""
_ROUNDS = 9


def faster_dtype(features: int, outputs: int) -> str:
    """Return `bfloat16` if products of these sizes are much faster in it, else `float32`.

    Of each product the fastest of a few rounds counts. Processors without instructions for bfloat16 are slower in it, those
    with them are several times as fast: chance decides nothing.
    """
    if features * outputs < _SMALL:
        return "float32"
    wide, narrow = (_seconds(features, outputs, dtype) for dtype in (torch.float32, torch.bfloat16))
    return "bfloat16" if wide >= AT_LEAST * narrow else "float32"


@torch.inference_mode()
def _seconds(features: int, outputs: int, dtype: torch.dtype) -> float:
    """Return the time that a token takes in a product of few tokens and in one of many, added."""
    weight, total = torch.ones(outputs, features, dtype=dtype), 0.0
    for tokens in _TOKENS:
        x, rounds = torch.ones(tokens, features, dtype=dtype), []
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            linear(x, weight)
            rounds.append(time.perf_counter() - started)
        total += min(rounds) / tokens
    return total
