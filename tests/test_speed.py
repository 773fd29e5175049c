"""Fast paths stay fast: each is compared with the simple way, PEFT's adapters node by node, measured in the same run.

The tests measure the processor time of one thread, so that other work on the machine matters little, and take the median of
alternating rounds. They measure up to three times before they fail. The references are what a quiet machine gives, rounded
down; a ratio more than 30% below its reference fails.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from models import export_peft
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from neuromas import Backbone
from neuromas.bundled import BUNDLED
from neuromas.config import AdapterConfig
from neuromas.model.adapters import AdapterBank
from neuromas.model.policy import Policy
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.training.reinforce import Batch
from neuromas.types import Completion, Prompt, Request, Sample

REFERENCE = {"update": 5.0, "rollout": 5.0}
ALLOWED = 0.7
ROUNDS, ATTEMPTS = 3, 3
NODES, QUESTIONS, GROUP, PREFIX, OWN, NEW = (1, 2, 3), 2, 8, 256, 32, 16


@pytest.fixture(scope="module")
def policy() -> Policy:
    backbone = Backbone.load("bundled", device="cpu")
    policy = Policy(backbone, NODES, AdapterConfig(rank=8))
    bank = bank_of(policy)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in bank.parameters().items():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    # No token stops a text, so every text has the full length.
    policy.frame = replace(policy.frame, stop_ids=frozenset({-1}))
    return policy


@pytest.fixture(scope="module")
def peft(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    folder = tmp_path_factory.mktemp("adapters")
    plain = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    for node in NODES:
        export_peft(bank_of(policy), node, folder / str(node))
    model = PeftModel.from_pretrained(plain, str(folder / str(NODES[0])), adapter_name=str(NODES[0]), is_trainable=True)
    for node in NODES[1:]:
        model.load_adapter(str(folder / str(node)), str(node), is_trainable=True)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module")
def completions() -> list[Completion]:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(16, 500, (count,), generator=generator).tolist())

    prefixes = [ids(PREFIX) for _ in range(QUESTIONS)]
    # All rows have the same length, so the simple way needs no padding.
    return [
        Completion(node, Prompt(prefix, ids(OWN)), Sample(ids(NEW), (0.0,) * NEW, ("",), True, 0), ())
        for prefix in prefixes
        for _ in range(GROUP)
        for node in NODES
    ]


def ratio_of(fast: Callable[[], object], simple: Callable[[], object]) -> float:
    """Return the median over rounds of the simple way's processor time against the fast one's."""

    def seconds(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    fast()
    return statistics.median(seconds(simple) / seconds(fast) for _ in range(ROUNDS))


def check(name: str, fast: Callable[[], object], simple: Callable[[], object]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = []
        while len(ratios) < ATTEMPTS and (not ratios or max(ratios) < ALLOWED * REFERENCE[name]):
            ratios.append(ratio_of(fast, simple))
    finally:
        torch.set_num_threads(before)
    assert max(ratios) >= ALLOWED * REFERENCE[name], f"{name}: {ratios} times as fast as the simple way, was {REFERENCE[name]}"


def bank_of(policy: Policy) -> AdapterBank:
    assert policy.adapters is not None
    return policy.adapters


def shared_update(policy: Policy, completions: Sequence[Completion]) -> dict[int, float]:
    """Compute gradients for all nodes at once, each distinct prefix once; return each node's summed log-probability."""
    rows = sorted(completions, key=lambda completion: completion.node)
    batch = Batch(tuple((row, 1.0) for row in rows), 1, policy.routing, 1.0)
    total = dict.fromkeys(NODES, 0.0)
    row = 0
    for micro_batch in batch.split(10_000, policy.backbone.device):
        logprobs = policy.logprobs(micro_batch.rows).view(-1, NEW)
        logprobs.sum().backward()
        for value in logprobs.sum(1).tolist():
            total[rows[row].node] += value
            row += 1
    for parameter in bank_of(policy).parameters().values():
        parameter.grad = None
    return total


def looped_update(model: PeftModel, completions: Sequence[Completion]) -> dict[int, float]:
    """Compute gradients node by node, each row with its own prefix; return each node's summed log-probability."""
    total = {}
    for node in NODES:
        model.set_adapter(str(node))
        rows = [completion for completion in completions if completion.node == node]
        ids = torch.tensor([c.prompt.prefix_ids + c.prompt.suffix_ids + c.sample.token_ids for c in rows])
        logits = model(input_ids=ids, logits_to_keep=NEW + 1).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, ids[:, -NEW:, None])[..., 0]
        logprobs.sum().backward()
        total[node] = logprobs.sum().item()
        model.zero_grad(set_to_none=True)
    return total


def sample_together(policy: Policy, completions: Sequence[Completion]) -> int:
    """Sample all nodes in one batch of the engine, each distinct prefix once; return the number of tokens."""
    found: list[Sample] = []

    def receive(key: int, sample: Sample) -> list[tuple[int, Request]]:
        found.append(sample)
        return []

    requests = [(key, Request(c.node, c.prompt, (key,))) for key, c in enumerate(completions)]
    TorchEngine(policy).generate(requests, receive, temperature=1.0, max_new_tokens=NEW)
    return sum(len(sample.token_ids) for sample in found)


@torch.inference_mode()
def sample_in_turn(model: PeftModel, completions: Sequence[Completion]) -> int:
    """Sample node by node by transformers' `generate`; return the number of tokens."""
    tokens = 0
    for node in NODES:
        model.set_adapter(str(node))
        ids = torch.tensor([c.prompt.prefix_ids + c.prompt.suffix_ids for c in completions if c.node == node])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0
        )
        assert isinstance(out, Tensor)
        tokens += out[:, ids.shape[1] :].numel()
    return tokens


@pytest.mark.processes
def test_the_update_beats_a_loop_over_nodes(policy: Policy, peft: PeftModel, completions: list[Completion]) -> None:
    ours, theirs = shared_update(policy, completions), looped_update(peft, completions)
    assert ours == pytest.approx(theirs, rel=1e-4)
    check("update", lambda: shared_update(policy, completions), lambda: looped_update(peft, completions))


@pytest.mark.processes
def test_rollouts_beat_a_loop_over_nodes(policy: Policy, peft: PeftModel, completions: list[Completion]) -> None:
    assert sample_together(policy, completions) == sample_in_turn(peft, completions) == len(completions) * NEW
    check("rollout", lambda: sample_together(policy, completions), lambda: sample_in_turn(peft, completions))
