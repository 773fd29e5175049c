"""Norms, heads and gates of a layer, and their gradients, by compiled loops."""

import math

import torch
from torch import Tensor

from neuromas.model.kernels import loops
from neuromas.model.kernels.launch import run

_GELU = 2 * math.sqrt(2 / math.pi)
_GATES = {"silu": (1.0, 0.0), "gelu_pytorch_tanh": (_GELU, 0.044715 * _GELU)}
"""The a and b of activations of the form g * sigmoid(a g + b g^3), by transformers' names."""


def normalise(x_TC: Tensor, scale_C: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * scale in a dtype, and 1 / rms(x), which is (T,)."""
    x_TC = x_TC.contiguous()
    y_TC, inverse_T = torch.empty_like(x_TC, dtype=dtype), scale_C.new_empty(x_TC.shape[0])
    run(loops.normalise, x_TC, scale_C, eps, y_TC, inverse_T)
    return y_TC, inverse_T


def normalise_backward(dy_TC: Tensor, x_TC: Tensor, scale_C: Tensor, inverse_T: Tensor) -> Tensor:
    """Return the gradient at x."""
    dx_TC = torch.empty_like(x_TC, memory_format=torch.contiguous_format)
    run(loops.normalise_backward, dy_TC.contiguous(), x_TC.contiguous(), scale_C, inverse_T, dx_TC)
    return dx_TC


def heads(
    qkv: Tensor, cos_TD: Tensor, sin: Tensor, scale: Tensor | None, eps: float, queries: int, keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and, for the gradient, 1 / rms of queries and keys, (T, H + J), all in float32.

    `qkv` is (T, H + 2 J, D), `scale` is (H + J, D) and `sin` is (T, D / 2).
    """
    tokens, heads, size = qkv.shape
    assert heads == queries + 2 * keys, "there are as many value heads as key heads"
    query, key, value = (cos_TD.new_empty(tokens, count, size) for count in (queries, keys, keys))
    inverse_rms = cos_TD.new_empty(tokens, queries + keys)
    normed = scale is not None
    scale = scale if scale is not None else cos_TD.new_ones(queries + keys, size)
    run(loops.heads, qkv, cos_TD, sin, scale, normed, eps, query, key, value, inverse_rms)
    return query, key, value, inverse_rms


def heads_backward(
    grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, cos_TD: Tensor, sin: Tensor, scale: Tensor | None,
    inverse_rms: Tensor,
) -> Tensor:  # fmt: skip
    """Return the gradient at `qkv`."""
    d_qkv = torch.empty_like(qkv)
    normed = scale is not None
    scale = scale if scale is not None else cos_TD.new_ones(inverse_rms.shape[1], qkv.shape[2])
    contiguous = [grad.contiguous() for grad in grads]
    run(loops.heads_backward, *contiguous, qkv, cos_TD, sin, scale, normed, inverse_rms, d_qkv)
    return d_qkv


def has_gate(activation: str) -> bool:
    """Say whether there is a loop for a gate of this activation."""
    return activation in _GATES


def gate(gate_up_TO: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up, given both, concatenated along the features."""
    y_TI = gate_up_TO.new_empty(gate_up_TO.shape[0], gate_up_TO.shape[1] // 2)
    run(loops.gate, gate_up_TO, *_GATES[activation], y_TI)
    return y_TI


def gate_backward(dy_TI: Tensor, gate_up_TO: Tensor, activation: str) -> Tensor:
    """Return the gradient at `gate_up_TO`."""
    d_gate_up_TO = torch.empty_like(gate_up_TO)
    run(loops.gate_backward, dy_TI.contiguous(), gate_up_TO, *_GATES[activation], d_gate_up_TO)
    return d_gate_up_TO
