"""The torch engine samples with the learner's log-probabilities, and a row's text depends on its own prompt, node and seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, load_backbone, make_model, randomise, save_model
from scipy.stats import chi2
from torch import Tensor
from transformers import AutoModelForCausalLM

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig, Scope
from neuromas.model.attention import Prefixes
from neuromas.model.ops import TorchOps
from neuromas.model.packing import Packed
from neuromas.model.policy import Policy, Rows
from neuromas.rollout.engine import Engine, uniforms
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.tasks import get_task
from neuromas.training import reinforce
from neuromas.types import Group, Prompt, Request, Sample

FLOAT32_BOUND = 1e-5
"""Largest difference of sampler and learner, natural log. Measured: 2.4e-6 at log-probabilities of about -6."""
BFLOAT16_BOUND = 0.1
"""The same with a bfloat16 backbone, whose logits carry 8 bits. Measured: 0.032 at worst, 0.007 on average."""

NODES = (1, 2, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("engines")
    says = ("Yes", "No", ":", ".")
    families = {family: save_model(make_model(family), parent / family) for family in FAMILIES}
    return {**families, "stops": save_model(make_model("qwen3", says), parent / "stops")}


def make_network(
    folder: Path,
    *,
    scope: Scope = "all",
    dtype: str = "float32",
    widths: Sequence[int] = (2, 1),
    max_rows: int = 256,
    max_new_tokens: int = 6,
) -> Network:
    backbone = load_backbone(folder, dtype)
    network = Network(
        Topology.layered(widths), backbone, adapter=AdapterConfig(rank=2, scope=scope), max_new_tokens=max_new_tokens
    )  # fmt: skip
    network.engine = TorchEngine(network.policy, max_rows)
    randomise(network.adapters)
    return network


def rollout(network: Network, *, count: int = 3, group_size: int = 4, temperature: float = 1.0) -> list[Group]:
    examples = get_task("navigate").examples("test", count)
    return network.rollout(examples, group_size, seed=(0, 0), temperature=temperature)


def samples(groups: Sequence[Group]) -> list[Sample]:
    return [completion.sample for group in groups for rollout in group for completion in rollout.completions]


def assert_same_samples(got: Sequence[Sample], expected: Sequence[Sample]) -> None:
    """Assert equal tokens, and log-probabilities within the float32 bound: sums over other batch shapes round differently."""
    assert [s.token_ids for s in got] == [s.token_ids for s in expected]
    assert [(s.text, s.stopped, s.adapter_version) for s in got] == [(s.text, s.stopped, s.adapter_version) for s in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, rel=0, abs=FLOAT32_BOUND)


def answer(policy: Policy, requests: Sequence[Request], *, max_rows: int = 256, **settings: Any) -> list[Sample]:
    """Return the samples of requests that lead to no others, in the order given."""
    found: dict[int, Sample] = {}

    def keep(key: int, sample: Sample) -> list[tuple[int, Request]]:
        assert key not in found
        found[key] = sample
        return []

    settings = {"temperature": 1.0, "max_new_tokens": 6, **settings}
    TorchEngine(policy, max_rows).generate(list(enumerate(requests)), keep, **settings)
    return [found[key] for key in range(len(requests))]


def make_requests(policy: Policy, count: int = 12) -> list[Request]:
    """Return requests of mixed nodes, with questions and suffixes of different lengths."""
    requests = []
    for index in range(count):
        prompt = policy.prompt("Is it even? " * (1 + index % 4), "Write. " * (1 + index % 3))
        requests.append(Request(NODES[index % len(NODES)], prompt, ("seed", index)))
    return requests


def adapted(folder: Path, scope: Scope = "all") -> Policy:
    policy = Policy(load_backbone(folder), NODES, AdapterConfig(rank=2, scope=scope))
    assert policy.adapters is not None
    randomise(policy.adapters)
    return policy


# Sampler and learner


def largest_gap(network: Network, *, temperature: float = 1.0) -> float:
    groups = rollout(network, temperature=temperature)
    batch = reinforce.build_batch(
        reinforce.Credits.of(groups, dict.fromkeys(NODES, torch.ones(3, 4))), routing=network.policy.routing, adapter_version=0,
        temperature=temperature,
    )  # fmt: skip
    gaps = []
    for micro in batch.split(7, network.backbone.device):
        with torch.no_grad():
            logprobs_K = network.policy.logprobs(micro.rows)
        assert (micro.sampled_logprobs_K < 0).all()
        gaps.append((logprobs_K - micro.sampled_logprobs_K).abs().max().item())
    assert sum(len(s.token_ids) for s in samples(groups)) > 150
    return max(gaps)


@pytest.mark.parametrize("scope", ["all", "suffix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_learner_agree(folders: dict[str, Path], family: str, scope: Scope) -> None:
    assert largest_gap(make_network(folders[family], scope=scope)) < FLOAT32_BOUND


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_learner_agree_with_the_operations_for_other_dtypes_and_devices(
    folders: dict[str, Path], family: str, *, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled loops are left out, as on a GPU, and so is torch's kernel for CPUs, as on a GPU.

    Without that kernel, a prefill copies prefixes to their rows, and decoding computes all scores at once.
    """
    usual = samples(rollout(make_network(folders[family])))
    monkeypatch.setattr("neuromas.model.ops.CompiledOps", lambda _: TorchOps())
    if not kernel:
        monkeypatch.setattr("neuromas.model.attention._has_kernel", lambda *_: False)
    network = make_network(folders[family])
    assert largest_gap(network) < FLOAT32_BOUND
    assert_same_samples(samples(rollout(make_network(folders[family]))), usual)


