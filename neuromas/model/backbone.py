"""The frozen language model that all nodes share, and its tokenizer."""

import copy
import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from neuromas.bundled import BUNDLED
from neuromas.config import PROMPT_DATE, TrainConfig
from neuromas.model.adapters import AdapterBank, require_memory
from neuromas.model.decoder import Decoder, slides
from neuromas.model.flex import prefix_attention, suffix_attention
from neuromas.model.gguf_file import converted
from neuromas.model.layers import Layers, TransformersLayers
from neuromas.model.number_format import faster_dtype
from neuromas.model.ops import ops_for
from neuromas.model.packing import ATTENTION, Packed
from neuromas.model.rms_norm import replace_norms
from neuromas.model.sources import find_backbone, is_gguf
from neuromas.model.turns import Frame, chat_frame, plain_frame
from neuromas.system.terminal import in_short

MICRO_BATCH_TOKENS = 10_000
MICRO_BATCH_BYTES = 3 * 2**29
"""What a forward pass may keep for its gradient, about."""


class Backbone:
    """One frozen causal language model with its tokenizer. Policies share its weights, and nothing changes them."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, prompt_date: str = PROMPT_DATE
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(ATTENTION)
        replace_norms(model)
        self.tokenizer = tokenizer
        self.name = name
        stop_ids = _stop_ids(model, tokenizer)
        self.has_chat_template = bool(tokenizer.chat_template)
        # Not made before it is wanted: a template may refuse what is asked of it, and plain text does without one.
        self._chat_frame = functools.cache(lambda: self._fitting(chat_frame(tokenizer, stop_ids, prompt_date)))
        self._plain_frame = functools.cache(lambda one_line: plain_frame(tokenizer, stop_ids, one_line))
        self.ops = ops_for(model.dtype, model.device)
        self.has_own_decoder = Decoder.fits(model)
        """Whether our own decoder computes the model, and not its layers in transformers."""
        self._encode_text = functools.lru_cache(maxsize=65536)(self._encode_uncached)

    def frame(self, *, chat: bool = True, one_line: bool = False) -> Frame:
        """Return the chat template's frame, or that of plain text if there is none or it is not wanted.

        Raises ValueError if the template refuses a user's turn.
        """
        return self._chat_frame() if chat and self.has_chat_template else self._plain_frame(one_line)

    def layers(self, model: PreTrainedModel, adapters: AdapterBank | None) -> Layers:
        """Return the layers that compute a module tree of this model with these adapters."""
        return Decoder(model, adapters) if self.has_own_decoder else TransformersLayers(model, adapters)

    def new_module_tree(self) -> PreTrainedModel:
        """Return a copy of the model's modules, for adapters to wrap; it holds the same weight tensors."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})

    @classmethod
    def load(
        cls, name: str = "bundled", *, dtype: str = "float32", device: str = "auto", prompt_date: str = PROMPT_DATE
    ) -> "Backbone":
        """Load what `--backbone` names: `bundled`, a folder, a GGUF file, `smollm2-135m`, `gemma3-270m` or a hub id.

        A chat template that asks for today's date gets `prompt_date` (YYYY-MM-DD). `dtype` is as in `resolve_dtype`.

        Raises ValueError that says what is wrong with the folder or the id.
        """
        source, dtype, device = find_backbone(name), resolve_dtype(dtype, name, device), resolve_device(device)
        # Errors are reported below, in one line.
        disable_progress_bar()
        set_verbosity_error()
        try:
            source = _converted(source)
            _require_room(Path(source), dtype, device)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True,
                trust_remote_code=False, device_map=None if device == "cpu" else torch.device(device),
            )  # fmt: skip
            model, report = loaded
            # Otherwise transformers would fill missing weights with random numbers and go on.
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"its files lack {len(missing)} weights, e.g. {missing[0]}")
            _require_numbers(model)
            backbone = cls(model, tokenizer, name, prompt_date)
            backbone._probe()
        except Exception as error:  # transformers, safetensors, jinja and the hub each raise classes of their own
            where = "" if Path(source).exists() else " (no local folder; offline, a hub id must be in the cache already)"
            raise ValueError(f"--backbone {name}: cannot be loaded{where}: {in_short(error)}") from error
        return backbone

    @classmethod
    def of(cls, config: TrainConfig) -> "Backbone":
        """Load the backbone of a run as its settings say; ValueError as `load`."""
        return cls.load(config.backbone, dtype=config.dtype, device=config.device, prompt_date=config.prompt_date)

    def _fitting(self, frame: Frame) -> Frame:
        """Return a frame; ValueError if the model knows no such tokens."""
        ids = (*frame.header, *self.tokenize("Probe: 1 2 3"), *frame.footer)
        embeddings = self.model.config.get_text_config().vocab_size
        if not self.tokenize("Probe") or max(ids) >= embeddings:
            raise ValueError(f"the tokenizer of {self.name} does not fit: ids {ids[:8]}... for a model of {embeddings} tokens")
        return frame

    @torch.inference_mode()
    def _probe(self) -> None:
        """Raise ValueError if the logits of a text in one forward differ from those of the text in two parts.

        Models with a state other than keys and values cannot be cached here.
        """
        frame = self._fitting(self.frame(chat=False))
        ids = (*frame.header, *self.tokenize("Probe: 1 2 3"), *frame.footer)
        window = getattr(self.model.config, "sliding_window", None) or 0
        ids = torch.tensor([(ids * (2 + min(window, 128) // len(ids)))], device=self.device)
        whole = self.model(input_ids=ids, use_cache=False).logits[0, -1:].float()
        cut = ids.shape[1] // 2
        head, tail = (Packed.of([part], self.device) for part in (ids[0, :cut].tolist(), ids[0, cut:].tolist()))
        first, layers = prefix_attention(head), self.layers(self.model, None)
        layers.prefill(head.ids_T, head.column_T, None, first)
        attention = suffix_attention(tail, first.prefixes, tail.row_T[:1])
        parts = layers.logits(tail.ids_T, attention.positions_T, None, attention, tail.column_T[-1:])
        if slides(self.model) and attention.windows == {None}:
            # The text could be shorter than the window, and comparing logits would then not test it.
            raise ValueError(f"its kind of sliding window ({self.model.config.model_type}) is not supported")
        # The mean is compared: in bfloat16 single logits may differ a lot, but with a wrong forward all logits do.
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.1
        if not (whole - parts).abs().mean() <= tolerance * whole.std():
            raise ValueError(f"its kind of attention ({self.model.config.model_type}) is not supported")

    @classmethod
    def tiny(cls, seed: int = 0) -> "Backbone":
        """Return a random Qwen3 of two layers with the bundled tokenizer: it shows the mechanics, not the skill."""
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            )  # fmt: skip
            return cls(Qwen3ForCausalLM(config), tokenizer, f"tiny-{seed}")

    @functools.cached_property
    def has_bundled_vocabulary(self) -> bool:
        """Whether its tokens are those of the bundled backbone, which knows few words."""
        bundled = AutoTokenizer.from_pretrained(BUNDLED)
        return len(self.tokenizer) == len(bundled) and self.tokenizer.get_vocab() == bundled.get_vocab()

    @functools.cached_property
    def max_tokens(self) -> int | None:
        """Return the length of the longest text that the model reads, or None if its config names none.

        If rotary angles depend on the length of the text, it is the length from which on they change: cached keys would have
        other angles than the keys after them.
        """
        config = self.model.config.get_text_config()
        found = [getattr(config, "max_position_embeddings", None)]
        rope = getattr(config, "rope_parameters", None) or {}
        for kind in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
            if kind.get("rope_type") in ("longrope", "dynamic"):
                found += [kind.get("original_max_position_embeddings")]
        return min((limit for limit in found if limit), default=None)

    @property
    def token_bytes(self) -> int:
        """Return the bytes of the keys and values of one token in all layers, or 0 if the config does not say."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
        size = getattr(config, "head_dim", None) or config.hidden_size // max(1, config.num_attention_heads)
        dtype = torch.float32 if self.ops.wide_residual and self.has_own_decoder else self.model.dtype
        return 2 * config.num_hidden_layers * heads * size * dtype.itemsize

    @property
    def bytes_per_trained_token(self) -> int:
        """Return about how many bytes a forward pass keeps of a token for the backward pass."""
        config = self.model.config.get_text_config()
        # Of each layer: hidden states, queries, keys, values and attention in float32, and the feed-forward's in the model's.
        of_layer = 40 * config.hidden_size + 6 * _feed_forward_size(config) * self.model.dtype.itemsize
        return config.num_hidden_layers * of_layer

    @property
    def tokens_per_micro_batch(self) -> int:
        """Return how many tokens a forward and backward pass takes at once: on a CPU, fewer of a large model."""
        if self.device.type != "cpu":
            return MICRO_BATCH_TOKENS
        return min(MICRO_BATCH_TOKENS, max(1, MICRO_BATCH_BYTES // self.bytes_per_trained_token))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def checksum(self) -> str:
        """Return a hash of all weights; it is equal before and after training."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict(keep_vars=True).items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def check_unchanged(self, checksum: str) -> None:
        """Raise RuntimeError if a weight is not what it was when this checksum was taken."""
        if (found := self.checksum()) != checksum:
            raise RuntimeError(f"training changed the frozen backbone: its checksum was {checksum} and is {found}")

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a part of a message."""
        return self._encode_text(text)

    def forget_texts(self) -> None:
        """Free the memory of texts whose token ids were kept."""
        self._encode_text.cache_clear()

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        decoded = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(decoded, str)
        return decoded

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        # Control tokens written out in a question or a message stay plain text, so that it cannot end its turn.
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(encoded["input_ids"])


def resolve_device(device: str) -> str:
    """Return `cuda` or `cpu`; raise ValueError if cuda is asked for and not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no NVIDIA GPU found; use --device cpu")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, name: str, device: str) -> str:
    """Return `float32` or `bfloat16`: for `auto`, bfloat16 where the machine has instructions for a backbone's products.

    Raises ValueError as `Backbone.load` does.
    """
    if dtype != "auto":
        return dtype
    if resolve_device(device) == "cuda":
        return "bfloat16"
    config = config_of(name).get_text_config()
    return faster_dtype(config.hidden_size, _feed_forward_size(config))


def _feed_forward_size(config: Any) -> int:
    """Return the features inside a layer's feed-forward, the most of any layer; 4 times the hidden ones if none are named."""
    found = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    return found if isinstance(found, int) else max(found)


def config_of(name: str) -> Any:
    """Return a backbone's transformers config without its weights; raise ValueError as `Backbone.load` does."""
    source = find_backbone(name)
    try:
        return AutoConfig.from_pretrained(_converted(source), trust_remote_code=False)
    except Exception as error:  # a damaged config raises whatever reading it meets
        raise ValueError(f"--backbone {name}: no config can be loaded: {in_short(error)}") from error


def folder_of(name: str) -> str:
    """Return the folder or hub id that a backbone is loaded from; raise ValueError if there is none of this name."""
    return _converted(find_backbone(name))


def _converted(source: str) -> str:
    """Return the folder or hub id to load: of a GGUF file, what it converts to."""
    return str(converted(Path(source))) if is_gguf(source) else source


def _require_room(folder: Path, dtype: str, device: str) -> None:
    """Raise ValueError if the weights in a folder need more memory than there is; of a hub id nothing is known yet."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118  # no dict
    size = count * getattr(torch, dtype).itemsize
    require_memory(f"its {count:,} weights in {dtype}", size, torch.device(device))


def _require_numbers(model: PreTrainedModel) -> None:
    """Raise ValueError if a weight is not a finite number."""
    # A sum is not finite if one of its terms is not, and takes a tenth of the time of looking at each.
    bad = [name for name, weight in model.named_parameters() if not math.isfinite(weight.sum(dtype=torch.float32).item())]
    if bad:
        raise ValueError(f"{len(bad)} of its weights hold nan or inf, e.g. {bad[0]}; its files are damaged: get them again")


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends a text: the model's and the tokenizer's, which may differ in chat models."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    ids = {token for token in named if isinstance(token, int)}
    if not ids:
        raise ValueError(f"--backbone {tokenizer.name_or_path}: neither the model nor the tokenizer names a stop token")
    return frozenset(ids)
