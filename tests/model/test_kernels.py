"""Compiled loops do what torch's operations do, in value and gradient."""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from products import listed, loops_of
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from neuromas.model import kernels
from neuromas.model.kernels import launch, loops
from neuromas.model.ops import CompiledOps, TorchOps, _passed
from neuromas.model.rms_norm import RMSNorm

TOKENS = 37
BOUND: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradients(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Return a function's values at the inputs, and the gradients of a weighted sum of them."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    found = function(*leaves)
    parts: tuple[Tensor, ...] = found if isinstance(found, tuple) else (found,)
    torch.stack([(part * normal(*part.shape, seed=9)).sum() for part in parts]).sum().backward()
    return [*(part.detach() for part in parts), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def both_ways(function_of: Callable[[TorchOps], Callable[..., Any]], *inputs: Tensor) -> None:
    with listed() as of_compiled:
        compiled = value_and_gradients(function_of(CompiledOps(torch.float32)), *inputs)
    with listed() as of_plain:
        plain = value_and_gradients(function_of(TorchOps()), *inputs)
    assert len(compiled) == len(plain) > len(inputs)
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, **BOUND)
    assert (len(loops_of(of_compiled)), loops_of(of_plain)) == (2, []), "forward and backward are a loop each, or none is"


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(size: int, offset: float) -> None:
    norm = RMSNorm(torch.nn.Parameter(normal(size)), 1e-6, offset, CompiledOps(torch.float32))
    both_ways(lambda ops: partial(ops.rms_norm, scale_C=norm.scale, eps=1e-6), 3 * normal(TOKENS, size))
    with torch.no_grad():
        x = normal(TOKENS, size)
        torch.testing.assert_close(norm(x), x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * norm.scale, **BOUND)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(4, 2), (4, 0), (0, 2)])
