"""Networks and rollouts, drawn in the terminal and described as JSON."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from neuromas.checkpoint import RunDirectory
from neuromas.config import TrainConfig, load_toml, to_json
from neuromas.evaluate import Evaluation
from neuromas.sizes import sizes
from neuromas.tasks import Task, from_config
from neuromas.topology import Topology
from neuromas.types import Rollout


def plan(config: TrainConfig) -> str:
    """Return what a run of this config would be, as text: the drawing, the budget, the resolved settings."""
    console = Console(width=100, highlight=False, markup=False)
    with console.capture() as capture:
        print_description(_description(config, config.topology.build()), console)
    return f"{capture.get()}{to_json(config)}"


def describe(what: Path) -> dict[str, Any]:
    """Describe a run folder or a TOML config; ValueError if it is neither."""
    if what.suffix == ".toml":
        config = load_toml(what).check()
        return _description(config, config.topology.build())
    run = RunDirectory.open(what)
    description = _description(run.config, run.topology) | {
        "run": str(what),
        "evaluation": run.read_json("evaluation.json"),
    }
    if folders := run.checkpoints():
        description["checkpoint"] = folders[-1].name
        description["ledger"] = run.read_json(f"checkpoints/{folders[-1].name}/ledger.json")
    return description


def _description(config: TrainConfig, topology: Topology) -> dict[str, Any]:
    count = sizes(config)
    return {
        "task": from_config(config.task).name,
        "backbone": config.backbone,
        "backbone_parameters": count.backbone,
        "nodes": [
            {
                "id": node,
                "layer": topology.layer(node),
                "reads": list(topology.senders(node)),
                "writes_to": list(topology.recipients(node)),
            }
            for node in topology.nodes
        ],
        "output_node": topology.output_node,
        "calls_per_answer": len(topology.nodes),
        "rank": count.rank,
        "trainable_parameters_per_node": count.per_adapter,
        "trainable_parameters": count.trainable,
        "adapter_scope": config.adapter.scope,
        "max_tokens_per_answer": config.max_new_tokens * len(topology.nodes),
        "training_rollouts": config.num_steps * config.examples_per_step * config.group_size,
    }


def print_description(description: dict[str, Any], console: Console | None = None) -> None:
    console = console or Console(highlight=False, markup=False)
    console.print(_drawing(description))
    edges = "  ".join(f"{node['id']}─▶{recipient}" for node in description["nodes"] for recipient in node["writes_to"])
    console.print(f"messages: {edges or 'none'}; every node reads the question as well")
    for key in ("task", "backbone", "backbone_parameters", "trainable_parameters", "trainable_parameters_per_node", "rank",
                "adapter_scope", "calls_per_answer", "max_tokens_per_answer", "training_rollouts", "checkpoint"):  # fmt: skip
        if key in description:
            value = description[key]
            console.print(
                f"{key.replace('_', ' ')}: {value:,}" if isinstance(value, int) else f"{key.replace('_', ' ')}: {value}"
            )
    for key, value in (description.get("ledger") or {}).items():
        console.print(f"spent in training, {key.replace('_', ' ')}: {value:,}")
    for when, results in (description.get("evaluation") or {}).items():
        for name, result in results.items():
            console.print(Text(f"{when} training, {name}: {Evaluation(**result)}"), soft_wrap=True)


def _drawing(description: dict[str, Any]) -> Table:
    """Draw one column per layer, its nodes below each other; the edges are listed beneath."""
    nodes = description["nodes"]
    depth = max(node["layer"] for node in nodes)
    layers = [[f"({node['id']})" for node in nodes if node["layer"] == layer] for layer in range(1, depth + 1)]
    columns = [["question"], *layers, ["answer"]]
    table = Table.grid(padding=(0, 1))
    cells = []
    for column in columns:
        cells += ["\n".join(column), "─▶"]
    for _ in cells[:-1]:
        table.add_column(no_wrap=True)
    table.add_row(*cells[:-1])
    return table


def print_rollout(rollout: Rollout, task: Task) -> None:
    """Print every message on its edge, then the answer."""
    console = Console(highlight=False, markup=False)
    for completion in rollout.completions:
        for message in completion.messages:
            fault = "" if message.status.value == "ok" else f"  ({message.status.value})"
            console.print(
                Panel(
                    Text(message.text),
                    title=f"node {message.sender} ─▶ node {message.recipient}{fault}",
                    title_align="left",
                )
            )
    console.print(Panel(Text(rollout.answer), title=f"node {rollout.completions[-1].node} answers", title_align="left"))
    console.print(f"answer: {task.parse_answer(rollout.answer) or '(none that the task can read)'}")


def rollout_json(rollout: Rollout, task: Task) -> dict[str, Any]:
    return {
        "question": rollout.example.question,
        "messages": [
            {"from": m.sender, "to": m.recipient, "text": m.text, "status": m.status.value}
            for completion in rollout.completions
            for m in completion.messages
        ],
        "text": rollout.answer,
        "answer": task.parse_answer(rollout.answer),
        "calls": len(rollout.completions),
        "tokens": sum(len(c.sample.token_ids) for c in rollout.completions),
    }
