"""The divergence from the bare backbone: its numbers against plain transformers, its gradient by enumeration."""

from itertools import product
from pathlib import Path
from typing import Literal

import pytest
import torch
from models import load_backbone, make_model, plain_logprobs, randomise, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from neuromas import Network, Topology
from neuromas.config import AdapterConfig, PromptConfig, Scope
from neuromas.graph.messages import parse
from neuromas.model.policy import Policy
from neuromas.tasks import get_task
from neuromas.training import reinforce
from neuromas.training.divergence import Divergence
from neuromas.types import Completion, Example, Prompt, Rollout, Sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3"), tmp_path_factory.mktemp("bare") / "qwen3")


@pytest.mark.parametrize(("scope", "wording"), [("all", "terse"), ("suffix", "chat")])
def test_it_is_the_sum_of_log_ratios_of_plain_transformers(
    folder: Path, scope: Scope, wording: Literal["terse", "chat"]
) -> None:
    """With wording `chat` node 1 writes two texts, and the header of the second is given: it counts for nothing."""
    backbone = load_backbone(folder)
    network = Network(
        Topology.layered([1, 2, 1]), backbone, adapter=AdapterConfig(rank=2, scope=scope), max_new_tokens=30,
        prompt=PromptConfig(wording=wording),
    )  # fmt: skip
    examples, bare = get_task("navigate").examples("test", 2), Policy(backbone)

    def divergence(tokens_per_micro_batch: int = 10_000) -> Divergence:
        groups = network.rollout(examples, 2, seed=(0,), temperature=0.7)
        return Divergence.of(groups, bare, temperature=0.7, tokens_per_micro_batch=tokens_per_micro_batch)

    assert divergence().per_token() == pytest.approx(0, abs=1e-5)
    randomise(network.adapters)
    found, plain = divergence(), AutoModelForCausalLM.from_pretrained(folder)
    completions = [c for group in found.groups for r in group for c in r.completions]
    assert any(c.sample.given for c in completions) == (wording == "chat")

    def log_ratio(c: Completion) -> float:
        of_bare = plain_logprobs(plain, c, 0.7).tolist()
        return sum(c.sample.logprobs) - sum(p for index, p in enumerate(of_bare) if index not in c.sample.given)

    ratios = [[{c.node: log_ratio(c) for c in r.completions} for r in group] for group in found.groups]
    # Nodes 2 and 3 write to node 4: what one of them writes changes nothing of the other's text.
    for node, counted in ((1, (1, 2, 3, 4)), (2, (2, 4)), (3, (3, 4)), (4, (4,))):
        sums = torch.tensor([[sum(rollout[n] for n in counted) for rollout in group] for group in ratios])
        assert sums.abs().max() > 0.1
        torch.testing.assert_close(found.penalties(node), sums - sums.flip(1), rtol=0, atol=1e-4)
        one_by_one = divergence(tokens_per_micro_batch=1).penalties(node)
        torch.testing.assert_close(one_by_one, found.penalties(node), rtol=0, atol=1e-4)
    total = sum(ratio for group in ratios for rollout in group for ratio in rollout.values())
    assert found.per_token() == pytest.approx(total / sum(len(c.sample.logprobs) for c in completions), abs=1e-4)


@pytest.mark.parametrize("shared_by", [1, 2])
def test_the_expected_gradient_is_that_of_the_divergence_of_whole_rollouts(shared_by: int) -> None:
    """Node 1 writes one of two symbols, node 2 reads it and writes one of two; in a tree two leaves share node 1's text.

    The reward is right for one pair of symbols, so that the gradient of both together is tested.
    """
    coefficient, reward = 0.3, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    head, tail, bare_head, bare_tail = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((2,), (2, 2)) * 2
    )
    parameters = head, tail
    first, second, bare_first, bare_second = (t.log_softmax(-1) for t in (head, tail, bare_head, bare_tail))

    def completion(node: int, read: tuple[int, ...], symbol: int, logprob: Tensor) -> Completion:
        sample = Sample((symbol,), (logprob.item(),), ("x",), stopped=True, adapter_version=0)
        return Completion(node, Prompt(read, (node,)), sample, parse("x", node, (2,) if node == 1 else ()))

    bare = {
        **{(Prompt((), (1,)), (a,), ()): bare_first[a].item() for a in range(2)},
        **{(Prompt((a,), (2,)), (b,), ()): bare_second[a, b].item() for a, b in product(range(2), repeat=2)},
    }
    total = torch.zeros((), dtype=torch.float64)
    for texts in product(range(2), repeat=2):
        before = [text for text in texts for _ in range(shared_by)]
        for answers in product(range(2), repeat=len(before)):
            pairs = list(zip(before, answers, strict=True))
            # Each text is drawn once, however many leaves hold it.
            drawn = [first[a] for a in texts] + [second[a, b] for a, b in pairs]
            probability = torch.stack(drawn).sum().exp().detach()
            group = tuple(
                Rollout(Example("id", "q", "a", ""), i, (completion(1, (), a, first[a]), completion(2, (a,), b, second[a, b])))
                for i, (a, b) in enumerate(pairs)
            )
            divergence, rewards_PG = Divergence([group], bare), torch.stack([reward[a, b] for a, b in pairs])[None]
            of_both = [first[a] for a, _ in pairs], [second[a, b] for a, b in pairs]
            for node, shared, logprobs in zip((1, 2), (shared_by, 1), of_both, strict=True):
                of_reward = reinforce.advantages(rewards_PG, "leave_one_out", shared_by=shared)
                advantages = of_reward - coefficient * divergence.penalties(node, shared_by=shared)
                total = total + probability * reinforce.loss(torch.stack(logprobs), advantages[0], len(pairs))
    joint = (first[:, None] + second).exp()
    log_ratio = first[:, None] + second - (bare_first[:, None] + bare_second).detach()
    true = torch.autograd.grad(-(joint * (reward - coefficient * log_ratio)).sum(), parameters, retain_graph=True)
    without = torch.autograd.grad(-(joint * reward).sum(), parameters, retain_graph=True)
    for found, expected, unpenalised in zip(torch.autograd.grad(total, parameters), true, without, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (expected - unpenalised).abs().max() > 0.01
