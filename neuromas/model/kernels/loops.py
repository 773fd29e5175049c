"""The loops themselves, each compiled when it is first called, which takes seconds, and kept on disk.

All in one file: Numba keeps compiled code by the time of the file that a loop is in, whatever it calls elsewhere.

Shapes beyond the legend: H size of a hidden state, C columns of a product, X heads of queries (and of keys behind them, where
both are turned), K heads of keys, G heads of queries that share one, D size of a head, S slots, Q prefixes, P places of rows
that share a prefix, L columns of keys.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import float32, float64, prange

_MATH = {"reassoc", "contract", "arcp", "nsz"}
"""What sums need to be several at a time. Infinities and NaN stay what they are."""
_STRETCH = 256
"""Tokens of a vocabulary whose shares are summed in float32."""

Loop = Callable[..., Any]


def _compiler(**options: Any) -> Callable[[Loop], Loop]:
    def compiled(loop: Loop) -> Loop:
        try:
            return numba.njit(cache=True, **options)(loop)
        except RuntimeError:
            # Neither the package's folder nor the user's can be written: it is compiled anew in every process.
            return numba.njit(**options)(loop)

    return compiled


function = _compiler(fastmath=_MATH, inline="always")
ordered = _compiler(fastmath=_MATH | {"nnan"})
"""For a maximum, which is taken several at a time only where NaN need not be kept."""
kernel = _compiler(fastmath=_MATH, parallel=True, nogil=True)


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


@kernel
def normalise(x_TH: Any, scale_H: Any, eps: Any, y_TH: Any, inverse_T: Any) -> None:
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
def normalise_backward(dy_TH: Any, x_TH: Any, scale_H: Any, inverse_T: Any, dx_TH: Any) -> None:
    size = x_TH.shape[1]
    for t in prange(len(x_TH)):
        dy, x, dx, inverse = dy_TH[t], x_TH[t], dx_TH[t], inverse_T[t]
        along = float32(0)
        for h in range(size):
            along += dy[h] * scale_H[h] * x[h]
        along *= inverse * inverse / float32(size)
        for h in range(size):
            dx[h] = (dy[h] * scale_H[h] - x[h] * along) * inverse


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
def heads(
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
def heads_backward(
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


@kernel
def gate(both_TC: Any, a: Any, b: Any, y_TC: Any) -> None:
    size = y_TC.shape[1]
    for t in prange(len(both_TC)):
        gate, up, y = both_TC[t, :size], both_TC[t, size:], y_TC[t]
        for c in range(size):
            g = gate[c]
            y[c] = g / (float32(1) + exp(-(a + b * g * g) * g)) * up[c]


@kernel
def gate_backward(dy_TC: Any, both_TC: Any, a: Any, b: Any, d_both_TC: Any) -> None:
    size = dy_TC.shape[1]
    for t in prange(len(both_TC)):
        gate, up, dy, d_gate, d_up = both_TC[t, :size], both_TC[t, size:], dy_TC[t], d_both_TC[t, :size], d_both_TC[t, size:]
        for c in range(size):
            g = gate[c]
            share = float32(1) / (float32(1) + exp(-(a + b * g * g) * g))
            d_up[c] = dy[c] * g * share
            d_gate[c] = dy[c] * up[c] * share * (float32(1) + g * (float32(1) - share) * (a + float32(3) * b * g * g))


@kernel
def lay_out(
    query_BXD: Any, new_keys_BKD: Any, new_values_BKD: Any, slot_B: Any, column_B: Any, prefix_B: Any, place_B: Any, scale: Any,
    keys_SKLD: Any, values_SKLD: Any, own_SKGD: Any, grid_QKPGD: Any,
) -> None:  # fmt: skip
    _, heads, shared, size = own_SKGD.shape
    for row in prange(len(query_BXD)):
        slot, column, prefix, place = slot_B[row], column_B[row], prefix_B[row], place_B[row]
        for head in range(heads):
            for d in range(size):
                keys_SKLD[slot, head, column, d] = new_keys_BKD[row, head, d]
                values_SKLD[slot, head, column, d] = new_values_BKD[row, head, d]
            for g in range(shared):
                for d in range(size):
                    q = query_BXD[row, head * shared + g, d] * scale
                    own_SKGD[slot, head, g, d] = q
                    grid_QKPGD[prefix, head, place, g, d] = q


@ordered
def _most(scores: Any, most: Any) -> Any:
    for at in range(len(scores)):
        most = max(most, scores[at])
    return most


@function
def _exponentials(scores: Any, most: Any) -> Any:
    """Put exponentials in place of scores and return their sum."""
    total = float32(0)
    for at in range(len(scores)):
        share = exp(scores[at] - most)
        scores[at] = share
        total += share
    return total


@function
def _forget(scores: Any, first: Any, end: Any) -> None:
    """Put 0 in place of scores of what is not seen."""
    for at in range(first):
        scores[at] = float32(0)
    behind = scores[end:]
    for at in range(len(behind)):
        behind[at] = float32(0)


@kernel
def weigh(
    slot_B: Any, column_B: Any, prefix_B: Any, place_B: Any, length_Q: Any, window: Any, own_SKGL: Any, grid_QKPGL: Any,
    inverse_BX: Any,
) -> None:  # fmt: skip
    _, heads, shared, _ = own_SKGL.shape
    for job in prange(len(slot_B) * heads):
        row, head = job // heads, job % heads
        prefix, end_own = prefix_B[row], column_B[row] + 1
        end_prefix = length_Q[prefix]
        first_own = max(end_own - window, 0)
        first_prefix = min(max(end_prefix + end_own - window, 0), end_prefix)
        for g in range(shared):
            own, of_prefix = own_SKGL[slot_B[row], head, g], grid_QKPGL[prefix, head, place_B[row], g]
            _forget(own, first_own, end_own)
            _forget(of_prefix, first_prefix, end_prefix)
            own, of_prefix = own[first_own:end_own], of_prefix[first_prefix:end_prefix]
            most = _most(of_prefix, _most(own, own[0]))
            inverse_BX[row, head * shared + g] = float32(1) / (_exponentials(own, most) + _exponentials(of_prefix, most))


@kernel
def join(
    slot_B: Any, prefix_B: Any, place_B: Any, own_SKGD: Any, grid_QKPGD: Any, inverse_BX: Any, out_BXD: Any
) -> None:  # fmt: skip
    _, heads, shared, size = own_SKGD.shape
    for row in prange(len(out_BXD)):
        own, of_prefix = own_SKGD[slot_B[row]], grid_QKPGD[prefix_B[row], :, place_B[row]]
        for head in range(heads):
            for g in range(shared):
                x = head * shared + g
                for d in range(size):
                    out_BXD[row, x, d] = (own[head, g, d] + of_prefix[head, g, d]) * inverse_BX[row, x]


@function
def _share_out(logits: Any, most: Any, by: Any, shares: Any) -> Any:
    """Write exponentials of logits, and return their sum."""
    total = float32(0)
    for v in range(len(logits)):
        share = exp((logits[v] - most) * by)
        shares[v] = share
        total += share
    return total


@kernel
def draw(logits_BV: Any, uniform_B: Any, by: Any, greedy: Any, token_B: Any, logprob_B: Any) -> None:
    vocabulary = logits_BV.shape[1]
    stretches = (vocabulary + _STRETCH - 1) // _STRETCH
    for row in prange(len(logits_BV)):
        logits = logits_BV[row]
        most = _most(logits, logits[0])
        shares, sums = np.empty(vocabulary, np.float32), np.empty(stretches, np.float32)
        # In float64: a sum over a large vocabulary in float32 would shift the tail.
        total = float64(0)
        for stretch in range(stretches):
            part = slice(stretch * _STRETCH, (stretch + 1) * _STRETCH)
            sums[stretch] = _share_out(logits[part], most, by, shares[part])
            total += float64(sums[stretch])
        token, first = 0, 0
        if greedy:
            while token < vocabulary - 1 and logits[token] != most:
                token += 1
        else:
            # Sums only grow where there is something to draw, so a token without a share is passed by.
            aim, passed = uniform_B[row] * total, float64(0)
            while first < stretches - 1 and passed + float64(sums[first]) <= aim:
                passed += float64(sums[first])
                first += 1
            part = shares[first * _STRETCH : (first + 1) * _STRETCH]
            inside = float64(0)
            for v in range(len(part)):
                inside += float64(part[v])
            aim, passed = (aim - passed) / float64(sums[first]) * inside, float64(0)
            for v in range(len(part)):
                if passed + float64(part[v]) > passed:
                    token = first * _STRETCH + v
                passed += float64(part[v])
                if passed > aim:
                    break
        token_B[row] = token
        logprob_B[row] = (logits[token] - most) * by - np.log(total)
