"""The policy: one frozen backbone with the adapters of a network's nodes on it. It is what is sampled and trained.

prefill   keys and values of the shared prefixes, each computed once for all rows that go on from it
decode    logits of the next token: behind the nodes' own parts of their prompts, then token by token
logprobs  log-probabilities of what was sampled, with gradients
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuromas.config import AdapterConfig, Scope
from neuromas.model.adapters import AdapterBank
from neuromas.model.attention import PrefixAttention, Prefixes, SuffixAttention
from neuromas.model.backbone import Backbone
from neuromas.model.packing import Attention, Packed
from neuromas.types import Prompt

PrefixKey = tuple[tuple[int, ...], int]
"""Token ids of a prefix, and the index of the adapter that reads it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Completions of K tokens in all: per row a node's part of the prompt, then what it wrote.

    `prefixes` are the distinct shared prefixes; each row goes on from one of them. Rows of one node lie together.
    """

    prefixes: Packed
    prefix_node_Q: Int[Tensor, " Q"]
    """Index of the adapter that reads the prefix, where the scope is `all`."""
    prefix_of_row_B: Int[Tensor, " B"]
    node_of_row_B: Int[Tensor, " B"]
    """Index of the row's adapter."""
    suffixes: Packed
    sampled_K: Int[Tensor, " K"]
    """Where in the stream of suffixes the sampled tokens lie, stop tokens included."""
    temperature: float


@dataclass(frozen=True, slots=True)
class Routing:
    """Which adapter a node speaks through, and which one reads its prefix. Adapters are counted from 0."""

    nodes: tuple[int, ...]
    """One adapter each; a single one serves whoever speaks."""
    scope: Scope = "all"

    def adapter_of(self, node: int) -> int:
        return self.nodes.index(node) if len(self.nodes) > 1 else 0

    def prefix_key(self, prompt: Prompt, node: int) -> PrefixKey:
        """Name what a prefix computes to: rows with equal keys share it. With scope `suffix` no adapter reads it."""
        return prompt.prefix_ids, self.adapter_of(node) if self.scope == "all" else 0


class Policy:
    """A backbone with an adapter for each of `nodes`; without nodes it is the bare backbone.

    The backbone is not changed: any number of policies may stand on it. Its weights are shared, never copied.
    """

    def __init__(
        self, backbone: Backbone, nodes: Sequence[int] = (), adapter: AdapterConfig | None = None, seed: int = 0
    ) -> None:
        self.backbone = backbone
        adapter = adapter or AdapterConfig()
        self.model = backbone.new_module_tree()
        """The backbone's modules with adapters on them."""
        self.adapters = AdapterBank(self.model, nodes, adapter, seed) if nodes else None
        self.scope: Scope = adapter.scope
        self.ops = backbone.ops
        self._layers = backbone.layers(self.model, self.adapters)

    @property
    def version(self) -> int:
        """Number of updates of the adapters; a completion carries the version that wrote it."""
        return self.adapters.version if self.adapters else 0

    @property
    def routing(self) -> Routing:
        return Routing(self.adapters.nodes if self.adapters else (), self.scope)

    def prompt(self, question: str, node_text: str, *, has_inbox: bool = True) -> Prompt:
        """Return the tokens of a node's prompt: one user message, the question first, the node's own part last.

        Without an inbox that part is the same in all rollouts and belongs to the shared prefix, unless adapters act behind the
        question alone, or all nodes share one adapter and with it the question.
        """
        header, footer = self.backbone.chat_frame
        prefix, own = (*header, *self.backbone.encode(f"{question}\n\n")), self.backbone.encode(node_text)
        shares_question = self.scope == "suffix" or (self.adapters is not None and self.adapters.shared)
        if not has_inbox and not shares_question and footer:
            return Prompt((*prefix, *own), footer)
        return Prompt(prefix, (*own, *footer))

    def sampling(self) -> AbstractContextManager[None]:
        """Prepare the adapters once for all that is computed inside, without gradients and without a change of adapters."""
        return self.adapters.prepared() if self.adapters else nullcontext()

    def prefill(self, prefixes: Packed, node_Q: Int[Tensor, " Q"]) -> Prefixes:
        """Compute keys and values of shared prefixes: with the given adapters (scope `all`), or bare (`suffix`)."""
        attention = PrefixAttention(prefixes)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.scope == "all"):
            nodes_T = node_Q[prefixes.row_T] if self.scope == "all" else None
            self._layers.fill(prefixes.ids_T, prefixes.column_T, nodes_T, attention)
        return attention.prefixes

    def decode(
        self,
        ids_T: Int[Tensor, " T"],
        positions_T: Int[Tensor, " T"],
        nodes_T: Int[Tensor, " T"] | None,
        attention: Attention,
        keep_K: Int[Tensor, " K"],
    ) -> Float[Tensor, "K V"]:
        """Return float32 logits of the token behind each of the given places of a stream of tokens.

        `nodes_T` are indices of adapters; None leaves the adapters out.
        """
        return self._layers.logits(ids_T, positions_T, nodes_T, attention, keep_K)

    def logprobs(self, rows: Rows) -> Float[Tensor, " K"]:
        """Return the log-probability of every sampled token under its row's node.

        The prefix is computed once per question (scope `suffix`) or once per question and node (scope `all`) and its keys
        and values are shared by the rows that read it; gradients flow through them.
        """
        suffixes = rows.suffixes
        attention = SuffixAttention(suffixes, self.prefill(rows.prefixes, rows.prefix_node_Q), rows.prefix_of_row_B)
        nodes_T, chosen_K = rows.node_of_row_B[suffixes.row_T], suffixes.ids_T[rows.sampled_K]
        return self._layers.logprobs(
            suffixes.ids_T, attention.positions_T, nodes_T, attention, rows.sampled_K - 1, chosen_K, rows.temperature
        )
