"""The policy: one frozen backbone with the adapters of a network's nodes. It is what is sampled and trained.

`prefill` computes keys and values of the shared prefixes, each once for all rows that continue it. `decode` computes logits of
the next token: after the suffixes of the prompts, and then token by token. `logprobs` computes log-probabilities of what was
sampled, with gradients.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuromas.config import AdapterConfig, Scope
from neuromas.model.adapters import AdapterBank
from neuromas.model.attention import Prefixes
from neuromas.model.backbone import Backbone
from neuromas.model.decoder import Decoder
from neuromas.model.flex import prefix_attention, suffix_attention
from neuromas.model.packing import Attention, Packed
from neuromas.model.turns import Frame
from neuromas.types import Prompt

PrefixKey = tuple[tuple[int, ...], int]
"""Token ids of a prefix, and the index of the adapter that acts on it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Holds completions with K sampled tokens in all; a row is the suffix of a node's prompt and then its completion.

    `prefixes` are the distinct shared prefixes, and each row continues one of them. Rows of one node are adjacent.
    """

    prefixes: Packed
    prefix_node_Q: Int[Tensor, " Q"]
    """Index of the adapter that acts on the prefix, if the scope is `all`."""
    prefix_of_row_B: Int[Tensor, " B"]
    node_of_row_B: Int[Tensor, " B"]
    """Index of the row's adapter."""
    suffixes: Packed
    sampled_K: Int[Tensor, " K"]
    """Indices of the sampled tokens in the stream of suffixes, stop tokens included."""
    temperature: float


@dataclass(frozen=True, slots=True)
class Routing:
    """Says which adapter acts on a node's tokens and which one on its prefix. Adapters are counted from 0."""

    nodes: tuple[int, ...]
    """The nodes that have an adapter each; if it is a single node, all nodes share its adapter."""
    scope: Scope = "all"

    def adapter_of(self, node: int) -> int:
        """Return the index of a node's adapter."""
        return self.nodes.index(node) if len(self.nodes) > 1 else 0

    def prefix_key(self, prompt: Prompt, node: int) -> PrefixKey:
        """Return the key of a prefix: rows with equal keys share it. With scope `suffix` no adapter acts on prefixes."""
        return prompt.prefix_ids, self.adapter_of(node) if self.scope == "all" else 0


