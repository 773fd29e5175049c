"""A backbone's layers on a stream of tokens, with as few operations as they take.

Many open models have one kind of layer (Llama and SmolLM2, Mistral, Qwen 2 and 3, Gemma 3): norm, attention with rotary
positions (Su et al. 2021, arXiv 2104.09864), norm, gated feed-forward (Shazeer 2020, arXiv 2002.05202), each added to what came
in. Those are computed here: modules that read the same tokens are one product, the last layer treats only the tokens that
somebody asks for, and gradients are written out where torch would pass over memory more often. Any other model keeps its own
forward.

Shapes beyond the legend: H size of a hidden state, C columns of a product, X heads of queries and keys, D size of a head.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuromas.model.adapters import AdapterBank
from neuromas.model.attention import PrefixAttention
from neuromas.model.logprobs import chosen_logprobs
from neuromas.model.lora import LinearGroup
from neuromas.model.ops import GATES, TorchOps, ops_for
from neuromas.model.packing import Attention, Packed
from neuromas.model.rms_norm import RMSNorm

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Whose sources are as described. Others may be made of the same modules and differ in what a short text does not show."""
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_AROUND_MLP = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "attn_logit_softcapping")
"""Settings by which models change logits or scores; small ones may not show it."""


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: LinearGroup
    q: LinearGroup
    kv: LinearGroup
    out: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    before_attention: RMSNorm
    behind_attention: RMSNorm | None
    before_mlp: RMSNorm
    behind_mlp: RMSNorm | None
    heads: tuple[int, int]
    """Of queries, and of keys."""
    head_scale_XD: Tensor | None
    """Weights of the norms of queries and keys."""
    head_eps: float
    scale: float
    window: int | None
    kind: str
    """Which of the model's rotary frequencies it uses."""
    activation: str
    ops: TorchOps

    def query_keys_values(self, normal_TH: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads(self.qkv, normal_TH, angles, *self.heads)

    def query(self, normal_TH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return self._heads(self.q, normal_TH, angles, self.heads[0], 0)[0]

    def keys_values(self, normal_TH: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self._heads(self.kv, normal_TH, angles, 0, self.heads[1])[1:]

    def _heads(
        self, linear: LinearGroup, normal_TH: Tensor, angles: tuple[Tensor, Tensor], queries: int, keys: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_keys = slice(0 if queries else self.heads[0], sum(self.heads) if keys else self.heads[0])
        scale_XD = None if self.head_scale_XD is None else self.head_scale_XD[of_keys]
        return self.ops.heads(linear(normal_TH), *angles, queries, keys, scale_XD, self.head_eps)

    def rest(self, hidden_TH: Tensor, read_TXD: Tensor) -> Tensor:
        """Add what tokens have read to them, then what the feed-forward makes of them."""
        hidden_TH = _added(hidden_TH, self.out, read_TXD.flatten(1), self.behind_attention)
        gated_TC = self.ops.gate(self.gate_up(self.before_mlp(hidden_TH)), self.activation)
        return _added(hidden_TH, self.down, gated_TC, self.behind_mlp)


def _added(hidden_TH: Tensor, linear: LinearGroup, x_TI: Tensor, norm: RMSNorm | None) -> Tensor:
    return linear(x_TI, hidden_TH) if norm is None else hidden_TH + norm(linear(x_TI))


class Decoder:
    """The layers of a model with the adapters on it; `fits` says whether a model is of the kind described."""

    def __init__(self, model: PreTrainedModel, adapters: AdapterBank | None) -> None:
        base: Any = model.base_model
        self._embedding, self._norm = base.embed_tokens, base.norm
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        self.head = head
        self._adapters = adapters
        ops, config = ops_for(model.dtype, model.device), model.config.get_text_config()
        self._layers = [_layer(layer, config, ops) for layer in base.layers]
        self._frequencies = {kind: _frequencies(base.rotary_emb, kind) for kind in {layer.kind for layer in self._layers}}

    @classmethod
    @torch.no_grad()
    def fits(cls, model: PreTrainedModel) -> bool:
        """Say whether a model is of the kind described: made of these parts, and with our logits on random tokens."""
        if not _has_our_parts(model):
            return False
        decoder = cls(model, None)
        generator = torch.Generator().manual_seed(0)
        window = max(layer.window or 0 for layer in decoder._layers)
        if slides(model) and not window:
            # A text may be shorter than the window, which is then not tried by comparing.
            return False
        ids = torch.randint(0, decoder._embedding.num_embeddings, (32 + min(window, 128),), generator=generator)
        packed = Packed.of([ids.tolist()], model.device)
        theirs = model(input_ids=packed.ids_T[None], use_cache=False).logits[0].float()
        ours = decoder.logits(packed.ids_T, packed.column_T, None, PrefixAttention(packed), packed.column_T)
        # On average: in bfloat16 single logits may be far apart, and a model that is read wrongly is so in most of them.
        tolerance = 1e-4 if model.dtype.itemsize >= 4 else 0.1
        return bool((ours - theirs).abs().mean() <= tolerance * theirs.std())

    def hidden(
        self,
        ids_T: Int[Tensor, " T"],
        positions_T: Int[Tensor, " T"],
        nodes_T: Int[Tensor, " T"] | None,
        attention: Attention,
        keep_K: Int[Tensor, " K"],
    ) -> Float[Tensor, "K H"]:
        """Return what the head reads, of the tokens at the given places of the stream; they are in order."""
        last, keep = self._layers[-1], None if keep_K.shape[0] == ids_T.shape[0] else keep_K
        with self._routed(nodes_T):
            hidden_TH, normal_TH, angles = self._to_last_layer(ids_T, positions_T, attention)
            if keep is None:
                query, keys, values = last.query_keys_values(normal_TH, angles)
                return self._finish(hidden_TH, query, keys, values, attention, None)
            keys, values = last.keys_values(normal_TH, angles)
        hidden_TH, normal_TH = hidden_TH.index_select(0, keep), normal_TH.index_select(0, keep)
        with self._routed(None if nodes_T is None else nodes_T[keep]):
            query = last.query(normal_TH, (angles[0][keep], angles[1][keep]))
            return self._finish(hidden_TH, query, keys, values, attention, keep)

    def _finish(
        self, hidden_KH: Tensor, query: Tensor, keys: Tensor, values: Tensor, attention: Attention, keep_K: Tensor | None
    ) -> Tensor:
        last, number = self._layers[-1], len(self._layers) - 1
        read_KXD = attention.attend(number, query, keys, values, scale=last.scale, window=last.window, keep_K=keep_K)
        return self._norm(last.rest(hidden_KH, read_KXD))

    def logits(
        self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: Attention, keep_K: Tensor
    ) -> Float[Tensor, "K V"]:
        """Return float32 logits of the tokens at the given places."""
        return self.head(self.hidden(ids_T, positions_T, nodes_T, attention, keep_K)).float()

    def logprobs(
        self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: Attention, keep_K: Tensor,
        chosen_K: Int[Tensor, " K"], temperature: float,
    ) -> Float[Tensor, " K"]:  # fmt: skip
        """Return the log-probability of one token each behind the given places."""
        hidden_KH = self.hidden(ids_T, positions_T, nodes_T, attention, keep_K)
        return chosen_logprobs(hidden_KH, self.head, chosen_K, temperature)

    def fill(self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: PrefixAttention) -> None:
        """Compute no more than what others read of these tokens."""
        with self._routed(nodes_T):
            _, normal_TH, angles = self._to_last_layer(ids_T, positions_T, attention)
            attention.leave(*self._layers[-1].keys_values(normal_TH, angles))

    def _to_last_layer(
        self, ids_T: Tensor, positions_T: Tensor, attention: Attention
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return hidden states before the last layer, the same normed as it does, and the angles of its kind."""
        hidden_TH = self._embedding(ids_T)
        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        angles = {kind: _angles(positions_T, *frequencies, dtype) for kind, frequencies in self._frequencies.items()}
        for number, layer in enumerate(self._layers[:-1]):
            streams = layer.query_keys_values(layer.before_attention(hidden_TH), angles[layer.kind])
            read_TXD = attention.attend(number, *streams, scale=layer.scale, window=layer.window)
            hidden_TH = layer.rest(hidden_TH, read_TXD)
        last = self._layers[-1]
        return hidden_TH, last.before_attention(hidden_TH), angles[last.kind]

    def _routed(self, nodes_T: Tensor | None) -> AbstractContextManager[None]:
        return self._adapters.routed(nodes_T) if self._adapters else nullcontext()


def _angles(positions_T: Tensor, frequencies_D: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines, (T, D), and sines, (T, D/2), of the angles that a head's pairs are turned by."""
    angles = positions_T[:, None] * frequencies_D
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if scaling != 1:
        cos, sin = cos * scaling, sin * scaling
    return torch.cat([cos, cos], 1), sin


def _frequencies(rotary: Any, kind: str) -> tuple[Tensor, float]:
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    return getattr(rotary, f"{prefix}inv_freq").float(), float(getattr(rotary, f"{prefix}attention_scaling"))


def _layer(layer: Any, config: Any, ops: TorchOps) -> _Layer:
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
        behind_attention=layer.post_attention_layernorm if around else None,
        before_mlp=layer.pre_feedforward_layernorm if around else layer.post_attention_layernorm,
        behind_mlp=layer.post_feedforward_layernorm if around else None,
        heads=heads,
        head_scale_XD=torch.cat(scales) if scales else None,
        head_eps=norms[0].eps if norms else 0.0,
        scale=float(attention.scaling),
        window=getattr(attention, "sliding_window", None),
        kind=getattr(attention, "layer_type", None) or "",
        activation=_activation(config),
        ops=ops,
    )


def slides(model: PreTrainedModel) -> bool:
    """Say whether any layer sees a window only. Without a list of kinds all layers slide."""
    kinds = getattr(model.config, "layer_types", None)
    return bool(getattr(model.config, "sliding_window", None)) and (not kinds or "sliding_attention" in kinds)


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")


def _has_our_parts(model: PreTrainedModel) -> bool:
    """Say whether a model is made of the modules that `_layer` looks for, and of no other."""
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
        # Their angles depend on how long the text is.
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
        # Quantized layers are kinds of nn.Linear too.
        and all(type(linear) is nn.Linear and linear.weight.is_floating_point() for linear in linears)
        and len({attention[name].bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
        and (mlp["gate_proj"].bias is None) == (mlp["up_proj"].bias is None)
        and hasattr(parts["self_attn"], "scaling")
        and config.num_attention_heads % config.num_key_value_heads == 0
    )
