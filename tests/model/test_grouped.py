"""Adapters of all nodes as grouped products, by torch's implementation of them on a CPU."""

import pytest
import torch
from models import randomise
from torch import Tensor, nn

from neuromas.config import AdapterConfig
from neuromas.model.adapters import AdapterBank
from neuromas.model.grouped import has_grouped_products
from neuromas.model.lora import LinearGroup, Route

NODES = (1, 2, 3)


def updated(groups: bool, tokens_of: list[int], kept: bool, *, rank: int) -> list[Tensor]:
    """Return the output of two modules with the same input, of which the second has adapters, or both, and all gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({"q_proj": nn.Linear(16, 8), "k_proj": nn.Linear(16, 24)}).requires_grad_(False)
    bank = AdapterBank(model, NODES, AdapterConfig(rank=rank, target_modules=("q_proj", "k_proj")), 0)
    randomise(bank)
    bank.state.groups = groups
    group = LinearGroup([model["q_proj"], model["k_proj"]])
    nodes_T = torch.tensor(tokens_of)
    x = torch.randn(len(nodes_T), 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    residual = torch.randn(len(nodes_T), 32, generator=torch.Generator().manual_seed(2))
    if kept:
        with torch.no_grad(), bank.prepared(), bank.routed(nodes_T):
            assert (bank.state.route is not None and bank.state.route.groups is not None) == groups
            return [group(x, residual), group(x, residual), group(x)]
    with bank.routed(nodes_T):
        y = group(x, residual)
    (y * residual.cos()).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in bank.parameters().values() if p.grad is not None)]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("tokens_of", [[0] * 5 + [2] * 4 + [1], [1] * 3, [2, 0, 2, 2]])
def test_grouped_products_give_what_separate_ones_give(tokens_of: list[int], rank: int, kept: bool) -> None:
    ours, theirs = (updated(groups, tokens_of, kept, rank=rank) for groups in (True, False))
    assert len(ours) == len(theirs) == (3 if kept else 6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_segment_is_a_group_and_a_node_may_have_several() -> None:
    route = Route.of_groups(torch.tensor([2, 2, 0, 2]))
    assert route.groups is not None
    assert [part.tolist() for part in route.groups] == [[2, 0, 2], [2, 3, 4]]


def test_a_kernel_for_grouped_products_is_there_from_hopper_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, half = torch.device("cuda"), torch.bfloat16
    for capability, dtype, features, expected in [
        ((9, 0), half, [64, 128], True), ((10, 0), half, [64], True), ((8, 6), half, [64], False),
        ((9, 0), torch.float32, [64], False), ((9, 0), half, [64, 36], False),
    ]:  # fmt: skip
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, found=capability: found)
        assert has_grouped_products(cuda, dtype, features) is expected
    assert not has_grouped_products(torch.device("cpu"), half, [64])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setenv("NEUROMAS_WITHOUT", "groups")
    assert not has_grouped_products(cuda, half, [64])