class Policy:
    """A backbone with an adapter for each of `nodes`; without nodes it is the bare backbone.

    The backbone is not changed, so any number of policies may use it. Its weights are shared, never copied.
    """

    def __init__(
        self,
        backbone: Backbone,
        nodes: Sequence[int] = (),
        adapter: AdapterConfig | None = None,
        seed: int = 0,
        frame: Frame | None = None,
    ) -> None:
        self.backbone = backbone
        self.frame = frame or backbone.frame()
        """What stands around prompts and texts."""
        adapter = adapter or AdapterConfig()
        self.model = backbone.new_module_tree()
        """The backbone's modules, with adapters."""
        self.adapters = AdapterBank(self.model, nodes, adapter, seed) if nodes else None
        self.scope: Scope = adapter.scope
        self.ops = backbone.ops
        self._layers = backbone.layers(self.model, self.adapters)

    def recompute_layers(self) -> None:
        """Keep of a forward pass only what enters each layer: the backward pass computes the rest again, and gives the same.

        Raises ValueError if the layers are those of transformers.
        """
        if not isinstance(self._layers, Decoder):
            raise ValueError(
                f"--grad-checkpoint: {self.backbone.name} ({self.model.config.model_type}) is computed by its own layers in "
                "transformers, which it does not reach; leave it out and lower --tokens-per-micro-batch"
            )
        self._layers.recomputes = True

    @property
    def version(self) -> int:
        """Return the number of updates of the adapters; a completion carries the version that wrote it."""
        return self.adapters.version if self.adapters else 0

    @property
    def routing(self) -> Routing:
        return Routing(self.adapters.nodes if self.adapters else (), self.scope)

    def prompt(self, question: str, node_text: str, *, has_inbox: bool = True, begins: Sequence[str] = ()) -> Prompt:
        """Return the tokens of a node's prompt: one user message, the question first, the node's own part last.

        `begins` is what each of the node's texts is begun by, the first of them here.

        Without an inbox that part is the same in all rollouts and belongs to the shared prefix, unless adapters act only after
        the question, or all nodes share one adapter and so the question's keys and values.
        """
        footer = (*self.frame.footer, *(self.backbone.tokenize(begins[0]) if begins else ()))
        prefix, own = (*self.frame.header, *self.backbone.tokenize(f"{question}\n\n")), self.backbone.tokenize(node_text)
        shares_question = self.scope == "suffix" or (self.adapters is not None and self.adapters.shared)
        if not has_inbox and not shares_question and footer:
            return Prompt((*prefix, *own), footer)
        return Prompt(prefix, (*own, *footer))

    def prefix_bytes(self, question: str) -> int:
        """Return about how many bytes the prefixes that all nodes share of a question take together."""
        own = len(self.routing.nodes) if self.scope == "all" else 1
        return max(1, own) * len(self.prompt(question, "").prefix_ids) * self.backbone.token_bytes

    def later_headers(self, begins: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the tokens by which each text after a node's first one is begun."""
        return tuple((*self.frame.separator, *self.backbone.tokenize(begin)) for begin in begins[1:])

    def sampling(self) -> AbstractContextManager[None]:
        """Prepare the adapters once for all forwards inside, which have no gradients and change no adapter."""
        return self.adapters.prepared() if self.adapters else nullcontext()

    def prefill(self, prefixes: Packed, node_Q: Int[Tensor, " Q"]) -> Prefixes:
        """Return keys and values of shared prefixes, with the given adapters (scope `all`) or without any (`suffix`)."""
        attention = prefix_attention(prefixes)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.scope == "all"):
            nodes_T = node_Q[prefixes.row_T] if self.scope == "all" else None
            self._layers.prefill(prefixes.ids_T, prefixes.column_T, nodes_T, attention)
        return attention.prefixes

    def decode(
        self,
        ids_T: Int[Tensor, " T"],
        positions_T: Int[Tensor, " T"],
        nodes_T: Int[Tensor, " T"] | None,
        attention: Attention,
        keep_K: Int[Tensor, " K"],
    ) -> Float[Tensor, "K V"]:
        """Return float32 logits of the token after each of the given indices of a stream of tokens.

        `nodes_T` are indices of adapters; None leaves the adapters out.
        """
        return self._layers.logits(ids_T, positions_T, nodes_T, attention, keep_K)

    def decode_anywhere(
        self, ids_B: Int[Tensor, " B"], positions_B: Int[Tensor, " B"], nodes_B: Int[Tensor, " B"], attention: Attention
    ) -> Float[Tensor, "B V"]:
        """Return what `decode` does for rows of one token each, without a look at the nodes: what is computed depends on shapes
        alone."""
        with self.adapters.for_any_nodes() if self.adapters else nullcontext():
            return self.decode(ids_B, positions_B, nodes_B, attention, torch.arange(len(ids_B), device=ids_B.device))

    def logprobs(self, rows: Rows) -> Float[Tensor, " K"]:
        """Return the log-probability of every sampled token under its row's node.

        The prefix is computed once per question (scope `suffix`) or once per question and node (scope `all`), and the rows that
        continue it share its keys and values; gradients flow through them.
        """
        return self._logprobs(rows, entropy=False)[0]

    def logprobs_and_entropies(self, rows: Rows) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """Return as well the entropy of the distribution that each token was sampled from, in nats and with its gradient."""
        logprobs_K, entropies_K = self._logprobs(rows, entropy=True)
        assert entropies_K is not None
        return logprobs_K, entropies_K

    @torch.no_grad()
    def states(self, rows: Rows) -> Float[Tensor, "K C"]:
        """Return the final hidden state from which each sampled token was drawn, without gradients."""
        suffixes = rows.suffixes
        attention = suffix_attention(suffixes, self.prefill(rows.prefixes, rows.prefix_node_Q), rows.prefix_of_row_B)
        nodes_T = rows.node_of_row_B[suffixes.row_T]
        return self._layers.hidden(suffixes.ids_T, attention.positions_T, nodes_T, attention, rows.sampled_K - 1)

    def _logprobs(self, rows: Rows, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        suffixes = rows.suffixes
        attention = suffix_attention(suffixes, self.prefill(rows.prefixes, rows.prefix_node_Q), rows.prefix_of_row_B)
        nodes_T, chosen_K = rows.node_of_row_B[suffixes.row_T], suffixes.ids_T[rows.sampled_K]
        return self._layers.logprobs(
            suffixes.ids_T, attention.positions_T, nodes_T, attention, rows.sampled_K - 1, chosen_K, rows.temperature,
            entropy=entropy,
        )  # fmt: skip
