"""What a layer computes between its matrix products, in one of two ways: torch's operations, or compiled loops.

The way is chosen once, when a model is loaded (`ops_for`). Gradients are written out where torch would pass over memory more
often; all weights here are frozen, so none of them is with respect to a weight.

Shapes beyond the legend: H size of a hidden state, C columns of a product, X heads of queries and keys, D size of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from neuromas.model import kernels

GATES = {"silu": None, "gelu": "none", "gelu_pytorch_tanh": "tanh"}
"""What torch calls an activation's way of computing, by transformers' name; silu has one way."""


class TorchOps:
    """Torch's operations: any device, any number format."""

    reads_cache = False
    """Whether a decoding step reads the KV cache by the compiled loops."""

    def rms_norm(self, x: Tensor, scale_H: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * scale over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""
        return _tensor(_RMSNorm.apply(x, scale_H, eps))

    def heads(
        self, columns_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, queries: int, keys: int, scale_XD: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a product's columns as heads: queries and keys normed, if there is a scale, and rotated; values as they are.

        Rotary positions (Su et al. 2021, arXiv 2104.09864).
        """
        return _tensors(_Heads.apply(columns_TC, cos_TD, sin_TD, queries, keys, scale_XD, eps))

    def gate(self, both_TC: Tensor, activation: str) -> Tensor:
        """Return activation(gate) * up, of both beside each other (Shazeer 2020, arXiv 2002.05202)."""
        return _tensor(_Gate.apply(both_TC, activation))

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the tokens at which the distribution function passes a uniform draw, and their log-probabilities.

        At temperature 0 the likeliest tokens, with their log-probabilities at temperature 1.
        """
        if temperature not in (0, 1):
            logits_BV = logits_BV / temperature
        logprobs_BV = logits_BV.log_softmax(-1)
        if temperature == 0:
            tokens_B = logits_BV.argmax(-1)
        else:
            # In float64: a sum over a large vocabulary in float32 would shift the tail.
            cumulative = logprobs_BV.exp().double().cumsum(-1)
            target_B = uniform_B * cumulative[:, -1]
            tokens_B = torch.searchsorted(cumulative, target_B[:, None], right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
        return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


class CpuOps(TorchOps):
    """The same with compiled draws: logits are float32 whatever the model's number format."""

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return kernels.draw(logits_BV, uniform_B, temperature)


class CompiledOps(CpuOps):
    """Compiled loops wherever there is one: float32 on a CPU."""

    reads_cache = True

    def rms_norm(self, x: Tensor, scale_H: Tensor, eps: float) -> Tensor:
        if x.dim() != 2:  # transformers' own layers pass batches
            return super().rms_norm(x, scale_H, eps)
        if not torch.is_grad_enabled():
            return kernels.normalise(x, scale_H, eps)[0]
        return _tensor(_CompiledRMSNorm.apply(x, scale_H, eps))

    def heads(
        self, columns_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, queries: int, keys: int, scale_XD: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not torch.is_grad_enabled():
            columns_TXD = columns_TC.unflatten(1, (-1, cos_TD.shape[1]))
            return kernels.heads(columns_TXD, cos_TD, sin_TD, scale_XD, eps, queries, keys)[:3]
        return _tensors(_CompiledHeads.apply(columns_TC, cos_TD, sin_TD, queries, keys, scale_XD, eps))

    def gate(self, both_TC: Tensor, activation: str) -> Tensor:
        if not kernels.has_gate(activation):
            return super().gate(both_TC, activation)
        if not torch.is_grad_enabled():
            return kernels.gate(both_TC, activation)
        return _tensor(_CompiledGate.apply(both_TC, activation))


def ops_for(dtype: torch.dtype, device: torch.device) -> TorchOps:
    """Return the fastest way for models of a number format on a device."""
    if device.type != "cpu":
        return TorchOps()
    return CompiledOps() if dtype == torch.float32 else CpuOps()


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
    """Write the gradient at x into `out`, given that at x / rms(x), which is overwritten and may be `out`."""
    along = torch.linalg.vecdot(grad, normal).unsqueeze(-1).div_(normal.shape[-1])
    return torch.mul(grad.addcmul_(normal, along, value=-1), inverse, out=out)


class _RMSNorm(torch.autograd.Function):
    """Its gradient needs what it returns without the scale, and no gradient of the scale."""

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
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        y, inverse = kernels.normalise(x, scale, eps)
        ctx.save_for_backward(x, inverse, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, scale = ctx.saved_tensors
        return kernels.normalise_backward(grads[0], x, scale, inverse), None, None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, columns_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, queries: int, keys: int, scale_XD: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        columns_TXD, rotated = columns_TC.unflatten(1, (-1, cos_TD.shape[1])), queries + keys
        x = columns_TXD[:, :rotated]
        if scale_XD is not None:
            normal, inverse = _normalised(x, eps)
            ctx.save_for_backward(cos_TD, sin_TD, scale_XD, normal, inverse)
            x = normal * scale_XD
        else:
            ctx.save_for_backward(cos_TD, sin_TD, scale_XD)
        query, key = _rotate(x, cos_TD, sin_TD, 1).to(columns_TC.dtype).split((queries, keys), 1)
        return query, key, columns_TXD[:, rotated:].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_TD, sin_TD, scale_XD, *rest = ctx.saved_tensors
        d_query, d_keys, d_values = grads
        d_rotated = torch.cat([d_query, d_keys], 1)
        tokens, rotated, size = d_rotated.shape
        d_heads = d_rotated.new_empty(tokens, rotated + d_values.shape[1], size)
        d_heads[:, rotated:] = d_values
        dx = _rotate(d_rotated, cos_TD, sin_TD, -1)
        if scale_XD is not None:
            normal, inverse = rest
            _normalised_backward(dx.mul_(scale_XD), normal, inverse, d_heads[:, :rotated])
        else:
            d_heads[:, :rotated] = dx
        return d_heads.flatten(1), None, None, None, None, None, None


class _CompiledHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, columns_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, queries: int, keys: int, scale_XD: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        columns_TXD = columns_TC.unflatten(1, (-1, cos_TD.shape[1]))
        query, key, value, inverse = kernels.heads(columns_TXD, cos_TD, sin_TD, scale_XD, eps, queries, keys)
        ctx.save_for_backward(cos_TD, sin_TD, scale_XD, columns_TXD, inverse)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_TD, sin_TD, scale_XD, columns_TXD, inverse = ctx.saved_tensors
        d_query, d_keys, d_values = grads
        d_heads = kernels.heads_backward((d_query, d_keys, d_values), columns_TXD, cos_TD, sin_TD, scale_XD, inverse)
        return d_heads.flatten(1), None, None, None, None, None, None


def _rotate(x_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: int) -> Tensor:
    """Turn each pair (i, i + D/2) of a head by its token's angle, or back; in float32 or wider, as the angles are."""
    half, x_TXD = x_TXD.shape[-1] // 2, x_TXD.to(cos_TD.dtype)
    y = x_TXD * cos_TD[:, None]
    sin = sin_TD[:, None]
    y[..., :half].addcmul_(x_TXD[..., half:], sin, value=-sign)
    y[..., half:].addcmul_(x_TXD[..., :half], sin, value=sign)
    return y


class _Gate(torch.autograd.Function):
    """Written out: the gradients of gate and up are made where they are read, beside each other."""

    @staticmethod
    def forward(ctx: Any, both_TC: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        gate, up = both_TC.chunk(2, 1)
        acted = silu(gate) if activation == "silu" else gelu(gate, approximate=GATES[activation])
        ctx.save_for_backward(both_TC, acted)
        return acted * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        both_TC, acted = ctx.saved_tensors
        gate, up = both_TC.chunk(2, 1)
        d_both = torch.empty_like(both_TC)
        d_gate, d_up = d_both.chunk(2, 1)
        torch.mul(grads[0], acted, out=d_up)
        d_acted = grads[0] * up
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(d_acted, gate, grad_input=d_gate)
        else:
            torch.ops.aten.gelu_backward.grad_input(d_acted, gate, approximate=GATES[ctx.activation], grad_input=d_gate)
        return d_both, None


class _CompiledGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_TC: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(both_TC)
        return kernels.gate(both_TC, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (both_TC,) = ctx.saved_tensors
        return kernels.gate_backward(grads[0], both_TC, ctx.activation), None
