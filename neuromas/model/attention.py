"""Who reads whom: rows that read themselves, and rows that go on from a prefix that others go on from too.

A shared prefix is not copied to its rows: their queries stand behind each other as the queries of one row and read it once.
What a token reads of its prefix and what it reads of its own row are merged by their sums of exponentials, which gives
attention over both (the online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). So a row costs its own tokens. On a GPU
this holds for sampling one token after the other; there, prefills and the learner give every row a copy of its prefix.

Shapes beyond the legend: H heads, K heads of keys, D size of a head, L columns of keys, S columns of queries, W columns of
prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from neuromas.model.packing import Packed, among_all

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ROWS_AT_ONCE = 16
"""Rows of like length whose own tokens are read in one call: few enough to waste little on the longest."""


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores: 0 where seen, else far below every score.

    Finite, so that a token that sees nothing of one part reads numbers there, which merging then gives no weight.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min / 4)


def read(
    query_BHSD: Tensor, keys_BKLD: Tensor, values_BKLD: Tensor, mask: Tensor | None, *, causal: bool = False, scale: float
) -> tuple[Tensor, Tensor]:
    """Return what queries read, (B, H, S, D), and the logarithm of their sums of exponentials, (B, H, S), in float32 or wider.

    Without gradients of its own.
    """
    if _has_kernel(query_BHSD, values_BKLD):
        return _FLASH(query_BHSD, keys_BKLD, values_BKLD, 0.0, causal, attn_mask=mask, scale=scale)
    assert not causal, "rows that read themselves are read by the kernel or by torch"
    return read_plainly(query_BHSD, keys_BKLD, values_BKLD, mask, scale=scale)


def _has_kernel(query: Tensor, values: Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[-1] == values.shape[-1]


def read_plainly(
    query_BHSD: Tensor, keys_BHLD: Tensor, values_BHLD: Tensor, mask: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Do what `read` does on any device, with all scores at once and a head of keys for each head of queries."""
    scores_BHSL = query_BHSD.float() @ keys_BHLD.float().mT * scale
    if mask is not None:
        scores_BHSL += mask
    return scores_BHSL.softmax(-1).to(values_BHLD.dtype) @ values_BHLD, scores_BHSL.logsumexp(-1)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Return what is read of two parts together, given what is read of each and its sum as `read` returns them."""
    share = (first[1] - second[1]).sigmoid_().unsqueeze(-1)
    return torch.lerp(second[0].to(share.dtype), first[0].to(share.dtype), share).to(first[0].dtype)


def columns_of(group_T: Tensor, count: int) -> tuple[Tensor, int]:
    """Return each one's place among those of its group, in order, and the size of the largest of `count` groups."""
    sizes = torch.bincount(group_T, minlength=count)
    order_T = group_T.argsort(stable=True)
    column_T = torch.empty_like(group_T)
    column_T[order_T] = torch.arange(len(group_T), device=group_T.device) - (sizes.cumsum(0) - sizes)[group_T[order_T]]
    return column_T, int(sizes.max())


