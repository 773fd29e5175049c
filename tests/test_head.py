"""Log-probabilities without logits equal those of torch, and so do their gradients."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import neuromas.head
from neuromas.backbone import Backbone
from neuromas.config import AdapterConfig
from neuromas.head import chosen_logprobs
from neuromas.reinforce import Batch
from neuromas.types import Completion, Sample


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [1, 3 * 50, 2**24])
def test_chosen_logprobs_equal_cross_entropy(
    bias: bool, temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuromas.head, "LOGITS_AT_ONCE", at_once)
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


def test_a_model_that_bounds_its_logits_keeps_its_own_way() -> None:
    plain, bounded = Backbone.tiny(), Backbone.tiny()
    assert plain._plain_head is plain.model.get_output_embeddings()
    forward = bounded.model.forward

    def bound(**kwargs: Any) -> Any:
        result: Any = forward(**kwargs)
        result.logits = 0.5 * torch.tanh(result.logits)
        return result

    bounded.model.forward = bound
    assert bounded._plain_head is None
    named = Backbone.tiny()
    named.model.config.final_logit_softcapping = 30.0
    assert named._plain_head is None


def test_both_ways_give_the_same_log_probabilities() -> None:
    found = []
    for keeps_its_own_way in (False, True):
        backbone = Backbone.tiny()
        bank = backbone.add_adapters((1, 2), AdapterConfig(rank=2), seed=0)
        if keeps_its_own_way:
            backbone.model.config.final_logit_softcapping = 30.0
        prompt = backbone.prompt("Is it so?", "Say it.")
        completions = [Completion(n, prompt, Sample((20, 21, 22), (0.0,) * 3, "", True, 0), ()) for n in (1, 2)]
        batch = Batch(tuple((completion, 1.0) for completion in completions), 1, (1, 2), 0.8, "all")
        logprobs = backbone.logprobs(next(batch.split(8, backbone.device)).rows)
        logprobs.sum().backward()
        grads = [parameter.grad for parameter in bank.parameters().values() if parameter.grad is not None]
        found.append(torch.cat([logprobs.detach(), *map(torch.flatten, grads)]))
    assert torch.allclose(*found, atol=1e-5)
    assert found[0].abs().max() > 0.1
