"""The code for other devices than a CPU, run on a CPU: by torch's own implementation there of the same calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuromas.model.ops import TorchOps
from neuromas.rollout.fixed_decoding import Graphs


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


READS_BACK = {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "unique_dim", "masked_select", "lift_fresh"}
"""Operations that wait for a GPU, or bring something to it, neither of which can be recorded."""


class Graph(TorchDispatchMode):
    """Stands for a graph of a GPU: what is recorded leaves no trace, and a replay does the same on the same addresses."""

    made: ClassVar[list["Graph"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.replays, self._before = 0, dict[int, tuple[UntypedStorage, UntypedStorage]]()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func.overloadpacket.__name__ not in READS_BACK
        named = {argument.name: argument for argument in func._schema.arguments}
        given = [*zip(named, args, strict=False), *kwargs.items()]
        for written in (value for name, value in given if (alias := named[name].alias_info) and alias.is_write):
            storage = written.untyped_storage()
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, _tensors(out)))
        return out

    def forget(self) -> None:
        """Undo what recording has done to tensors, as a GPU does nothing meanwhile."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, found in self._calls:
            for old, new in zip(found, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def graphs_on_cpu() -> Iterator[list[Graph]]:
    """Have decoding over fixed buffers recorded and replayed; yield what is recorded."""

    @contextmanager
    def record(graph: Graph, pool: object) -> Iterator[None]:
        with graph:
            yield
        graph.forget()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromas.rollout.torch_engine.Graphs", lambda *, records: Graphs(records=True))
        patch.setattr("torch.cuda.graph_pool_handle", object)
        patch.setattr("torch.cuda.CUDAGraph", Graph)
        patch.setattr("torch.cuda.graph", record)
        patch.setattr(Graph, "made", [])
        yield Graph.made


class Recorded(TorchDispatchMode):
    """Lists every operation of torch with the layout of all its tensors, and where those that outlive it lie."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = _tensors((args, kwargs))
        self.operations.append((str(func), tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)))
        return func(*args, **(kwargs or {}))

    def names(self) -> set[str]:
        return {name.split(".")[1] for name, _ in self.operations}
