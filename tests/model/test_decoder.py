"""Our decoder equals the model's own forward in value and gradient, and models that it does not fit keep their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerator import flex_on_cpu, other_operations
from models import FAMILIES, TOKENIZER, make_model, randomise
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import neuromas.model.adapters
import neuromas.model.logprobs
import neuromas.model.lora
from neuromas.config import AdapterConfig, Scope
from neuromas.model.backbone import Backbone
from neuromas.model.decoder import Decoder
from neuromas.model.flex import suffix_attention
from neuromas.model.layers import TransformersLayers
from neuromas.model.ops import CompiledOps, TorchOps
from neuromas.model.policy import Policy
from neuromas.model.rms_norm import RMSNorm
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.training.reinforce import Batch
from neuromas.types import Completion, Prompt, Request, Sample

EVERY_MODULE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None,
}  # fmt: skip


def other_model(kind: str) -> PreTrainedModel:
    """Return a model whose layers have biases, or one whose positions are scaled, or whose logits are divided."""
    vocabulary = len(AutoTokenizer.from_pretrained(TOKENIZER))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "divided logits":
            return GraniteForCausalLM(GraniteConfig(vocab_size=vocabulary, logits_scaling=8.0, **SIZES))
        if kind == "biases":
            model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **SIZES))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter)
            return model
        scaling: dict[str, Any] = {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, rope_parameters=scaling, attention_bias=True, **SIZES))


def load(kind: str, dtype: torch.dtype = torch.float32) -> Backbone:
    model: Any = make_model(kind) if kind in FAMILIES else other_model(kind)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return Backbone(model.to(dtype=dtype), AutoTokenizer.from_pretrained(TOKENIZER), kind)


def policy_on(backbone: Backbone, *, scope: Scope = "all", targets: tuple[str, ...] = EVERY_MODULE) -> Policy:
    """Return a policy of two nodes whose adapters are not zero."""
    policy = Policy(backbone, (1, 2), AdapterConfig(rank=2, scope=scope, target_modules=targets), seed=0)
    assert policy.adapters is not None
    randomise(policy.adapters)
    return policy


def with_transformers_layers(policy: Policy) -> Policy:
    """Return the policy, changed to compute with the model's own forward."""
    assert isinstance(policy._layers, Decoder)
    policy._layers = TransformersLayers(policy.model, policy.adapters)
    return policy


def batch_of(policy: Policy) -> Batch:
    """Return rows of two nodes and of different lengths; some share a prefix."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 200, (count,), generator=generator).tolist())

    prefixes = [ids(9), ids(5)]
    completions = [
        Completion(node, Prompt(prefixes[row % 2], ids(3 + row)), Sample(ids(2 + row), (0.0,) * (2 + row), ("",), True, 0), ())
        for node in (1, 2)
        for row in range(5)
    ]
    weighted = tuple((completion, 1.0 - 0.3 * index) for index, completion in enumerate(completions))
    return Batch(weighted, 4, policy.routing, 0.8)


def learned(policy: Policy, batch: Batch) -> list[Tensor]:
    """Return log-probabilities and the gradients of all adapters."""
    assert policy.adapters is not None
    (micro,) = batch.split(10**6, policy.backbone.device)
    logprobs_K = policy.logprobs(micro.rows)
    (logprobs_K * micro.advantages_K).sum().backward()
    found = [logprobs_K.detach()]
    for parameter in policy.adapters.parameters().values():
        found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return found


def assert_close(ours: list[Tensor], theirs: list[Tensor], bound: float) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= bound * max(1.0, other.abs().max().item())
    assert theirs[0].abs().max() > 0.1
    assert sum(gradient.abs().sum().item() for gradient in theirs[1:]) > 0.1


@pytest.mark.parametrize("scope", ["all", "suffix"])
@pytest.mark.parametrize("targets", [EVERY_MODULE, ("q_proj", "v_proj"), ("k_proj", "up_proj"), ("down_proj",)])
@pytest.mark.parametrize("kind", [*FAMILIES, "biases", "scaled positions"])
def test_it_equals_the_models_own_forward_in_value_and_gradient(kind: str, targets: tuple[str, ...], scope: Scope) -> None:
    policy = policy_on(load(kind), scope=scope, targets=targets)
    batch = batch_of(policy)
    ours = learned(policy, batch)
    assert_close(ours, learned(with_transformers_layers(policy), batch), 2e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_the_models_own_forward(kind: str) -> None:
    """Our decoder keeps more digits, because its norms and angles are in float32."""
    found = {}
    for dtype, ours in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        policy = policy_on(load(kind, dtype))
        if not ours:
            with_transformers_layers(policy)
        found[dtype, ours] = torch.cat([tensor.flatten().float() for tensor in learned(policy, batch_of(policy))])
    exact = found[torch.float32, True]
    away, theirs = ((found[torch.bfloat16, ours] - exact).abs().mean() for ours in (True, False))
    assert away <= 1.1 * theirs
    assert away <= 0.1 * exact.abs().mean()


@pytest.mark.parametrize("scope", ["all", "suffix"])
@pytest.mark.parametrize("kind", ["qwen3", "biases", "grown"])
def test_widened_products_give_the_gradients_of_separate_adapters(kind: str, scope: Scope) -> None:
    """A micro-batch of some nodes alone, as well: then others' B are not written."""
    found = []
    for widened in (True, False):
        policy = grown("qwen3", torch.bfloat16) if kind == "grown" else policy_on(load(kind, torch.bfloat16), scope=scope)
        bank = policy.adapters
        assert bank is not None
        assert bank.state.widened is not None
        if not widened:
            bank.state.widened = None
        batch = batch_of(policy)
        both = learned(policy, batch)
        second = learned(policy, Batch(batch.completions[5:], 4, policy.routing, 0.8))
        found.append([*both, *second])
        assert widened == bool(bank.state.widened)
    assert_close(found[0], found[1], 0.05)