@pytest.mark.parametrize("scope", ["all", "suffix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_learner_agree_in_bfloat16(folders: dict[str, Path], family: str, scope: Scope) -> None:
    assert largest_gap(make_network(folders[family], scope=scope, dtype="bfloat16")) < BFLOAT16_BOUND


def test_sampler_and_learner_agree_at_another_temperature(folders: dict[str, Path]) -> None:
    assert largest_gap(make_network(folders["qwen3"]), temperature=0.6) < FLOAT32_BOUND


@pytest.mark.parametrize("scope", ["all", "suffix"])
def test_a_sample_carries_the_adapters_version(folders: dict[str, Path], scope: Scope) -> None:
    network = make_network(folders["qwen3"], scope=scope)
    network.adapters.version = 5
    assert {sample.adapter_version for sample in samples(rollout(network))} == {5}


# What a row's text depends on


@pytest.mark.exact
@pytest.mark.parametrize(("family", "max_rows"), [("qwen3", 3), ("llama", 3), ("gemma3", 3), ("stops", 1), ("stops", 5)])
def test_the_number_of_slots_changes_nothing(folders: dict[str, Path], family: str, max_rows: int) -> None:
    """With fewer slots than rows, slots are reused, moved and widened, in another order each time."""
    few, many = (make_network(folders[family], max_rows=slots, widths=(2, 1, 1)) for slots in (max_rows, 256))
    assert_same_samples(samples(rollout(few, group_size=2)), samples(rollout(many, group_size=2)))


@pytest.mark.exact
@pytest.mark.parametrize("scope", ["all", "suffix"])
@pytest.mark.parametrize("family", [*FAMILIES, "stops"])
def test_a_row_is_the_same_whatever_other_rows_decode_with_it(folders: dict[str, Path], family: str, scope: Scope) -> None:
    policy = adapted(folders[family], scope)
    requests = make_requests(policy)
    together = answer(policy, requests)
    assert_same_samples([answer(policy, [request])[0] for request in requests], together)
    assert_same_samples(answer(policy, requests[::-1])[::-1], together)
    assert_same_samples(answer(policy, requests[5:8]), together[5:8])
    # Samples differ by seed, so the rows above are not copies of one text.
    assert len({sample.token_ids for sample in together}) > len(requests) // 2


def test_requests_that_become_ready_later_equal_requests_made_at_once(folders: dict[str, Path]) -> None:
    """A row that starts while others decode writes the same as one that starts with them."""
    policy = adapted(folders["stops"])
    requests = make_requests(policy)
    found: dict[int, Sample] = {}

    def chain(key: int, sample: Sample) -> list[tuple[int, Request]]:
        found[key] = sample
        return [(key + 4, requests[key + 4])] if key + 4 < len(requests) else []

    TorchEngine(policy, 3).generate(list(enumerate(requests[:4])), chain, temperature=1.0, max_new_tokens=6)
    assert_same_samples([found[key] for key in range(len(requests))], answer(policy, requests))


def test_the_same_seed_samples_the_same_and_a_longer_limit_only_continues(folders: dict[str, Path]) -> None:
    policy = adapted(folders["qwen3"])
    requests = make_requests(policy)
    short, long = (answer(policy, requests, max_new_tokens=limit) for limit in (3, 9))
    assert answer(policy, requests, max_new_tokens=3) == short
    for one, other in zip(short, long, strict=True):
        assert other.token_ids[: len(one.token_ids)] == one.token_ids


# Greedy


@pytest.mark.parametrize("family", [*FAMILIES, "stops"])
def test_greedy_equals_transformers_generate(folders: dict[str, Path], family: str) -> None:
    """Adapters are zero, as at the start. The engine takes prompts of different lengths at once, transformers one by one."""
    policy = Policy(load_backbone(folders[family]), NODES, AdapterConfig(rank=2))
    plain: Any = AutoModelForCausalLM.from_pretrained(folders[family])
    requests = make_requests(policy)
    for request, sample in zip(requests, answer(policy, requests, temperature=0.0, max_new_tokens=12), strict=True):
        ids = torch.tensor([[*request.prompt.prefix_ids, *request.prompt.suffix_ids]])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
            eos_token_id=sorted(policy.frame.stop_ids),
        )  # fmt: skip
        assert list(sample.token_ids) == expected[0, ids.shape[1] :].tolist()


def test_greedy_ignores_the_seed_and_records_untempered_logprobs(folders: dict[str, Path]) -> None:
    policy = adapted(folders["qwen3"])
    requests = make_requests(policy)
    others = [Request(request.node, request.prompt, ("another", index)) for index, request in enumerate(requests)]
    greedy = answer(policy, requests, temperature=0.0)
    assert answer(policy, others, temperature=0.0) == greedy
    # A greedy token is the likeliest: sampling at temperature 1e-4 gives the same.
    assert [s.token_ids for s in answer(policy, others, temperature=1e-4)] == [s.token_ids for s in greedy]
    first = requests[0]
    probabilities = first_token_probabilities(policy, first.prompt, first.node, temperature=1.0)
    assert greedy[0].token_ids[0] == probabilities.argmax().item()
    assert greedy[0].logprobs[0] == pytest.approx(probabilities.max().log().item(), abs=FLOAT32_BOUND)


# Frequencies


def test_uniform_draws_depend_on_the_seed_alone() -> None:
    draws = uniforms((0, 3, "ab12", 1, 2), 10)
    assert np.array_equal(uniforms((0, 3, "ab12", 1, 2), 10), draws)
    assert np.array_equal(uniforms((0, 3, "ab12", 1, 2), 4), draws[:4])
    assert ((draws >= 0) & (draws < 1)).all()
    neighbours = [(1, 3, "ab12", 1, 2), (0, 4, "ab12", 1, 2), (0, 3, "ab13", 1, 2), (0, 3, "ab12", 2, 2), (0, 3, "ab12", 1, 1)]
    for seed in neighbours:
        assert not np.isin(uniforms(seed, 10), draws).any()
    # (1, 23) and (12, 3) are two seeds.
    assert not np.isin(uniforms((1, 23), 10), uniforms((12, 3), 10)).any()


def test_uniform_draws_of_neighbouring_seeds_are_uniform_and_unrelated() -> None:
    draws = np.array([uniforms((0, step, "ab12", rollout, 1), 2) for step in range(50) for rollout in range(40)])
    # 2000 draws in 20 bins of 100 each: chi-square with 19 degrees of freedom
    for column in draws.T:
        counts = np.histogram(column, bins=20, range=(0, 1))[0]
        assert ((counts - 100) ** 2 / 100).sum() < chi2.ppf(1 - 1e-4, df=19)
    # Correlations of independent draws have standard deviation 1 / sqrt(2000) = 0.022.
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.09
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.09


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_frequencies_follow_the_probabilities(folders: dict[str, Path], temperature: float) -> None:
    """Compare 3000 first tokens of one prompt; the seeds are fixed, and so the outcome is."""
    policy = adapted(folders["qwen3"], "suffix")
    prompt = policy.prompt("Is it even?", "Write.")
    requests = [Request(2, prompt, ("frequency", index)) for index in range(3000)]
    first_tokens = [sample.token_ids[0] for sample in answer(policy, requests, temperature=temperature, max_new_tokens=1)]
    counts = torch.bincount(torch.tensor(first_tokens), minlength=len(policy.backbone.tokenizer))
    expected = 3000 * first_token_probabilities(policy, prompt, 2, temperature)
    common = expected >= 5
    rare = torch.stack([counts[~common].sum(), expected[~common].sum()])
    assert rare[1] >= 5
    counts, expected = torch.cat([counts[common], rare[:1]]), torch.cat([expected[common], rare[1:]])
    assert len(counts) > 20
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < chi2.ppf(1 - 1e-4, df=len(counts) - 1)


def first_token_probabilities(policy: Policy, prompt: Prompt, node: int, temperature: float) -> torch.Tensor:
    """Return the learner's probability of every possible first token of a prompt."""
    count = len(policy.backbone.tokenizer)
    suffixes = Packed.of([(*prompt.suffix_ids, token) for token in range(count)], policy.backbone.device)
    rows = Rows(
        prefixes=Packed.of([prompt.prefix_ids], policy.backbone.device),
        prefix_node_Q=torch.tensor([NODES.index(node)]),
        prefix_of_row_B=torch.zeros(count, dtype=torch.long),
        node_of_row_B=torch.full((count,), NODES.index(node)),
        suffixes=suffixes,
        sampled_K=suffixes.lengths_B.cumsum(0) - 1,
        temperature=temperature,
    )
    with torch.no_grad():
        probabilities = policy.logprobs(rows).exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-4)
    return probabilities


