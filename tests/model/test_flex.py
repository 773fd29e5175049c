"""Attention for other devices, on a CPU: torch's flex attention gives what the CPU's attention gives, gradients included."""

from threading import Thread

import pytest
import torch
from accelerator import flex_on_cpu
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention.flex_attention import create_block_mask

from neuromas.model import flex
from neuromas.model.attention import PrefixAttention, Prefixes, SuffixAttention
from neuromas.model.flex import FlexPrefixAttention, FlexSuffixAttention, prefix_attention, suffix_attention
from neuromas.model.left_out import is_left_out
from neuromas.model.packing import Packed

# They trace what they compute, which takes seconds.
pytestmark = pytest.mark.processes

KEY_HEADS, SIZE = 2, 8


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows() -> tuple[Packed, Tensor, Tensor]:
    """Return rows of all lengths, the prefix of each, and the lengths of three prefixes, one of a single row."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (21,), generator=generator).tolist()
    prefix_of_row = torch.randint(0, 2, (21,), generator=generator)
    prefix_of_row[5] = 2
    return Packed.of([[1] * length for length in lengths], torch.device("cpu")), prefix_of_row, torch.tensor([9, 4, 1])


def last_of_each_row(packed: Packed) -> Tensor:
    """Return the indices of the last tokens of all rows, and of a few others."""
    last = packed.lengths_B.cumsum(0) - 1
    return torch.cat([last, last[packed.lengths_B > 3] - 2]).sort().values


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("heads", "window"), [(4, None), (4, 4), (2, 3)])
def test_suffixes_attend_as_on_a_cpu(heads: int, window: int | None, kept: bool) -> None:
    packed, prefix_of_row, lengths_Q = rows()
    tokens = len(packed.ids_T)
    keep = last_of_each_row(packed) if kept else None
    count = tokens if keep is None else len(keep)
    shapes = [(count, heads, SIZE), *[(tokens, KEY_HEADS, SIZE)] * 2, *[(3, KEY_HEADS, 9, SIZE)] * 2]
    weight, found = drawn(count, heads, SIZE, seed=9), []
    for kind in (SuffixAttention, FlexSuffixAttention):
        inputs = [drawn(*shape, seed=index).requires_grad_() for index, shape in enumerate(shapes)]
        with flex_on_cpu():
            attention = kind(packed, Prefixes([(inputs[3], inputs[4])], lengths_Q), prefix_of_row)
            out = attention.attend(0, *inputs[:3], scale=0.3, window=window, keep_K=keep)
        assert attention.windows == {window}
        (out * weight).sum().backward()
        found.append([out.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)])
    assert len(found[0]) == len(found[1]) == 6
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_prefixes_attend_as_on_a_cpu_and_are_stored(window: int | None, kept: bool) -> None:
    packed, _, _ = rows()
    tokens = len(packed.ids_T)
    keep = last_of_each_row(packed) if kept else None
    count = tokens if keep is None else len(keep)
    weight, found = drawn(count, 4, SIZE, seed=9), []
    for kind in (PrefixAttention, FlexPrefixAttention):
        shapes = [(count, 4, SIZE), *[(tokens, KEY_HEADS, SIZE)] * 2]
        inputs = [drawn(*shape, seed=index).requires_grad_() for index, shape in enumerate(shapes)]
        with flex_on_cpu():
            attention = kind(packed)
            out = attention.attend(0, *inputs, scale=0.3, window=window, keep_K=keep)
        keys, values = attention.prefixes.past[0]
        ((out * weight).sum() + keys.sum() + 2 * values.sum()).backward()
        found.append([out.detach(), keys, values, *(tensor.grad for tensor in inputs if tensor.grad is not None)])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_every_block_in_which_something_is_seen_is_in_the_table_and_few_others(window: int | None, kept: bool) -> None:
    """The kernel of a GPU looks at no other blocks; torch's implementation on a CPU does not show it."""
    packed, prefix_of_row, lengths_Q = rows()
    keep = last_of_each_row(packed) if kept else None
    past = [(drawn(3, KEY_HEADS, 9, SIZE, seed=0), drawn(3, KEY_HEADS, 9, SIZE, seed=1))]
    with flex_on_cpu(block=8):
        ours = FlexSuffixAttention(packed, Prefixes(past, lengths_Q), prefix_of_row)._block_mask(window, keep)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Where shapes are checked, a function's arguments cannot be counted.
        return ours.mask_mod(b, h, query, key)

    exact = create_block_mask(mask_mod, None, None, *ours.seq_lengths, device="cpu", BLOCK_SIZE=8)
    listed, needed = ours.to_dense()[0, 0] > 0, exact.to_dense()[0, 0] > 0
    assert not (needed & ~listed).any()
    assert listed.sum() <= 1.5 * needed.sum() < 0.5 * listed.numel()


def test_the_device_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not flex.uses_flex(torch.device("cpu"))
    assert flex.uses_flex(torch.device("cuda"))
    packed, prefix_of_row, lengths_Q = rows()
    prefixes = Prefixes([(drawn(3, KEY_HEADS, 9, SIZE, seed=0), drawn(3, KEY_HEADS, 9, SIZE, seed=1))], lengths_Q)
    assert type(prefix_attention(packed)) is PrefixAttention
    assert type(suffix_attention(packed, prefixes, prefix_of_row)) is SuffixAttention
    monkeypatch.setattr("neuromas.model.flex.uses_flex", lambda _: True)
    assert type(prefix_attention(packed)) is FlexPrefixAttention
    assert type(suffix_attention(packed, prefixes, prefix_of_row)) is FlexSuffixAttention


def test_a_part_of_a_gpus_path_is_left_out_if_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROMAS_WITHOUT", "graphs, flex")
    assert not flex.uses_flex(torch.device("cuda"))
    assert is_left_out("graphs")
    assert not is_left_out("groups")
    monkeypatch.setenv("NEUROMAS_WITHOUT", "flex graph")
    with pytest.raises(ValueError, match=r"NEUROMAS_WITHOUT must name parts among flex, graphs and groups, got \['graph'\]$"):
        flex.uses_flex(torch.device("cuda"))


def test_attention_that_torch_cannot_compile_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise TorchDynamoException("no compiler\nis there")

    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", fail)
    packed, _, _ = rows()
    query, keys, values = (drawn(len(packed.ids_T), heads, SIZE, seed=0) for heads in (4, KEY_HEADS, KEY_HEADS))
    with pytest.raises(ValueError, match=r"^set the environment variable NEUROMAS_WITHOUT=flex: .* \(no compiler is there\)$"):
        FlexPrefixAttention(packed).attend(0, query, keys, values, scale=0.3, window=None)


def test_as_many_kernels_are_compiled_in_any_thread() -> None:
    """A server samples in another thread than it loads in, and torch keeps its settings by thread."""
    limits: list[int] = []

    def ask() -> None:
        flex._compiled()
        limits.append(torch._dynamo.config.recompile_limit)

    before = torch._dynamo.config.recompile_limit
    try:
        ask()
        other = Thread(target=ask)
        other.start()
        other.join()
    finally:
        torch._dynamo.config.recompile_limit = before
    assert limits == [flex._KERNELS] * 2
