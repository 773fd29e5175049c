"""The learner's forward equals plain transformers and PEFT; backbone, prompts and adapter files do as documented.

Every model is tiny, random, in float32 and saved to disk first; tolerances are absolute unless a comment says otherwise.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import (
    FAMILIES,
    export_peft,
    load_backbone,
    load_peft,
    make_model,
    plain_logprobs,
    randomise,
    save_model,
    suffix_logprobs,
)
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, Phi3Config, Phi3ForCausalLM

from neuromas import Network, Topology
from neuromas.compare.methods.converse import Answerer
from neuromas.config import AdapterConfig, PromptConfig, Scope, TrainConfig
from neuromas.model.adapters import AdapterBank, resolve_rank
from neuromas.model.attention import Prefixes, SuffixAttention
from neuromas.model.backbone import Backbone, _feed_forward_size, config_of, resolve_device, resolve_dtype
from neuromas.model.packing import Packed
from neuromas.model.policy import Policy, Rows
from neuromas.model.rms_norm import replace_norms
from neuromas.tasks import get_task
from neuromas.training import reinforce
from neuromas.training.checkpoint import RunDirectory
from neuromas.training.setup import build_network
from neuromas.types import Completion, Example, Group

LOGPROB_BOUND = 1e-5
"""Measured: 2e-6 at log-probabilities of about -6."""
GRADIENT_BOUND = 1e-5
"""Largest difference over largest entry, per tensor. Measured: 2e-6."""


@dataclass(frozen=True, slots=True)
class Case:
    """A network with adapters that are not zero, and what it wrote: nodes 1 and 2 write to node 3."""

    folder: Path
    network: Network
    groups: list[Group]

    @property
    def backbone(self) -> Backbone:
        return self.network.backbone

    @property
    def policy(self) -> Policy:
        return self.network.policy

    @property
    def bank(self) -> AdapterBank:
        return self.network.adapters

    def batch(self) -> reinforce.Batch:
        advantages = dict.fromkeys(self.bank.nodes, torch.tensor([[1.0, -1.0], [0.5, -0.25]]))
        return reinforce.build_batch(
            reinforce.Credits.of(self.groups, advantages), routing=self.policy.routing, adapter_version=0, temperature=1.0
        )

    def rows(self) -> Rows:
        (micro,) = self.batch().split(10**6, self.backbone.device)
        return micro.rows

    def gradients(self, batch: reinforce.Batch, tokens_per_micro_batch: int = 10**6) -> dict[str, Tensor]:
        for micro in batch.split(tokens_per_micro_batch, self.backbone.device):
            logprobs_K = self.policy.logprobs(micro.rows)
            reinforce.loss(logprobs_K, micro.advantages_K, batch.num_rollouts).backward()
        return self.take_gradients()

    def take_gradients(self) -> dict[str, Tensor]:
        taken = {}
        for name, parameter in self.bank.parameters().items():
            assert parameter.grad is not None
            taken[name], parameter.grad = parameter.grad, None
        return taken


def make_case(folder: Path, scope: Scope) -> Case:
    backbone = load_backbone(folder)
    network = Network(
        Topology.layered([2, 1]), backbone, adapter=AdapterConfig(rank=2, scope=scope), max_new_tokens=5
    )  # fmt: skip
    randomise(network.adapters)
    return Case(folder, network, network.rollout(get_task("navigate").examples("test", 2), 2, seed=(0, 0)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("backbones")
    return {family: save_model(make_model(family), parent / family) for family in FAMILIES}


@pytest.fixture(scope="module", params=[(family, scope) for family in FAMILIES for scope in ("all", "suffix")])
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Case:
    family, scope = request.param
    return make_case(folders[family], scope)


@pytest.fixture
def small(folders: dict[str, Path]) -> Case:
    """A fresh case for tests that change something."""
    return make_case(folders["qwen3"], "all")


@pytest.fixture
def bare(folders: dict[str, Path]) -> Backbone:
    return load_backbone(folders["qwen3"])


def bank_of(policy: Policy) -> AdapterBank:
    assert policy.adapters is not None
    return policy.adapters


def row_by_row(case: Case, folder: Path) -> Iterator[tuple[Completion, float, int, Tensor, Mapping[str, Tensor]]]:
    """Yield each row's completion, advantage and node, and its log-probabilities and parameters in plain PEFT."""
    for index, node in enumerate(case.bank.nodes):
        model = load_peft(case.folder, export_peft(case.bank, node, folder / str(node)))
        parameters = {
            name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        compute = plain_logprobs if case.policy.scope == "all" else suffix_logprobs
        for completion, advantage in case.batch().completions:
            if completion.node == node:
                assert isinstance(advantage, float)
                yield completion, advantage, index, compute(model, completion), parameters


def assert_gradients_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = tensor.abs().max().item()
        assert largest > 1e-4, f"{name}: no gradient to compare"
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=GRADIENT_BOUND * largest, msg=lambda m, n=name: f"{n}: {m}")


