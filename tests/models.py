"""Tiny random language models of three families, and reference log-probabilities by plain transformers and PEFT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from neuromas.model.adapters import AdapterBank
from neuromas.model.backbone import Backbone
from neuromas.types import Completion

TOKENIZER = Path(__file__).parent / "tokenizer"
"""A small BPE of the tests' own, so that what a test samples does not change when the bundled backbone is remade."""

FAMILIES = ("qwen3", "llama", "gemma3")
SLIDING_WINDOW = 8
"""Shorter than every prompt of the tests."""


def make_model(family: str, says: Sequence[str] = ()) -> PreTrainedModel:
    """Return a model that writes noise; with `says` it mostly writes one of these single-token words or nothing, and stops.

    Weights are drawn ten times wider than usual, so that attention is far from uniform and a wrong mask or position shows.
    """
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "tie_word_embeddings": False,
        "max_position_embeddings": 512, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **sizes))
        elif family == "llama":
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        else:
            layers = ["sliding_attention", "full_attention", "sliding_attention"]
            config = Gemma3TextConfig(
                num_hidden_layers=3, layer_types=layers, sliding_window=SLIDING_WINDOW, query_pre_attn_scalar=8, **sizes
            )  # fmt: skip
            model = Gemma3ForCausalLM(config)
    if says:
        _favour(model, tokenizer.eos_token_id, [_only_token(tokenizer, text) for text in says])
    return model


def _only_token(tokenizer: Any, text: str) -> int:
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


def _favour(model: PreTrainedModel, stop: int, words: list[int]) -> None:
    """Change weights so that logits depend on two marks in the residual stream: any text, and a word just written."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        embedding.weight[:, 0], embedding.weight[:, 1] = 2.0, 0.0
        embedding.weight[words, 1] = 2.0
        head.weight[:, :2] = 0.0
        head.weight[[stop, *words], 0] = 4.0
        head.weight[stop, 1] = 2.0


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def randomise(bank: AdapterBank, size: float = 0.1) -> None:
    """Give every B random values that depend on its node and module alone, so that adapters are not zero."""
    with torch.no_grad():
        for index, node in enumerate(bank.nodes):
            generator = torch.Generator().manual_seed(node)
            for module in bank.modules.values():
                b = torch.randn(module.lora_B.shape[1:], generator=generator)
                module.lora_B[index] = size * b


def export_peft(bank: AdapterBank, node: int, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in bank.peft_files(node, "").items():
        (folder / name).write_bytes(data)
    return folder


def load_peft(backbone_folder: Path, adapter_folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Return a fresh copy of the backbone with one adapter, loaded by PEFT alone."""
    plain = AutoModelForCausalLM.from_pretrained(backbone_folder, dtype=dtype)
    return PeftModel.from_pretrained(plain, str(adapter_folder), is_trainable=True).eval()


def plain_logprobs(model: Any, completion: Completion, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities of a completion from one forward over the whole text: no padding, no cache."""
    prompt = [*completion.prompt.prefix_ids, *completion.prompt.suffix_ids]
    written = list(completion.sample.token_ids)
    logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)[range(len(written)), written]


def suffix_logprobs(model: PeftModel, completion: Completion) -> Tensor:
    """Return the same for an adapter that acts only after the prefix, from two forwards through plain PEFT."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=torch.tensor([completion.prompt.prefix_ids]), past_key_values=cache)
    prompt, written = list(completion.prompt.suffix_ids), list(completion.sample.token_ids)
    logits = model(input_ids=torch.tensor([[*prompt, *written]]), past_key_values=cache).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)[range(len(written)), written]


def load_backbone(folder: Path, dtype: str = "float32") -> Backbone:
    return Backbone.load(str(folder), dtype=dtype, device="cpu")
