"""The limit: the bare matrix products of a case's tokens, without a model, padding, softmax, sampling or an optimizer.

Products of frozen weights, adapters, output head and attention, at the shapes that the work needs at least: each distinct
prefix once (a question and node with scope `all`, a question with scope `suffix`), every other token once, the last layer for
tokens that somebody goes on from (of the others their keys and values alone), log-probabilities only where tokens were sampled.
Adapters are part of the weights in a forward pass and its gradient; the gradients of their halves have products of their own.
Nothing that is not a product is in it, so 1.0 cannot be reached.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import Row, prepare, read_rows
from benchmarks.peers.protocol import Work, serve

TOKENS_AT_ONCE = 2048
"""Rows of a product over many tokens: enough to be as fast as it gets, and few enough to stay in a cache."""
SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}
"""Scores of attention in one product: a GPU would be idle between products that fit in a processor's cache."""
KEYS_AND_VALUES = (1, 2)
"""Their places among a layer's linear modules."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the products of a model's layer are made of."""

    layers: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    vocabulary: int
    linears: tuple[tuple[int, int], ...]
    """(in, out) of a layer's linear modules, all of which carry an adapter."""

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        c = json.loads((folder / "config.json").read_text())
        hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
        q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
        linears = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden))
        return cls(
            c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], head, hidden, c["vocab_size"], linears
        )


class Products:
    """Weights of a model's shape and the products with them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.device, self.spec, self.rows = prepare(spec), spec, read_rows(spec)
        self.dtype, self.shape = getattr(torch, spec["dtype"]), Shape.read(Path(spec["model_folder"]))
        rank = spec["rank"]
        self.weights = [[self._random(o, i) for i, o in self.shape.linears] for _ in range(self.shape.layers)]
        self.halves = [(self._random(rank, i), self._random(o, rank)) for i, o in self.shape.linears]
        self.head = self._random(self.shape.vocabulary, self.shape.hidden)
        widest = max(max(pair) for pair in self.shape.linears)
        self.input = self._random(TOKENS_AT_ONCE, widest)
        self.buffer = self._random(1)
        self.distinct = {(row.question, row.node if spec["scope"] == "all" else 0): len(row.prefix) for row in self.rows}

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype) * 0.02

    def _lent(self, *size: int) -> Tensor:
        """Return numbers of this shape out of one buffer: making them is no part of the limit."""
        if self.buffer.numel() < math.prod(size):
            self.buffer = self._random(math.prod(size) * 5 // 4)
        return self.buffer[: math.prod(size)].view(size)

    def tokens(self, count: int, kept: int, *, adapted: bool, backward: bool) -> None:
        """Pass this many tokens of one node through the linear modules of all layers, the kept ones to the end of the last."""
        for number, layer in enumerate(self.weights):
            for place, (weight, (a, b)) in enumerate(zip(layer, self.halves, strict=True)):
                all_are_read = number + 1 < len(self.weights) or place in KEYS_AND_VALUES
                left = count if all_are_read else kept
                while left > 0:
                    self._linear(weight, a, b, min(TOKENS_AT_ONCE, left), adapted=adapted, backward=backward)
                    left -= TOKENS_AT_ONCE

    def _linear(self, weight: Tensor, a: Tensor, b: Tensor, n: int, *, adapted: bool, backward: bool) -> None:
        x, dy = self.input[:n, : weight.shape[1]], self.input[:n, : weight.shape[0]]
        torch.matmul(x, weight.T)
        if backward:
            torch.matmul(dy, weight)
        if adapted and backward:
            torch.matmul((dy @ b).T, x)
            torch.matmul((x @ a.T).T, dy)

    def logits(self, count: int, *, backward: bool) -> None:
        for start in range(0, count, TOKENS_AT_ONCE):
            n = min(TOKENS_AT_ONCE, count - start)
            out = self.input[:n, : self.shape.hidden] @ self.head.T
            if backward:
                torch.matmul(out, self.head)

    def attention(self, rows: int, queries: int, keys: int, *, layers: int, backward: bool) -> None:
        """Score and mix as many rows as given; queries of a group of heads share their keys."""
        if not layers or not queries:
            return
        s = self.shape
        at_once = max(1, min(rows, SCORES_AT_ONCE[self.device.type] // max(1, s.heads * queries * keys)))
        q = self._lent(at_once * s.kv_heads, queries * s.heads // s.kv_heads, s.head)
        k = self._lent(at_once * s.kv_heads, keys, s.head)
        for start in range(0, rows, at_once):
            n = min(at_once, rows - start) * s.kv_heads
            for _ in range(layers):
                scores = q[:n] @ k[:n].mT
                torch.matmul(scores, k[:n])
                if backward:
                    # d value, d weights, d query, d key.
                    torch.matmul(scores.mT, q[:n])
                    torch.matmul(q[:n], k[:n].mT)
                    torch.matmul(scores, k[:n])
                    torch.matmul(scores.mT, q[:n])

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def prefixes(self, *, backward: bool) -> None:
        adapted = self.spec["scope"] == "all"
        backward = backward and adapted
        by_node: Counter[int] = Counter()
        for (_, node), length in self.distinct.items():
            by_node[node] += length
        for count in by_node.values():
            self.tokens(count, 0, adapted=adapted, backward=backward)
        mean = sum(self.distinct.values()) // len(self.distinct)
        self.attention(len(self.distinct), mean, mean, layers=self.shape.layers - 1, backward=backward)

    def suffixes(self, rows: list[Row], *, written: bool) -> None:
        """Pass the rows' own tokens, in an update with what they wrote, through everything but the head."""
        lengths = [len(row.prompt) + len(row.written) * written for row in rows]
        by_node, kept_by_node = Counter[int](), Counter[int]()
        for row, length in zip(rows, lengths, strict=True):
            by_node[row.node] += length
            kept_by_node[row.node] += len(row.written) if written else 1
        for node, count in by_node.items():
            self.tokens(count, kept_by_node[node], adapted=True, backward=written)
        mean, prefix = sum(lengths) // len(rows), sum(len(row.prefix) for row in rows) // len(rows)
        kept = sum(kept_by_node.values()) // len(rows)
        self.attention(len(rows), mean, prefix + mean, layers=self.shape.layers - 1, backward=written)
        self.attention(len(rows), kept, prefix + mean, layers=1, backward=written)

    def check(self) -> dict[str, Any]:
        return {}


