"""One decoding step by compiled loops: attention over the KV cache, and sampling."""

import numpy as np
import torch
from torch import Tensor

from neuromas.model.kernels import loops
from neuromas.model.kernels.launch import run


class CacheAttention:
    """Attention of one token per row over the cache and the row's prefix, as long as no row starts or finishes.

    The rows fill the first slots of the cache. Layers must have these numbers of query and key heads and this head size.
    `index_in_prefix_B` numbers the rows of a prefix, which are at most `rows_per_prefix`. Matrix products are torch's.
    """

    def __init__(
        self, slot_B: Tensor, prefix_B: Tensor, index_in_prefix_B: Tensor, rows_per_prefix: int, length_Q: Tensor, queries: int,
        heads: int, size: int,
    ) -> None:  # fmt: skip
        rows, count, shared = slot_B.shape[0], length_Q.shape[0], queries // heads
        self._indices = [tensor.numpy() for tensor in (slot_B, prefix_B, index_in_prefix_B)]
        self._length_Q = length_Q.numpy()
        # Two pairs of views: scaled queries by slot and by prefix, which the attention outputs overwrite.
        self._own_queries = torch.empty(rows * heads, shared, size, dtype=torch.float32)
        self._prefix_queries = torch.empty(count * heads, rows_per_prefix * shared, size, dtype=torch.float32)
        self._own_array = self._own_queries.view(rows, heads, shared, size).numpy()
        self._prefix_array = self._prefix_queries.view(count, heads, rows_per_prefix, shared, size).numpy()
        self._inverse_BH = np.empty((rows, queries), np.float32)

    def attend(
        self, query_BHD: Tensor, keys_BJD: Tensor, values_BJD: Tensor, column_B: Tensor, longest: int,
        cache: tuple[Tensor, Tensor], prefixes: tuple[Tensor, Tensor], *, window: int | None, scale: float,
    ) -> Tensor:  # fmt: skip
        """Write each row's new key and value into the cache, (S, J, L, D), and return its attention over slot and prefix.

        `longest` is the number of columns in use. `prefixes` are contiguous, (Q, J, L, D).
        """
        slot_B, prefix_B, index_in_prefix_B = self._indices
        new = [tensor.contiguous() for tensor in (query_BHD, keys_BJD, values_BJD)]
        run(
            loops.lay_out, *new, slot_B, column_B, prefix_B, index_in_prefix_B, scale, *cache, self._own_array,
            self._prefix_array,
        )  # fmt: skip
        keys, values = (part.flatten(0, 1)[: len(self._own_queries), :longest] for part in cache)
        prefix_keys, prefix_values = (part.view(-1, *part.shape[2:]) for part in prefixes)
        own_scores, prefix_scores = torch.bmm(self._own_queries, keys.mT), torch.bmm(self._prefix_queries, prefix_keys.mT)
        own_array = own_scores.numpy().reshape(*self._own_array.shape[:3], -1)
        prefix_array = prefix_scores.numpy().reshape(*self._prefix_array.shape[:4], -1)
        window = 2**62 if window is None else window
        run(
            loops.weigh, slot_B, column_B, prefix_B, index_in_prefix_B, self._length_Q, window, own_array, prefix_array,
            self._inverse_BH,
        )  # fmt: skip
        torch.bmm(own_scores, values, out=self._own_queries)
        torch.bmm(prefix_scores, prefix_values, out=self._prefix_queries)
        out_BHD = torch.empty_like(new[0])
        run(loops.join, slot_B, prefix_B, index_in_prefix_B, self._own_array, self._prefix_array, self._inverse_BH, out_BHD)
        return out_BHD


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the tokens at which the distribution function passes a uniform draw, and their log-probabilities.

    At temperature 0 they are the likeliest tokens, with their log-probabilities at temperature 1.
    """
    tokens_B, logprobs_B = torch.empty(logits_BV.shape[0], dtype=torch.long), logits_BV.new_empty(logits_BV.shape[0])
    run(loops.sample, logits_BV.contiguous(), uniform_B, 1 / (temperature or 1.0), temperature == 0, tokens_B, logprobs_B)
    return tokens_B, logprobs_B
