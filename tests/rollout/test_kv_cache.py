"""Attention of live rows over the cache and their prefixes is the same by compiled loops and by torch's operations."""

import copy

import pytest
import torch
from products import listed, loops_of
from torch import Tensor

from neuromas.model.attention import Prefixes
from neuromas.model.ops import CompiledOps, TorchOps
from neuromas.rollout.kv_cache import DecodeAttention, LiveRows, PrefixSharing, Slots

LAYERS = [(4, 2, 8), (2, 1, 16), (4, 2, 8)]
"""Numbers of query and key heads, and head size: in some models the layers differ."""
SLOTS, COLUMNS, WIDTH = 24, 12, 7
ROWS = {"dense": [0, 0, 1, 2, 0, 1], "alone": [3], "one large prefix among many": [*range(1, 16), *[0] * 7]}
"""By case, the prefix of each live row."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_slots(prefix_of_row: list[int], lengths_Q: Tensor) -> Slots:
    caches = [
        (normal(SLOTS, k, COLUMNS, d, seed=layer), normal(SLOTS, k, COLUMNS, d, seed=50 + layer))
        for layer, (_, k, d) in enumerate(LAYERS)
    ]
    prefix = torch.tensor(prefix_of_row + [0] * (SLOTS - len(prefix_of_row)))
    integers = torch.arange(SLOTS)
    return Slots(
        keys=[keys for keys, _ in caches], values=[values for _, values in caches], nodes=integers * 7 % 3,
        temperature=torch.zeros(SLOTS, dtype=torch.float64), prefix=prefix,
        prefix_length=lengths_Q[prefix], length=integers * 5 % (COLUMNS - 2), last_token=integers, count=integers,
        uniforms=torch.zeros(SLOTS, 1), tokens=integers[:, None], logprobs=torch.zeros(SLOTS, 1), limit=integers,
        given=integers[:, None],
    )  # fmt: skip


def attend_all(slots: Slots, prefixes: Prefixes, rows: int, window: int | None, ops: TorchOps) -> tuple[list[Tensor], bool]:
    """Return the attention of two tokens of each row in every layer, and whether queries padded by prefix were dense."""
    found = []
    sharing = PrefixSharing(prefixes, LiveRows(slots, rows), None)
    for token in range(2):
        attention = DecodeAttention(slots, sharing, ops)
        for layer, (queries, keys, size) in enumerate(LAYERS):
            new = (normal(rows, heads, size, seed=100 * token + 10 * layer + heads) for heads in (queries, keys, keys))
            found.append(attention.attend(layer, *new, scale=0.3, window=window))
        slots.length[:rows] += 1
    return found, sharing.is_dense


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("case", ROWS)
def test_compiled_loops_compute_the_attention_that_torch_computes(case: str, window: int | None) -> None:
    lengths_Q = torch.arange(16) % WIDTH + 1
    past = [
        (normal(16, k, WIDTH, d, seed=200 + layer), normal(16, k, WIDTH, d, seed=300 + layer))
        for layer, (_, k, d) in enumerate(LAYERS)
    ]
    slots = make_slots(ROWS[case], lengths_Q)
    other = copy.deepcopy(slots)
    with listed() as computed:
        ours, is_dense = attend_all(slots, Prefixes(past, lengths_Q), len(ROWS[case]), window, CompiledOps(torch.float32))
    with listed() as plainly:
        theirs, _ = attend_all(other, Prefixes(past, lengths_Q), len(ROWS[case]), window, TorchOps())
    for one, two in zip([*ours, *slots.keys, *slots.values], [*theirs, *other.keys, *other.values], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert is_dense == (case != "one large prefix among many")
    assert (bool(loops_of(computed)), loops_of(plainly)) == (is_dense, [])
