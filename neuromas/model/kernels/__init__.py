"""Loops that replace many operations of torch, compiled by Numba for the CPU they run on.

A decoding step is so little work that calling torch's operations takes most of its time, and in an update they pass over memory
several times. The loops compute in float32, and read and write what enters and leaves matrix products in float32 or bfloat16;
other devices and dtypes use torch's operations, and tests compare the two.
"""

from neuromas.model.kernels.decoding import CacheAttention, sample
from neuromas.model.kernels.head import chosen, logits
from neuromas.model.kernels.layers import gate, gate_backward, has_gate, heads, heads_backward, normalise, normalise_backward

__all__ = [
    "CacheAttention",
    "chosen",
    "gate",
    "gate_backward",
    "has_gate",
    "heads",
    "heads_backward",
    "logits",
    "normalise",
    "normalise_backward",
    "sample",
]  # fmt: skip
