"""Loops for which torch takes many operations, compiled by Numba for the CPU they run on.

A step of decoding is so little work that calling torch's operations takes most of its time, and in an update they pass over
memory several times. Everything here is in float32; other devices and types take torch's way, which tests compare with this.
"""

from neuromas.model.kernels.decoding import Reading, draw
from neuromas.model.kernels.layers import gate, gate_backward, has_gate, heads, heads_backward, normalise, normalise_backward

__all__ = [
    "Reading",
    "draw",
    "gate",
    "gate_backward",
    "has_gate",
    "heads",
    "heads_backward",
    "normalise",
    "normalise_backward",
]  # fmt: skip
