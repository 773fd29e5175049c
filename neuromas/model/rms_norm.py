"""Root-mean-square norms (Zhang and Sennrich 2019, arXiv 1910.07467) of a frozen backbone, with half the memory traffic."""

import torch
from torch import Tensor, nn

from neuromas.model.ops import TorchOps, ops_for


class RMSNorm(nn.Module):
    """Computes what a norm of transformers with this weight computes; `offset` is added to the weight (1 in Gemma)."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float, ops: TorchOps) -> None:
        super().__init__()
        self.weight, self.eps, self.ops = weight, eps, ops
        # In bfloat16, 1 + weight would lose digits, so the scale is kept in float32.
        self.scale = weight.data.to(torch.promote_types(weight.dtype, torch.float32)) + offset

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.scale, self.eps)


def replace_norms(model: nn.Module) -> int:
    """Replace every norm by ours if both give equal results on random numbers, and return how many were replaced."""
    count = 0
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
            continue
        if isinstance(module, RMSNorm):
            continue
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        # In bfloat16 both round to 8 bits, and some models round twice.
        rtol, atol = (1e-5, 1e-6) if weight.dtype.itemsize >= 4 else (0.01, 1e-6)
        for offset in (0.0, 1.0):
            ours = RMSNorm(weight, eps, offset, ops_for(weight.dtype, weight.device))
            with torch.no_grad():
                same = torch.allclose(ours(x), module(x), rtol=rtol, atol=atol)
            if same:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, ours)
                count += 1
                break
    return count