# Where a row ends


def test_rows_end_with_the_stop_token_or_at_the_limit(folders: dict[str, Path]) -> None:
    policy = adapted(folders["stops"])
    found = answer(policy, make_requests(policy, 60), max_new_tokens=4)
    for sample in found:
        assert len(sample.token_ids) == len(sample.logprobs) <= 4
        assert sample.stopped is (sample.token_ids[-1] in policy.frame.stop_ids)
        assert not policy.frame.stop_ids & set(sample.token_ids[:-1])
        assert sample.stopped or len(sample.token_ids) == 4
        body = sample.token_ids[:-1] if sample.stopped else sample.token_ids
        assert sample.text == policy.backbone.detokenize(body)
    lengths = {(len(sample.token_ids), sample.stopped) for sample in found}
    # Rows end in every way: at once, in between, with the last token allowed, and cut off.
    assert lengths >= {(1, True), (2, True), (4, True), (4, False)}


def test_every_stop_token_of_model_and_tokenizer_ends_a_row(folders: dict[str, Path]) -> None:
    given = load_backbone(folders["stops"])
    end = given.tokenizer.eos_token_id
    assert isinstance(end, int)
    (yes,) = given.tokenizer("Yes", add_special_tokens=False)["input_ids"]
    assert given.model.generation_config is not None
    given.model.generation_config.eos_token_id = [yes]
    backbone = Backbone(given.model, given.tokenizer, "two stops")
    assert backbone.frame().stop_ids == {yes, end}
    policy = Policy(backbone)
    found = answer(policy, make_requests(policy, 40), max_new_tokens=8)
    assert {sample.token_ids[-1] for sample in found if sample.stopped} == backbone.frame().stop_ids
    # A stop token that is a plain word is no part of the text either.
    assert all(sample.text == backbone.detokenize(sample.token_ids[:-1]) for sample in found if sample.stopped)


