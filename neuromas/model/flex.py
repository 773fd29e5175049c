"""Attention on other devices than a CPU: torch's flex attention (Dong et al. 2024, arXiv 2412.05496) over packed rows.

Rows are not padded and no prefix is copied to its rows: the keys are those of all prefixes and then those of the stream, and a
mask says which a query sees. The kernel passes over blocks of the mask in which nothing is seen. `prefix_attention` and
`suffix_attention` choose by the device. On a GPU the kernel is compiled, which takes Triton and a C compiler.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from neuromas.model.attention import PrefixAttention, Prefixes, SuffixAttention, effective_window
from neuromas.model.left_out import is_left_out, way_out
from neuromas.model.packing import Packed

BLOCK = 128
"""Queries, and keys, of a block."""
_KERNELS = 64
"""Kernels that are compiled at most, for kinds of layers, gradients or none, and sizes of 1, before an error."""


def uses_flex(device: torch.device) -> bool:
    """Say whether attention on this device is torch's flex attention; else it copies each prefix to its rows."""
    return device.type != "cpu" and not is_left_out("flex")


def prefix_attention(packed: Packed) -> PrefixAttention:
    """Return the attention of prefixes over themselves."""
    return FlexPrefixAttention(packed) if uses_flex(packed.ids_T.device) else PrefixAttention(packed)


def suffix_attention(packed: Packed, prefixes: Prefixes, prefix_of_row_B: Int[Tensor, " B"]) -> SuffixAttention:
    """Return the attention of rows over themselves and one computed prefix each."""
    kind = FlexSuffixAttention if uses_flex(packed.ids_T.device) else SuffixAttention
    return kind(packed, prefixes, prefix_of_row_B)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Says of tokens to which of several groups they belong. A group is a prefix or a row."""

    group: Tensor
    """The token's own group."""
    order: Tensor
    """Index in the stream; -1 for a token of a prefix, which is before every token of a row."""
    position: Tensor

    def at(self, keep_K: Tensor | None) -> "Tokens":
        """Return some of the tokens."""
        return self if keep_K is None else Tokens(self.group[keep_K], self.order[keep_K], self.position[keep_K])


def block_mask(queries: Tokens, also_seen: Tensor, keys: Tokens, groups: int, window: int | None) -> BlockMask:
    """Return the mask of queries that see the keys of two groups: their own, up to themselves, and `also_seen`.

    A block that holds nothing that is seen may be in the table of blocks; one that holds something always is. Tables of the
    size of the mask itself are not made: only of its blocks.
    """
    query_group, query_order, query_position = queries.group, queries.order, queries.position
    key_group, key_order, key_position = keys.group, keys.order, keys.position

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (key_group[key] == query_group[query]) | (key_group[key] == also_seen[query])
        before = same & (key_order[key] <= query_order[query])
        return before if window is None else before & (query_position[query] - key_position[key] < window)

    of_query = _members(query_group, groups) + _members(also_seen, groups)
    table = of_query @ _members(key_group, groups).T > 0
    table &= _per_block(key_order, torch.amin)[None] <= _per_block(query_order, torch.amax)[:, None]
    if window is not None:
        table &= _per_block(query_position, torch.amin)[:, None] - _per_block(key_position, torch.amax)[None] < window
    counts, indices = table.sum(1), table.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        counts.to(torch.int32)[None, None], indices.to(torch.int32)[None, None], BLOCK_SIZE=BLOCK, mask_mod=seen,
        seq_lengths=(len(query_group), len(key_group)),
    )  # fmt: skip


