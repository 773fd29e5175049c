"""The models that are measured, as folders that every peer can load, with the same adapters as PEFT folders beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from neuromas.bundled import BUNDLED
from neuromas.config import AdapterConfig
from neuromas.model.adapters import AdapterBank
from neuromas.model.gguf_file import converted
from neuromas.model.sources import find_backbone

RANK = 8
MOST_NODES = 15
SMOLLM2 = "smollm2-135m"
"""A pretrained model, out of a package that has to be installed; the others are made here."""
_CHAT = (
    "{% for message in messages %}<user> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# Hidden size, feed-forward size, layers, heads, key-value heads, head size, vocabulary.
_SHAPES = {
    "60m": (512, 1536, 14, 8, 4, 64, 32768),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936),
    "tiny": (64, 128, 2, 4, 2, 16, 512),
}


def make_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, int]:
    """Return the folders of a model and of its adapters, made where they are not there, and the size of its vocabulary.

    ValueError if the package that ships the model is not installed.
    """
    model, adapters = folder / name, folder / f"{name}-adapters"
    if name == SMOLLM2:
        model = Path(converted(Path(find_backbone(name))))
    elif not (model / "config.json").exists():
        _write_model(name, model, dtype)
    if not (adapters / "done").exists():
        _write_adapters(model, adapters)
    config = json.loads((model / "config.json").read_text())
    return model, adapters, int(config["vocab_size"])


def _write_model(name: str, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if name == "bundled":
        for path in BUNDLED.iterdir():
            if path.is_file() and path.suffix != ".py":
                shutil.copy(path, folder)
        return
    hidden, feed_forward, layers, heads, kv_heads, head, vocabulary = _SHAPES[name]
    _word_tokenizer(vocabulary).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head, tie_word_embeddings=True,
        max_position_embeddings=4096, pad_token_id=0, eos_token_id=3, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Qwen3ForCausalLM(config)
        model.to(dtype).save_pretrained(folder)


def _word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, so that a text of n words is n tokens, there and back."""
    special = ["<pad>", "<unk>", "<user>", "<end>", "<assistant>"]
    words = {word: i for i, word in enumerate([*special, *[f"w{i}" for i in range(len(special), vocabulary)]])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    fast.chat_template = _CHAT
    return fast


def _write_adapters(model: Path, folder: Path) -> None:
    """Write adapters of nodes 1 to 15 whose B is not zero: a peer that drops one gives other losses."""
    # The model itself is never called: what computes it may be what is measured, and fail.
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    bank = AdapterBank(plain, range(1, MOST_NODES + 1), AdapterConfig(rank=RANK), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in bank.parameters().items():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    for node in bank.nodes:
        (folder / str(node)).mkdir(parents=True, exist_ok=True)
        for file, data in bank.peft_files(node, str(model)).items():
            (folder / str(node) / file).write_bytes(data)
    (folder / "done").touch()
