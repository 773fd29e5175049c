"""The loops themselves: each is compiled when it is first called, which takes seconds, and kept on disk.

They are all in one file: Numba takes kept code as current by the time of the loop's own file, whatever it calls elsewhere.
Numbers are computed in float32; arrays of bfloat16 are given as uint16, read by `wide` and written by `put`.

Some arrays have axes that are sums or quotients of the legend's sizes. `qkv` is (T, H + 2 J, D): the heads of queries, keys and
values; `scale`, (H + J, D), and `inverse_rms`, (T, H + J), are of queries and keys; `sin` is (T, D / 2). `own_queries`, then
`own_scores` and `own_sums`, is (S, J, H / J, D or L): the queries of each slot, grouped by the key head that they share.
`prefix_queries`, then `prefix_scores` and `prefix_sums`, is (Q, J, rows of one prefix, H / J, D or L).
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import float32, float64, prange, types
from numba.extending import overload

_MATH = {"reassoc", "contract", "arcp", "nsz"}
"""What the compiler needs to vectorise sums. Infinities and NaN stay what they are."""
_CHUNK = 256
"""Number of tokens of the vocabulary whose weights are summed in float32."""

Loop = Callable[..., Any]


def _compiler(**options: Any) -> Callable[[Loop], Loop]:
    """Return a decorator that compiles a loop with these options of Numba, and keeps it on disk where it can."""

    def compiled(loop: Loop) -> Loop:
        try:
            return numba.njit(cache=True, **options)(loop)
        except RuntimeError:
            # Neither the package's folder nor the user's can be written to: every process compiles the loop anew.
            return numba.njit(**options)(loop)

    return compiled


function = _compiler(fastmath=_MATH, inline="always")
ordered = _compiler(fastmath=_MATH | {"nnan"})
"""Compiles a maximum, which is vectorised only if NaN need not be kept."""
kernel = _compiler(fastmath=_MATH, parallel=True, nogil=True)


def wide(x: Any) -> Any:
    """Return an array's number as float32."""
    raise NotImplementedError(x)


@overload(wide, inline="always")
def _wide(x: Any) -> Any:
    def shifted(x: Any) -> Any:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def same(x: Any) -> Any:
        return x

    return shifted if x == types.uint16 else same


def put(y: Any, i: Any, x: Any) -> None:
    """Write a float32 number into an array at index i, rounded to the nearest of its format and if tied to the even one."""
    raise NotImplementedError(y, i, x)


@overload(put, inline="always")
def _put(y: Any, i: Any, x: Any) -> Any:
    def rounded(y: Any, i: Any, x: Any) -> None:
        bits = np.float32(x).view(np.uint32)
        bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        y[i] = np.uint16(bits >> np.uint32(16))

    def same(y: Any, i: Any, x: Any) -> None:
        y[i] = x

    return rounded if y.dtype == types.uint16 else same


@function
def exp(x: Any) -> Any:
    """Return e^x in float32 as 2^k times a polynomial, which can be vectorised (Cephes' expf)."""
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
def normalise(x_TC: Any, scale_C: Any, eps: Any, y_TC: Any, inverse_T: Any) -> None:
    """Write x / rms(x) * scale into `y_TC`, and 1 / rms(x) into `inverse_T`."""
    size = x_TC.shape[1]
    for t in prange(len(x_TC)):
        x, y = x_TC[t], y_TC[t]
        squares = float32(0)
        for c in range(size):
            squares += wide(x[c]) * wide(x[c])
        inverse = float32(1) / np.sqrt(squares / float32(size) + eps)
        inverse_T[t] = inverse
        for c in range(size):
            put(y, c, wide(x[c]) * inverse * scale_C[c])


@kernel
def normalise_backward(dy_TC: Any, x_TC: Any, scale_C: Any, inverse_T: Any, dx_TC: Any) -> None:
    """Write the gradient at x into `dx_TC`."""
    size = x_TC.shape[1]
    for t in prange(len(x_TC)):
        dy, x, dx, inverse = dy_TC[t], x_TC[t], dx_TC[t], inverse_T[t]
        along = float32(0)
        for c in range(size):
            along += wide(dy[c]) * scale_C[c] * wide(x[c])
        along *= inverse * inverse / float32(size)
        for c in range(size):
            put(dx, c, (wide(dy[c]) * scale_C[c] - wide(x[c]) * along) * inverse)


