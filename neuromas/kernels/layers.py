"""Norms, heads and gates of a layer, and their gradients.

Shapes beyond the legend: H size of a hidden state, C columns of a product, X heads, K heads of keys, D size of a head.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import float32, prange
from torch import Tensor

from neuromas.kernels.compiled import exp, function, kernel, run

_GELU = 2 * math.sqrt(2 / math.pi)
_GATES = {"silu": (1.0, 0.0), "gelu_pytorch_tanh": (_GELU, 0.044715 * _GELU)}
"""Activations as g * sigmoid(a g + b g^3), by transformers' names: a and b."""


# Norms


@kernel
def _normalise(x_TH: Any, scale_H: Any, eps: Any, y_TH: Any, inverse_T: Any) -> None:
    size = x_TH.shape[1]
    for t in prange(len(x_TH)):
        x, y = x_TH[t], y_TH[t]
        squares = float32(0)
        for h in range(size):
            squares += x[h] * x[h]
        inverse = float32(1) / np.sqrt(squares / float32(size) + eps)
        inverse_T[t] = inverse
        for h in range(size):
            y[h] = x[h] * inverse * scale_H[h]


@kernel
def _normalise_backward(dy_TH: Any, x_TH: Any, scale_H: Any, inverse_T: Any, dx_TH: Any) -> None:
    size = x_TH.shape[1]
    for t in prange(len(x_TH)):
        dy, x, dx, inverse = dy_TH[t], x_TH[t], dx_TH[t], inverse_T[t]
        along = float32(0)
        for h in range(size):
            along += dy[h] * scale_H[h] * x[h]
        along *= inverse * inverse / float32(size)
        for h in range(size):
            dx[h] = (dy[h] * scale_H[h] - x[h] * along) * inverse


