"""transformers.generate and plain PEFT, as anybody would put them together; what the two ways of routing share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.peers.common import Row, chunks, of_first_layer, pad, prepare, read_rows
from benchmarks.peers.protocol import Work

Batch = tuple[int | None, list[Row]]
"""Rows that go together, and the node whose adapter is active; None: each row has its own."""
Route = Callable[[Sequence[Row], int], list[Batch]]
"""Cuts rows into batches of at most a number of rows."""


def name_of(node: int) -> str:
    return f"node{node}"


def load(spec: dict[str, Any], device: torch.device, nodes: Sequence[int]) -> PeftModel:
    """Load the backbone with the adapters of these nodes, all of them trainable."""
    plain: Any = AutoModelForCausalLM.from_pretrained(spec["model_folder"], dtype=getattr(torch, spec["dtype"]))
    folder = Path(spec["adapters_folder"])
    model = PeftModel.from_pretrained(plain.to(device), str(folder / str(nodes[0])), name_of(nodes[0]), is_trainable=True)
    for node in nodes[1:]:
        model.load_adapter(str(folder / str(node)), name_of(node), is_trainable=True)
    return model.to(device).eval()


def adapter_names(batch: Batch) -> dict[str, list[str]]:
    """Return the argument that routes each row of a mixed batch; nothing where one adapter is active."""
    return {"adapter_names": [name_of(row.node) for row in batch[1]]} if batch[0] is None else {}


class Rollout:
    """Layer by layer: a layer's rows are written when all messages to them are.

    With `merges` the adapter of a node is a part of the weights while its rows are written.
    """

    def __init__(self, spec: dict[str, Any], route: Route, *, merges: bool) -> None:
        self.spec, self.route, self.device, self.merges = spec, route, prepare(spec), merges
        self.rows = read_rows(spec)
        self.model = load(spec, self.device, sorted({row.node for row in self.rows}))
        # Without a stop token every row samples as many tokens as it may.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def _write(self, rows: Sequence[Row], new: int, *, greedy: bool) -> list[list[int]]:
        by_place: dict[int, list[int]] = {}
        for batch in self.route(rows, self.spec["max_rows"]):
            if batch[0] is not None:
                self.model.set_adapter(name_of(batch[0]))
            ids, mask = pad([row.prefix + row.prompt for row in batch[1]], self.device, left=True)
            how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            if self.merges:
                self.model.merge_adapter()
            out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **how, **adapter_names(batch))
            if self.merges:
                self.model.unmerge_adapter()
            written: list[list[int]] = out[:, ids.shape[1] :].tolist()
            by_place |= {row.place: tokens for row, tokens in zip(batch[1], written, strict=True)}
        return [by_place[row.place] for row in rows]

    def run(self) -> int:
        layers = sorted({row.layer for row in self.rows})
        texts = [
            self._write([row for row in self.rows if row.layer == layer], self.spec["new"], greedy=False) for layer in layers
        ]
        return sum(len(tokens) for layer in texts for tokens in layer)

    def check(self) -> dict[str, Any]:
        return {"greedy": self._write(of_first_layer(self.rows), 8, greedy=True)}


class Update:
    """One joint update of all nodes: forward and backward in micro-batches, clipping by node, AdamW."""

    def __init__(self, spec: dict[str, Any], route: Route) -> None:
        self.spec, self.route, self.device = spec, route, prepare(spec)
        self.rows = read_rows(spec)
        self.nodes = sorted({row.node for row in self.rows})
        self.model = load(spec, self.device, self.nodes)
        self.parameters = {
            node: [p for name, p in self.model.named_parameters() if f".{name_of(node)}." in name] for node in self.nodes
        }
        every = [p for parameters in self.parameters.values() for p in parameters]
        # `set_adapter` and `load_adapter` freeze the adapters that are not active.
        for parameter in every:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(every, lr=spec["lr"], weight_decay=0.0)
        self.num_rollouts = len({row.rollout for row in self.rows})

    def _batch_logprobs(self, batch: Batch) -> Tensor:
        """Return summed log-probabilities of what each row wrote: prompts padded in front, texts behind."""
        rows = batch[1]
        prompt_ids, prompt_mask = pad([row.prefix + row.prompt for row in rows], self.device, left=True)
        ids, mask = pad([row.written for row in rows], self.device, left=False)
        whole = torch.cat([prompt_mask, mask], dim=1)
        out = self.model(
            input_ids=torch.cat([prompt_ids, ids], dim=1), attention_mask=whole,
            position_ids=(whole.cumsum(1) - 1).clamp(min=0), use_cache=False, logits_to_keep=ids.shape[1] + 1,
            **adapter_names(batch),
        )  # fmt: skip
        logits = out.logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        return -(losses * mask).sum(1)

    def _gradients(self) -> float:
        total = 0.0
        for batch in self.route(self.rows, self.spec["rows_per_micro_batch"]):
            if batch[0] is not None:
                self.model.set_adapter(name_of(batch[0]))
            advantages = torch.tensor([row.advantage for row in batch[1]], device=self.device)
            loss = -(self._batch_logprobs(batch) * advantages).sum() / self.num_rollouts
            loss.backward()
            total += loss.item()
        return total

    def run(self) -> int:
        self._gradients()
        for parameters in self.parameters.values():
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(len(row.written) for row in self.rows)

    def check(self) -> dict[str, Any]:
        loss = self._gradients()
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in ps if p.grad is not None]).item() for ps in self.parameters.values()
        ]
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norms": norms}


def by_node(rows: Sequence[Row], size: int) -> list[Batch]:
    """Return batches of one node each, rows of like length together."""
    nodes = sorted({row.node for row in rows})
    return [
        (node, part) for node in nodes for part in chunks(sorted((row for row in rows if row.node == node), key=_length), size)
    ]


def mixed(rows: Sequence[Row], size: int) -> list[Batch]:
    """Return batches of all nodes, rows of like length together."""
    return [(None, part) for part in chunks(sorted(rows, key=_length), size)]


def _length(row: Row) -> int:
    return len(row.prefix) + len(row.prompt) + len(row.written)


def set_up(spec: dict[str, Any], route: Route, *, merges: bool = False) -> Work:
    assert spec["scope"] == "all", "PEFT applies an adapter to every token"
    return Rollout(spec, route, merges=merges) if spec["kind"] == "rollout" else Update(spec, route)