@function
def _head(x: Any, cos: Any, sin: Any, scale: Any, inverse: Any, y: Any) -> None:
    """Norm and rotate one head."""
    half = len(sin)
    for d in range(half):
        low, high = wide(x[d]) * inverse * scale[d], wide(x[half + d]) * inverse * scale[half + d]
        y[d] = low * cos[d] - high * sin[d]
        y[half + d] = high * cos[d] + low * sin[d]


@function
def _head_backward(dy: Any, x: Any, cos: Any, sin: Any, scale: Any, inverse: Any, normed: Any, dx: Any) -> None:
    """Write the gradient at one head into `dx`."""
    half = len(sin)
    along = float32(0)
    for d in range(half):
        low = (dy[d] * cos[d] + dy[half + d] * sin[d]) * scale[d]
        high = (dy[half + d] * cos[d] - dy[d] * sin[d]) * scale[half + d]
        put(dx, d, low * inverse)
        put(dx, half + d, high * inverse)
        along += low * wide(x[d]) + high * wide(x[half + d])
    if normed:
        along *= inverse * inverse * inverse / float32(2 * half)
        for d in range(2 * half):
            put(dx, d, wide(dx[d]) - wide(x[d]) * along)


@kernel
def heads(
    qkv: Any, cos_TD: Any, sin: Any, scale: Any, normed: Any, eps: Any, query_THD: Any, keys_TJD: Any, values_TJD: Any,
    inverse_rms: Any,
) -> None:  # fmt: skip
    """Norm, if `normed`, and rotate the heads of queries and keys, and copy those of values."""
    queries, rotated, size = query_THD.shape[1], inverse_rms.shape[1], qkv.shape[2]
    for t in prange(len(qkv)):
        for h in range(rotated):
            head, inverse = qkv[t, h], float32(1)
            if normed:
                squares = float32(0)
                for d in range(size):
                    squares += wide(head[d]) * wide(head[d])
                inverse = float32(1) / np.sqrt(squares / float32(size) + eps)
            inverse_rms[t, h] = inverse
            y = query_THD[t, h] if h < queries else keys_TJD[t, h - queries]
            _head(head, cos_TD[t], sin[t], scale[h], inverse, y)
        for h in range(values_TJD.shape[1]):
            value, y = qkv[t, rotated + h], values_TJD[t, h]
            for d in range(size):
                y[d] = wide(value[d])


@kernel
def heads_backward(
    d_query_THD: Any, d_keys_TJD: Any, d_values_TJD: Any, qkv: Any, cos_TD: Any, sin: Any, scale: Any, normed: Any,
    inverse_rms: Any, d_qkv: Any,
) -> None:  # fmt: skip
    """Write the gradient at `qkv` into `d_qkv`."""
    queries, rotated = d_query_THD.shape[1], inverse_rms.shape[1]
    for t in prange(len(qkv)):
        for h in range(rotated):
            dy = d_query_THD[t, h] if h < queries else d_keys_TJD[t, h - queries]
            head, dx = qkv[t, h], d_qkv[t, h]
            _head_backward(dy, head, cos_TD[t], sin[t], scale[h], inverse_rms[t, h], normed, dx)
        for h in range(d_values_TJD.shape[1]):
            dy, dx = d_values_TJD[t, h], d_qkv[t, rotated + h]
            for d in range(len(dy)):
                put(dx, d, dy[d])


@kernel
def gate(gate_up_TO: Any, a: Any, b: Any, y_TI: Any) -> None:
    """Write up * gate * sigmoid(a gate + b gate^3) into `y_TI`."""
    size = y_TI.shape[1]
    for t in prange(len(gate_up_TO)):
        gate, up, y = gate_up_TO[t, :size], gate_up_TO[t, size:], y_TI[t]
        for i in range(size):
            g = wide(gate[i])
            put(y, i, g / (float32(1) + exp(-(a + b * g * g) * g)) * wide(up[i]))