class UpdateLimit(Products):
    """Forward and backward of an update; frozen weights need no gradient of their own."""

    @torch.inference_mode()
    def run(self) -> int:
        tokens = sum(len(row.written) for row in self.rows)
        self.prefixes(backward=True)
        self.suffixes(self.rows, written=True)
        self.logits(tokens, backward=True)
        self.finish()
        return tokens


class RolloutLimit(Products):
    """Prefill, then one step a token with all rows of a layer at once: the fewest steps that the messages allow."""

    @torch.inference_mode()
    def run(self) -> int:
        self.prefixes(backward=False)
        layers = sorted({row.layer for row in self.rows})
        for layer in layers:
            rows = [row for row in self.rows if row.layer == layer]
            self.suffixes(rows, written=False)
            for start in range(0, len(rows), self.spec["max_rows"]):
                self._decode(rows[start : start + self.spec["max_rows"]])
        self.finish()
        return len(self.rows) * self.spec["new"]

    def _decode(self, rows: list[Row]) -> None:
        filled = sum(len(row.prefix) + len(row.prompt) for row in rows) // len(rows)
        for step in range(self.spec["new"]):
            for layer in self.weights:
                for weight in layer:
                    torch.matmul(self.input[: len(rows), : weight.shape[1]], weight.T)
            self.attention(len(rows), 1, filled + step + 1, layers=self.shape.layers, backward=False)
            self.logits(len(rows), backward=False)


def setup(spec: dict[str, Any]) -> Work:
    return RolloutLimit(spec) if spec["kind"] == "rollout" else UpdateLimit(spec)


if __name__ == "__main__":
    serve(setup)