# Against plain transformers and PEFT


def test_logprobs_equal_plain_peft(case: Case, tmp_path: Path) -> None:
    """With scope `all` the adapter acts on prompt and completion, with scope `suffix` only after the prefix."""
    with torch.no_grad():
        completions = [completion for completion, _ in case.batch().completions]
        by_row = case.policy.logprobs(case.rows()).split([len(c.sample.token_ids) for c in completions])
        got = dict(zip(completions, by_row, strict=True))
        for completion, _, _, expected, _ in row_by_row(case, tmp_path):
            torch.testing.assert_close(got[completion], expected, rtol=0, atol=LOGPROB_BOUND)


def test_adapters_and_scope_change_the_logprobs(folders: dict[str, Path]) -> None:
    """Without this, every comparison above would hold for adapters that are zero."""
    of_all, of_suffix = (make_case(folders["qwen3"], scope) for scope in ("all", "suffix"))
    rows = replace(of_suffix.rows(), prefix_node_Q=torch.tensor([0, 0]))
    with torch.no_grad():
        logprobs_K = of_suffix.policy.logprobs(rows)
        of_suffix.policy.scope = "all"
        assert (logprobs_K - of_suffix.policy.logprobs(rows)).abs().max() > 0.1
        before_K = of_all.policy.logprobs(of_all.rows())
        for module in of_all.bank.modules.values():
            module.lora_B.zero_()
        assert (before_K - of_all.policy.logprobs(of_all.rows())).abs().max() > 0.1


def test_gradients_through_the_shared_prefix_equal_the_unshared_computation(case: Case, tmp_path: Path) -> None:
    batch = case.batch()
    got = case.gradients(batch)
    expected = {name: torch.zeros_like(parameter) for name, parameter in case.bank.parameters().items()}
    for _, advantage, index, logprobs, parameters in row_by_row(case, tmp_path):
        loss = -advantage * logprobs.sum() / batch.num_rollouts
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            expected[name][index] += gradient
    assert_gradients_close(got, expected)


# What must not change the results


def test_the_other_rows_of_a_batch_change_nothing(case: Case) -> None:
    """A row alone has no padding; in a batch its prefix and its text are padded to the longest."""
    batch = case.batch()
    (whole,) = batch.split(10**6, case.backbone.device)
    assert len({len(c.prompt.prefix_ids) for c, _ in batch.completions}) > 1, "no prefix is padded"
    assert whole.rows.suffixes.rows * whole.rows.suffixes.width > len(whole.rows.suffixes.ids_T), "no text is padded"
    with torch.no_grad():
        alone = [case.policy.logprobs(micro.rows) for micro in batch.split(1, case.backbone.device)]
        torch.testing.assert_close(torch.cat(alone), case.policy.logprobs(whole.rows), rtol=0, atol=LOGPROB_BOUND)


