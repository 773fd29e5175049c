"""Log-probabilities that are computed in chunks equal those of torch, and so do their gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

import neuromas.model.logprobs
from neuromas.model.logprobs import chosen_logprobs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [1, 3 * 50, 2**24])
def test_chosen_logprobs_and_entropies_equal_those_of_torch(
    bias: bool, temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuromas.model.logprobs, "LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 50, bias=bias).double().requires_grad_(False)
    hidden = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 50, (11,), generator=generator)
    weights_2K = torch.randn(2, 11, generator=generator)

    def gradient(compute: Callable[[Tensor], Sequence[Tensor | None]], weights: Tensor) -> tuple[list[Tensor], Tensor]:
        leaf = hidden.clone().requires_grad_()
        values = [value for value in compute(leaf) if value is not None]
        (torch.stack(values) * weights[: len(values)]).sum().backward()
        assert leaf.grad is not None
        return [value.detach().double() for value in values], leaf.grad

    def plain(leaf: Tensor) -> list[Tensor]:
        logits = head(leaf) / temperature
        return [-cross_entropy(logits, ids, reduction="none"), Categorical(logits=logits).entropy()]

    def ours(leaf: Tensor) -> Sequence[Tensor | None]:
        return chosen_logprobs(leaf, head, ids, temperature, entropy=True)

    # Both together, and each alone.
    for weights in (weights_2K, weights_2K * torch.tensor([[1.0], [0.0]]), weights_2K * torch.tensor([[0.0], [1.0]])):
        (values, grad), (expected, expected_grad) = gradient(ours, weights), gradient(plain, weights)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-5)
    # Without the entropy the numbers are the same, bit for bit.
    alone, grad = gradient(lambda leaf: chosen_logprobs(leaf, head, ids, temperature), weights_2K)
    assert torch.equal(alone[0], gradient(ours, weights_2K)[0][0])
    assert torch.equal(grad, gradient(lambda leaf: ours(leaf)[:1], weights_2K)[1])
