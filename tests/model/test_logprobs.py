"""Log-probabilities that are computed in chunks equal those of torch, and so do their gradients."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import neuromas.model.logprobs
from neuromas.model.logprobs import chosen_logprobs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [1, 3 * 50, 2**24])
def test_chosen_logprobs_equal_cross_entropy(
    bias: bool, temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuromas.model.logprobs, "LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 50, bias=bias).double().requires_grad_(False)
    hidden = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 50, (11,), generator=generator)
    weight = torch.randn(11, generator=generator)
    ours_in, plain_in = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours = chosen_logprobs(ours_in, head, ids, temperature)
    plain = -cross_entropy(head(plain_in) / temperature, ids, reduction="none")
    (ours * weight).sum().backward()
    (plain * weight).sum().backward()
    assert ours_in.grad is not None
    assert plain_in.grad is not None
    assert torch.allclose(ours.double(), plain, atol=1e-5)
    assert torch.allclose(ours_in.grad, plain_in.grad, atol=1e-5)
