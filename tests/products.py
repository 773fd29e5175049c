"""Lists the products and compiled loops of a computation, in order, with the layout of their inputs.

Two computations with equal lists and equal inputs have equal results, bit for bit, on every processor: its kernel and the
kernel's order of summation follow from shapes, strides and alignment.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import neuromas.model.kernels.decoding
import neuromas.model.kernels.head
import neuromas.model.kernels.layers

_ADD_UP = ("mm", "matmul", "linear", "attention", "softmax", "logsumexp", "embedding")
"""Parts of the names of operations that sum products."""
Layout = tuple[tuple[int, ...], tuple[int, ...], int]
Product = tuple[str, tuple[Layout, ...]]


def _described(name: str, arguments: object) -> Product:
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return name, tuple((tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())) for tensor in tensors)


class _Listing(TorchDispatchMode):
    def __init__(self, products: list[Product]) -> None:
        super().__init__()
        self._products = products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in func.__name__ for part in _ADD_UP):
            self._products.append(_described(func.__name__, (args, kwargs)))
        return func(*args, **(kwargs or {}))


@contextmanager
def listed() -> Iterator[list[Product]]:
    """List the products of torch and the compiled loops that are run inside."""
    products: list[Product] = []
    run = neuromas.model.kernels.layers.run

    def listing(loop: Callable[..., None], *arguments: Any) -> None:
        products.append(_described(loop.__name__, arguments))
        run(loop, *arguments)

    with pytest.MonkeyPatch.context() as patch, _Listing(products):
        for module in (neuromas.model.kernels.layers, neuromas.model.kernels.decoding, neuromas.model.kernels.head):
            patch.setattr(module, "run", listing)
        yield products


def loops_of(products: list[Product]) -> list[str]:
    """Return the names of the compiled loops among products; torch's have a dot."""
    return [name for name, _ in products if "." not in name]
