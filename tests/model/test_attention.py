"""Attention in two parts is attention over both."""

import math

import pytest
import torch
from torch import Tensor

from neuromas.model.attention import Prefixes, SuffixAttention, additive_mask, merge_parts, partial_attention, plain_attention
from neuromas.model.packing import Packed

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def rows() -> tuple[Packed, Prefixes, Tensor]:
    """Return more rows than one bucket holds, and three prefixes; all lengths differ, and one prefix has a single row."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (37,), generator=generator).tolist()
    packed = Packed.of([[1] * length for length in lengths], torch.device("cpu"))
    past = [(torch.randn(3, KEY_HEADS, 9, SIZE, generator=generator), torch.randn(3, KEY_HEADS, 9, SIZE, generator=generator))]
    prefix_of_row = torch.randint(0, 2, (37,), generator=generator)
    prefix_of_row[5] = 2
    return packed, Prefixes(past, torch.tensor([9, 4, 1])), prefix_of_row


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_two_parts_and_their_gradients_equal_a_copy_of_the_prefix_in_every_row(
    window: int | None, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, prefixes, prefix_of_row = rows()
    generator = torch.Generator().manual_seed(4)
    tokens = len(packed.ids_T)
    streams = [torch.randn(tokens, heads, SIZE, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    weight = torch.randn(tokens, HEADS, SIZE, generator=generator).to(dtype)
    found: list[list[Tensor]] = []
    for copied in (False, True):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (*streams, *prefixes.past[0])]
        query, keys, values, prefix_keys, prefix_values = inputs
        attention = SuffixAttention(packed, Prefixes([(prefix_keys, prefix_values)], prefixes.lengths_Q), prefix_of_row)
        if copied:
            monkeypatch.setattr("neuromas.model.attention._has_kernel", lambda *_: False)
        out = attention.attend(0, query, keys, values, scale=0.3, window=window)
        assert attention.windows == {window}
        (out * weight).sum().backward()
        found.append([out.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)])
    assert len(found[0]) == len(found[1]) == 6
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).abs().max() <= tolerance * max(1.0, plain.abs().max().item())


def test_a_token_that_sees_nothing_of_a_part_attends_to_the_other_alone() -> None:
    query, keys, values = (torch.randn(2, 2, 3, SIZE) for _ in range(3))
    nothing = additive_mask(torch.zeros(2, 1, 1, 3, dtype=torch.bool), torch.float32)
    out = merge_parts(
        partial_attention(query, keys, values, nothing, scale=0.3), partial_attention(query, keys, values, None, scale=0.3)
    )
    assert torch.allclose(out, partial_attention(query, keys, values, None, scale=0.3)[0], atol=1e-6)


def test_plain_attention_for_other_devices_is_the_same() -> None:
    query, keys, values = torch.randn(2, 3, 4, SIZE), torch.randn(2, 3, 7, SIZE), torch.randn(2, 3, 7, SIZE)
    mask = additive_mask(torch.rand(2, 1, 4, 7) > 0.3, torch.float32)
    ways = (attend(query, keys, values, mask, scale=0.3) for attend in (partial_attention, plain_attention))
    for ours, plain in zip(*ways, strict=True):
        assert torch.allclose(ours, plain, atol=1e-6)


def test_prefixes_join_and_are_selected() -> None:
    _, prefixes, _ = rows()
    short = Prefixes([(torch.ones(1, KEY_HEADS, 2, SIZE), torch.ones(1, KEY_HEADS, 2, SIZE))], torch.tensor([2]))
    joined = short.join(prefixes)
    assert joined.width == 9
    assert joined.lengths_Q.tolist() == [2, 9, 4, 1]
    assert math.isclose(float(joined.past[0][0][0].sum()), 2 * KEY_HEADS * SIZE)
    picked = joined.select(torch.tensor([3, 1]))
    assert torch.equal(picked.past[0][1][1], prefixes.past[0][1][0])
    assert picked.lengths_Q.tolist() == [1, 9]
