"""What a layer computes between its matrix products: by torch's operations or by compiled loops.

`ops_for` chooses between them once, when a model is loaded. Operations have their own backward where autograd would pass over
memory more often. All weights are frozen, so no backward returns a gradient for a weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from neuromas.model import kernels

GATES = {"silu": None, "gelu": "none", "gelu_pytorch_tanh": "tanh"}
"""Torch's name of the approximation of each activation, by transformers' name of the activation; silu has none."""


class TorchOps:
    """Torch's operations, for any device and any dtype."""

    has_fixed_buffers = True
    """Whether rows decode over buffers of fixed shapes, a chunk of tokens at a time, which a GPU does as one graph."""
    has_cache_attention = False
    """Whether a decoding step computes attention over the KV cache by the compiled loops."""
    wide_residual = False
    """Whether everything between matrix products, the residual stream and attention among it, is in float32."""

    def rms_norm(self, x: Tensor, scale_C: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * scale over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""
        return _tensor(_RMSNorm.apply(x, scale_C, eps))

    def heads(
        self, qkv_TO: Tensor, cos_TD: Tensor, sin: Tensor, queries: int, keys: int, scale: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the heads of queries, keys and values, (T, H, D) and twice (T, J, D), given the output of their projections.

        Queries and keys are normed, if there is a `scale`, (H + J, D), and get rotary positions (Su et al. 2021, arXiv
        2104.09864); `sin` is (T, D / 2).
        """
        return _tensors(_Heads.apply(qkv_TO, cos_TD, sin, queries, keys, scale, eps))

    def gate(self, gate_up_TO: Tensor, activation: str) -> Tensor:
        """Return activation(gate) * up, given both, concatenated along the features (Shazeer 2020, arXiv 2002.05202)."""
        return _tensor(_Gate.apply(gate_up_TO, activation))

    def sample(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the tokens at which the distribution function passes a uniform draw, and their log-probabilities.

        At temperature 0 they are the likeliest tokens, with their log-probabilities at temperature 1.
        """
        if temperature not in (0, 1):
            logits_BV = logits_BV / temperature
        total_B = logits_BV.logsumexp(-1)
        tokens_B = logits_BV.argmax(-1) if temperature == 0 else _inverted(logits_BV, total_B, uniform_B)
        return tokens_B, logits_BV.gather(1, tokens_B[:, None])[:, 0] - total_B


class CpuOps(TorchOps):
    """Torch's operations with compiled sampling, which needs float32 logits; logits are float32 whatever the model's dtype."""

    has_fixed_buffers = False

    def sample(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return kernels.sample(logits_BV, uniform_B, temperature)


class CompiledOps(CpuOps):
    """Compiled loops wherever there is one, on a CPU, for models in float32 or bfloat16.

    In bfloat16, matrix products alone are: what enters one is rounded to it, and what a product returns is added to a residual
    stream in float32, normed, rotated and attended to in float32. So log-probabilities of sampler and learner, which add up
    in different orders, stay close to each other.
    """

    has_cache_attention = True
    wide_residual = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        """What matrix products take."""

    def rms_norm(self, x: Tensor, scale_C: Tensor, eps: float) -> Tensor:
        if x.dim() != 2:  # transformers' own layers pass batches
            return super().rms_norm(x, scale_C, eps)
        if not torch.is_grad_enabled():
            return kernels.normalise(x, scale_C, eps, self.dtype)[0]
        return _tensor(_CompiledRMSNorm.apply(x, scale_C, eps, self.dtype))

    def heads(
        self, qkv_TO: Tensor, cos_TD: Tensor, sin: Tensor, queries: int, keys: int, scale: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not torch.is_grad_enabled():
            qkv = qkv_TO.unflatten(1, (-1, cos_TD.shape[1]))
            return kernels.heads(qkv, cos_TD, sin, scale, eps, queries, keys)[:3]
        return _tensors(_CompiledHeads.apply(qkv_TO, cos_TD, sin, queries, keys, scale, eps))

    def gate(self, gate_up_TO: Tensor, activation: str) -> Tensor:
        if not kernels.has_gate(activation):
            return super().gate(gate_up_TO, activation)
        if not torch.is_grad_enabled():
            return kernels.gate(gate_up_TO, activation)
        return _tensor(_CompiledGate.apply(gate_up_TO, activation))


_PART = 512
"""Tokens of the vocabulary whose probabilities are added up in float32."""


def _inverted(logits_BV: Tensor, total_B: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the tokens at which the distribution function passes a uniform draw.

    A sum over a large vocabulary in float32 would shift the tail. So the part of the vocabulary is found first, among the sums
    of all parts, and then the token in it: both in float64, of which there is little.
    """
    padded = pad(logits_BV, (0, -logits_BV.shape[1] % _PART), value=-torch.inf)
    probabilities = (padded - total_B[:, None]).exp_().unflatten(1, (-1, _PART))
    sums = probabilities.sum(2).double()
    cumulative = sums.cumsum(1)
    target_B = uniform_B * cumulative[:, -1]
    part_B = _passed(sums, cumulative, target_B)[:, None]
    rest_B = target_B - (cumulative - sums).gather(1, part_B)[:, 0]
    inside = probabilities.gather(1, part_B[:, :, None].expand(-1, -1, _PART))[:, 0].double()
    return part_B[:, 0] * _PART + _passed(inside, inside.cumsum(1), rest_B)


def _passed(terms: Tensor, cumulative: Tensor, target_B: Tensor) -> Tensor:
    """Return the index at which the sum of each row's terms passes its target: the last one that adds to it, if none does.

    A GPU adds up in parts, so that the sum may still change at a term of 0, such as what is no token.
    """
    adds = terms > cumulative[:, -1:] * 2**-53
    last_B = (adds * torch.arange(terms.shape[1], device=terms.device)).amax(1)
    return torch.minimum(torch.searchsorted(cumulative, target_B[:, None], right=True)[:, 0], last_B)


def ops_for(dtype: torch.dtype, device: torch.device) -> TorchOps:
    """Return the fastest operations for models of this dtype on this device."""
    if device.type != "cpu":
        return TorchOps()
    return CompiledOps(dtype) if dtype in (torch.float32, torch.bfloat16) else CpuOps()


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two matrices, or of two batches of them, in float32 or wider."""
    if a.is_cuda and a.dtype.itemsize < 4:
        # A GPU adds up in float32, and need not round the sum.
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def _tensors(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(found, tuple)
    return found


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) over the last dimension, in float32 or wider, and 1 / rms(x)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def _normalised_backward(grad: Tensor, normal: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Write the gradient at x into `out`, given the gradient at x / rms(x), which is overwritten and may be `out`."""
    along = torch.linalg.vecdot(grad, normal).unsqueeze(-1).div_(normal.shape[-1])
    return torch.mul(grad.addcmul_(normal, along, value=-1), inverse, out=out)


class _RMSNorm(torch.autograd.Function):
    """Keeps x / rms(x) for its gradient, and has no gradient for the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        normal, inverse = _normalised(x, eps)
        ctx.save_for_backward(normal, inverse, scale)
        ctx.dtype = x.dtype
        return (normal * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        normal, inverse, scale = ctx.saved_tensors
        grad = grads[0] * scale
        return _normalised_backward(grad, normal, inverse, grad).to(ctx.dtype), None, None


class _CompiledRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, inverse = kernels.normalise(x, scale, eps, dtype)
        ctx.save_for_backward(x, inverse, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, inverse, scale = ctx.saved_tensors
        return kernels.normalise_backward(grads[0], x, scale, inverse), None, None, None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_TO: Tensor, cos_TD: Tensor, sin: Tensor, queries: int, keys: int, scale: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        qkv, rotated = qkv_TO.unflatten(1, (-1, cos_TD.shape[1])), queries + keys
        x = qkv[:, :rotated]
        if scale is not None:
            normal, inverse = _normalised(x, eps)
            ctx.save_for_backward(cos_TD, sin, scale, normal, inverse)
            x = normal * scale
        else:
            ctx.save_for_backward(cos_TD, sin, scale)
        query, key = _rotate(x, cos_TD, sin, 1).to(qkv_TO.dtype).split((queries, keys), 1)
        return query, key, qkv[:, rotated:].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_TD, sin, scale, *rest = ctx.saved_tensors
        d_query, d_keys, d_values = grads
        d_rotated = torch.cat([d_query, d_keys], 1)
        tokens, rotated, size = d_rotated.shape
        d_heads = d_rotated.new_empty(tokens, rotated + d_values.shape[1], size)
        d_heads[:, rotated:] = d_values
        dx = _rotate(d_rotated, cos_TD, sin, -1)
        if scale is not None:
            normal, inverse = rest
            _normalised_backward(dx.mul_(scale), normal, inverse, d_heads[:, :rotated])
        else:
            d_heads[:, :rotated] = dx
        return d_heads.flatten(1), None, None, None, None, None, None


class _CompiledHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_TO: Tensor, cos_TD: Tensor, sin: Tensor, queries: int, keys: int, scale: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        qkv = qkv_TO.unflatten(1, (-1, cos_TD.shape[1]))
        query, key, value, inverse = kernels.heads(qkv, cos_TD, sin, scale, eps, queries, keys)
        ctx.save_for_backward(cos_TD, sin, scale, qkv, inverse)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_TD, sin, scale, qkv, inverse = ctx.saved_tensors
        d_query, d_keys, d_values = grads
        d_heads = kernels.heads_backward((d_query, d_keys, d_values), qkv, cos_TD, sin, scale, inverse)
        return d_heads.flatten(1), None, None, None, None, None, None


def _rotate(x: Tensor, cos_TD: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotate each pair (i, i + D / 2) of a head by its token's angle, or back if `sign` is -1, in the dtype of the angles."""
    half, x = x.shape[-1] // 2, x.to(cos_TD.dtype)
    y = x * cos_TD[:, None]
    sin = sin[:, None]
    y[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return y


class _Gate(torch.autograd.Function):
    """Has its own backward, which writes the gradients of gate and up straight into one concatenated tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up_TO: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        gate, up = gate_up_TO.chunk(2, 1)
        acted = silu(gate) if activation == "silu" else gelu(gate, approximate=GATES[activation])
        ctx.save_for_backward(gate_up_TO, acted)
        return acted * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        gate_up_TO, acted = ctx.saved_tensors
        gate, up = gate_up_TO.chunk(2, 1)
        d_gate_up = torch.empty_like(gate_up_TO)
        d_gate, d_up = d_gate_up.chunk(2, 1)
        torch.mul(grads[0], acted, out=d_up)
        d_acted = grads[0] * up
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(d_acted, gate, grad_input=d_gate)
        else:
            torch.ops.aten.gelu_backward.grad_input(d_acted, gate, approximate=GATES[ctx.activation], grad_input=d_gate)
        return d_gate_up, None


class _CompiledGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TO: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate_up_TO)
        return kernels.gate(gate_up_TO, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up_TO,) = ctx.saved_tensors
        return kernels.gate_backward(grads[0], gate_up_TO, ctx.activation), None