def cutting(window: int | None, longest: int) -> int | None:
    """Return a layer's window where it hides anything of rows that are at most so long."""
    return None if window is None or window >= longest else window


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Keys and values of Q prefixes, (Q, K, W, D) by layer, padded on the right."""

    past: list[tuple[Tensor, Tensor]]
    lengths_Q: Tensor

    @property
    def width(self) -> int:
        return self.past[0][0].shape[2]

    def select(self, places: Tensor) -> "Prefixes":
        """Return those at the given places, which are distinct and in order."""
        if len(places) == len(self.lengths_Q):
            return self
        lengths_Q = self.lengths_Q[places]
        width = int(lengths_Q.max())
        picked = [tuple(tensor[:, :, :width].index_select(0, places) for tensor in layer) for layer in self.past]
        return Prefixes([(keys, values) for keys, values in picked], lengths_Q)

    def contiguous(self) -> "Prefixes":
        """Return them as they are read fastest, in order of prefix, head and column."""
        return Prefixes([(keys.contiguous(), values.contiguous()) for keys, values in self.past], self.lengths_Q)

    def join(self, other: "Prefixes") -> "Prefixes":
        width = max(self.width, other.width)

        def both(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat([pad(tensor, (0, 0, 0, width - tensor.shape[2])) for tensor in (ours, theirs)])

        past = [(both(k, other_k), both(v, other_v)) for (k, v), (other_k, other_v) in zip(self.past, other.past, strict=True)]
        return Prefixes(past, torch.cat([self.lengths_Q, other.lengths_Q]))


class PrefixAttention:
    """Rows that read themselves only; what they leave behind is `prefixes`, for those that go on from them."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.prefixes = Prefixes([], packed.lengths_B)
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(
        self, layer: int, query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if keep_K is not None:
            query_THD = among_all(query_THD, keep_K, len(keys_THD))
        keys, values = self.leave(keys_THD, values_THD)
        query = self.packed.pad(query_THD).transpose(1, 2)
        window = cutting(window, self.packed.width)
        if window not in self._masks:
            self._masks[window] = None if window is None else _band(self.packed.width, window, query)
        read_THD = self.packed.unpad(_sdpa(query, keys, values, self._masks[window], scale).transpose(1, 2))
        return read_THD if keep_K is None else read_THD[keep_K]

    def leave(self, keys_THD: Tensor, values_THD: Tensor) -> tuple[Tensor, Tensor]:
        """Leave a layer's keys and values behind, and return them as rows."""
        keys, values = (self.packed.pad(tensor).transpose(1, 2) for tensor in (keys_THD, values_THD))
        self.prefixes.past.append((keys, values))
        return keys, values


def _band(width: int, window: int, like: Tensor) -> Tensor:
    """Return the mask of rows that see themselves as far back as a window."""
    columns = torch.arange(width, device=like.device)
    distance = columns[:, None] - columns
    return additive((distance >= 0) & (distance < window), like.dtype)[None, None]


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return what is read with gradients by torch; without a mask, causally. Heads of queries may share a head of keys."""
    shared = query.shape[1] // keys.shape[1]
    if query.is_cuda and shared > 1 and mask is not None:
        # On a GPU, heads that share keys fall back to a kernel that keeps every score, where there is a mask.
        keys, values = (tensor.repeat_interleave(shared, 1) for tensor in (keys, values))
        shared = 1
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared > 1
    )


class SuffixAttention:
    """Rows that go on from prefixes computed before, each from one of them; gradients flow into the prefixes."""

    def __init__(self, packed: Packed, prefixes: Prefixes, prefix_of_row_B: Int[Tensor, " B"]) -> None:
        self.packed, self.prefixes, self.of_row_B = packed, prefixes, prefix_of_row_B
        self._lengths_B = prefixes.lengths_Q[prefix_of_row_B]
        self.positions_T = self._lengths_B[packed.row_T] + packed.column_T
        self.windows: set[int | None] = set()
        """Those of the layers that have attended."""
        self._longest = int(self.positions_T.max()) + 1
        self._parts: dict[tuple[int | None, bool], _Parts] = {}
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        past = self.prefixes.past[layer]
        self.windows.add(window)
        window = cutting(window, self._longest)
        if not _has_kernel(query_THD, values_THD):
            if keep_K is None:
                return self._on_one_grid(past, query_THD, keys_THD, values_THD, scale, window)
            query_THD = among_all(query_THD, keep_K, len(keys_THD))
            return self._on_one_grid(past, query_THD, keys_THD, values_THD, scale, window)[keep_K]
        # Whoever keeps some tokens keeps the same ones in every layer.
        case = window, keep_K is not None
        if case not in self._parts:
            self._parts[case] = _Parts.of(self.packed, self.prefixes, self.of_row_B, window, keep_K, query_THD.dtype)
        out = _ReadBoth.apply(query_THD, keys_THD, values_THD, *past, self._parts[case], scale)
        assert isinstance(out, Tensor)
        return out

    def _on_one_grid(
        self, past: tuple[Tensor, Tensor], query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, scale: float,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        """Give every row a copy of its prefix: the plain way, with torch's own gradients."""
        keys, values = (
            torch.cat([prefix[self.of_row_B], self.packed.pad(new).transpose(1, 2)], dim=2)
            for prefix, new in zip(past, (keys_THD, values_THD), strict=True)
        )
        if window not in self._masks:
            self._masks[window] = self._mask(window, keys.dtype)
        query = self.packed.pad(query_THD).transpose(1, 2)
        return self.packed.unpad(_sdpa(query, keys, values, self._masks[window], scale).transpose(1, 2))

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        device = self._lengths_B.device
        prefix_L, own_S = torch.arange(self.prefixes.width, device=device), torch.arange(self.packed.width, device=device)
        seen = torch.cat([
            (prefix_L < self._lengths_B[:, None])[:, None].expand(-1, len(own_S), -1),
            (own_S <= own_S[:, None]).expand(len(self._lengths_B), -1, -1),
        ], dim=2)  # fmt: skip
        if window is not None:
            keys = torch.cat([prefix_L.expand(len(seen), -1), self._lengths_B[:, None] + own_S], dim=1)
            queries = self._lengths_B[:, None] + own_S
            seen = seen & (queries[:, :, None] - keys[:, None] < window)
        return additive(seen, dtype)[:, None]


class _Grid:
    """Some tokens of a stream laid out as rows. Padding holds other tokens; what they read is left out when it is undone."""

    def __init__(self, tokens: Tensor, places: Tensor, rows: int, width: int) -> None:
        self.tokens, self.places = tokens, places
        """Where in the stream the tokens are, and where in rows x width each of them goes."""
        self._rows_and_width = rows, width
        self._sources = places.new_zeros(rows * width).index_copy_(0, places, tokens)

    def pad(self, stream: Tensor) -> Tensor:
        """(T, H, ...) to (rows, H, width, ...)."""
        return stream.index_select(0, self._sources).unflatten(0, self._rows_and_width).transpose(1, 2)

    def pad_total(self, total_TH: Tensor) -> Tensor:
        """Lay out sums of exponentials, padded with one so large that a gradient takes nothing from what is padded."""
        rows, width = self._rows_and_width
        chosen = total_TH.index_select(0, self.tokens)
        grid = chosen.new_full((rows * width, *chosen.shape[1:]), 1e30).index_copy_(0, self.places, chosen)
        return grid.unflatten(0, self._rows_and_width).transpose(1, 2)

    def unpad(self, grid: Tensor) -> Tensor:
        """(rows, H, width, ...) to the grid's own tokens."""
        return grid.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True, slots=True)
