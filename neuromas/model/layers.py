"""The layers that compute a stream of tokens for a policy: our own decoder (`decoder.py`), or the model's own in transformers.

The choice is made once, when a backbone is loaded; both have the same interface.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from neuromas.model.adapters import AdapterBank
from neuromas.model.attention import PrefixAttention
from neuromas.model.decoder import LOGIT_CHANGES, slides
from neuromas.model.logprobs import chosen_logprobs, tokens_at_once
from neuromas.model.packing import Attention

PROBE_TOKENS = 8
"""Number of tokens on which a model's head is compared with its logits."""


@runtime_checkable
class Layers(Protocol):
    """Computes a model's layers with adapters. `nodes_T` are indices into the bank's nodes; None leaves the adapters out."""

    def logits(
        self,
        ids_T: Int[Tensor, " T"],
        positions_T: Int[Tensor, " T"],
        nodes_T: Int[Tensor, " T"] | None,
        attention: Attention,
        keep_K: Int[Tensor, " K"],
    ) -> Float[Tensor, "K V"]:
        """Return float32 logits at the given indices of a stream of tokens, which are in order."""
        ...

    def hidden(
        self,
        ids_T: Int[Tensor, " T"],
        positions_T: Int[Tensor, " T"],
        nodes_T: Int[Tensor, " T"] | None,
        attention: Attention,
        keep_K: Int[Tensor, " K"],
    ) -> Float[Tensor, "K C"]:
        """Return the final hidden states at the given indices, which the head takes."""
        ...

    def prefill(self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: PrefixAttention) -> None:
        """Compute the keys and values of these tokens in all layers, and no more."""
        ...

    def logprobs(
        self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: Attention, keep_K: Tensor,
        chosen_K: Int[Tensor, " K"], temperature: float, *, entropy: bool,
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"] | None]:  # fmt: skip
        """Return the log-probability of one chosen token after each of the given indices, and the entropies if asked."""
        ...


class TransformersLayers:
    """Computes with the model's own forward, which must call transformers' attention interface and keep no other state."""

    def __init__(self, model: PreTrainedModel, adapters: AdapterBank | None) -> None:
        self._model, self._adapters = model, adapters
        self._no_mask = _no_mask(model)

    @functools.cached_property
    def _plain_head(self) -> nn.Linear | None:
        return _plain_head(self._model)

    def logits(
        self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: Attention, keep_K: Tensor
    ) -> Float[Tensor, "K V"]:
        with self._routed(nodes_T):
            return self._model(**self._inputs(ids_T, positions_T, attention), logits_to_keep=keep_K).logits[0].float()

    def prefill(self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: PrefixAttention) -> None:
        with self._routed(nodes_T):
            self._model.base_model(**self._inputs(ids_T, positions_T, attention))

    def logprobs(
        self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: Attention, keep_K: Tensor,
        chosen_K: Int[Tensor, " K"], temperature: float, *, entropy: bool,
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"] | None]:  # fmt: skip
        hidden_KC = self.hidden(ids_T, positions_T, nodes_T, attention, keep_K)
        if self._plain_head is None:
            return self._own_logprobs(hidden_KC, chosen_K, temperature, entropy=entropy)
        return chosen_logprobs(hidden_KC, self._plain_head, chosen_K, temperature, entropy=entropy)

    def _own_logprobs(
        self, hidden_KC: Tensor, chosen_K: Tensor, temperature: float, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return them under logits that the model changes, a chunk of tokens at a time; a backward pass computes it again."""

        def compute(hidden_KC: Tensor, chosen_K: Tensor) -> tuple[Tensor, Tensor | None]:
            logits_KV = self._own_logits(hidden_KC) / temperature
            logprobs_K = -cross_entropy(logits_KV, chosen_K, reduction="none")
            return logprobs_K, Categorical(logits=logits_KV).entropy() if entropy else None

        size = tokens_at_once(self._model.config.get_text_config().vocab_size, hidden_KC.device)
        parts = [
            checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(hidden_KC.split(size), chosen_K.split(size), strict=True)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies) if entropy else None

    def _own_logits(self, hidden_KC: Tensor) -> Tensor:
        """Return what the model's own forward makes of final hidden states: its head, and whatever it does to logits."""
        layers: Any = self._model.base_model
        given = MoeModelOutputWithPast(last_hidden_state=hidden_KC[None])
        # It hides the class's own: the layers have been computed already.
        layers.forward = lambda *_, **__: given
        try:
            ids = torch.zeros(1, len(hidden_KC), dtype=torch.long, device=hidden_KC.device)
            return self._model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            del layers.forward

    def hidden(
        self, ids_T: Tensor, positions_T: Tensor, nodes_T: Tensor | None, attention: Attention, keep_K: Tensor
    ) -> Float[Tensor, "K C"]:
        with self._routed(nodes_T):
            return self._model.base_model(**self._inputs(ids_T, positions_T, attention)).last_hidden_state[0][keep_K]

    def _inputs(self, ids_T: Tensor, positions_T: Tensor, attention: Attention) -> dict[str, Any]:
        return {
            "input_ids": ids_T[None], "position_ids": positions_T[None], "attention_mask": self._no_mask, "use_cache": False,
            "packed": attention,
        }  # fmt: skip

    def _routed(self, nodes_T: Tensor | None) -> AbstractContextManager[None]:
        return self._adapters.routed(nodes_T) if self._adapters else nullcontext()


@torch.inference_mode()
def _plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the head if logits are its output and nothing else, or None: some models scale or bound their logits."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    if not isinstance(head, nn.Linear) or any(getattr(config, name, None) for name in LOGIT_CHANGES):
        return None
    ids = torch.arange(min(PROBE_TOKENS, config.vocab_size), device=model.device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    return head if torch.allclose(head(hidden).float(), logits.float(), rtol=1e-5, atol=1e-5) else None


def _no_mask(model: PreTrainedModel) -> Any:
    """Return an empty mask that a model takes as it is, so that it makes none: `Attention` has masks of its own."""
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=model.device)
    by_kind = slides(model) and getattr(model.config, "layer_types", None)
    return dict.fromkeys(("full_attention", "sliding_attention"), mask) if by_kind else mask