def normalise(x_TH: Tensor, scale_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * scale, and 1 / rms(x), (T,)."""
    x_TH = x_TH.contiguous()
    y_TH, inverse_T = torch.empty_like(x_TH), x_TH.new_empty(x_TH.shape[0])
    run(_normalise, x_TH, scale_H, eps, y_TH, inverse_T)
    return y_TH, inverse_T


def normalise_backward(dy_TH: Tensor, x_TH: Tensor, scale_H: Tensor, inverse_T: Tensor) -> Tensor:
    dx_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    run(_normalise_backward, dy_TH.contiguous(), x_TH.contiguous(), scale_H, inverse_T, dx_TH)
    return dx_TH


# Heads of attention: normed where the model does so, and rotated


@function
def _head(x: Any, cos: Any, sin: Any, scale: Any, inverse: Any, y: Any) -> None:
    half = len(sin)
    for d in range(half):
        low, high = x[d] * inverse * scale[d], x[half + d] * inverse * scale[half + d]
        y[d] = low * cos[d] - high * sin[d]
        y[half + d] = high * cos[d] + low * sin[d]


@function
def _head_backward(dy: Any, x: Any, cos: Any, sin: Any, scale: Any, inverse: Any, normed: Any, dx: Any) -> None:
    half = len(sin)
    along = float32(0)
    for d in range(half):
        low = (dy[d] * cos[d] + dy[half + d] * sin[d]) * scale[d]
        high = (dy[half + d] * cos[d] - dy[d] * sin[d]) * scale[half + d]
        dx[d], dx[half + d] = low * inverse, high * inverse
        along += low * x[d] + high * x[half + d]
    if normed:
        along *= inverse * inverse * inverse / float32(2 * half)
        for d in range(2 * half):
            dx[d] -= x[d] * along


@kernel
def _heads(
    columns_TXD: Any, cos_TD: Any, sin_TD: Any, scale_XD: Any, normed: Any, eps: Any, query_TXD: Any, keys_TKD: Any,
    values_TKD: Any, inverse_TX: Any,
) -> None:  # fmt: skip
    queries, turned, size = query_TXD.shape[1], inverse_TX.shape[1], columns_TXD.shape[2]
    for t in prange(len(columns_TXD)):
        for x in range(turned):
            head, inverse = columns_TXD[t, x], float32(1)
            if normed:
                squares = float32(0)
                for d in range(size):
                    squares += head[d] * head[d]
                inverse = float32(1) / np.sqrt(squares / float32(size) + eps)
            inverse_TX[t, x] = inverse
            y = query_TXD[t, x] if x < queries else keys_TKD[t, x - queries]
            _head(head, cos_TD[t], sin_TD[t], scale_XD[x], inverse, y)
        for x in range(values_TKD.shape[1]):
            values_TKD[t, x] = columns_TXD[t, turned + x]


@kernel
def _heads_backward(
    d_query_TXD: Any, d_keys_TKD: Any, d_values_TKD: Any, columns_TXD: Any, cos_TD: Any, sin_TD: Any, scale_XD: Any,
    normed: Any, inverse_TX: Any, d_columns_TXD: Any,
) -> None:  # fmt: skip
    queries, turned = d_query_TXD.shape[1], inverse_TX.shape[1]
    for t in prange(len(columns_TXD)):
        for x in range(turned):
            dy = d_query_TXD[t, x] if x < queries else d_keys_TKD[t, x - queries]
            head, dx = columns_TXD[t, x], d_columns_TXD[t, x]
            _head_backward(dy, head, cos_TD[t], sin_TD[t], scale_XD[x], inverse_TX[t, x], normed, dx)
        for x in range(d_values_TKD.shape[1]):
            d_columns_TXD[t, turned + x] = d_values_TKD[t, x]


def heads(
    columns_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor, scale_XD: Tensor | None, eps: float, queries: int, keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and, for the gradient, 1 / rms of queries and keys, (T, X)."""
    tokens, _, size = columns_TXD.shape
    query, key, value = (columns_TXD.new_empty(tokens, count, size) for count in (queries, keys, keys))
    inverse_TX = columns_TXD.new_empty(tokens, queries + keys)
    normed = scale_XD is not None
    scale_XD = scale_XD if scale_XD is not None else columns_TXD.new_ones(queries + keys, size)
    run(_heads, columns_TXD, cos_TD, sin_TD, scale_XD, normed, eps, query, key, value, inverse_TX)
    return query, key, value, inverse_TX


def heads_backward(
    grads: tuple[Tensor, Tensor, Tensor], columns_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor, scale_XD: Tensor | None,
    inverse_TX: Tensor,
) -> Tensor:  # fmt: skip
    d_columns_TXD = torch.empty_like(columns_TXD)
    normed = scale_XD is not None
    scale_XD = scale_XD if scale_XD is not None else columns_TXD.new_ones(inverse_TX.shape[1], columns_TXD.shape[2])
    contiguous = [grad.contiguous() for grad in grads]
    run(_heads_backward, *contiguous, columns_TXD, cos_TD, sin_TD, scale_XD, normed, inverse_TX, d_columns_TXD)
    return d_columns_TXD


# Gated feed-forward


def fit_gate(activation: str) -> bool:
    """Say whether there is a loop for a gate of this activation."""
    return activation in _GATES


@kernel
def _gate(both_TC: Any, a: Any, b: Any, y_TC: Any) -> None:
    size = y_TC.shape[1]
    for t in prange(len(both_TC)):
        gate, up, y = both_TC[t, :size], both_TC[t, size:], y_TC[t]
        for c in range(size):
            g = gate[c]
            y[c] = g / (float32(1) + exp(-(a + b * g * g) * g)) * up[c]


@kernel
def _gate_backward(dy_TC: Any, both_TC: Any, a: Any, b: Any, d_both_TC: Any) -> None:
    size = dy_TC.shape[1]
    for t in prange(len(both_TC)):
        gate, up, dy, d_gate, d_up = both_TC[t, :size], both_TC[t, size:], dy_TC[t], d_both_TC[t, :size], d_both_TC[t, size:]
        for c in range(size):
            g = gate[c]
            share = float32(1) / (float32(1) + exp(-(a + b * g * g) * g))
            d_up[c] = dy[c] * g * share
            d_gate[c] = dy[c] * up[c] * share * (float32(1) + g * (float32(1) - share) * (a + float32(3) * b * g * g))


def gate(both_TC: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up, (T, C/2), of both beside each other."""
    y_TC = both_TC.new_empty(both_TC.shape[0], both_TC.shape[1] // 2)
    run(_gate, both_TC, *_GATES[activation], y_TC)
    return y_TC


def gate_backward(dy_TC: Tensor, both_TC: Tensor, activation: str) -> Tensor:
    d_both_TC = torch.empty_like(both_TC)
    run(_gate_backward, dy_TC.contiguous(), both_TC, *_GATES[activation], d_both_TC)
    return d_both_TC