def test_row_order_and_micro_batch_size_change_nothing(case: Case) -> None:
    batch = case.batch()
    whole = case.gradients(batch)
    assert_gradients_close(case.gradients(batch, tokens_per_micro_batch=1), whole)
    assert_gradients_close(case.gradients(batch, tokens_per_micro_batch=60), whole)
    backwards = replace(batch, completions=batch.completions[::-1])
    assert_gradients_close(case.gradients(backwards), whole)
    (micro,), (turned,) = (b.split(10**6, case.backbone.device) for b in (batch, backwards))
    with torch.no_grad():
        straight_K, turned_K = case.policy.logprobs(micro.rows), case.policy.logprobs(turned.rows)
    by_row = turned_K.split([len(completion.sample.token_ids) for completion, _ in backwards.completions])
    torch.testing.assert_close(torch.cat(by_row[::-1]), straight_K, rtol=0, atol=LOGPROB_BOUND)


def test_a_mixed_batch_equals_one_node_at_a_time(case: Case) -> None:
    batch = case.batch()
    whole = case.gradients(batch)
    for index, node in enumerate(case.bank.nodes):
        alone = case.gradients(replace(batch, completions=tuple(c for c in batch.completions if c[0].node == node)))
        assert_gradients_close(
            {name: gradient[index] for name, gradient in alone.items()},
            {name: gradient[index] for name, gradient in whole.items()},
        )


def test_a_nodes_text_gives_other_adapters_exactly_no_gradient(case: Case) -> None:
    rows = case.rows()
    for index in range(len(case.bank.nodes)):
        of_node_K = rows.node_of_row_B[rows.suffixes.row_T[rows.sampled_K]] == index
        case.policy.logprobs(rows)[of_node_K].sum().backward()
        for name, gradient in case.take_gradients().items():
            assert gradient[index].any(), f"{name}: node {index} learns nothing"
            others = torch.arange(len(gradient)) != index
            assert not gradient[others].any(), f"{name}: node {index}'s text moves another adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_the_family_in_value_and_gradient(family: str) -> None:
    model = make_model(family)
    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    with torch.no_grad():
        for index, module in enumerate(norms.values()):
            assert isinstance(module.weight, Tensor)
            module.weight.add_(0.1 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(index)))
    names = list(model.state_dict())
    assert replace_norms(model) == len(norms) > 4
    assert list(model.state_dict()) == names
    for name, plain in norms.items():
        assert isinstance(plain.weight, Tensor)
        # One row of large, one of tiny numbers: there the epsilon counts.
        x = torch.randn(3, len(plain.weight), generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e3], [1e-3]])
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        results = []
        for module in (plain, model.get_submodule(name)):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, grad), module(x)))
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_does_not_pass_its_window_to_attention_is_refused(tmp_path: Path) -> None:
    """The probe's text may be shorter than the window, so that equal logits would not show that the window is ignored."""
    folder = save_model(make_model("llama"), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 4096}))
    with pytest.raises(ValueError, match=r"cannot be loaded: its kind of sliding window \(llama\) is not supported"):
        load_backbone(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_whose_logits_differ_for_a_text_in_two_parts_is_refused(
    tiny_folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgets(SuffixAttention):
        """Attends to the first token of the first part only."""

        def __init__(self, packed: Packed, prefixes: Prefixes, prefix_of_row_B: Tensor) -> None:
            super().__init__(packed, Prefixes(prefixes.past, torch.ones_like(prefixes.lengths_Q)), prefix_of_row_B)

    Backbone.load(str(tiny_folder), dtype=dtype, device="cpu")
    monkeypatch.setattr("neuromas.model.backbone.suffix_attention", Forgets)
    with pytest.raises(ValueError, match=r"its kind of attention \(qwen3\) is not supported"):
        Backbone.load(str(tiny_folder), dtype=dtype, device="cpu")


def test_a_model_whose_angles_change_with_the_length_takes_texts_up_to_that_length(tmp_path: Path) -> None:
    """With Phi-3's LongRoPE, one text beyond the original length changes the angles of every position in the batch."""
    original, plain = 256, make_model("llama").config
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 8.0, 16.0], "rope_theta": 1e4}
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
             "initializer_range", "pad_token_id", "eos_token_id", "bos_token_id")  # fmt: skip
    config = Phi3Config(
        **{name: getattr(plain, name) for name in sizes}, num_hidden_layers=2, max_position_embeddings=1024,
        original_max_position_embeddings=original, rope_parameters=rope,
    )  # fmt: skip
    backbone = load_backbone(save_model(Phi3ForCausalLM(config), tmp_path / "phi"))
    assert backbone.max_tokens == original
    adapter = AdapterConfig(rank=2, target_modules=("qkv_proj",))
    prompt = PromptConfig(wording="terse")
    network = Network(Topology.layered([1, 1]), backbone, adapter=adapter, max_new_tokens=5, prompt=prompt)
    short, long = (Example(str(n), "one " * n, "", "") for n in (40, original))
    ((rollout,),) = network.rollout([short], 1, seed=(0,))
    for completion in rollout.completions:
        expected = plain_logprobs(Phi3ForCausalLM.from_pretrained(tmp_path / "phi"), completion)
        assert (torch.tensor(completion.sample.logprobs) - expected).abs().max() <= LOGPROB_BOUND
    with pytest.raises(ValueError, match=r"need up to \d+ tokens, the backbone reads 256; shorten one of them$"):
        network.rollout([short, long], 1, seed=(0,))