class _Bunch:
    """Rows of like length, whose tokens read their own row."""

    asking: _Grid
    asked: _Grid
    mask: Tensor | None
    """Without one, a row is read causally by as many as it has tokens."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The two parts that the tokens of a stream read."""

    prefix: _Grid
    """Tokens as rows of those that read one prefix."""
    prefix_mask: Tensor
    own: list[_Bunch]

    @classmethod
    def of(
        cls, packed: Packed, prefixes: Prefixes, of_row_B: Tensor, window: int | None, keep_K: Tensor | None, dtype: torch.dtype
    ) -> "_Parts":
        row_T, place_T = (packed.row_T, packed.column_T) if keep_K is None else (packed.row_T[keep_K], packed.column_T[keep_K])
        of_T, count = of_row_B[row_T], len(prefixes.lengths_Q)
        column_T, width = columns_of(of_T, count)
        prefix = _Grid(torch.arange(len(of_T), device=of_T.device), of_T * width + column_T, count, width)
        columns_L = torch.arange(prefixes.width, device=of_T.device)
        seen_QSL = (columns_L < prefixes.lengths_Q[:, None])[:, None]
        if window is not None:
            positions_QS = prefix.pad((prefixes.lengths_Q[of_T] + place_T)[:, None])[:, 0]
            seen_QSL = seen_QSL & (positions_QS[:, :, None] - columns_L < window)
        mask = additive(seen_QSL, dtype)[:, None]
        bunches = cls._bunches(packed, row_T, place_T, window, whole=keep_K is None, dtype=dtype)
        return cls(prefix, mask, bunches)

    @staticmethod
    def _bunches(
        packed: Packed, row_T: Tensor, place_T: Tensor, window: int | None, *, whole: bool, dtype: torch.dtype
    ) -> list[_Bunch]:
        bunches: list[_Bunch] = []
        for rows in packed.lengths_B.argsort(stable=True).split(ROWS_AT_ONCE):
            row_in_bunch_B = torch.full_like(packed.lengths_B, -1)
            row_in_bunch_B[rows] = torch.arange(len(rows), device=rows.device)
            width = int(packed.lengths_B[rows[-1]])
            asked = _rows(row_in_bunch_B[packed.row_T], packed.column_T, len(rows), width)
            if whole:
                mask = None if window is None else _band(width, window, torch.empty(0, dtype=dtype, device=rows.device))
                bunches.append(_Bunch(asked, asked, mask))
                continue
            in_bunch_T = row_in_bunch_B[row_T]
            chosen = (in_bunch_T >= 0).nonzero()[:, 0]
            assert len(chosen), "of every row some token is kept"
            column_S, most = columns_of(in_bunch_T[chosen], len(rows))
            asking = _Grid(chosen, in_bunch_T[chosen] * most + column_S, len(rows), most)
            distance = asking.pad(place_T[:, None])[:, 0, :, None] - torch.arange(width, device=rows.device)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            bunches.append(_Bunch(asking, asked, additive(seen, dtype)[:, None]))
        return bunches


