"""Packed rows: rows of tokens are concatenated into one stream without padding, and only attention knows where a row ends.

Projections, norms, MLPs and adapters treat tokens one by one, so they run on the stream. Attention pads the rows. The models of
transformers call `attend` of the object that their forward is given as `packed`, instead of an attention of their own.
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


# Tests check arguments of this module's functions as they run.
@runtime_checkable
class Attention(Protocol):
    """Computes attention in a stream of T tokens; it knows which keys and values each query attends to."""

    def attend(
        self,
        layer: int,
        query_KHD: Float[Tensor, "K H D"],
        keys_TJD: Float[Tensor, "T J D"],
        values_TJD: Float[Tensor, "T J D"],
        *,
        scale: float,
        window: int | None,
        keep_K: Int[Tensor, " K"] | None = None,
    ) -> Float[Tensor, "K H D"]:
        """Return the attention output of each query. With a `window`, a token attends to that many tokens, itself included.

        `keep_K` holds the indices of the tokens that queries are given for; None means all tokens, so that K is T.
        """
        ...


def scatter_queries(query_KHD: Tensor, keep_K: Tensor, tokens: int) -> Tensor:
    """Return queries for all tokens, (T, H, D): those given at their indices, 0 elsewhere."""
    return query_KHD.new_zeros(tokens, *query_KHD.shape[1:]).index_copy(0, keep_K, query_KHD)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float,
    sliding_window: int | None = None, packed: Attention | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention for transformers: by `packed` if the forward is given one, else by its own scaled dot product."""
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
    """Pads a stream. It has its own backward because autograd's for indexing adds up, where here every index occurs once."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, indices: Tensor, rows: int, width: int) -> Tensor:
        ctx.save_for_backward(indices)
        padded = stream.new_zeros(rows * width, *stream.shape[1:])
        return padded.index_copy_(0, indices, stream).unflatten(0, (rows, width))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (indices,) = ctx.saved_tensors
        return grads[0].flatten(0, 1).index_select(0, indices), None, None, None


class _Unpad(torch.autograd.Function):
    """Turns a padded batch back into a stream."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = padded.shape
        return padded.flatten(0, 1).index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        rows, width, *rest = ctx.shape
        padded = grads[0].new_zeros(rows * width, *rest).index_copy_(0, indices, grads[0])
        return padded.view(ctx.shape), None


class Packed:
    """Holds non-empty rows of different lengths as one stream; `pad` makes a padded batch of a stream and `unpad` undoes it."""

    def __init__(self, ids_T: Tensor, lengths_B: Tensor, row_T: Tensor, column_T: Tensor, width: int) -> None:
        self.ids_T, self.lengths_B, self.row_T, self.column_T = ids_T, lengths_B, row_T, column_T
        self.rows, self.width = len(lengths_B), width
        full = len(ids_T) == self.rows * width
        self._indices = None if full else row_T * width + column_T

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> "Packed":
        """Return sequences of token ids as packed rows."""
        lengths = np.array([len(sequence) for sequence in sequences])
        total = int(lengths.sum())
        rows = np.repeat(np.arange(len(sequences)), lengths)
        columns = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids = np.fromiter((token for sequence in sequences for token in sequence), np.int64, total)
        tensors = (torch.from_numpy(array).to(device) for array in (ids, lengths, rows, columns))
        ids_T, lengths_B, row_T, column_T = tensors
        return cls(ids_T, lengths_B, row_T, column_T, int(lengths.max()))

    def pad(self, stream: Tensor) -> Tensor:
        """Return a stream (T, ...) as a padded batch (B, width, ...), with 0 after a row's end."""
        if self._indices is None:
            return stream.unflatten(0, (self.rows, self.width))
        padded = _Pad.apply(stream, self._indices, self.rows, self.width)
        assert isinstance(padded, Tensor)
        return padded

    def unpad(self, padded: Tensor) -> Tensor:
        """Return a padded batch (B, width, ...) as a stream (T, ...)."""
        if self._indices is None:
            return padded.flatten(0, 1)
        stream = _Unpad.apply(padded, self._indices)
        assert isinstance(stream, Tensor)
        return stream