def test_one_token_and_no_requests(folders: dict[str, Path]) -> None:
    policy = adapted(folders["qwen3"])
    assert all(len(sample.token_ids) == 1 for sample in answer(policy, make_requests(policy), max_new_tokens=1))
    assert answer(policy, []) == []


# The scripted engine


def test_the_scripted_engine_keeps_the_order_of_requests(folders: dict[str, Path]) -> None:
    requests = make_requests(Policy(load_backbone(folders["qwen3"])), 3)
    engine = ScriptedEngine(lambda request: f"from {request.node}")
    assert isinstance(engine, Engine)
    received: list[tuple[int, str]] = []

    def on_sample(key: int, sample: Sample) -> list[tuple[int, Request]]:
        received.append((key, sample.text))
        return [(7, requests[2])] if key == 0 else []

    engine.generate([(0, requests[0]), (1, requests[1])], on_sample, temperature=1.0, max_new_tokens=1)
    assert received == [(0, "from 1"), (1, "from 2"), (7, "from 3")]
    assert engine.requests == requests


def test_prefixes_without_a_live_row_are_dropped_where_they_take_much(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, computed = adapted(folders["qwen3"]), list[int]()
    requests = make_requests(policy, 24)
    usual = answer(policy, requests, max_rows=3)
    prefill = policy.prefill

    def counting(prefixes: Packed, node_Q: Tensor) -> Prefixes:
        computed.append(len(node_Q))
        return prefill(prefixes, node_Q)

    monkeypatch.setattr(policy, "prefill", counting)
    monkeypatch.setattr("neuromas.rollout.torch_engine.PREFIX_BYTES", 0)
    assert_same_samples(answer(policy, requests, max_rows=3), usual)
    distinct = len({policy.routing.prefix_key(request.prompt, request.node) for request in requests})
    assert sum(computed) > distinct, "a prefix that was dropped is computed again"


def test_on_a_cpu_the_cache_bounds_the_rows_that_decode_at_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, live = adapted(folders["qwen3"]), list[int]()
    requests = make_requests(policy)
    usual = answer(policy, requests)
    decode = policy.decode

    def counting(*inputs: Any) -> Tensor:
        live.append(len(inputs[-1]))
        return decode(*inputs)

    monkeypatch.setattr(policy, "decode", counting)
    longest = max(len(request.prompt.suffix_ids) for request in requests) + 6
    monkeypatch.setattr("neuromas.rollout.torch_engine.CACHE_BYTES", 5 * longest * policy.backbone.token_bytes)
    assert_same_samples(answer(policy, requests), usual)
    assert max(live) == 5
    # Less than a row takes lets rows decode one by one.
    monkeypatch.setattr("neuromas.rollout.torch_engine.CACHE_BYTES", 0)
    live.clear()
    assert_same_samples(answer(policy, requests), usual)
    assert max(live) == 1
