"""Products of a stream of tokens with frozen weights."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def concatenated(weights: Sequence[Tensor]) -> Tensor:
    """Return weights concatenated along the output features: a view if they already lie so in one storage, else a copy."""
    first = weights[0]
    ends = itertools.accumulate((weight.nbytes for weight in weights[:-1]), initial=first.data_ptr())
    one_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if one_storage and all(weight.data_ptr() == end for weight, end in zip(weights, ends, strict=True)):
        return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())
    return torch.cat(list(weights))


def frozen_product(x_TI: Tensor, weight: Tensor, bias: Tensor | None, residual_TO: Tensor | None) -> Tensor:
    """Return W x plus the bias and the residual."""
    if residual_TO is None:
        return functional.linear(x_TI, weight, bias)
    y_TO = torch.addmm(residual_TO, x_TI, weight.T)
    return y_TO if bias is None else y_TO + bias


def write_product(y_TO: Tensor, x_TI: Tensor, weight_IO: Tensor, residual_TO: Tensor | None, segment: slice) -> None:
    """Write one segment of W x plus the residual into `y_TO`."""
    if residual_TO is None:
        torch.mm(x_TI[segment], weight_IO, out=y_TO[segment])
    else:
        torch.addmm(residual_TO[segment], x_TI[segment], weight_IO, out=y_TO[segment])