def grown(kind: str, dtype: torch.dtype = torch.float32) -> Policy:
    """Return a policy with nodes of two cohorts whose adapters are not zero."""
    policy = Policy(load(kind, dtype), (1,), AdapterConfig(rank=2, target_modules=EVERY_MODULE), seed=0)
    bank = policy.adapters
    assert bank is not None
    bank.add_nodes({2: None})
    for index, (name, parameter) in enumerate(bank.parameters().items()):
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return policy


def test_nodes_that_joined_later_have_the_same_gradients_by_both_forwards() -> None:
    policy = grown("qwen3")
    batch = batch_of(policy)
    ours = learned(policy, batch)
    assert_close(ours, learned(with_transformers_layers(policy), batch), 2e-5)


@pytest.mark.parametrize("scope", ["all", "suffix"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_operations_for_other_devices_give_the_same(kind: str, scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_on(load(kind), scope=scope)
    batch = batch_of(policy)
    ours = learned(policy, batch)
    monkeypatch.setattr("neuromas.model.attention._has_kernel", lambda *_: False)
    monkeypatch.setattr("neuromas.model.ops.CompiledOps", lambda _: TorchOps())
    other = policy_on(load(kind), scope=scope)
    assert type(policy.ops) is CompiledOps
    assert type(other.ops) is TorchOps
    assert_close(ours, learned(other, batch), 2e-5)


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "scope"), [("qwen3", "all"), ("gemma3", "suffix"), ("gemma3", "all")])
def test_the_learner_of_other_devices_gives_the_same(kind: str, scope: Scope) -> None:
    """With flex attention and grouped products, on the layers' own operations for other devices."""
    policy = policy_on(load(kind), scope=scope)
    batch = batch_of(policy)
    ours = learned(policy, batch)
    with other_operations(), flex_on_cpu():
        other = policy_on(load(kind), scope=scope)
        assert other.adapters is not None
        other.adapters.state.groups = True
        assert_close(ours, learned(other, batch), 2e-5)


@pytest.mark.exact
@pytest.mark.parametrize("scope", ["all", "suffix"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_layers_that_are_computed_again_give_the_same_and_keep_less(kind: str, scope: Scope) -> None:
    policy = policy_on(load(kind), scope=scope)
    batch = batch_of(policy)
    kept, found = [], []
    for again in (False, True):
        if again:
            policy.recompute_layers()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(learned(policy, batch))
        kept.append(sum(sizes))
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))
    assert kept[1] < 0.7 * kept[0]


def test_layers_of_transformers_are_not_computed_again() -> None:
    policy = with_transformers_layers(policy_on(load("qwen3")))
    with pytest.raises(ValueError, match=r"--grad-checkpoint: qwen3 \(qwen3\) is computed by its own layers in transformers"):
        policy.recompute_layers()


@pytest.mark.parametrize("plain_head", [False, True])
def test_a_models_own_forward_needs_no_logits_where_its_head_is_plain(plain_head: bool) -> None:
    policy = policy_on(load("qwen3"))
    batch = batch_of(policy)
    ours = learned(policy, batch)
    if not plain_head:
        policy.model.config.final_logit_softcapping = 30.0
    layers = with_transformers_layers(policy)._layers
    assert isinstance(layers, TransformersLayers)
    assert (layers._plain_head is not None) == plain_head
    assert_close(ours, learned(policy, batch), 2e-5)


def test_logits_that_a_model_changes_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite divides its logits; values, entropies and gradients are those of all logits at once."""
    policy = policy_on(load("divided logits"))
    assert isinstance(policy._layers, TransformersLayers)
    assert policy._layers._plain_head is None
    bank, head = policy.adapters, policy.model.get_output_embeddings()
    assert bank is not None
    assert isinstance(head, nn.Linear)
    (micro,) = batch_of(policy).split(10**6, policy.backbone.device)
    tokens, found = list[int](), list[list[Tensor]]()
    head.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[-2]))
    for at_once in (10**9, 3 * head.out_features):
        monkeypatch.setattr(neuromas.model.logprobs, "LOGITS_AT_ONCE", at_once)
        tokens.clear()
        logprobs_K, entropies_K = policy.logprobs_and_entropies(micro.rows)
        (logprobs_K * micro.advantages_K - 0.5 * entropies_K).sum().backward()
        found.append([logprobs_K.detach(), entropies_K.detach()])
        for parameter in bank.parameters().values():
            assert parameter.grad is not None
            found[-1].append(parameter.grad)
            parameter.grad = None
    assert max(tokens) == 3 < len(logprobs_K)
    assert_close(found[1], found[0], 1e-6)
    rows = micro.rows
    attention = suffix_attention(rows.suffixes, policy.prefill(rows.prefixes, rows.prefix_node_Q), rows.prefix_of_row_B)
    nodes_T, chosen_K = rows.node_of_row_B[rows.suffixes.row_T], rows.suffixes.ids_T[rows.sampled_K]
    logits_KV = policy.decode(rows.suffixes.ids_T, attention.positions_T, nodes_T, attention, rows.sampled_K - 1)
    all_KV = (logits_KV / rows.temperature).log_softmax(-1)
    torch.testing.assert_close(found[0][0], all_KV.gather(1, chosen_K[:, None])[:, 0].detach())
    torch.testing.assert_close(found[0][1], -(all_KV.exp() * all_KV).sum(-1).detach())


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("merge_from", [0, 10**9])
def test_merged_weights_give_the_gradients_of_separate_adapters(
    kind: str, merge_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuromas.model.lora, "_MERGE_FROM", merge_from)
    policy = policy_on(load(kind, torch.float64))
    batch = batch_of(policy)
    ours = learned(policy, batch)
    assert_close(ours, learned(with_transformers_layers(policy), batch), 1e-6)


@pytest.mark.parametrize("targets", [EVERY_MODULE, ("v_proj", "gate_proj"), None])
@pytest.mark.parametrize("kind", [*FAMILIES, "biases"])
@pytest.mark.parametrize("way", ["merged weights", "stacked adapters", "long segments", "the model's own"])
def test_sampled_logprobs_equal_the_learners_in_every_way_of_sampling(
    kind: str, way: str, targets: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities agree within 1e-5, as in the engine's other tests; the rows of the two nodes alternate.

    Without targets, the second node has joined later.
    """
    monkeypatch.setattr(neuromas.model.lora, "LONG_SEGMENT_IF_MERGED", 1)
    if way != "merged weights":
        monkeypatch.setattr(neuromas.model.adapters, "MERGED_AT_MOST", 0)
    monkeypatch.setattr(neuromas.model.lora, "LONG_SEGMENT", 1 if way == "long segments" else 10**6)
    policy = grown(kind) if targets is None else policy_on(load(kind), targets=targets)
    bank = policy.adapters
    assert bank is not None
    if way == "the model's own":
        with_transformers_layers(policy)
    prompts = [completion.prompt for completion, _ in batch_of(policy).completions]
    found: dict[int, Completion] = {}

    def keep(key: int, sample: Sample) -> list[Any]:
        found[key] = Completion(1 + key % 2, prompts[key], sample, ())
        return []

    requests = [(key, Request(1 + key % 2, prompt, (0, key))) for key, prompt in enumerate(prompts)]
    TorchEngine(policy, max_rows=6).generate(requests, keep, temperature=1.0, max_new_tokens=6)
    assert bank.state.merged is None, "merged weights are dropped when sampling ends"
    rows = sorted(found.values(), key=lambda completion: completion.node)
    (micro,) = Batch(tuple((row, 1.0) for row in rows), 1, policy.routing, 1.0).split(10**6, policy.backbone.device)
    with torch.no_grad():
        assert (policy.logprobs(micro.rows) - micro.sampled_logprobs_K).abs().max() <= 1e-5


def test_weights_are_held_once_and_keep_their_names() -> None:
    model = make_model("qwen3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone = Backbone(model, AutoTokenizer.from_pretrained(TOKENIZER), "qwen3")
    base: Any = model.base_model
    attention = base.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    (storage,) = {module.weight.untyped_storage().data_ptr() for module in modules}
    policies = [policy_on(backbone) for _ in range(2)]
    for policy in policies:
        tree: Any = policy.model.base_model
        wrapped = tree.layers[0].self_attn
        assert {module.base.weight.untyped_storage().data_ptr() for module in (wrapped.q_proj, wrapped.v_proj)} == {storage}
    after = backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def _rename_the_family(model: Any) -> None:
    model.config.model_type = "smollm3"


def _quantize(model: Any) -> None:
    class Quantized(nn.Linear):
        pass

    model.base_model.layers[0].self_attn.k_proj.__class__ = Quantized


def _bound_logits(model: Any) -> None:
    forward = model.forward

    def bound(**kwargs: Any) -> Any:
        result: Any = forward(**kwargs)
        result.logits = 0.5 * torch.tanh(result.logits)
        return result

    model.forward = bound


def _name_a_bound(model: Any) -> None:
    model.config.final_logit_softcapping = 30.0


def _add_a_part(model: Any) -> None:
    model.base_model.layers[1].self_attn.gate = nn.Linear(2, 2)


def _change_a_norm(model: Any) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model.base_model.layers[1].input_layernorm = Other()


def _scale_what_is_added(model: Any) -> None:
    model.base_model.layers[0].mlp.register_forward_hook(lambda _, __, out: 1.2 * out)


def _hide_the_window(model: Any) -> None:
    model.config.sliding_window, model.config.layer_types = 4096, None


@pytest.mark.parametrize(
    "change",
    [
        _rename_the_family, _quantize, _bound_logits, _name_a_bound, _add_a_part, _change_a_norm, _scale_what_is_added,
        _hide_the_window,
    ],
)  # fmt: skip
def test_a_model_that_does_something_else_keeps_its_own_forward(change: Callable[[Any], None]) -> None:
    model = make_model("qwen3")
    assert Backbone(model, AutoTokenizer.from_pretrained(TOKENIZER), "qwen3").has_own_decoder
    model = make_model("qwen3")
    change(model)
    assert not Backbone(model, AutoTokenizer.from_pretrained(TOKENIZER), "qwen3").has_own_decoder


def test_bfloat16_weights_are_not_merged() -> None:
    """Merged weights in bfloat16 would lose an update that is small against them."""
    backbone = load("qwen3", torch.bfloat16)
    policy = policy_on(backbone)
    bank = policy.adapters
    assert bank is not None
    assert backbone.has_own_decoder
    assert isinstance(backbone.model.base_model.norm, RMSNorm)
    with bank.prepared():
        assert bank.state.merged is None
    assert not neuromas.model.lora._is_long(10**9, torch.zeros(2, 2, dtype=torch.bfloat16))
    assert neuromas.model.lora._is_long(10**9, torch.zeros(2, 2))
