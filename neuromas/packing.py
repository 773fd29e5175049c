"""Rows of tokens without padding: one behind the other in one stream, so that only attention has to know where a row ends.

Projections, norms, MLPs and adapters treat tokens one by one, so they run on the stream. Attention pads rows to a grid, and
transformers' models are made to call `attend` of what `Backbone.forward` is given instead of an attention of their own.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "neuromas"
"""The name under which transformers finds this attention."""


@runtime_checkable
class Attention(Protocol):
    """Says who attends to whom in a stream of T tokens."""

    def attend(
        self,
        layer: int,
        query_THD: Float[Tensor, "T H D"],
        keys_THD: Float[Tensor, "T K D"],
        values_THD: Float[Tensor, "T K D"],
        *,
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "T H D"]:
        """Return what each token reads. With a `window`, a token sees that many, itself among them."""
        ...


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float,
    sliding_window: int | None = None, packed: Attention | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if unknown := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise ValueError(f"its attention ({', '.join(unknown)}) is not supported")
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    layer = module.layer_idx
    assert isinstance(layer, int)
    streams = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return packed.attend(layer, *streams, scale=scaling, window=sliding_window)[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _Pad(torch.autograd.Function):
    """Stream to grid. Written out because the gradient of an indexed read adds where here every place is read once."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, places: Tensor, rows: int, width: int) -> Tensor:
        ctx.save_for_backward(places)
        grid = stream.new_zeros(rows * width, *stream.shape[1:])
        return grid.index_copy_(0, places, stream).unflatten(0, (rows, width))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return grads[0].flatten(0, 1).index_select(0, places), None, None, None


class _Unpad(torch.autograd.Function):
    """Grid to stream."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = grid.shape
        return grid.flatten(0, 1).index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        rows, width, *rest = ctx.shape
        grid = grads[0].new_zeros(rows * width, *rest).index_copy_(0, places, grads[0])
        return grid.view(ctx.shape), None


class Packed:
    """Rows of unlike length, none of them empty, as one stream, and the grid of B x W that attention pads them to."""

    def __init__(self, ids_T: Tensor, lengths_B: Tensor, row_T: Tensor, column_T: Tensor, width: int) -> None:
        self.ids_T, self.lengths_B, self.row_T, self.column_T = ids_T, lengths_B, row_T, column_T
        self.rows, self.width = len(lengths_B), width
        full = len(ids_T) == self.rows * width
        self._places = None if full else row_T * width + column_T

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> "Packed":
        lengths = np.array([len(sequence) for sequence in sequences])
        total = int(lengths.sum())
        rows = np.repeat(np.arange(len(sequences)), lengths)
        columns = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids = np.fromiter((token for sequence in sequences for token in sequence), np.int64, total)
        tensors = (torch.from_numpy(array).to(device) for array in (ids, lengths, rows, columns))
        ids_T, lengths_B, row_T, column_T = tensors
        return cls(ids_T, lengths_B, row_T, column_T, int(lengths.max()))

    @classmethod
    def column(cls, ids_B: Tensor) -> "Packed":
        """Rows of one token each."""
        return cls(ids_B, torch.ones_like(ids_B), torch.arange(len(ids_B), device=ids_B.device), torch.zeros_like(ids_B), 1)

    def pad(self, stream: Tensor) -> Tensor:
        """(T, ...) to (B, W, ...), 0 behind a row's end."""
        if self._places is None:
            return stream.unflatten(0, (self.rows, self.width))
        padded = _Pad.apply(stream, self._places, self.rows, self.width)
        assert isinstance(padded, Tensor)
        return padded

    def unpad(self, grid: Tensor) -> Tensor:
        """(B, W, ...) to (T, ...)."""
        if self._places is None:
            return grid.flatten(0, 1)
        stream = _Unpad.apply(grid, self._places)
        assert isinstance(stream, Tensor)
        return stream