def test_a_model_whose_config_names_no_size_of_its_feed_forward_is_read_and_learned(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "word_embed_proj_dim": 32}
    tokens = {name: getattr(make_model("llama").config, name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    config = OPTConfig(**sizes, **tokens, ffn_dim=48, max_position_embeddings=512, bos_token_id=None)
    folder = save_model(OPTForCausalLM(config), tmp_path / "opt")
    assert resolve_dtype("auto", str(folder), "cpu") == "float32"
    backbone = load_backbone(folder)
    assert backbone.tokens_per_micro_batch > 0
    assert [_feed_forward_size(each) for each in (config, SimpleNamespace(hidden_size=32))] == [48, 4 * 32]
    assert _feed_forward_size(SimpleNamespace(intermediate_size=[16, 48])) == 48


def test_the_head_takes_no_adapter(bare: Backbone) -> None:
    with pytest.raises(ValueError, match=r"--adapter.target_modules must be among \['down_proj', .*got \['lm_head'\]"):
        Policy(bare, (1, 2), AdapterConfig(rank=2, target_modules=("q_proj", "lm_head")))


# The frozen backbone


def test_checksum_is_the_same_after_a_step_and_another_after_any_change(small: Case, bare: Backbone) -> None:
    before = bare.checksum()
    assert small.backbone.checksum() == before
    trained = [parameter.detach().clone() for parameter in small.bank.parameters().values()]
    for name, gradient in small.gradients(small.batch()).items():
        small.bank.parameters()[name].grad = gradient
    torch.optim.AdamW(small.bank.parameters().values(), lr=0.1).step()
    for old, new in zip(trained, small.bank.parameters().values(), strict=True):
        assert (old != new).any()
    assert all(p.grad is None and not p.requires_grad for p in small.backbone.model.parameters())
    assert small.backbone.checksum() == before
    with torch.no_grad():
        weight = small.backbone.model.get_submodule("model.layers.1.mlp.down_proj").weight
        assert isinstance(weight, Tensor)
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert small.backbone.checksum() != before


def test_any_number_of_policies_share_one_backbone(small: Case) -> None:
    rows = small.rows()
    with torch.no_grad():
        before_K = small.policy.logprobs(rows)
        other = Policy(small.backbone, (1, 2, 3), AdapterConfig(rank=4), seed=1)
        assert other.adapters is not None
        randomise(other.adapters)
        assert (other.logprobs(rows) - before_K).abs().max() > 0.1
        assert torch.equal(small.policy.logprobs(rows), before_K)
    weights = {tensor.untyped_storage().data_ptr() for tensor in small.backbone.model.parameters()}
    adapters = set(map(id, other.adapters.parameters().values()))
    found = {tensor.untyped_storage().data_ptr() for tensor in other.model.parameters() if id(tensor) not in adapters}
    assert found == weights


# Prompts


def test_a_prompt_is_one_user_message_with_the_question_first(bare: Backbone) -> None:
    policy = Policy(bare)
    prompt = policy.prompt("Is 2 even?", "You are node 1.")
    text = bare.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is 2 even?\n\nYou are node 1."}], tokenize=False, add_generation_prompt=True
    )
    assert bare.tokenizer.decode([*prompt.prefix_ids, *prompt.suffix_ids]) == text
    assert str(bare.tokenizer.decode(list(prompt.prefix_ids))).endswith("Is 2 even?\n\n")
    assert policy.prompt("Is 2 even?", "You are node 2.").prefix_ids == prompt.prefix_ids
    shared = policy.prompt("Is 2 even?", "You are node 1.", has_inbox=False)
    assert shared.prefix_ids + shared.suffix_ids == prompt.prefix_ids + prompt.suffix_ids
    assert len(shared.prefix_ids) > len(prompt.prefix_ids)
    for adapter in (AdapterConfig(rank=1, scope="suffix"), AdapterConfig(rank=1, shared=True)):
        assert Policy(bare, (1, 2), adapter).prompt("Is 2 even?", "You are node 1.", has_inbox=False) == prompt


def test_control_tokens_in_a_question_or_message_stay_plain_text(bare: Backbone) -> None:
    policy = Policy(bare)
    plain, control = policy.prompt("", ""), "".join(bare.tokenizer.all_special_tokens)
    assert set(bare.tokenizer(control)["input_ids"]) == set(bare.tokenizer.all_special_ids)
    prompt = policy.prompt(f"a{control}b", f"c{control}d")
    specials = set(bare.tokenizer.all_special_ids)
    for part, frame in ((prompt.prefix_ids, plain.prefix_ids), (prompt.suffix_ids, plain.suffix_ids)):
        assert [token for token in part if token in specials] == [token for token in frame if token in specials]
    assert f"a{control}b" in bare.detokenize(prompt.prefix_ids)
    assert f"c{control}d" in bare.detokenize(prompt.suffix_ids)


def test_without_a_chat_template_a_prompt_is_plain_text(folders: dict[str, Path]) -> None:
    given = load_backbone(folders["qwen3"])
    given.tokenizer.chat_template = None
    backbone = Backbone(given.model, given.tokenizer, "plain")
    prompt = Policy(backbone).prompt("Is 2 even?", "You are node 1.")
    assert backbone.tokenizer.decode([*prompt.prefix_ids, *prompt.suffix_ids]) == "Is 2 even?\n\nYou are node 1.\n"


DATED = """{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{{- "Today Date: " + date_string + "\n" }}{%- for message in messages %}{{ message.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- "\n>" }}{%- endif %}"""
"""A template that gives the day as those of Llama 3.2 and later do."""


def test_the_date_of_a_chat_template_is_the_runs_on_any_day(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "dated")
    tokenizer = load_backbone(folder).tokenizer
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    config = TrainConfig(backbone=str(folder), device="cpu", run_dir=tmp_path / "run", prompt_date="2025-03-02", eval_size=2)
    RunDirectory.create(config).initialise()

    def prompt_text(config: TrainConfig) -> str:
        policy = build_network(config).policy
        prompt = policy.prompt("Is 2 even?", "You are node 1.")
        return policy.backbone.detokenize((*prompt.prefix_ids, *prompt.suffix_ids))

    started = prompt_text(config)
    assert started == "Today Date: 02 Mar 2025\nIs 2 even?\n\nYou are node 1.\n>"

    class LaterDay(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "LaterDay":
            return cls(2031, 12, 24)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", LaterDay)
    left_alone = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    assert "24 Dec 2031" in str(left_alone), "the clock has not moved, so that nothing is tested"
    stored = RunDirectory.open(tmp_path / "run").config
    assert prompt_text(stored) == started
    # Untrained rivals read the frame that a network's nodes read.
    for each in (stored, replace(stored, prompt=PromptConfig(wording="plain"))):
        assert Answerer(each, temperature=0.0).policy.frame == build_network(each).policy.frame
    assert "26 Jul 2024" in prompt_text(replace(stored, prompt_date=TrainConfig().prompt_date))
    with pytest.raises(
        ValueError, match=r"belongs to another config, which has prompt_date = '2025-03-02' \(got '2024-07-26'\)"
    ):
        RunDirectory.resume(replace(config, prompt_date="2024-07-26"))


REFUSES = (
    "{% for turn in messages %}{% if turn.role == 'assistant' %}{{ raise_exception('users only') }}{% endif %}"
    "{{ turn.content }}{% endfor %}>"
)
QUESTIONS = [Example("id", "Is it even?", "Yes", 'Write "Answer: Yes".')]


def chatting(backbone: Backbone, template: str) -> Backbone:
    backbone.tokenizer.chat_template = template
    return Backbone(backbone.model, backbone.tokenizer, "refusing")


def test_a_template_without_turns_of_an_assistant_serves_where_none_is_needed(bare: Backbone) -> None:
    backbone, chat = chatting(bare, REFUSES), PromptConfig(wording="chat")
    Network(Topology.layered([1, 1]), backbone, prompt=chat).check_lengths(QUESTIONS)
    with pytest.raises(
        ValueError,
        match=r"template of --backbone \S+ refuses an assistant's turn, which .* \(users only\); take --wording plain \(\[prom",
    ):
        Network(Topology.layered([1, 2, 1]), backbone, prompt=chat).check_lengths(QUESTIONS)
    plain = Network(Topology.layered([1, 2, 1]), backbone, prompt=PromptConfig(wording="plain"), max_new_tokens=4)
    plain.check_lengths(QUESTIONS)
    assert plain.rollout(QUESTIONS, 1, seed=(0,))


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (
            "{{ raise_exception('a system turn, please') }}",
            r"refuses a user's turn \(a system turn, please\); take --wording plain",
        ),
        ("{{ messages[0].content | upper }}", "does not write the text of a user's turn as it is; take --wording plain"),
        ("{{ messages[0].content * 2 }}", "does not write the text of a user's turn as it is; take --wording plain"),
        ("{% endfor %}", r"refuses a user's turn \(.*endfor.*\); take --wording plain"),
    ],
)
def test_a_template_that_is_no_chat_template_can_be_left_out(bare: Backbone, template: str, error: str) -> None:
    backbone = chatting(bare, template)
    backbone._probe()
    with pytest.raises(ValueError, match=error):
        Network(Topology.layered([1]), backbone)
    assert Network(Topology.layered([1]), backbone, prompt=PromptConfig(wording="plain")).wording.name == "plain"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(bare: Backbone) -> None:
    bare.model.config.vocab_size = 40
    with pytest.raises(ValueError, match=r"the tokenizer of \S+ does not fit: ids \(\d+, .* for a model of 40 tokens"):
        bare._probe()


