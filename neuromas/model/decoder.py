"""Our own decoder: computes the layers of common models on a stream of tokens, with as few operations as possible.

Many open models have one kind of layer (Llama and SmolLM2, Mistral, Qwen 2 and 3, Gemma 3): norm, attention with rotary
positions (Su et al. 2021, arXiv 2104.09864), norm, gated feed-forward (Shazeer 2020, arXiv 2002.05202), with residual
connections. This module computes those: modules with the same input are one product, the last layer computes only the tokens
whose logits are needed, and operations have their own backward where autograd would pass over memory more often. Any other
model keeps its own forward.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from neuromas.model.adapters import AdapterBank
from neuromas.model.attention import PrefixAttention
from neuromas.model.flex import prefix_attention
from neuromas.model.logprobs import chosen_logprobs, logits_of
from neuromas.model.lora import LinearGroup
from neuromas.model.ops import GATES, TorchOps, ops_for
from neuromas.model.packing import Attention, Packed
from neuromas.model.rms_norm import RMSNorm

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Model types whose source is as described. Other types may have the same modules and yet differ on long texts."""
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_AROUND_MLP = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "attn_logit_softcapping")
"""Settings by which models change logits or scores; their effect on a short text may be too small to notice."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer: its products, norms and settings."""

    qkv: LinearGroup
    q: LinearGroup
    kv: LinearGroup
    out: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    before_attention: RMSNorm
    after_attention: RMSNorm | None
    before_mlp: RMSNorm
    after_mlp: RMSNorm | None
    heads: tuple[int, int]
    """Number of query heads, and of key heads."""
    head_scale: Tensor | None
    """Weights of the norms of queries and keys, (H + J, D)."""
    head_eps: float
    scale: float
    window: int | None
    kind: str
    """The kind of layer, by which the model's rotary frequencies may differ."""
    activation: str
    ops: TorchOps

    def query_keys_values(self, normed_TC: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of tokens, normed and rotated."""
        return self._heads(self.qkv, normed_TC, angles, *self.heads)

    def query(self, normed_TC: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Return the queries of tokens alone."""
        return self._heads(self.q, normed_TC, angles, self.heads[0], 0)[0]

    def keys_values(self, normed_TC: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of tokens alone."""
        return self._heads(self.kv, normed_TC, angles, 0, self.heads[1])[1:]

    def _heads(
        self, linear: LinearGroup, normed_TC: Tensor, angles: tuple[Tensor, Tensor], queries: int, keys: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        selected = slice(0 if queries else self.heads[0], sum(self.heads) if keys else self.heads[0])
        head_scale = None if self.head_scale is None else self.head_scale[selected]
        return self.ops.heads(linear(normed_TC), *angles, queries, keys, head_scale, self.head_eps)

    def rest(self, hidden_TC: Tensor, attended_THD: Tensor) -> Tensor:
        """Return the layer's output, given its input and its attention heads' output."""
        attended_TI = attended_THD.flatten(1).to(self.out.weight.dtype)
        hidden_TC = _added(hidden_TC, self.out, attended_TI, self.after_attention)
        gated_TI = self.ops.gate(self.gate_up(self.before_mlp(hidden_TC)), self.activation)
        return _added(hidden_TC, self.down, gated_TI, self.after_mlp)


def _added(hidden_TC: Tensor, linear: LinearGroup, x_TI: Tensor, norm: RMSNorm | None) -> Tensor:
    """Return the residual stream plus a product, which is normed first if there is a norm."""
    if norm is None and hidden_TC.dtype == linear.weight.dtype:
        return linear(x_TI, hidden_TC)
    y_TC = linear(x_TI)
    return hidden_TC + (y_TC if norm is None else norm(y_TC))


class Decoder:
    """Computes the layers of a model with adapters; `fits` says whether a model is of the kind described."""

    def __init__(self, model: PreTrainedModel, adapters: AdapterBank | None) -> None:
        base: Any = model.base_model
        self._embedding, self._norm = base.embed_tokens, base.norm
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        self.head = head
        self._adapters = adapters
        self.recomputes = False
        """Whether a backward pass computes the layers again, and a forward pass keeps only what enters them."""
        ops, config = ops_for(model.dtype, model.device), model.config.get_text_config()
        self._wide_residual = ops.wide_residual
        self._layers = [_layer(layer, config, ops) for layer in base.layers]
        self._frequencies = {kind: _frequencies(base.rotary_emb, kind) for kind in {layer.kind for layer in self._layers}}

    @classmethod
    @torch.no_grad()
    def fits(cls, model: PreTrainedModel) -> bool:
        """Say whether a model is of the kind described: it has these modules, and our logits equal its own on random tokens."""
        if not _has_our_parts(model):
            return False
        decoder = cls(model, None)
        generator = torch.Generator().manual_seed(0)
        window = max(layer.window or 0 for layer in decoder._layers)
        if slides(model) and not window:
            # The text could be shorter than the window, and comparing logits would then not test it.
            return False
        ids = torch.randint(0, decoder._embedding.num_embeddings, (32 + min(window, 128),), generator=generator)
        packed = Packed.of([ids.tolist()], model.device)
        theirs = model(input_ids=packed.ids_T[None], use_cache=False).logits[0].float()
        ours = decoder.logits(packed.ids_T, packed.column_T, None, prefix_attention(packed), packed.column_T)
        # The mean is compared: in bfloat16 single logits may differ a lot, but with a wrong forward most logits do.
        tolerance = 1e-4 if model.dtype.itemsize >= 4 else 0.1
        return bool((ours - theirs).abs().mean() <= tolerance * theirs.std())

    def hidden(
        self,
        ids_T: Int[Tensor, " T"],
        positions_T: Int[Tensor, " T"],
        nodes_T: Int[Tensor, " T"] | None,
        attention: Attention,
        keep_K: Int[Tensor, " K"],
    ) -> Float[Tensor, "K C"]:
        """Return the final hidden states, which the head takes, of the tokens at the given indices of the stream, in order."""
        last, keep = self._layers[-1], None if keep_K.shape[0] == ids_T.shape[0] else keep_K
        with self._routed(nodes_T):
            hidden_TC, normed_TC, angles = self._to_last_layer(ids_T, positions_T, nodes_T, attention)
            if keep is None:
                query, keys, values = last.query_keys_values(normed_TC, angles)
                return self._finish(hidden_TC, query, keys, values, attention, None)
            keys, values = last.keys_values(normed_TC, angles)
        hidden_TC, normed_TC = hidden_TC.index_select(0, keep), normed_TC.index_select(0, keep)
        with self._routed(None if nodes_T is None else nodes_T[keep]):
            query = last.query(normed_TC, (angles[0][keep], angles[1][keep]))
            return self._finish(hidden_TC, query, keys, values, attention, keep)

    def _finish(
        self, hidden_KC: Tensor, query: Tensor, keys: Tensor, values: Tensor, attention: Attention, keep_K: Tensor | None
    ) -> Tensor:
        last, number = self._layers[-1], len(self._layers) - 1
        attended_KHD = attention.attend(number, query, keys, values, scale=last.scale, window=last.window, keep_K=keep_K)
        return self._norm(last.rest(hidden_KC, attended_KHD))

    def logits(
        self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: Attention, keep_K: Tensor
    ) -> Float[Tensor, "K V"]:
        """Return float32 logits of the tokens at the given indices."""
        return logits_of(self.hidden(ids_T, positions_T, nodes_T, attention, keep_K), self.head.weight, self.head.bias)

    def logprobs(
        self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: Attention, keep_K: Tensor,
        chosen_K: Int[Tensor, " K"], temperature: float, *, entropy: bool,
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"] | None]:  # fmt: skip
        """Return the log-probability of one chosen token after each of the given indices, and the entropies if asked."""
        hidden_KC = self.hidden(ids_T, positions_T, nodes_T, attention, keep_K)
        return chosen_logprobs(hidden_KC, self.head, chosen_K, temperature, entropy=entropy)

    def prefill(self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: PrefixAttention) -> None:
        """Compute the keys and values of these tokens in all layers, and no more."""
        with self._routed(nodes_T):
            _, normed_TC, angles = self._to_last_layer(ids_T, positions_T, nodes_T, attention)
            attention.store(len(self._layers) - 1, *self._layers[-1].keys_values(normed_TC, angles))

    def _to_last_layer(
        self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: Attention
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return the last layer's input, the same after its first norm, and the cosines and sines of its rotary positions."""
        hidden_TC = self._embedding(ids_T)
        dtype = torch.promote_types(hidden_TC.dtype, torch.float32)
        if self._wide_residual:
            hidden_TC = hidden_TC.to(dtype)
        angles = {kind: _angles(positions_T, *frequencies, dtype) for kind, frequencies in self._frequencies.items()}
        for number, layer in enumerate(self._layers[:-1]):
            through = partial(_through, number, layer, angles=angles[layer.kind], attention=attention)
            if self.recomputes and torch.is_grad_enabled():
                routed = partial(self._routed, nodes_T)
                hidden_TC = checkpoint(
                    partial(_inside, routed, through), hidden_TC, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_TC = through(hidden_TC)
        last = self._layers[-1]
        return hidden_TC, last.before_attention(hidden_TC), angles[last.kind]

    def _routed(self, nodes_T: Tensor | None) -> AbstractContextManager[None]:
        return self._adapters.routed(nodes_T) if self._adapters else nullcontext()


def _through(
    number: int, layer: _Layer, hidden_TC: Tensor, *, angles: tuple[Tensor, Tensor], attention: Attention
) -> Tensor:  # fmt: skip
    """Return a layer's output."""
    streams = layer.query_keys_values(layer.before_attention(hidden_TC), angles)
    return layer.rest(hidden_TC, attention.attend(number, *streams, scale=layer.scale, window=layer.window))


def _inside(context: Callable[[], AbstractContextManager[None]], compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute inside a context of its own: again in a backward pass, it is not in that of its forward pass."""
    with context():
        return compute(x)


def _angles(positions_T: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines, (T, D), and sines, (T, D / 2), of the angles that a head's pairs are rotated by."""
    angles = positions_T[:, None] * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if scaling != 1:
        cos, sin = cos * scaling, sin * scaling
    return torch.cat([cos, cos], 1), sin


def _frequencies(rotary: Any, kind: str) -> tuple[Tensor, float]:
    """Return the rotary frequencies of a kind of layer, (D / 2,), and the factor of its cosines and sines."""
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    return getattr(rotary, f"{prefix}inv_freq").float(), float(getattr(rotary, f"{prefix}attention_scaling"))


def _layer(layer: Any, config: Any, ops: TorchOps) -> _Layer:
    """Return a layer of transformers as one of ours."""
    attention, mlp = layer.self_attn, layer.mlp
    around = hasattr(layer, "pre_feedforward_layernorm")
    heads = config.num_attention_heads, config.num_key_value_heads
    norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    scales = [norm.scale.expand(count, -1) for norm, count in zip(norms, heads, strict=False)]
    qkv = LinearGroup([attention.q_proj, attention.k_proj, attention.v_proj])
    return _Layer(
        qkv=qkv,
        q=qkv.select(0, 1),
        kv=qkv.select(1, 3),
        out=LinearGroup([attention.o_proj]),
        gate_up=LinearGroup([mlp.gate_proj, mlp.up_proj]),
        down=LinearGroup([mlp.down_proj]),
        before_attention=layer.input_layernorm,
        after_attention=layer.post_attention_layernorm if around else None,
        before_mlp=layer.pre_feedforward_layernorm if around else layer.post_attention_layernorm,
        after_mlp=layer.post_feedforward_layernorm if around else None,
        heads=heads,
        head_scale=torch.cat(scales) if scales else None,
        head_eps=norms[0].eps if norms else 0.0,
        scale=float(attention.scaling),
        window=getattr(attention, "sliding_window", None),
        kind=getattr(attention, "layer_type", None) or "",
        activation=_activation(config),
        ops=ops,
    )


def slides(model: PreTrainedModel) -> bool:
    """Say whether any layer has a sliding window. Without a list of kinds all layers have it."""
    kinds = getattr(model.config, "layer_types", None)
    return bool(getattr(model.config, "sliding_window", None)) and (not kinds or "sliding_attention" in kinds)


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")


def _has_our_parts(model: PreTrainedModel) -> bool:
    """Say whether a model has the modules that `_layer` looks for, and no others."""
    base: Any = model.base_model
    config = model.config.get_text_config()
    if config.model_type not in _FAMILIES:
        return False
    if any(getattr(config, name, None) for name in LOGIT_CHANGES) or _activation(config) not in GATES:
        return False
    if {name for name, _ in base.named_children()} != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return False
    kinds = getattr(base.rotary_emb, "rope_type", "")
    if any(kind in ("dynamic", "longrope") for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])):
        # Their rotary angles depend on the length of the text.
        return False
    return isinstance(model.get_output_embeddings(), nn.Linear) and all(_is_our_layer(layer, config) for layer in base.layers)


def _is_our_layer(layer: nn.Module, config: Any) -> bool:
    parts = dict(layer.named_children())
    if set(parts) not in (_LAYER, _LAYER | _AROUND_MLP):
        return False
    attention, mlp = dict(parts["self_attn"].named_children()), dict(parts["mlp"].named_children())
    norms: Sequence[nn.Module] = [part for name, part in parts.items() if name.endswith("layernorm")]
    if {"q_norm", "k_norm"} <= set(attention):
        norms = [*norms, q_norm := attention.pop("q_norm"), k_norm := attention.pop("k_norm")]
        size = getattr(parts["self_attn"], "head_dim", None)
        if not all(isinstance(n, RMSNorm) and len(n.weight) == size for n in (q_norm, k_norm)) or q_norm.eps != k_norm.eps:
            return False
    mlp.pop("act_fn", None)
    linears = [*attention.values(), *mlp.values()]
    return (
        set(attention) == _ATTENTION
        and set(mlp) == _MLP
        and all(isinstance(norm, RMSNorm) for norm in norms)
        # Quantized layers are subclasses of nn.Linear too.
        and all(type(linear) is nn.Linear and linear.weight.is_floating_point() for linear in linears)
        and len({attention[name].bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
        and (mlp["gate_proj"].bias is None) == (mlp["up_proj"].bias is None)
        and hasattr(parts["self_attn"], "scaling")
        and config.num_attention_heads % config.num_key_value_heads == 0
    )