def _members(group: Tensor, groups: int) -> Tensor:
    """Return for each block and group 1 if the block has a token of the group, else 0."""
    block = torch.arange(len(group), device=group.device) // BLOCK
    found = torch.zeros(-(-len(group) // BLOCK), groups, device=group.device)
    found[block, group] = 1.0
    return found


def _per_block(numbers: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Return the least or the largest of the numbers in each block."""
    blocks = -(-len(numbers) // BLOCK)
    padded = torch.cat([numbers, numbers[-1:].expand(blocks * BLOCK - len(numbers))])
    return reduce(padded.view(blocks, BLOCK), 1)


def _attend(query_KHD: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Return attention, (K, H, D), of queries over keys and values, (J, number of keys, D)."""
    compute = _compiled() if query_KHD.is_cuda else flex.flex_attention
    gqa = query_KHD.shape[1] > keys.shape[0]
    # The kernel for a few queries is another one, and has limits of its own.
    options: flex.FlexKernelOptions = {"FORCE_USE_FLEX_ATTENTION": True}
    query = query_KHD.transpose(0, 1)[None]
    try:
        out = compute(query, keys[None], values[None], block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options=options)
    except _compile_errors() as error:
        raise ValueError(way_out("flex", error)) from error
    assert isinstance(out, Tensor)
    return out[0].transpose(0, 1)


def _compiled() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    # Torch keeps its settings by thread, and a server samples in another one than it loads in.
    torch._dynamo.config.recompile_limit = _KERNELS
    return _kernel()


@functools.cache
def _kernel() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    # Beyond the limit, without `fullgraph`, it would compute every score in silence.
    return torch.compile(flex.flex_attention, dynamic=True, fullgraph=True)


def _compile_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo import exc  # takes a second, unless something has been compiled

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


class FlexPrefixAttention(PrefixAttention):
    """Attention of prefixes over themselves."""

    def __init__(self, packed: Packed) -> None:
        super().__init__(packed)
        self._block_masks: dict[tuple[int | None, bool], BlockMask] = {}

    def attend(
        self, layer: int, query_KHD: Tensor, keys_TJD: Tensor, values_TJD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self.store(layer, keys_TJD, values_TJD)
        window = effective_window(window, self.packed.width)
        case = window, keep_K is not None
        if case not in self._block_masks:
            packed = self.packed
            tokens = Tokens(packed.row_T, torch.arange(len(packed.row_T), device=packed.row_T.device), packed.column_T)
            queries = tokens.at(keep_K)
            self._block_masks[case] = block_mask(queries, queries.group, tokens, packed.rows, window)
        return _attend(query_KHD, keys_TJD.transpose(0, 1), values_TJD.transpose(0, 1), self._block_masks[case], scale)


class FlexSuffixAttention(SuffixAttention):
    """Attention of rows over themselves and one computed prefix each; gradients flow into the prefixes."""

    def __init__(self, packed: Packed, prefixes: Prefixes, prefix_of_row_B: Int[Tensor, " B"]) -> None:
        super().__init__(packed, prefixes, prefix_of_row_B)
        self._block_masks: dict[tuple[int | None, bool], BlockMask] = {}

    def attend(
        self, layer: int, query_KHD: Tensor, keys_TJD: Tensor, values_TJD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self.windows.add(window)
        window = effective_window(window, self._longest)
        # A forward keeps the same tokens in every layer that is given `keep_K`.
        case = window, keep_K is not None
        if case not in self._block_masks:
            self._block_masks[case] = self._block_mask(window, keep_K)
        keys, values = (
            torch.cat([prefix.transpose(0, 1).flatten(1, 2), new.transpose(0, 1)], dim=1)
            for prefix, new in zip(self.prefixes.past[layer], (keys_TJD, values_TJD), strict=True)
        )
        return _attend(query_KHD, keys, values, self._block_masks[case], scale)

    def _block_mask(self, window: int | None, keep_K: Tensor | None) -> BlockMask:
        """Return the mask of all tokens, or of those at `keep_K`; groups are the rows, the prefixes, and their padding."""
        packed, prefixes = self.packed, self.prefixes
        count, width, device = len(prefixes.lengths_Q), prefixes.width, packed.row_T.device
        columns_L = torch.arange(width, device=device).expand(count, -1)
        prefix_groups = packed.rows + torch.arange(count, device=device)[:, None]
        padding = packed.rows + count
        of_prefix = torch.where(columns_L < prefixes.lengths_Q[:, None], prefix_groups, padding).flatten()
        own = Tokens(packed.row_T, torch.arange(len(packed.row_T), device=device), self.positions_T)
        before = torch.full_like(of_prefix, -1)
        keys = Tokens(*(
            torch.cat(both)
            for both in ((of_prefix, own.group), (before, own.order), (columns_L.flatten(), own.position))
        ))  # fmt: skip
        queries = own.at(keep_K)
        also_seen = packed.rows + self.prefix_of_row_B[queries.group]
        return block_mask(queries, also_seen, keys, padding + 1, window)