def _rows(row_T: Tensor, column_T: Tensor, rows: int, width: int) -> _Grid:
    """Return the grid of those tokens that are of a row; others have -1."""
    tokens = (row_T >= 0).nonzero()[:, 0]
    return _Grid(tokens, row_T[tokens] * width + column_T[tokens], rows, width)


class _ReadBoth(torch.autograd.Function):
    """Attention of a stream's tokens over their prefixes and their own rows, on a CPU.

    Written out: torch has no gradient of `read` that takes what both parts give together, which is all that each part needs.
    """

    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, keys_TKD: Tensor, values_TKD: Tensor, prefix_keys: Tensor, prefix_values: Tensor,
        parts: _Parts, scale: float,
    ) -> Tensor:  # fmt: skip
        asked = parts.prefix.pad(query_THD)
        out, total = read(asked, prefix_keys, prefix_values, parts.prefix_mask, scale=scale)
        of_prefix = parts.prefix.unpad(out), parts.prefix.unpad(total)
        of_own = torch.empty_like(of_prefix[0]), torch.empty_like(of_prefix[1])
        grids: list[Tensor] = []
        for bunch in parts.own:
            q, k, v = bunch.asking.pad(query_THD), bunch.asked.pad(keys_TKD), bunch.asked.pad(values_TKD)
            found = read(q, k, v, bunch.mask, causal=bunch.mask is None, scale=scale)
            for whole, part in zip(of_own, found, strict=True):
                whole.index_copy_(0, bunch.asking.tokens, bunch.asking.unpad(part))
            grids += (q, k, v)
        out_THD = merge(of_prefix, of_own)
        total_TH = torch.logaddexp(of_prefix[1], of_own[1])
        ctx.save_for_backward(out_THD, total_TH, prefix_keys, prefix_values, asked, *grids)
        ctx.parts, ctx.scale, ctx.shape = parts, scale, keys_TKD.shape
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out_THD, total_TH, prefix_keys, prefix_values, asked, *grids = ctx.saved_tensors
        parts: _Parts = ctx.parts

        def part(grid: _Grid, qkv: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            d_out, out, total = grid.pad(grads[0]), grid.pad(out_THD), grid.pad_total(total_TH)
            return _FLASH_BACKWARD(d_out, *qkv, out, total, 0.0, mask is None, attn_mask=mask, scale=ctx.scale)

        d_asked, d_prefix_keys, d_prefix_values = part(parts.prefix, (asked, prefix_keys, prefix_values), parts.prefix_mask)
        d_query_THD = parts.prefix.unpad(d_asked)
        d_keys_TKD, d_values_TKD = (grads[0].new_empty(ctx.shape) for _ in range(2))
        for at, bunch in enumerate(parts.own):
            d_q, d_k, d_v = part(bunch.asking, grids[3 * at : 3 * at + 3], bunch.mask)
            d_query_THD.index_add_(0, bunch.asking.tokens, bunch.asking.unpad(d_q))
            d_keys_TKD.index_copy_(0, bunch.asked.tokens, bunch.asked.unpad(d_k))
            d_values_TKD.index_copy_(0, bunch.asked.tokens, bunch.asked.unpad(d_v))
        return d_query_THD, d_keys_TKD, d_values_TKD, d_prefix_keys, d_prefix_values, None, None