# Loading


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--backbone .*none: expected a folder with a config.json, found none"):
        Backbone.load(str(tmp_path / "none"))


def test_a_folder_that_holds_a_gguf_file_says_what_to_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/small.GGUF").touch()
    monkeypatch.chdir(tmp_path)
    message = r"--backbone models: expected a folder .* found none; a GGUF file is named itself: models/small\.GGUF$"
    with pytest.raises(ValueError, match=message):
        Backbone.load("models")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_model_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "abacus"}')


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def overwrite(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(bytes(range(256)) * 8)


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def misfit_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))


def lose_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))


@pytest.mark.parametrize(
    "damage",
    [
        break_config,
        break_model_type,
        break_tokenizer,
        remove_tokenizer,
        remove_weights,
        truncate_weights,
        misfit_weights,
        lose_layer,
        overwrite,
    ],
)
def test_a_corrupt_model_folder_is_one_clear_line(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = save_model(make_model("qwen3"), tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match=f"--backbone {folder}: cannot be loaded: .") as caught:
        load_backbone(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, number: float) -> None:
    model = make_model("qwen3")
    # An embedding that no probe of the model reads.
    model.state_dict()["model.embed_tokens.weight"][-1, 0] = number
    folder = save_model(model, tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"1 of its weights hold nan or inf, e\.g\. model\.embed_tokens\.weight; its files are da"
    ):
        load_backbone(folder)


def test_config_of_reads_the_config_alone(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert config_of(str(folders["gemma3"])).model_type == "gemma3_text"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no config can be loaded: "):
        config_of(str(tmp_path))


def test_a_model_without_a_stop_token_is_refused(bare: Backbone) -> None:
    bare.tokenizer.eos_token = None
    assert bare.model.generation_config is not None
    bare.model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="neither the model nor the tokenizer names a stop token"):
        Backbone(bare.model, bare.tokenizer, "endless")


@pytest.mark.parametrize(("device", "expected"), [("cuda", torch.device("cuda")), ("cpu", None)])
def test_weights_are_read_straight_to_another_device(
    tiny_folder: Path, device: str, expected: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(source: str, **settings: object) -> object:
        raise RuntimeError(f"read to {settings['device_map']}")

    monkeypatch.setattr("neuromas.model.backbone.AutoModelForCausalLM.from_pretrained", found)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("neuromas.model.backbone.require_memory", lambda what, size, where: None)
    with pytest.raises(ValueError, match=f"read to {expected}$"):
        Backbone.load(str(tiny_folder), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_named() -> None:
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="--device cuda: no NVIDIA GPU found; use --device cpu"):
        resolve_device("cuda")


# Adapters: rank, start, files


@pytest.mark.parametrize(("nodes", "rank"), [(1, 24), (2, 12), (3, 8), (4, 6), (5, 4), (8, 3), (24, 1), (30, 1)])
def test_by_default_a_total_rank_of_24_is_shared(nodes: int, rank: int) -> None:
    assert resolve_rank(AdapterConfig(), nodes, 100) == rank


@pytest.mark.parametrize(("budget", "rank"), [(600, 1), (1199, 1), (1200, 2), (6599, 10), (6600, 11)])
def test_a_budget_gives_the_largest_rank_that_fits(budget: int, rank: int) -> None:
    # 3 nodes x 200 parameters: 600 for each rank
    assert resolve_rank(AdapterConfig(budget=budget), 3, 200) == rank


def test_a_budget_below_rank_1_says_what_is_needed() -> None:
    expected = "--adapter.budget 599 is too small for rank 1: 3 nodes need at least 600 trainable parameters"
    with pytest.raises(ValueError, match=expected):
        resolve_rank(AdapterConfig(budget=599), 3, 200)


def test_trainable_parameters_are_the_banks_tensors_within_the_budget(bare: Backbone) -> None:
    policy = Policy(bare, (1, 2, 3), AdapterConfig(budget=20_000, target_modules=("q_proj", "v_proj")))
    bank = bank_of(policy)
    # q: 32 -> 32, v: 32 -> 16, two layers: 2 * (64 + 48) = 224 for each rank; 20000 // (3 * 224) = 29
    assert bank.rank == 29
    assert bank.trainable_parameters == 3 * 29 * 224 == sum(p.numel() for p in bank.parameters().values())
    trained = {id(p) for p in policy.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in bank.parameters().values()}


def test_an_unknown_target_module_lists_the_known_ones(bare: Backbone) -> None:
    expected = r"--adapter.target_modules must be among \['down_proj', .*'v_proj'\] for this backbone, got \['qkv'\]"
    with pytest.raises(ValueError, match=expected):
        Policy(bare, (1,), AdapterConfig(target_modules=("q_proj", "qkv")))


def start_of(folder: Path, nodes: tuple[int, ...], node: int, seed: int = 0) -> dict[str, Tensor]:
    policy = Policy(load_backbone(folder), nodes, AdapterConfig(rank=2), seed)
    bank = bank_of(policy)
    return {name: parameter[policy.routing.adapter_of(node)].detach() for name, parameter in bank.parameters().items()}


def test_an_adapters_start_depends_on_its_own_node_and_the_seed_alone(folders: dict[str, Path]) -> None:
    alone = start_of(folders["qwen3"], (2,), 2)
    assert all(not tensor.any() for name, tensor in alone.items() if name.endswith("lora_B"))
    for other in (start_of(folders["qwen3"], (1, 2, 3), 2), start_of(folders["qwen3"], (7, 2), 2)):
        assert all(torch.equal(tensor, other[name]) for name, tensor in alone.items())
    for other in (start_of(folders["qwen3"], (2,), 2, seed=1), start_of(folders["qwen3"], (1, 2), 1)):
        assert all(not torch.equal(tensor, other[name]) for name, tensor in alone.items() if name.endswith("lora_A"))


def test_new_adapters_change_nothing(small: Case, bare: Backbone) -> None:
    """B starts at zero, so the network starts as the bare backbone, bit for bit."""
    rows = small.rows()
    with torch.no_grad():
        before_K = Policy(bare).logprobs(rows)
        assert torch.equal(Policy(bare, (1, 2, 3), AdapterConfig(rank=2)).logprobs(rows), before_K)


def test_the_card_of_an_adapter_with_scope_suffix_says_what_cannot_serve_it(bare: Backbone) -> None:
    bank = bank_of(Policy(bare, (1,), AdapterConfig(rank=2, scope="suffix"), seed=0))
    assert b"behind the question" in bank.peft_files(1, "")["README.md"]


def test_peft_files_round_trip_bit_for_bit(small: Case, bare: Backbone, tmp_path: Path) -> None:
    # Node 2 is loaded as node 5 of another bank: a file holds one adapter, whatever its index was.
    folder = export_peft(small.bank, 2, tmp_path / "2")
    bank = bank_of(Policy(bare, (4, 5), AdapterConfig(rank=2), seed=9))
    untouched = {name: parameter[0].clone() for name, parameter in bank.parameters().items()}
    bank.load_peft(5, folder)
    for name, parameter in bank.parameters().items():
        assert torch.equal(parameter[1], small.bank.parameters()[name][1])
        assert torch.equal(parameter[0], untouched[name])
    assert bank.peft_files(5, "") == small.bank.peft_files(2, "")


def test_an_adapter_of_another_shape_is_refused(small: Case, bare: Backbone, tmp_path: Path) -> None:
    folder = export_peft(small.bank, 1, tmp_path / "1")
    bank = bank_of(Policy(bare, (1,), AdapterConfig(rank=3), seed=0))
    with pytest.raises(ValueError, match=r"adapter .* holds \(2, 32\) for .*q_proj.lora_A, expected \(3, 32\)"):
        bank.load_peft(1, folder)


def test_clipping_scales_the_gradient_of_each_node_separately(small: Case) -> None:
    for parameter in small.bank.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    first, second = list(small.bank.parameters().values())[:2]
    assert first.grad is not None
    assert second.grad is not None
    # Node 1: 3 and 4 in two tensors, norm 5; node 2: 0.5; node 3: nothing.
    first.grad[0, 0, 0], second.grad[0, 0, 0], first.grad[1, 0, 0] = 3.0, 4.0, 0.5
    assert small.bank.clip_grad_norms(0.0) == {1: 5.0, 2: 0.5, 3: 0.0}
    assert first.grad[0, 0, 0].item() == 3.0
    assert small.bank.clip_grad_norms(1.0) == {1: 5.0, 2: 0.5, 3: 0.0}
    assert first.grad[0, 0, 0].item() == pytest.approx(0.6, abs=1e-6)
    assert second.grad[0, 0, 0].item() == pytest.approx(0.8, abs=1e-6)
    assert first.grad[1, 0, 0].item() == 0.5
