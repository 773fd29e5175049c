"""One new token of each row: what it reads, and which one is drawn.

Shapes beyond the legend: S slots, Q prefixes, P places of rows that share a prefix, L columns of keys, X heads of queries, K
heads of keys, G heads of queries that share one, D size of a head.
"""

import numpy as np
import torch
from torch import Tensor

from neuromas.model.kernels import loops
from neuromas.model.kernels.launch import run


class Reading:
    """What rows read, one token each, as long as none comes or goes. They fill the first slots of a cache.

    For layers with as many heads of queries and keys, of one size. `prefix_B` and `place_B` say which of a prefix's `places` a
    row takes. Products of matrices are torch's.
    """

    def __init__(
        self, slot_B: Tensor, prefix_B: Tensor, place_B: Tensor, places: int, length_Q: Tensor, queries: int, heads: int,
        size: int,
    ) -> None:  # fmt: skip
        rows, count, shared = slot_B.shape[0], length_Q.shape[0], queries // heads
        self._who = [tensor.numpy() for tensor in (slot_B, prefix_B, place_B)]
        self._length_Q = length_Q.numpy()
        self._own = torch.empty(rows * heads, shared, size, dtype=torch.float32)
        self._grid = torch.empty(count * heads, places * shared, size, dtype=torch.float32)
        self._own_SKGD = self._own.view(rows, heads, shared, size).numpy()
        self._grid_QKPGD = self._grid.view(count, heads, places, shared, size).numpy()
        self._inverse_BX = np.empty((rows, queries), np.float32)

    def attend(
        self, query_BXD: Tensor, keys_BKD: Tensor, values_BKD: Tensor, column_B: Tensor, longest: int,
        cache: tuple[Tensor, Tensor], prefixes: tuple[Tensor, Tensor], *, window: int | None, scale: float,
    ) -> Tensor:  # fmt: skip
        """Write each row's new key and value into its slot of the cache, (slots, K, columns, D), of which `longest` are read.

        Return what its query reads there and in its prefix: `prefixes` are contiguous, (Q, K, columns, D).
        """
        slot_B, prefix_B, place_B = self._who
        new = [tensor.contiguous() for tensor in (query_BXD, keys_BKD, values_BKD)]
        run(loops.lay_out, *new, slot_B, column_B, prefix_B, place_B, scale, *cache, self._own_SKGD, self._grid_QKPGD)
        keys, values = (part.flatten(0, 1)[: len(self._own), :longest] for part in cache)
        prefix_keys, prefix_values = (part.view(-1, *part.shape[2:]) for part in prefixes)
        own, grid = torch.bmm(self._own, keys.mT), torch.bmm(self._grid, prefix_keys.mT)
        own_SKGL = own.numpy().reshape(*self._own_SKGD.shape[:3], -1)
        grid_QKPGL = grid.numpy().reshape(*self._grid_QKPGD.shape[:4], -1)
        window = 2**62 if window is None else window
        run(loops.weigh, slot_B, column_B, prefix_B, place_B, self._length_Q, window, own_SKGL, grid_QKPGL, self._inverse_BX)
        torch.bmm(own, values, out=self._own)
        torch.bmm(grid, prefix_values, out=self._grid)
        out_BXD = torch.empty_like(new[0])
        run(loops.join, slot_B, prefix_B, place_B, self._own_SKGD, self._grid_QKPGD, self._inverse_BX, out_BXD)
        return out_BXD


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the tokens at which the distribution function passes a uniform draw, and their log-probabilities.

    At temperature 0 the likeliest tokens, with their log-probabilities at temperature 1.
    """
    token_B, logprob_B = torch.empty(logits_BV.shape[0], dtype=torch.long), logits_BV.new_empty(logits_BV.shape[0])
    run(loops.draw, logits_BV.contiguous(), uniform_B, 1 / (temperature or 1.0), temperature == 0, token_B, logprob_B)
    return token_B, logprob_B
