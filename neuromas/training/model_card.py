"""The model card of an export: what it is, what it scored, and how to load it. It tells what the run has recorded."""

import json
import shlex
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from neuromas.config import LINEAR_LAYERS, PromptConfig
from neuromas.graph.growth import widths_of
from neuromas.model.backbone import Backbone
from neuromas.model.sources import SHIPPED, is_gguf
from neuromas.rollout.network import worded
from neuromas.rollout.vllm_engine import RANKS
from neuromas.tasks.user_tasks import OWN_CODE
from neuromas.training.evaluate import Evaluation
from neuromas.training.exported import Export


def card(export: Export, backbone: Backbone) -> str:
    """Return the card of an export whose adapters are on this backbone."""
    config, adapter = export.config, export.adapter
    scores = export.json("evaluation.json") or {}
    before, after = (
        {name: Evaluation.from_json(score, "evaluation.json") for name, score in scores.get(when, {}).items()}
        for when in ("before", "after")
    )
    rank = next((rank for rank in RANKS if rank >= adapter["r"]), None)
    others = sorted(set(adapter["target_modules"]) - set(LINEAR_LAYERS))
    imports, source = _source(config.backbone)
    is_own = Path(config.backbone).exists()
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        resources.files("neuromas.training").joinpath("model_card.md.jinja").read_text()
    )
    return template.render(
        quote=shlex.quote,
        config=config, adapter=adapter, topology=export.topology, nodes=export.nodes, head=export.head,
        wording=worded(backbone, config.prompt)[0].name, own_words=_own_words(config.prompt),
        names=[f"node{node}" for node in export.nodes], before=before, after=after, ledger=export.json("ledger.json"),
        places={node: _place(export, node) for node in export.topology.nodes}, title=_title(export), kind=_kind(export),
        chosen=_chosen(export), imports=imports, source=source,
        vllm_rank=None if others else rank, own_code=config.task.name.startswith(OWN_CODE),
        no_vllm=f"it takes no adapters on {', '.join(others)}" if others else f"its largest rank is {RANKS[-1]}",
        own_name=is_own,
        hub_id=None if imports or is_own else config.backbone,
    )  # fmt: skip


def _own_words(prompt: PromptConfig) -> str:
    """Return the names of what the run words otherwise than its wording does."""
    plain = asdict(PromptConfig(wording=prompt.wording))
    return ", ".join(f"`{name}`" for name, value in asdict(prompt).items() if value != plain[name])


def _title(export: Export) -> str:
    shape = "-".join(map(str, widths_of(export.topology)))
    return f"{export.config.task.name}, {shape} on {Path(export.config.backbone).name}"


def _kind(export: Export) -> str:
    count = len(export.topology.nodes)
    if export.config.society.rounds:
        return f"A society of {count} agents that debate in {export.config.society.rounds} rounds and vote."
    if count == 1:
        return "One node."
    answering = [node for node in export.topology.nodes if not export.topology.recipients(node)]
    told = " that send each other messages" if len(answering) < count else ""
    ends = f"node {answering[0]} answers" if len(answering) == 1 else f"{len(answering)} answer, and a majority vote decides"
    return f"A network of {count} nodes{told}; {ends}."


def _place(export: Export, node: int) -> str:
    """Return what a node reads and whom it writes to, as two cells of a table."""
    topology, society = export.topology, export.config.society
    if not society.rounds:
        read, told = topology.senders(node), topology.recipients(node)
        reads = ", ".join(["the question", *(f"node {sender}" for sender in read)])
        return f"{reads} | {', '.join(f'node {recipient}' for recipient in told) or 'the answer'}"
    layer, agents = topology.layer(node), len([each for each in topology.nodes if topology.layer(each) == 1])
    others = "a summary of the others' by the bare backbone" if society.summary else "the others' in full"
    if layer == 2:
        return f"the question, the last answer that began as node {node - agents}'s, {others} | an answer in each later round"
    later = society.rounds > 1 and topology.depth == 1
    reads = f"the question, in later rounds its own last answer and {others}" if later else "the question"
    return f"{reads} | an answer in {'each' if later else 'the first'} round"


def _chosen(export: Export) -> str:
    """Return the validation score by which a best checkpoint was chosen; empty for a newest one."""
    if export.head["validation_accuracy"] is None:
        return ""
    lines = export.files["metrics.jsonl"].splitlines()
    found: dict[str, Any] = next((m for m in map(json.loads, reversed(lines)) if m["step"] == export.step - 1), {})
    low, high, floor = (found.get(f"validation/{name}/value") for name in ("low", "high", "floor"))
    measured = f" (95% interval {low:.1%} to {high:.1%}, floor {floor:.1%})" if low is not None else ""
    return f"{export.head['validation_accuracy']:.1%}{measured}"


def _source(backbone: str) -> tuple[str, str]:
    """Return imports, and the expression for what transformers loads the backbone from."""
    if backbone == "bundled":
        return "from neuromas.bundled import BUNDLED\n", "str(BUNDLED)"
    if backbone in SHIPPED or is_gguf(backbone):
        modules = {"pathlib": "Path", "neuromas.model.gguf_file": "converted", "neuromas.model.sources": "find_backbone"}
        imports = "".join(f"from {module} import {name}\n" for module, name in modules.items())
        return imports, f"str(converted(Path(find_backbone({json.dumps(backbone)}))))"
    return "", json.dumps(backbone)
