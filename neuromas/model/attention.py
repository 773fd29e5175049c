"""Attention of prefixes over themselves, and of suffixes over a shared prefix and themselves.

A shared prefix is not copied to its rows: their queries are concatenated as the queries of one row, so that the prefix's keys
and values are loaded once. A token's attention over its prefix and its attention over its own row are merged by their sums of
exponentials, which gives attention over both (the online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). So a row
costs its own tokens only. In prefills and the learner of other devices than a CPU, `flex.py` computes this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from neuromas.model.ops import wide_product
from neuromas.model.packing import Packed, scatter_queries

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ROWS_AT_ONCE = 16
"""Rows of similar length in a bucket, whose attention over themselves is one call: few, so that little of it is padding."""


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores: 0 where a key is seen, else far below every score.

    It is finite, so that a token that sees nothing of one part gets numbers there, which have no weight after merging.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min / 4)


def partial_attention(
    query: Tensor, keys_BJLD: Tensor, values_BJLD: Tensor, mask: Tensor | None, *, causal: bool = False, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention outputs, (B, H, queries, D), and the logarithm of the sums of exponentials, (B, H, queries).

    `query` is (B, H, queries, D). The sums are in float32 or wider. There is no gradient.
    """
    if _has_kernel(query, values_BJLD):
        return _FLASH(query, keys_BJLD, values_BJLD, 0.0, causal, attn_mask=mask, scale=scale)
    assert not causal, "causal attention is computed by the kernel or by `_sdpa`"
    return plain_attention(query, keys_BJLD, values_BJLD, mask, scale=scale)


def _has_kernel(query: Tensor, values: Tensor) -> bool:
    """Say whether torch's flash attention for CPUs computes these heads."""
    return query.device.type == "cpu" and query.shape[-1] == values.shape[-1]


