"""Norms, heads and gates of a layer, and their gradients.

Shapes beyond the legend: H size of a hidden state, C columns of a product, X heads, K heads of keys, D size of a head.
"""

import math

import torch
from torch import Tensor

from neuromas.model.kernels import loops
from neuromas.model.kernels.launch import run

_GELU = 2 * math.sqrt(2 / math.pi)
_GATES = {"silu": (1.0, 0.0), "gelu_pytorch_tanh": (_GELU, 0.044715 * _GELU)}
"""Activations as g * sigmoid(a g + b g^3), by transformers' names: a and b."""


def normalise(x_TH: Tensor, scale_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * scale, and 1 / rms(x), (T,)."""
    x_TH = x_TH.contiguous()
    y_TH, inverse_T = torch.empty_like(x_TH), x_TH.new_empty(x_TH.shape[0])
    run(loops.normalise, x_TH, scale_H, eps, y_TH, inverse_T)
    return y_TH, inverse_T


def normalise_backward(dy_TH: Tensor, x_TH: Tensor, scale_H: Tensor, inverse_T: Tensor) -> Tensor:
    dx_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    run(loops.normalise_backward, dy_TH.contiguous(), x_TH.contiguous(), scale_H, inverse_T, dx_TH)
    return dx_TH


def heads(
    columns_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor, scale_XD: Tensor | None, eps: float, queries: int, keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and, for the gradient, 1 / rms of queries and keys, (T, X)."""
    tokens, heads, size = columns_TXD.shape
    assert heads == queries + 2 * keys, "values have as many heads as keys"
    query, key, value = (columns_TXD.new_empty(tokens, count, size) for count in (queries, keys, keys))
    inverse_TX = columns_TXD.new_empty(tokens, queries + keys)
    normed = scale_XD is not None
    scale_XD = scale_XD if scale_XD is not None else columns_TXD.new_ones(queries + keys, size)
    run(loops.heads, columns_TXD, cos_TD, sin_TD, scale_XD, normed, eps, query, key, value, inverse_TX)
    return query, key, value, inverse_TX


def heads_backward(
    grads: tuple[Tensor, Tensor, Tensor], columns_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor, scale_XD: Tensor | None,
    inverse_TX: Tensor,
) -> Tensor:  # fmt: skip
    d_columns_TXD = torch.empty_like(columns_TXD)
    normed = scale_XD is not None
    scale_XD = scale_XD if scale_XD is not None else columns_TXD.new_ones(inverse_TX.shape[1], columns_TXD.shape[2])
    contiguous = [grad.contiguous() for grad in grads]
    run(loops.heads_backward, *contiguous, columns_TXD, cos_TD, sin_TD, scale_XD, normed, inverse_TX, d_columns_TXD)
    return d_columns_TXD


def has_gate(activation: str) -> bool:
    """Say whether there is a loop for a gate of this activation."""
    return activation in _GATES


def gate(both_TC: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up, (T, C/2), of both beside each other."""
    y_TC = both_TC.new_empty(both_TC.shape[0], both_TC.shape[1] // 2)
    run(loops.gate, both_TC, *_GATES[activation], y_TC)
    return y_TC


def gate_backward(dy_TC: Tensor, both_TC: Tensor, activation: str) -> Tensor:
    d_both_TC = torch.empty_like(both_TC)
    run(loops.gate_backward, dy_TC.contiguous(), both_TC, *_GATES[activation], d_both_TC)
    return d_both_TC
