"""Root-mean-square norms of a frozen backbone (Zhang and Sennrich 2019, arXiv 1910.07467), with half the memory traffic."""

from typing import Any

import torch
from torch import Tensor, nn

from neuromas.model import kernels


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) over the last dimension, in float32 or wider, and 1 / rms(x)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def normalised_backward(grad: Tensor, normal: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Write the gradient at x into `out`, given that at x / rms(x), which is overwritten and may be `out`."""
    along = torch.linalg.vecdot(grad, normal).unsqueeze(-1).div_(normal.shape[-1])
    return torch.mul(grad.addcmul_(normal, along, value=-1), inverse, out=out)


def _is_compiled(x: Tensor) -> bool:
    return x.dim() == 2 and kernels.fit(x)


class _Normalise(torch.autograd.Function):
    """x / rms(x) * scale. Written out: its gradient needs what it returns without the scale, and no gradient of the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.compiled = _is_compiled(x)
        if ctx.compiled:
            y, inverse = kernels.normalise(x, scale, eps)
            ctx.save_for_backward(x, inverse, scale)
            return y
        normal, inverse = normalised(x, eps)
        ctx.save_for_backward(normal, inverse, scale)
        ctx.dtype = x.dtype
        return (normal * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.compiled:
            x, inverse, scale = ctx.saved_tensors
            return kernels.normalise_backward(grads[0], x, scale, inverse), None, None
        normal, inverse, scale = ctx.saved_tensors
        grad = grads[0] * scale
        return normalised_backward(grad, normal, inverse, grad).to(ctx.dtype), None, None


class RMSNorm(nn.Module):
    """Does what a transformers norm with this weight does; `offset` is added to the weight (1 in Gemma)."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        # In bfloat16, 1 + weight would lose digits.
        self.scale = weight.data.to(torch.promote_types(weight.dtype, torch.float32)) + offset

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and _is_compiled(x):
            return kernels.normalise(x, self.scale, self.eps)[0]
        y = _Normalise.apply(x, self.scale, self.eps)
        assert isinstance(y, Tensor)
        return y


def replace_norms(model: nn.Module) -> int:
    """Put ours in place of every norm that it equals, tried on random numbers; return how many. Others stay."""
    count = 0
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
            continue
        if isinstance(module, RMSNorm):
            continue
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        # In bfloat16 both round to 8 bits, some models twice.
        rtol, atol = (1e-5, 1e-6) if weight.dtype.itemsize >= 4 else (0.01, 1e-6)
        for offset in (0.0, 1.0):
            ours = RMSNorm(weight, eps, offset)
            with torch.no_grad():
                same = torch.allclose(ours(x), module(x), rtol=rtol, atol=atol)
            if same:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, ours)
                count += 1
                break
    return count
