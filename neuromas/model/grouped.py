"""Adapters of all nodes as grouped products: a call multiplies each node's tokens by that node's matrices.

W x is one product of all tokens. Two grouped products add scaling B A x, whatever the number of nodes and of modules with the
same input: the A of those are concatenated, and their B are blocks of one matrix. Gradients are torch's own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from neuromas.model.left_out import is_left_out

_ALIGNED = 16
"""Rows of the matrices of a grouped product start at multiples of this many bytes."""


def has_grouped_products(device: torch.device, dtype: torch.dtype, features: Sequence[int]) -> bool:
    """Say whether a device has a kernel for grouped products of matrices with so many features: a Hopper GPU or later."""
    fits = device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    return fits and not is_left_out("groups") and all(count * dtype.itemsize % _ALIGNED == 0 for count in features)


def adapters_in_blocks(
    scaling: float, every_a: Sequence[Tensor], every_b: Sequence[Tensor], columns: Sequence[slice], outputs: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the A of all nodes and modules, (N, ranks, I), and scaling times their B, (N, ranks, O).

    Given is for each module its A, (N, R, I), its B, (N, O, R), and the columns of the product that are its own. Ranks are
    filled up with 0 to the alignment of grouped products.
    """
    fill = -sum(a.shape[1] for a in every_a) % (_ALIGNED // dtype.itemsize)
    bs = [functional.pad(b.mT, (own.start, outputs - own.stop)) for b, own in zip(every_b, columns, strict=True)]
    a, b = (functional.pad(torch.cat(list(parts), 1), (0, 0, 0, fill)) for parts in (every_a, bs))
    return a.to(dtype), (scaling * b).to(dtype)


def grouped_update(x_TI: Tensor, a: Tensor, b: Tensor, groups: tuple[Tensor, Tensor]) -> Tensor:
    """Return scaling B A x of each token, given the node of each segment and one past its last token."""
    nodes, ends = groups
    return functional.grouped_mm(functional.grouped_mm(x_TI, a[nodes].mT, offs=ends), b[nodes], offs=ends)
