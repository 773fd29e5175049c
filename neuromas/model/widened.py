"""Products with adapters in bfloat16 on a CPU: W x + scaling B A x as one product, `[W, scaling B] [x, A x]`.

A product in bfloat16 takes so little time that those with narrow adapters beside it, which read and write its whole result,
would take half as much again. And what a product returns is rounded to 8 bits: here once, after both parts are added.
W is copied into a wider matrix, whose last columns take the B of the nodes of a forward; A x is masked to the token's node.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 32
"""Rows of the wider matrix start at a multiple of this many numbers, 64 bytes."""


class Widened:
    """The frozen weights of some modules, (O, I), and room for the B of their adapters: N x modules x R columns."""

    def __init__(self, weight: Tensor, columns: tuple[slice, ...], ranks: int) -> None:
        self.features, self.columns, self.ranks = weight.shape[1], columns, ranks
        self.holds: range | None = None
        """The nodes whose B are held, as long as adapters do not change."""
        width = -(-(self.features + ranks) // _ALIGNED) * _ALIGNED
        # A module's rows keep 0 in the columns of the other modules. Made while sampling, it serves the learner too.
        with torch.inference_mode(False):
            self._matrix = weight.new_zeros(weight.shape[0], width)
            self._matrix[:, : self.features] = weight
        self._used = self.features + ranks

    def hold(self, bs: Sequence[Tensor]) -> None:
        """Write scaling times each module's B, (N, O, R), for the nodes of a forward."""
        nodes, _, rank = bs[0].shape
        self._used = self.features + nodes * len(bs) * rank
        for index, (where, b) in enumerate(zip(self.columns, bs, strict=True)):
            block = self._matrix[where, self.features : self._used].unflatten(1, (nodes, len(bs), rank))
            block[:, :, index] = b.transpose(0, 1)

    def with_ranks(self, x_TI: Tensor, a: Tensor, mask_TN: Tensor | None) -> Tensor:
        """Return `[x, A x]`, masked to each token's node; `a` is (N x modules x R, I)."""
        both = x_TI.new_empty(x_TI.shape[0], self.features + a.shape[0])
        both[:, : self.features] = x_TI
        torch.mm(x_TI, a.T, out=both[:, self.features :])
        _mask(both[:, self.features :], mask_TN)
        return both

    def product(self, both: Tensor) -> Tensor:
        """Return W x + scaling B A x, given `[x, A x]`."""
        return both @ self._matrix[:, : self._used].T

    def back(self, dy_TO: Tensor, *, ranks_only: bool) -> Tensor:
        """Return the gradient at `[x, A x]`, or at A x alone."""
        return dy_TO @ self._matrix[:, self.features if ranks_only else 0 : self._used]


def _mask(inner: Tensor, mask_TN: Tensor | None) -> None:
    if mask_TN is not None:
        inner.unflatten(1, (mask_TN.shape[1], -1)).mul_(mask_TN[:, :, None])


class WidenedLinear(torch.autograd.Function):
    """Computes a widened product, and the gradients at x and at the A and B of the nodes of a forward."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, wide: Widened, mask_TN: Tensor | None, nodes: slice, scaling: float, *halves: Tensor
    ) -> Tensor:
        a = torch.stack([half[nodes].to(x_TI.dtype) for half in halves[::2]], 1).flatten(0, 2)
        bs = [(scaling * half[nodes]).to(x_TI.dtype) for half in halves[1::2]]
        wide.holds = None
        wide.hold(bs)
        both = wide.with_ranks(x_TI, a, mask_TN)
        ctx.save_for_backward(both, mask_TN, a, *bs)
        ctx.wide, ctx.nodes, ctx.scaling, ctx.like = wide, nodes, scaling, [(half.shape, half.dtype) for half in halves]
        return wide.product(both)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        both, mask_TN, a, *bs = ctx.saved_tensors
        wide, dy_TO = ctx.wide, grads[0].contiguous()
        # Another forward may have written other nodes since.
        wide.holds = None
        wide.hold(bs)
        needs_dx = ctx.needs_input_grad[0]
        d_both = wide.back(dy_TO, ranks_only=not needs_dx)
        d_inner = d_both[:, wide.features :] if needs_dx else d_both
        _mask(d_inner, mask_TN)
        dx_TI = torch.addmm(d_both[:, : wide.features], d_inner, a) if needs_dx else None
        shape = len(bs[0]), len(bs), -1
        d_a = (d_inner.T @ both[:, : wide.features]).unflatten(0, shape)
        d_b = (both[:, wide.features :].T @ dy_TO).unflatten(0, shape)
        d_halves = [torch.zeros(size, dtype=dtype) for size, dtype in ctx.like]
        for index, where in enumerate(wide.columns):
            d_halves[2 * index][ctx.nodes] = d_a[:, index]
            d_halves[2 * index + 1][ctx.nodes] = ctx.scaling * d_b[:, index, :, where].mT.float()
        return dx_TI, None, None, None, None, *d_halves
