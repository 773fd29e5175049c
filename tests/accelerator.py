"""The code for other devices than a CPU, run on a CPU: by torch's own implementation there of the same calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuromas.model.ops import TorchOps


@contextmanager
def flex_on_cpu(block: int = 16) -> Iterator[None]:
    """Have attention computed by torch's flex attention, with its gradients, which torch otherwise refuses on a CPU.

    Torch computes every score there and looks at no table of blocks. These are smaller here, so that there are several.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromas.model.flex.uses_flex", lambda _: True)
        patch.setattr("neuromas.model.flex.BLOCK", block)
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
        patch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


@contextmanager
def other_operations() -> Iterator[None]:
    """Have backbones that are loaded inside compute by the operations for other devices, attention aside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromas.model.ops.CompiledOps", lambda _: TorchOps())
        patch.setattr("neuromas.model.attention._has_kernel", lambda *_: False)
        yield


class Recorded(TorchDispatchMode):
    """Lists every operation of torch with the layout of all its tensors, and where those that outlive it lie."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.operations.append((str(func), tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)))
        return func(*args, **(kwargs or {}))

    def names(self) -> set[str]:
        return {name.split(".")[1] for name, _ in self.operations}
