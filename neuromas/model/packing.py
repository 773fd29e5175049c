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
        keep_K: Int[Tensor, " K"] | None = None,
    ) -> Float[Tensor, "T H D"]:
        """Return what each token reads. With a `window`, a token sees that many, itself among them.

        With `keep_K`, queries are those of the tokens at these places alone, and so is what is returned.
        """
        ...


def among_all(query_KHD: Tensor, keep_K: Tensor, tokens: int) -> Tensor:
    """Return queries of some tokens as those of all, 0 elsewhere: for attention that has all tokens read."""
    return query_KHD.new_zeros(tokens, *query_KHD.shape[1:]).index_copy(0, keep_K, query_KHD)


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