def plain_attention(
    query: Tensor, keys_BHLD: Tensor, values_BHLD: Tensor, mask: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return what `partial_attention` does, on any device: with all scores at once and a key head for each query head."""
    scores = wide_product(query.flatten(0, 1), keys_BHLD.flatten(0, 1).mT).unflatten(0, query.shape[:2]) * scale
    if mask is not None:
        scores += mask
    return scores.softmax(-1).to(values_BHLD.dtype) @ values_BHLD, scores.logsumexp(-1)


def merge_parts(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Return the attention over two parts together, given what `partial_attention` returns for each."""
    share = (first[1] - second[1]).sigmoid_().unsqueeze(-1)
    return torch.lerp(second[0].to(share.dtype), first[0].to(share.dtype), share).to(first[0].dtype)


def columns_in_groups(group_T: Tensor, count: int) -> tuple[Tensor, int]:
    """Return each token's column among the tokens of its group, in order, and the size of the largest of `count` groups."""
    sizes = torch.bincount(group_T, minlength=count)
    order_T = group_T.argsort(stable=True)
    column_T = torch.empty_like(group_T)
    column_T[order_T] = torch.arange(len(group_T), device=group_T.device) - (sizes.cumsum(0) - sizes)[group_T[order_T]]
    return column_T, int(sizes.max())


def effective_window(window: int | None, longest: int) -> int | None:
    """Return a layer's window, or None where it hides nothing because rows are at most `longest` tokens long."""
    return None if window is None or window >= longest else window


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Holds the keys and values of Q prefixes, padded on the right."""

    past: list[tuple[Tensor, Tensor]]
    """Keys and values by layer, (Q, J, L, D)."""
    lengths_Q: Tensor

    @property
    def width(self) -> int:
        """Return the number of columns, the length of the longest prefix."""
        return self.past[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.past)

    def select(self, indices: Tensor) -> "Prefixes":
        """Return the prefixes at the given indices, which are distinct and in order."""
        if len(indices) == len(self.lengths_Q):
            return self
        lengths_Q = self.lengths_Q[indices]
        width = int(lengths_Q.max())
        picked = [tuple(tensor[:, :, :width].index_select(0, indices) for tensor in layer) for layer in self.past]
        return Prefixes([(keys, values) for keys, values in picked], lengths_Q)

    def contiguous(self) -> "Prefixes":
        """Return the same prefixes, laid out contiguously by prefix, head and column, which is the fastest to load."""
        return Prefixes([(keys.contiguous(), values.contiguous()) for keys, values in self.past], self.lengths_Q)

    def join(self, other: "Prefixes") -> "Prefixes":
        """Return these prefixes and then the others."""
        width = max(self.width, other.width)

        def both(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat([pad(tensor, (0, 0, 0, width - tensor.shape[2])) for tensor in (ours, theirs)])

        past = [(both(k, other_k), both(v, other_v)) for (k, v), (other_k, other_v) in zip(self.past, other.past, strict=True)]
        return Prefixes(past, torch.cat([self.lengths_Q, other.lengths_Q]))


class PrefixAttention:
    """Attention of prefixes over themselves; it stores their keys and values in `prefixes`, for the rows that continue them."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.prefixes = Prefixes([], packed.lengths_B)
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(
        self, layer: int, query_KHD: Tensor, keys_TJD: Tensor, values_TJD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        query_THD = query_KHD if keep_K is None else scatter_queries(query_KHD, keep_K, len(keys_TJD))
        keys, values = self.store(layer, keys_TJD, values_TJD)
        query = self.packed.pad(query_THD).transpose(1, 2)
        window = effective_window(window, self.packed.width)
        if window not in self._masks:
            self._masks[window] = None if window is None else _window_mask(self.packed.width, window, query)
        out_THD = self.packed.unpad(_sdpa(query, keys, values, self._masks[window], scale).transpose(1, 2))
        return out_THD if keep_K is None else out_THD[keep_K]

    def store(self, layer: int, keys_TJD: Tensor, values_TJD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values in `prefixes`, and return them as a padded batch.

        A layer that is computed again for its gradient has stored them before.
        """
        keys, values = (self.packed.pad(tensor).transpose(1, 2) for tensor in (keys_TJD, values_TJD))
        if layer == len(self.prefixes.past):
            self.prefixes.past.append((keys, values))
        return keys, values


def _window_mask(width: int, window: int, like: Tensor) -> Tensor:
    """Return the causal mask of rows that attend to themselves within a window."""
    columns = torch.arange(width, device=like.device)
    distance = columns[:, None] - columns
    return additive_mask((distance >= 0) & (distance < window), like.dtype)[None, None]


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return torch's scaled dot product attention, which has gradients; without a mask it is causal."""
    shared = query.shape[1] // keys.shape[1]
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared > 1
    )


class SuffixAttention:
    """Attention of rows over themselves and one computed prefix each; gradients flow into the prefixes."""

    def __init__(self, packed: Packed, prefixes: Prefixes, prefix_of_row_B: Int[Tensor, " B"]) -> None:
        self.packed, self.prefixes, self.prefix_of_row_B = packed, prefixes, prefix_of_row_B
        self._lengths_B = prefixes.lengths_Q[prefix_of_row_B]
        self.positions_T = self._lengths_B[packed.row_T] + packed.column_T
        self.windows: set[int | None] = set()
        """The windows of the layers that have attended."""
        self._longest = int(self.positions_T.max()) + 1
        self._parts: dict[tuple[int | None, bool], _Parts] = {}
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, query_KHD: Tensor, keys_TJD: Tensor, values_TJD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        past = self.prefixes.past[layer]
        self.windows.add(window)
        window = effective_window(window, self._longest)
        if not _has_kernel(query_KHD, values_TJD):
            query_THD = query_KHD if keep_K is None else scatter_queries(query_KHD, keep_K, len(keys_TJD))
            out_THD = self._with_copied_prefixes(past, query_THD, keys_TJD, values_TJD, scale, window)
            return out_THD if keep_K is None else out_THD[keep_K]
        # A forward keeps the same tokens in every layer that is given `keep_K`.
        case = window, keep_K is not None
        if case not in self._parts:
            self._parts[case] = _Parts.of(self.packed, self.prefixes, self.prefix_of_row_B, window, keep_K, query_KHD.dtype)
        out = _TwoPartAttention.apply(query_KHD, keys_TJD, values_TJD, *past, self._parts[case], scale)
        assert isinstance(out, Tensor)
        return out

    def _with_copied_prefixes(
        self, past: tuple[Tensor, Tensor], query_THD: Tensor, keys_TJD: Tensor, values_TJD: Tensor, scale: float,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        """Return attention over a copy of the prefix in every row, with torch's own gradients."""
        keys, values = (
            torch.cat([prefix[self.prefix_of_row_B], self.packed.pad(new).transpose(1, 2)], dim=2)
            for prefix, new in zip(past, (keys_TJD, values_TJD), strict=True)
        )
        if window not in self._masks:
            self._masks[window] = self._mask(window, keys.dtype)
        query = self.packed.pad(query_THD).transpose(1, 2)
        return self.packed.unpad(_sdpa(query, keys, values, self._masks[window], scale).transpose(1, 2))

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the mask of rows that each have a copy of their prefix."""
        device = self._lengths_B.device
        prefix_columns, own_columns = (torch.arange(part.width, device=device) for part in (self.prefixes, self.packed))
        seen = torch.cat([
            (prefix_columns < self._lengths_B[:, None])[:, None].expand(-1, len(own_columns), -1),
            (own_columns <= own_columns[:, None]).expand(len(self._lengths_B), -1, -1),
        ], dim=2)  # fmt: skip
        if window is not None:
            keys = torch.cat([prefix_columns.expand(len(seen), -1), self._lengths_B[:, None] + own_columns], dim=1)
            queries = self._lengths_B[:, None] + own_columns
            seen = seen & (queries[:, :, None] - keys[:, None] < window)
        return additive_mask(seen, dtype)[:, None]


class _PaddedBatch:
    """Lays some tokens of a stream out as a padded batch. Padding holds other tokens, whose results `unpad` leaves out."""

    def __init__(self, tokens: Tensor, indices: Tensor, rows: int, width: int) -> None:
        self.tokens, self.indices = tokens, indices
        """Indices of the tokens in the stream, and index in rows x width that each of them goes to."""
        self._rows_and_width = rows, width
        self._sources = indices.new_zeros(rows * width).index_copy_(0, indices, tokens)

    def pad(self, stream: Tensor) -> Tensor:
        """Return a stream (T, H, ...) as a padded batch (rows, H, width, ...)."""
        return stream.index_select(0, self._sources).unflatten(0, self._rows_and_width).transpose(1, 2)

    def pad_logsumexp(self, logsumexp_KH: Tensor) -> Tensor:
        """Return logarithms of sums of exponentials as a padded batch, with padding so large that its gradients vanish."""
        rows, width = self._rows_and_width
        chosen = logsumexp_KH.index_select(0, self.tokens)
        padded = chosen.new_full((rows * width, *chosen.shape[1:]), 1e30).index_copy_(0, self.indices, chosen)
        return padded.unflatten(0, self._rows_and_width).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """Return a padded batch (rows, H, width, ...) as a stream of the tokens that were laid out."""
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.indices)


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Rows of similar length, whose tokens attend to their own row."""

    query: _PaddedBatch
    key: _PaddedBatch
    mask: Tensor | None
    """None means causal attention, with a query for every key."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """Says how the tokens of a stream are laid out for each of their two parts: the prefix and the own row."""

    prefix: _PaddedBatch
    """Layout of the queries, with those of one prefix as a row."""
    prefix_mask: Tensor
    buckets: list[_Bucket]

    @classmethod
    def of(
        cls, packed: Packed, prefixes: Prefixes, prefix_of_row_B: Tensor, window: int | None, keep_K: Tensor | None,
        dtype: torch.dtype,
    ) -> "_Parts":  # fmt: skip
        """Return the layout for all tokens, or for those at `keep_K`."""
        row_K, column_K = (packed.row_T, packed.column_T) if keep_K is None else (packed.row_T[keep_K], packed.column_T[keep_K])
        prefix_K, count = prefix_of_row_B[row_K], len(prefixes.lengths_Q)
        query_column_K, width = columns_in_groups(prefix_K, count)
        prefix = _PaddedBatch(
            torch.arange(len(prefix_K), device=prefix_K.device), prefix_K * width + query_column_K, count, width
        )
        columns_L = torch.arange(prefixes.width, device=prefix_K.device)
        seen = (columns_L < prefixes.lengths_Q[:, None])[:, None]
        if window is not None:
            positions = prefix.pad((prefixes.lengths_Q[prefix_K] + column_K)[:, None])[:, 0]
            seen = seen & (positions[:, :, None] - columns_L < window)
        mask = additive_mask(seen, dtype)[:, None]
        buckets = cls._buckets(packed, row_K, column_K, window, keep_all=keep_K is None, dtype=dtype)
        return cls(prefix, mask, buckets)

    @staticmethod
    def _buckets(
        packed: Packed, row_K: Tensor, column_K: Tensor, window: int | None, *, keep_all: bool, dtype: torch.dtype
    ) -> list[_Bucket]:
        """Return all rows in buckets of similar length."""
        buckets: list[_Bucket] = []
        for rows in packed.lengths_B.argsort(stable=True).split(ROWS_AT_ONCE):
            row_in_bucket_B = torch.full_like(packed.lengths_B, -1)
            row_in_bucket_B[rows] = torch.arange(len(rows), device=rows.device)
            width = int(packed.lengths_B[rows[-1]])
            key = _padded_rows(row_in_bucket_B[packed.row_T], packed.column_T, len(rows), width)
            if keep_all:
                mask = None if window is None else _window_mask(width, window, torch.empty(0, dtype=dtype, device=rows.device))
                buckets.append(_Bucket(key, key, mask))
                continue
            bucket_row_K = row_in_bucket_B[row_K]
            kept = (bucket_row_K >= 0).nonzero()[:, 0]
            assert len(kept), "every row has a kept token"
            query_column, query_width = columns_in_groups(bucket_row_K[kept], len(rows))
            query = _PaddedBatch(kept, bucket_row_K[kept] * query_width + query_column, len(rows), query_width)
            distance = query.pad(column_K[:, None])[:, 0, :, None] - torch.arange(width, device=rows.device)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            buckets.append(_Bucket(query, key, additive_mask(seen, dtype)[:, None]))
        return buckets


def _padded_rows(row_T: Tensor, column_T: Tensor, rows: int, width: int) -> _PaddedBatch:
    """Return the layout of the tokens that belong to a row; the others have -1 for their row."""
    tokens = (row_T >= 0).nonzero()[:, 0]
    return _PaddedBatch(tokens, row_T[tokens] * width + column_T[tokens], rows, width)


class _TwoPartAttention(torch.autograd.Function):
    """Attention of a stream's tokens over their prefixes and their own rows, on a CPU.

    It has its own backward: torch's backward for one part takes that part's output and sum, while the gradient needs the output
    and sum of both parts together.
    """

    @staticmethod
    def forward(
        ctx: Any, query_KHD: Tensor, keys_TJD: Tensor, values_TJD: Tensor, prefix_keys: Tensor, prefix_values: Tensor,
        parts: _Parts, scale: float,
    ) -> Tensor:  # fmt: skip
        prefix_query = parts.prefix.pad(query_KHD)
        out, logsumexp = partial_attention(prefix_query, prefix_keys, prefix_values, parts.prefix_mask, scale=scale)
        of_prefix = parts.prefix.unpad(out), parts.prefix.unpad(logsumexp)
        of_own = torch.empty_like(of_prefix[0]), torch.empty_like(of_prefix[1])
        padded: list[Tensor] = []
        for bucket in parts.buckets:
            q, k, v = bucket.query.pad(query_KHD), bucket.key.pad(keys_TJD), bucket.key.pad(values_TJD)
            found = partial_attention(q, k, v, bucket.mask, causal=bucket.mask is None, scale=scale)
            for target, part in zip(of_own, found, strict=True):
                target.index_copy_(0, bucket.query.tokens, bucket.query.unpad(part))
            padded += (q, k, v)
        out_KHD = merge_parts(of_prefix, of_own)
        logsumexp_KH = torch.logaddexp(of_prefix[1], of_own[1])
        ctx.save_for_backward(out_KHD, logsumexp_KH, prefix_keys, prefix_values, prefix_query, *padded)
        ctx.parts, ctx.scale, ctx.shape = parts, scale, keys_TJD.shape
        return out_KHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out_KHD, logsumexp_KH, prefix_keys, prefix_values, prefix_query, *padded = ctx.saved_tensors
        parts: _Parts = ctx.parts

        def part(batch: _PaddedBatch, qkv: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            d_out, out, logsumexp = batch.pad(grads[0]), batch.pad(out_KHD), batch.pad_logsumexp(logsumexp_KH)
            return _FLASH_BACKWARD(d_out, *qkv, out, logsumexp, 0.0, mask is None, attn_mask=mask, scale=ctx.scale)

        prefix_qkv = prefix_query, prefix_keys, prefix_values
        d_prefix_query, d_prefix_keys, d_prefix_values = part(parts.prefix, prefix_qkv, parts.prefix_mask)
        d_query_KHD = parts.prefix.unpad(d_prefix_query)
        d_keys_TJD, d_values_TJD = (grads[0].new_empty(ctx.shape) for _ in range(2))
        for index, bucket in enumerate(parts.buckets):
            d_q, d_k, d_v = part(bucket.query, padded[3 * index : 3 * index + 3], bucket.mask)
            d_query_KHD.index_add_(0, bucket.query.tokens, bucket.query.unpad(d_q))
            d_keys_TJD.index_copy_(0, bucket.key.tokens, bucket.key.unpad(d_k))
            d_values_TJD.index_copy_(0, bucket.key.tokens, bucket.key.unpad(d_v))
        return d_query_KHD, d_keys_TJD, d_values_TJD, d_prefix_keys, d_prefix_values, None, None
