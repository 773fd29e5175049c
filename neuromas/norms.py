"""Root-mean-square norms of a frozen backbone (Zhang and Sennrich 2019, arXiv 1910.07467), with half the memory traffic."""

from typing import Any

import torch
from torch import Tensor, nn


class _Normalise(torch.autograd.Function):
    """x / rms(x) * scale. Written out: its gradient needs what it returns without the scale, and no gradient of the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).sqrt_()
        normal = x / rms
        ctx.save_for_backward(normal, rms, scale)
        return normal * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        normal, rms, scale = ctx.saved_tensors
        grad = grads[0] * scale
        along = torch.linalg.vecdot(grad, normal).unsqueeze(-1).div_(normal.shape[-1])
        return grad.addcmul_(normal, along, value=-1).div_(rms), None, None


class RMSNorm(nn.Module):
    """Does what a transformers norm with this weight does; `offset` is added to the weight (1 in Gemma)."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self._eps, self._offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight + self._offset if self._offset else self.weight
        y = _Normalise.apply(x, scale, self._eps)
        assert isinstance(y, Tensor)
        return y


def replace_norms(model: nn.Module) -> int:
    """Put ours in place of every float32 norm that it equals, tried on random numbers; return how many. Others stay."""
    count = 0
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
            continue
        if weight.dtype != torch.float32 or isinstance(module, RMSNorm):
            continue
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
        for offset in (0.0, 1.0):
            ours = RMSNorm(weight, eps, offset)
            with torch.no_grad():
                same = torch.allclose(ours(x), module(x), rtol=1e-5, atol=1e-6)
            if same:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, ours)
                count += 1
                break
    return count
