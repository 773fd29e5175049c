"""One new token of each row: what it reads, and which one is drawn.

Shapes beyond the legend: S slots, Q prefixes, P places of rows that share a prefix, L columns of keys, X heads of queries, K
heads of keys, G heads of queries that share one, D size of a head.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import float32, float64, prange
from torch import Tensor

from neuromas.kernels.compiled import exp, function, kernel, ordered, run

_STRETCH = 256
"""Tokens of a vocabulary whose shares are summed in float32."""


# Reading. Products of matrices are torch's; what stands around them is here.


@kernel
def _lay_out(
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
def _weigh(
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
def _join(
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


class Reading:
    """What rows read, one token each, as long as none comes or goes. They fill the first slots of a cache.

    `prefix_B` and `place_B` say which of a prefix's `places` a row takes. Prefixes are (Q, K, columns, D) by layer,
    contiguous.
    """

    def __init__(
        self, slot_B: Tensor, prefix_B: Tensor, place_B: Tensor, places: int, length_Q: Tensor,
        prefixes: Sequence[tuple[Tensor, Tensor]], queries: int,
    ) -> None:  # fmt: skip
        prefix_keys = prefixes[0][0]
        count, heads, _, size = prefix_keys.shape
        rows, shared = slot_B.shape[0], queries // heads
        self._keys_of_all = rows * heads
        self._who = [tensor.numpy() for tensor in (slot_B, prefix_B, place_B)]
        self._length_Q = length_Q.numpy()
        self._prefixes = [(keys.view(-1, *keys.shape[2:]).mT, values.view(-1, *values.shape[2:])) for keys, values in prefixes]
        self._own, self._grid = (
            prefix_keys.new_empty(rows * heads, shared, size),
            prefix_keys.new_empty(count * heads, places * shared, size),
        )
        self._own_SKGD = self._own.view(rows, heads, shared, size).numpy()
        self._grid_QKPGD = self._grid.view(count, heads, places, shared, size).numpy()
        self._inverse_BX = np.empty((rows, queries), np.float32)

    def attend(
        self, layer: int, query_BXD: Tensor, keys_BKD: Tensor, values_BKD: Tensor, column_B: Tensor, longest: int,
        cache: tuple[Tensor, Tensor], *, window: int | None, scale: float,
    ) -> Tensor:  # fmt: skip
        """Write each row's new key and value into its slot of the cache, (slots, K, columns, D), of which `longest` are read.

        Return what its query reads there and in its prefix.
        """
        slot_B, prefix_B, place_B = self._who
        new = [tensor.contiguous() for tensor in (query_BXD, keys_BKD, values_BKD)]
        run(_lay_out, *new, slot_B, column_B, prefix_B, place_B, scale, *cache, self._own_SKGD, self._grid_QKPGD)
        keys, values = (part.flatten(0, 1)[: self._keys_of_all, :longest] for part in cache)
        own, (prefix_keys, prefix_values) = torch.bmm(self._own, keys.mT), self._prefixes[layer]
        grid = torch.bmm(self._grid, prefix_keys)
        own_SKGL = own.numpy().reshape(*self._own_SKGD.shape[:3], -1)
        grid_QKPGL = grid.numpy().reshape(*self._grid_QKPGD.shape[:4], -1)
        window = 2**62 if window is None else window
        run(_weigh, slot_B, column_B, prefix_B, place_B, self._length_Q, window, own_SKGL, grid_QKPGL, self._inverse_BX)
        torch.bmm(own, values, out=self._own)
        torch.bmm(grid, prefix_values, out=self._grid)
        out_BXD = torch.empty_like(new[0])
        run(_join, slot_B, prefix_B, place_B, self._own_SKGD, self._grid_QKPGD, self._inverse_BX, out_BXD)
        return out_BXD


# Draws


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
def _draw(logits_BV: Any, uniform_B: Any, by: Any, greedy: Any, token_B: Any, logprob_B: Any) -> None:
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
        token, first, rest = vocabulary - 1, 0, uniform_B[row] * total
        if greedy:
            while first < vocabulary - 1 and logits[first] != most:
                first += 1
            token = first
        else:
            while first < stretches - 1 and rest >= sums[first]:
                rest -= float64(sums[first])
                first += 1
            for v in range(first * _STRETCH, vocabulary):
                rest -= float64(shares[v])
                if rest < 0:
                    token = v
                    break
        token_B[row] = token
        logprob_B[row] = (logits[token] - most) * by - np.log(total)


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the tokens at which the distribution function passes a uniform draw, and their log-probabilities.

    At temperature 0 the likeliest tokens, with their log-probabilities at temperature 1.
    """
    token_B, logprob_B = torch.empty(logits_BV.shape[0], dtype=torch.long), logits_BV.new_empty(logits_BV.shape[0])
    run(_draw, logits_BV.contiguous(), uniform_B, 1 / (temperature or 1.0), temperature == 0, token_B, logprob_B)
    return token_B, logprob_B
