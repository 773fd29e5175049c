"""Our own forward of the usual kind of layer is the model's own, in value and gradient; every other model keeps its own."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from models import FAMILIES, TOKENIZER, make_model, randomise
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import neuromas.model.adapters
import neuromas.model.lora
from neuromas.config import AdapterConfig
from neuromas.model.backbone import Backbone
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
    """Build models whose layers have biases or whose positions are scaled."""
    vocabulary = len(AutoTokenizer.from_pretrained(TOKENIZER))
    with torch.random.fork_rng():
        torch.manual_seed(0)
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


def batch_of(backbone: Backbone, scope: Literal["all", "suffix"]) -> Batch:
    """Rows of two nodes and unlike length, some on one prefix."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 200, (count,), generator=generator).tolist())

    prefixes = [ids(9), ids(5)]
    completions = [
        Completion(node, Prompt(prefixes[row % 2], ids(3 + row)), Sample(ids(2 + row), (0.0,) * (2 + row), "", True, 0), ())
        for node in (1, 2)
        for row in range(5)
    ]
    weighted = tuple((completion, 1.0 - 0.3 * place) for place, completion in enumerate(completions))
    assert backbone.adapters is not None
    return Batch(weighted, 4, backbone.adapters.nodes, 0.8, scope)


def learned(backbone: Backbone, batch: Batch) -> list[Tensor]:
    """Return log-probabilities and the gradients of all adapters."""
    assert backbone.adapters is not None
    (micro,) = batch.split(10**6, backbone.device)
    logprobs_K = backbone.logprobs(micro.rows)
    (logprobs_K * micro.advantages_K).sum().backward()
    found = [logprobs_K.detach()]
    for parameter in backbone.adapters.parameters().values():
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
def test_it_equals_the_models_own_forward_in_value_and_gradient(
    kind: str, targets: tuple[str, ...], scope: Literal["all", "suffix"]
) -> None:
    backbone = load(kind)
    randomise(backbone.add_adapters((1, 2), AdapterConfig(rank=2, scope=scope, target_modules=targets), seed=0))
    assert backbone.decoder is not None
    batch = batch_of(backbone, scope)
    ours = learned(backbone, batch)
    backbone.decoder = None
    assert_close(ours, learned(backbone, batch), 2e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_the_models_own_forward(kind: str) -> None:
    """Ours keeps more digits: norms and angles are in float32."""
    found = {}
    for dtype, ours in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        backbone = load(kind, dtype)
        randomise(backbone.add_adapters((1, 2), AdapterConfig(rank=2, target_modules=EVERY_MODULE), seed=0))
        assert backbone.decoder is not None
        if not ours:
            backbone.decoder = None
        found[dtype, ours] = torch.cat([tensor.flatten().float() for tensor in learned(backbone, batch_of(backbone, "all"))])
    exact = found[torch.float32, True]
    away, theirs = ((found[torch.bfloat16, ours] - exact).abs().mean() for ours in (True, False))
    assert away <= 1.1 * theirs
    assert away <= 0.1 * exact.abs().mean()


def grown(kind: str) -> Backbone:
    """Nodes of two generations, with adapters that do something."""
    backbone = load(kind)
    bank = backbone.add_adapters((1,), AdapterConfig(rank=2, target_modules=EVERY_MODULE), seed=0)
    bank.add_nodes({2: None})
    for index, (name, parameter) in enumerate(bank.parameters().items()):
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return backbone


def test_nodes_that_joined_later_are_learned_by_both_forwards() -> None:
    backbone = grown("qwen3")
    batch = batch_of(backbone, "all")
    ours = learned(backbone, batch)
    backbone.decoder = None
    assert_close(ours, learned(backbone, batch), 2e-5)


@pytest.mark.parametrize("scope", ["all", "suffix"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_way_of_other_devices_is_the_same(
    kind: str, scope: Literal["all", "suffix"], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(kind)
    randomise(backbone.add_adapters((1, 2), AdapterConfig(rank=2, scope=scope, target_modules=EVERY_MODULE), seed=0))
    batch = batch_of(backbone, scope)
    ours = learned(backbone, batch)
    monkeypatch.setattr("neuromas.model.attention._has_kernel", lambda *_: False)
    monkeypatch.setattr("neuromas.model.kernels.fit", lambda *_: False)
    assert_close(ours, learned(backbone, batch), 2e-5)


@pytest.mark.parametrize("plain_head", [False, True])
def test_a_models_own_forward_needs_no_logits_where_its_head_is_plain(plain_head: bool) -> None:
    backbone = load("qwen3")
    randomise(backbone.add_adapters((1, 2), AdapterConfig(rank=2), seed=0))
    batch = batch_of(backbone, "all")
    ours = learned(backbone, batch)
    backbone.decoder = None
    if not plain_head:
        backbone.model.config.final_logit_softcapping = 30.0
    assert (backbone._plain_head is not None) == plain_head
    assert_close(ours, learned(backbone, batch), 2e-5)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("whole_from", [0, 10**9])
def test_whole_weights_give_the_gradients_of_adapters_beside_them(
    kind: str, whole_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuromas.model.lora, "_WHOLE_FROM", whole_from)
    backbone = load(kind, torch.float64)
    randomise(backbone.add_adapters((1, 2), AdapterConfig(rank=2, target_modules=EVERY_MODULE), seed=0))
    batch = batch_of(backbone, "all")
    ours = learned(backbone, batch)
    backbone.decoder = None
    assert_close(ours, learned(backbone, batch), 1e-6)


@pytest.mark.parametrize("targets", [EVERY_MODULE, ("v_proj", "gate_proj"), None])
@pytest.mark.parametrize("kind", [*FAMILIES, "biases"])
@pytest.mark.parametrize("way", ["kept whole", "masked", "long stretches", "the model's own"])
def test_every_way_of_sampling_gives_what_is_learned(
    kind: str, way: str, targets: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-5 of a log-probability, as the engine's other tests ask; rows of two nodes lie among each other.

    Without targets, the second node has joined later.
    """
    monkeypatch.setattr(neuromas.model.lora, "SHORT_STRETCH", 1)
    if way != "kept whole":
        monkeypatch.setattr(neuromas.model.adapters, "KEPT_AT_MOST", 0)
    monkeypatch.setattr(neuromas.model.lora, "LONG_STRETCH", 1 if way == "long stretches" else 10**6)
    if targets is None:
        backbone = grown(kind)
    else:
        backbone = load(kind)
        randomise(backbone.add_adapters((1, 2), AdapterConfig(rank=2, target_modules=targets), seed=0))
    bank = backbone.adapters
    assert bank is not None
    if way == "the model's own":
        backbone.decoder = None
    prompts = [completion.prompt for completion, _ in batch_of(backbone, "all").completions]
    found: dict[int, Completion] = {}

    def keep(key: int, sample: Sample) -> list[Any]:
        found[key] = Completion(1 + key % 2, prompts[key], sample, ())
        return []

    requests = [(key, Request(1 + key % 2, prompt, (0, key))) for key, prompt in enumerate(prompts)]
    TorchEngine(backbone, max_rows=6).generate(requests, keep, temperature=1.0, max_new_tokens=6)
    assert bank.routing.whole is None, "whole weights go when sampling ends"
    rows = sorted(found.values(), key=lambda completion: completion.node)
    (micro,) = Batch(tuple((row, 1.0) for row in rows), 1, bank.nodes, 1.0, "all").split(10**6, backbone.device)
    with torch.no_grad():
        assert (backbone.logprobs(micro.rows) - micro.sampled_logprobs_K).abs().max() <= 1e-5


def test_weights_are_held_once_and_keep_their_names() -> None:
    model = make_model("qwen3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone = Backbone(model, AutoTokenizer.from_pretrained(TOKENIZER), "qwen3")
    base: Any = model.base_model
    attention = base.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    (storage,) = {module.weight.untyped_storage().data_ptr() for module in modules}
    backbone.add_adapters((1, 2), AdapterConfig(rank=2), seed=0)
    assert {module.base.weight.untyped_storage().data_ptr() for module in (attention.q_proj, attention.v_proj)} == {storage}
    assert backbone.decoder is not None
    after = {name.replace(".base.", "."): tensor for name, tensor in backbone.model.state_dict().items() if "lora" not in name}
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
    assert Backbone(model, AutoTokenizer.from_pretrained(TOKENIZER), "qwen3").decoder is not None
    model = make_model("qwen3")
    change(model)
    assert Backbone(model, AutoTokenizer.from_pretrained(TOKENIZER), "qwen3").decoder is None


def test_bfloat16_stays_beside_its_adapters() -> None:
    """Whole weights in bfloat16 would lose an update that is small beside them."""
    backbone = load("qwen3", torch.bfloat16)
    bank = backbone.add_adapters((1, 2), AdapterConfig(rank=2), seed=0)
    assert backbone.decoder is not None
    assert isinstance(backbone.model.base_model.norm, RMSNorm)
    with bank.keep_merged():
        assert bank.routing.whole is None
    assert not neuromas.model.lora._is_long(10**9, torch.zeros(2, 2, dtype=torch.bfloat16))
    assert neuromas.model.lora._is_long(10**9, torch.zeros(2, 2))