def test_heads(queries: int, keys: int, *, normed: bool) -> None:
    size = 8
    angles = normal(TOKENS, size // 2)
    cos, sin = torch.cat([angles.cos()] * 2, 1), angles.sin()
    scale = normal(queries + keys, size) if normed else None

    def function(ops: TorchOps) -> Callable[[Tensor], object]:
        return lambda columns: ops.heads(columns, cos, sin, queries, keys, scale, 1e-6)

    both_ways(function, normal(TOKENS, (queries + 2 * keys) * size))


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gates(activation: str) -> None:
    both = torch.cat([4 * normal(TOKENS, 24), normal(TOKENS, 24, seed=1)], 1)
    # These gates are so large that their exponentials overflow float32.
    both[0, :4] = torch.tensor([-300.0, -90.0, 90.0, 300.0])
    assert kernels.has_gate(activation)
    both_ways(lambda ops: partial(ops.gate, activation=activation), both)
    gate, up = both.chunk(2, 1)
    acted = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
    torch.testing.assert_close(kernels.gate(both, activation), acted * up, **BOUND)


def test_loops_round_to_bfloat16_as_torch_does() -> None:
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38, -3.4e38, 1e-40, 0.0])
    gradient = torch.cat([ties, torch.tensor([torch.inf, torch.nan]), normal(6)]).view(1, 2, 8)
    cos, sin = torch.ones(1, 8), torch.zeros(1, 4)
    nothing, qkv = torch.zeros(1, 0, 8), torch.zeros(1, 2, 8, dtype=torch.bfloat16)
    # The gradient at values is copied.
    written = kernels.heads_backward((nothing, nothing, gradient), qkv, cos, sin, None, torch.zeros(1, 0))
    torch.testing.assert_close(written, gradient.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_loops_in_bfloat16_compute_in_float32_and_round_once(activation: str) -> None:
    half = torch.bfloat16
    once: dict[str, Any] = {"rtol": 2**-8, "atol": 1e-6}
    norm = partial(CompiledOps(half).rms_norm, scale_C=normal(24), eps=1e-6)
    wide = partial(CompiledOps(torch.float32).rms_norm, scale_C=normal(24), eps=1e-6)
    for given in (normal(TOKENS, 24), normal(TOKENS, 24).bfloat16()):
        y, dx = value_and_gradients(norm, given)
        exact, exact_dx = value_and_gradients(wide, given.float())
        assert (y.dtype, dx.dtype) == (half, given.dtype)
        torch.testing.assert_close(y.float(), exact, **once)
        torch.testing.assert_close(dx.float(), exact_dx, rtol=2**-7, atol=0.02)
    both, gradient = normal(TOKENS, 24).bfloat16(), normal(TOKENS, 12, seed=1).bfloat16()
    gated, d_both = kernels.gate(both, activation), kernels.gate_backward(gradient, both, activation)
    assert (gated.dtype, d_both.dtype) == (half, half)
    torch.testing.assert_close(gated.float(), kernels.gate(both.float(), activation), **once)
    torch.testing.assert_close(d_both.float(), kernels.gate_backward(gradient.float(), both.float(), activation), **once)
    angles, scale, qkv = normal(TOKENS, 4), normal(6, 8), normal(TOKENS, 8, 8).bfloat16()
    turned = torch.cat([angles.cos()] * 2, 1), angles.sin(), scale
    heads, exact = (kernels.heads(x, *turned, 1e-6, 4, 2) for x in (qkv, qkv.float()))
    for one, other in zip(heads, exact, strict=True):
        torch.testing.assert_close(one, other, **BOUND)
    grads = heads[:3]
    d_qkv, exact = (kernels.heads_backward(grads, x, *turned, heads[3]) for x in (qkv, qkv.float()))
    # It is rounded again after the norm's gradient.
    torch.testing.assert_close(d_qkv.float(), exact, rtol=2**-6, atol=0.05)


def test_a_head_in_bfloat16_loses_no_digits_of_its_logits() -> None:
    hidden, weight, ids = normal(5, 64).bfloat16(), 3 * normal(600, 64, seed=1).bfloat16(), torch.tensor([0, 599, 7, 7, 300])
    exact = hidden.double() @ weight.double().T
    assert exact.abs().max() > 64, "which bfloat16 alone would round by up to 0.25"
    torch.testing.assert_close(kernels.logits(hidden, weight), exact.float(), rtol=0, atol=2e-3)
    for temperature in (1.0, 0.5):
        logprobs, difference = kernels.chosen(hidden, weight, ids, temperature)
        expected = (exact / temperature).log_softmax(1)
        torch.testing.assert_close(logprobs, expected.gather(1, ids[:, None])[:, 0].float(), rtol=0, atol=5e-3)
        weights = expected.exp().scatter_add(1, ids[:, None], -torch.ones(5, 1, dtype=torch.float64))
        torch.testing.assert_close(difference.double(), weights, rtol=2**-7, atol=1e-3)


def test_a_gate_without_a_loop_is_computed_by_torch() -> None:
    assert not kernels.has_gate("gelu")


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("queries", [2, 4])
def test_one_token_of_each_row_attends_to_its_prefix_and_its_own_tokens(queries: int, window: int | None) -> None:
    heads, size, columns, width = 2, 8, 12, 7
    slots = torch.tensor([2, 0, 4, 1, 3])
    prefix, index_in_prefix, lengths = torch.tensor([0, 0, 1, 2, 0]), torch.tensor([0, 1, 0, 0, 2]), torch.tensor([7, 3, 1])
    column = torch.tensor([0, 3, 5, 1, 9])
    cache = normal(6, heads, columns, size), normal(6, heads, columns, size, seed=1)
    prefixes = normal(3, heads, width, size, seed=2), normal(3, heads, width, size, seed=3)
    query, key, value = (normal(5, count, size, seed=4 + index) for index, count in enumerate((queries, heads, heads)))
    expected = []
    for row in range(5):
        own = [
            torch.cat([past[slots[row], :, : column[row]], new[row, :, None]], 1)
            for past, new in zip(cache, (key, value), strict=True)
        ]
        keys_and_values = [
            torch.cat([past[prefix[row], :, : lengths[prefix[row]]], part], 1) for past, part in zip(prefixes, own, strict=True)
        ]
        keys, values = (part[:, -(window or 99) :].repeat_interleave(queries // heads, 0) for part in keys_and_values)
        expected.append(scaled_dot_product_attention(query[row, :, None], keys, values, scale=0.3)[:, 0])
    before = [tensor.clone() for tensor in cache]
    attention = kernels.CacheAttention(slots, prefix, index_in_prefix, 3, lengths, queries, heads, size)
    for _ in range(2):
        got = attention.attend(query, key, value, column, int(column.max()) + 1, cache, prefixes, window=window, scale=0.3)
        torch.testing.assert_close(got, torch.stack(expected), **BOUND)
    for tensor, old, new in zip(cache, before, (key, value), strict=True):
        old[slots, :, column] = new
        assert torch.equal(tensor, old)


Sampler = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
SAMPLERS = [kernels.sample, TorchOps().sample]


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("vocabulary", [2, 255, 256, 257, 1000])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_samples_invert_the_distribution_function(sample: Sampler, vocabulary: int, temperature: float) -> None:
    logits = 3 * normal(200, vocabulary)
    uniform = torch.from_numpy(np.random.default_rng(0).random(200))
    uniform[:3] = torch.tensor([0.0, 1e-12, 1 - 1e-12])
    tokens, logprobs = sample(logits, uniform, temperature)
    expected = (logits.double() / (temperature or 1)).log_softmax(1)
    torch.testing.assert_close(logprobs.double(), expected.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=2e-6)
    if temperature == 0:
        assert torch.equal(tokens, logits.argmax(1))
        return
    cumulative = expected.exp().cumsum(1)
    upper = cumulative.gather(1, tokens[:, None])[:, 0]
    lower = upper - expected.gather(1, tokens[:, None])[:, 0].exp()
    assert (lower <= uniform + 1e-6).all()
    assert (uniform <= upper + 1e-6).all()
    assert len(tokens.unique()) > min(vocabulary, 40) // 2


@pytest.mark.parametrize("sample", SAMPLERS)
def test_the_first_of_equally_likely_tokens_is_the_likeliest(sample: Sampler) -> None:
    tokens, logprobs = sample(torch.zeros(2, 300), torch.zeros(2, dtype=torch.float64), 0.0)
    assert tokens.tolist() == [0, 0]
    assert logprobs.tolist() == pytest.approx([-math.log(300)] * 2, rel=1e-6)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_logits_that_are_not_finite_still_give_a_token(sample: Sampler) -> None:
    """A model that has diverged is reported by `Network.rollout`, not by the sampler."""
    logits = torch.full((3, 300), math.nan)
    for temperature in (0.0, 1.0):
        tokens, _ = sample(logits, torch.full((3,), 0.5, dtype=torch.float64), temperature)
        assert ((tokens >= 0) & (tokens < 300)).all()


def test_threads_of_one_process_may_all_call_a_loop() -> None:
    both = normal(300, 64)
    expected, found = kernels.gate(both, "silu"), []
    threads = [threading.Thread(target=lambda: found.extend(kernels.gate(both, "silu") for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.processes
def test_loops_use_torchs_number_of_threads_and_do_not_change_it() -> None:
    code = (
        "import torch; torch.set_num_threads(1); from neuromas.model import kernels; import numba\n"
        "for _ in range(3): kernels.gate(torch.ones(4, 8), 'silu'); print(torch.get_num_threads(), numba.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"] * 3


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("vocabulary", [200, 512, 700])
def test_a_token_without_weight_is_never_sampled(sample: Sampler, vocabulary: int) -> None:
    """A uniform draw near one ends at the last token that has weight, however sums are rounded."""
    logits = normal(64, vocabulary)
    logits[:, 100:] = -60
    logits[1::2, 5:] = -math.inf
    for below_one in (1e-7, 3e-8, 1e-8, 1e-9, 1e-12, 2**-53):
        tokens, logprobs = sample(logits, torch.full((64,), 1 - below_one, dtype=torch.float64), 1.0)
        assert (tokens < 100).all()
        assert (logprobs > -20).all()


def test_a_term_of_0_is_not_passed_where_the_sum_of_a_gpu_still_changes() -> None:
    """Added up in parts, a sum is rounded otherwise from term to term."""
    terms = torch.tensor([[0.5, 0.25, 0.25, 0.0, 0.0]], dtype=torch.float64)
    cumulative = torch.tensor([[0.5, 0.75, 1 - 2**-52, 1 - 2**-53, 1.0]], dtype=torch.float64)
    for target, expected in ((0.0, 0), (0.5, 1), (0.9, 2), (1 - 2**-52, 2), (1.0, 2)):
        assert _passed(terms, cumulative, torch.tensor([target], dtype=torch.float64)).tolist() == [expected]


LAST_BITS = """
import sys, hashlib, torch
from neuromas.model import kernels
from neuromas.model.kernels import launch, loops
x, scale = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((37, 576), (576,)))
y, inverse = kernels.normalise(x, scale, 1e-5, torch.float32)
gradient = kernels.normalise_backward(y, x, scale, inverse)
print(hashlib.md5(gradient.numpy().tobytes()).hexdigest())
"""


@pytest.mark.processes
def test_no_process_computes_by_a_loop_that_it_compiled_itself(tmp_path: Path) -> None:
    """Its last bits would be others than those of all later processes."""

    def last_bits() -> tuple[str, bool]:
        done = subprocess.run(
            [sys.executable, "-c", LAST_BITS], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout, "compiling loops for this machine's processor, once: half a minute or more\n" in done.stderr

    at_first, told = last_bits()
    assert told
    assert last_bits() == (at_first, False)
    # As another version of Numba leaves them that has only begun.
    for index in tmp_path.rglob("loops.*_backward-*.nbi"):
        index.unlink()
    (mark,) = tmp_path.rglob("loops.*.compiled")
    mark.write_text("0.0")
    assert last_bits() == (at_first, True)


@pytest.mark.processes
def test_loops_work_where_no_cache_folder_can_be_written_to() -> None:
    code = (
        "from numba.core import caching; caching.CacheImpl._locator_classes = []\n"
        "import torch; from neuromas.model import kernels; print(kernels.gate(torch.ones(1, 2), 'silu').item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_compilation_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr="Traceback\nMemoryError: no room\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    loop: Any = loops.weigh
    elsewhere = SimpleNamespace(stats=SimpleNamespace(cache_path=str(tmp_path)), targetctx=loop.targetctx)
    monkeypatch.setattr(loops, "weigh", elsewhere)
    launch.prepare.__wrapped__()
    assert "compiling ahead failed (MemoryError: no room)" in capsys.readouterr().err
    (mark,) = tmp_path.iterdir()
    assert not mark.read_text()