def attend_on_grid(
    packed: Packed, query_THD: Tensor, keys_BHKD: Tensor, values_BHKD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Return what the tokens of a stream read from the keys and values of their rows; without a mask, causally.

    Several heads of a query may share one head of keys. Keys may be more than queries only where there is a mask.
    """
    heads = keys_BHKD.shape[1]
    if packed.width == 1 and mask is not None:
        # One query a row: the heads that share keys stand as queries of one head, and nothing is copied.
        query_BHGD = query_THD.unflatten(1, (heads, -1))
        read = scaled_dot_product_attention(query_BHGD, keys_BHKD, values_BHKD, attn_mask=mask, scale=scale)
        return read.flatten(1, 2)
    query_BHSD = packed.pad(query_THD).transpose(1, 2)
    shared = query_BHSD.shape[1] // heads
    if query_BHSD.is_cuda and shared > 1:
        # On a GPU, heads that share keys fall back to a kernel that keeps every score, wherever there is a mask.
        keys_BHKD, values_BHKD = (tensor.repeat_interleave(shared, 1) for tensor in (keys_BHKD, values_BHKD))
        shared = 1
    read = scaled_dot_product_attention(
        query_BHSD, keys_BHKD, values_BHKD, attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=shared > 1,
    )  # fmt: skip
    return packed.unpad(read.transpose(1, 2))


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores: 0 where seen, else minus infinity. Made once, it serves every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


class PrefixAttention:
    """Rows that see themselves only; keeps their keys and values, (B, H, W, D) by layer, for those that read them later."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.past: list[tuple[Tensor, Tensor]] = []

    def attend(
        self, layer: int, query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        keys, values = (self.packed.pad(tensor).transpose(1, 2) for tensor in (keys_THD, values_THD))
        self.past.append((keys, values))
        mask = None
        if window is not None and window < self.packed.width:
            columns = torch.arange(self.packed.width, device=keys.device)
            distance = columns[:, None] - columns
            mask = additive((distance >= 0) & (distance < window), keys.dtype)[None, None]
        return attend_on_grid(self.packed, query_THD, keys, values, mask, scale)


class SuffixAttention:
    """Rows that go on from prefixes computed before, each from one of them; gradients flow into the prefixes."""

    def __init__(self, packed: Packed, prefixes: PrefixAttention, prefix_of_row_B: Int[Tensor, " B"]) -> None:
        self.packed, self.past, self._of_row = packed, prefixes.past, prefix_of_row_B
        self._lengths_B = prefixes.packed.lengths_B[prefix_of_row_B]
        self._prefix_width = prefixes.packed.width
        self.positions_T = self._lengths_B[packed.row_T] + packed.column_T
        self._masks: dict[int | None, Tensor] = {}

    @property
    def windows(self) -> set[int | None]:
        """The windows of the layers that have attended."""
        return set(self._masks)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._masks:
            device = self._lengths_B.device
            prefix_T = torch.arange(self._prefix_width, device=device)
            own_S = torch.arange(self.packed.width, device=device)
            seen = torch.cat([
                (prefix_T < self._lengths_B[:, None])[:, None].expand(-1, len(own_S), -1),
                (own_S <= own_S[:, None]).expand(len(self._lengths_B), -1, -1),
            ], dim=2)  # fmt: skip
            if window is not None:
                keys = torch.cat([prefix_T.expand(len(seen), -1), self._lengths_B[:, None] + own_S], dim=1)
                queries = self._lengths_B[:, None] + own_S
                seen = seen & (queries[:, :, None] - keys[:, None] < window)
            self._masks[window] = additive(seen, dtype)[:, None]
        return self._masks[window]

    def attend(
        self, layer: int, query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        keys, values = (
            torch.cat([past[self._of_row], self.packed.pad(new).transpose(1, 2)], dim=2)
            for past, new in zip(self.past[layer], (keys_THD, values_THD), strict=True)
        )
        return attend_on_grid(self.packed, query_THD, keys, values, self._mask(window, keys.dtype), scale)