@kernel
def gate_backward(dy_TI: Any, gate_up_TO: Any, a: Any, b: Any, d_gate_up_TO: Any) -> None:
    """Write the gradient at `gate_up_TO` into `d_gate_up_TO`."""
    size = dy_TI.shape[1]
    for t in prange(len(gate_up_TO)):
        gate, up, dy, d_gate, d_up = (
            gate_up_TO[t, :size], gate_up_TO[t, size:], dy_TI[t], d_gate_up_TO[t, :size], d_gate_up_TO[t, size:],
        )  # fmt: skip
        for i in range(size):
            g = wide(gate[i])
            sigmoid = float32(1) / (float32(1) + exp(-(a + b * g * g) * g))
            put(d_up, i, wide(dy[i]) * g * sigmoid)
            slope = float32(1) + g * (float32(1) - sigmoid) * (a + float32(3) * b * g * g)
            put(d_gate, i, wide(dy[i]) * wide(up[i]) * sigmoid * slope)


@kernel
def lay_out(
    query_BHD: Any, new_keys_BJD: Any, new_values_BJD: Any, slot_B: Any, column_B: Any, prefix_B: Any, index_in_prefix_B: Any,
    scale: Any, keys_SJLD: Any, values_SJLD: Any, own_queries: Any, prefix_queries: Any,
) -> None:  # fmt: skip
    """Write new keys and values into the cache, and scaled queries as a batch by slot and a padded batch by prefix."""
    _, heads, shared, size = own_queries.shape
    for row in prange(len(query_BHD)):
        slot, column, prefix, index = slot_B[row], column_B[row], prefix_B[row], index_in_prefix_B[row]
        for head in range(heads):
            for d in range(size):
                keys_SJLD[slot, head, column, d] = new_keys_BJD[row, head, d]
                values_SJLD[slot, head, column, d] = new_values_BJD[row, head, d]
            for i in range(shared):
                for d in range(size):
                    q = query_BHD[row, head * shared + i, d] * scale
                    own_queries[slot, head, i, d] = q
                    prefix_queries[prefix, head, index, i, d] = q


@ordered
def _maximum(scores: Any, maximum: Any) -> Any:
    """Return the largest of the scores and `maximum`."""
    for index in range(len(scores)):
        maximum = max(maximum, scores[index])
    return maximum


@function
def _exponentials(scores: Any, maximum: Any) -> Any:
    """Replace scores by their exponentials and return the sum."""
    total = float32(0)
    for index in range(len(scores)):
        weight = exp(scores[index] - maximum)
        scores[index] = weight
        total += weight
    return total


@function
def _zero_outside(scores: Any, first: Any, end: Any) -> None:
    """Replace the scores of keys that are not seen, those before `first` and from `end` on, by 0."""
    for index in range(first):
        scores[index] = float32(0)
    after = scores[end:]
    for index in range(len(after)):
        after[index] = float32(0)


@kernel
def weigh(
    slot_B: Any, column_B: Any, prefix_B: Any, index_in_prefix_B: Any, length_Q: Any, window: Any, own_scores: Any,
    prefix_scores: Any, inverse_BH: Any,
) -> None:  # fmt: skip
    """Replace scores by the exponentials of those that are seen, and write 1 / their sum over both parts into `inverse_BH`."""
    _, heads, shared, _ = own_scores.shape
    for job in prange(len(slot_B) * heads):
        row, head = job // heads, job % heads
        prefix, end_own = prefix_B[row], column_B[row] + 1
        end_prefix = length_Q[prefix]
        first_own = max(end_own - window, 0)
        first_prefix = min(max(end_prefix + end_own - window, 0), end_prefix)
        for i in range(shared):
            own, of_prefix = own_scores[slot_B[row], head, i], prefix_scores[prefix, head, index_in_prefix_B[row], i]
            _zero_outside(own, first_own, end_own)
            _zero_outside(of_prefix, first_prefix, end_prefix)
            own, of_prefix = own[first_own:end_own], of_prefix[first_prefix:end_prefix]
            maximum = _maximum(of_prefix, _maximum(own, own[0]))
            inverse_BH[row, head * shared + i] = float32(1) / (_exponentials(own, maximum) + _exponentials(of_prefix, maximum))


@kernel
def join(
    slot_B: Any, prefix_B: Any, index_in_prefix_B: Any, own_sums: Any, prefix_sums: Any, inverse_BH: Any, out_BHD: Any
) -> None:  # fmt: skip
    """Write the attention over both parts into `out_BHD`."""
    _, heads, shared, size = own_sums.shape
    for row in prange(len(out_BHD)):
        own, of_prefix = own_sums[slot_B[row]], prefix_sums[prefix_B[row], :, index_in_prefix_B[row]]
        for head in range(heads):
            for i in range(shared):
                h = head * shared + i
                for d in range(size):
                    out_BHD[row, h, d] = (own[head, i, d] + of_prefix[head, i, d]) * inverse_BH[row, h]


@kernel
def add_parts(rounded_KV: Any, rest_KV: Any, logits_KV: Any) -> None:
    """Write the sums of two parts of logits."""
    for k in prange(len(logits_KV)):
        rounded, rest, logits = rounded_KV[k], rest_KV[k], logits_KV[k]
        for v in range(len(logits)):
            logits[v] = wide(rounded[v]) + wide(rest[v])


@function
def _exponentials_of_logits(logits: Any, maximum: Any, inverse_temperature: Any, weights: Any) -> Any:
    """Write the exponentials of logits into `weights` and return the sum."""
    total = float32(0)
    for v in range(len(logits)):
        weight = exp((logits[v] - maximum) * inverse_temperature)
        weights[v] = weight
        total += weight
    return total


@kernel
def sample(logits_BV: Any, uniform_B: Any, inverse_temperature: Any, greedy: Any, tokens_B: Any, logprobs_B: Any) -> None:
    """Write sampled tokens, or the likeliest if `greedy`, and their log-probabilities."""
    vocabulary = logits_BV.shape[1]
    chunks = (vocabulary + _CHUNK - 1) // _CHUNK
    for row in prange(len(logits_BV)):
        logits = logits_BV[row]
        maximum = _maximum(logits, logits[0])
        weights, sums = np.empty(vocabulary, np.float32), np.empty(chunks, np.float32)
        # In float64: a sum over a large vocabulary in float32 would shift the tail.
        total = float64(0)
        for chunk in range(chunks):
            part = slice(chunk * _CHUNK, (chunk + 1) * _CHUNK)
            sums[chunk] = _exponentials_of_logits(logits[part], maximum, inverse_temperature, weights[part])
            total += float64(sums[chunk])
        token, first = 0, 0
        if greedy:
            while token < vocabulary - 1 and logits[token] != maximum:
                token += 1
        else:
            # The sum grows only at tokens that can be sampled, so a token without weight is skipped.
            target, cumulative = uniform_B[row] * total, float64(0)
            while first < chunks - 1 and cumulative + float64(sums[first]) <= target:
                cumulative += float64(sums[first])
                first += 1
            part = weights[first * _CHUNK : (first + 1) * _CHUNK]
            inside = float64(0)
            for v in range(len(part)):
                inside += float64(part[v])
            target, cumulative = (target - cumulative) / float64(sums[first]) * inside, float64(0)
            for v in range(len(part)):
                if cumulative + float64(part[v]) > cumulative:
                    token = first * _CHUNK + v
                cumulative += float64(part[v])
                if cumulative > target:
                    break
        tokens_B[row] = token
        logprobs_B[row] = (logits[token] - maximum) * inverse_temperature - np.log(total)


@kernel
def chosen(rounded_KV: Any, rest_KV: Any, ids_K: Any, inverse_temperature: Any, logprobs_K: Any) -> None:
    """Write log softmax of one token each, given logits in two parts; softmax minus 1 at that token overwrites the first."""
    vocabulary = rounded_KV.shape[1]
    chunks = (vocabulary + _CHUNK - 1) // _CHUNK
    for k in prange(len(rounded_KV)):
        rounded, rest = rounded_KV[k], rest_KV[k]
        logits = np.empty(vocabulary, np.float32)
        for v in range(vocabulary):
            logits[v] = wide(rounded[v]) + wide(rest[v])
        chosen, maximum = logits[ids_K[k]], _maximum(logits, logits[0])
        total = float64(0)
        for chunk in range(chunks):
            part = logits[chunk * _CHUNK : (chunk + 1) * _CHUNK]
            total += float64(_exponentials_of_logits(part, maximum, inverse_temperature, part))
        logprobs_K[k] = (chosen - maximum) * inverse_temperature - np.log(total)
        inverse = float32(1 / total)
        for v in range(vocabulary):
            put(rounded, v, logits[v] * inverse)
        put(rounded, ids_K[k], logits[ids_K[k]] * inverse - float32(1))
