"""Draws networks and rollouts in the terminal, and describes them as JSON."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuromas.config import TrainConfig
from neuromas.graph.growth import Growth
from neuromas.graph.growth import describe as describe_growth
from neuromas.graph.topology import Topology
from neuromas.model.backbone import resolve_device
from neuromas.model.sizes import sizes
from neuromas.serve.talk import answer_line, message_panel, panel
from neuromas.system.files import damaged
from neuromas.system.terminal import one_line, printable
from neuromas.tasks import Task, from_config
from neuromas.tasks.user_tasks import OWN_CODE
from neuromas.training.config_file import to_json
from neuromas.training.evaluate import Evaluation
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import require_training_memory
from neuromas.types import Rollout


def describe_plan(config: TrainConfig, remark: str) -> str:
    """Return the plan of a run as text: the drawing, the budget, a remark on the task, all settings.

    Raises ValueError if the adapters do not fit into memory.
    """
    console, description = Console(width=100, highlight=False, markup=False), _planned(config)
    trainable, device = description["trainable_parameters"], torch.device(resolve_device(config.device))
    require_training_memory(trainable, description["rank"], len(description["nodes"]), device)
    with console.capture() as capture:
        print_description(description, console)
    remark = printable(f"{remark}\n") if remark else ""
    return f"{capture.get()}{remark}{to_json(config)}"


def describe(what: TrainConfig | RunDirectory) -> dict[str, Any]:
    """Return the description of a run or of a config; ValueError names a file of the run that is damaged."""
    if isinstance(what, TrainConfig):
        return _planned(what)
    run = what
    done, growths = run.step, run.config.growths()
    taken = [growth for growth in growths if growth.at_step < done]
    where = str(run.path / "evaluation.json")
    scores = {when: run.scores(when) for when in ("before", "after")}
    description = _description(run.config, taken[-1].grown if taken else run.topology, taken, done) | {
        "run": str(run.path),
        "evaluation": {
            when: {name: Evaluation.from_json(score, where).to_json() for name, score in sets.items()}
            for when, sets in scores.items()
            if sets
        },
    }
    if growths:
        description["growth"] = _records(run)[: len(taken)] + [growth.record() for growth in growths[len(taken) :]]
        description["parent"] = _origin(run)
    if run.checkpoints():
        # `newest` checks the checkpoint, and its ledger with it.
        folder, _ = run.newest()
        description["checkpoint"] = folder.name
        description["ledger"] = run.read_json(f"checkpoints/{folder.name}/ledger.json", dict)
    return description


def _records(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the stored records of a run's growths."""
    records = run.read_json("growth.json", list) or []
    try:
        for record in records:
            describe_growth(record)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise damaged(run.path / "growth.json", "a growth lacks a part") from error
    return records


def _origin(run: RunDirectory) -> dict[str, Any] | None:
    """Return the run, checkpoint and checksum that a run has grown from; None if it has not grown from a run."""
    origin = run.read_json("parent.json", dict)
    if origin is not None and not origin.keys() >= {"run", "checkpoint", "checksum"}:
        raise damaged(run.path / "parent.json", "it lacks run, checkpoint or checksum")
    return origin


def _planned(config: TrainConfig) -> dict[str, Any]:
    """Return the description of a config: the network at the end, and the growths before it."""
    growths = config.growths()
    description = _description(config, growths[-1].grown if growths else config.topology.build(), growths, config.num_steps)
    return description | {"growth": [growth.record() for growth in growths]} if growths else description


def _description(config: TrainConfig, topology: Topology, taken: Sequence[Growth], step: int) -> dict[str, Any]:
    """Return the description of a network that has taken these growths and done `step` steps."""
    name = config.task.name
    # New nodes get the rank of the first ones.
    count = sizes(config)
    new = taken[-1].new if taken else ()
    probability = taken[-1].open_probability(step) if taken else 1.0
    society = config.society
    calls = society.calls(config.topology.widths[0]) if society.rounds else len(topology.nodes)
    return (
        {
            # A task in a Python file is not loaded: that would execute the file.
            "task": name if name.startswith(OWN_CODE) else from_config(config.task).name,
            "backbone": config.backbone,
            "backbone_parameters": count.backbone,
            "nodes": [
                {
                    "id": node,
                    "layer": topology.layer(node),
                    "reads": list(topology.senders(node)),
                    "writes_to": list(topology.recipients(node)),
                }
                | ({"state": "kept" if node not in new else "new" if probability >= 1 else "opening"} if taken else {})
                for node in topology.nodes
            ],
            "output_node": topology.output_node,
            "open_probability": probability,
            "calls_per_answer": calls,
            "rank": count.rank,
            "trainable_parameters_per_node": count.per_adapter,
            "trainable_parameters": count.per_adapter * (len(topology.nodes) if not config.adapter.shared else 1),
            "adapter_scope": config.adapter.scope,
            "max_tokens_per_answer": config.max_new_tokens * calls,
        }
        | ({"debate_rounds": society.rounds} if society.rounds else {})
        | (
            {"training_sampled_tokens": config.num_steps * config.step_tokens}
            if config.step_tokens
            else {"training_rollouts": config.num_steps * config.examples_per_step * config.group_size}
        )
    )


def print_description(description: dict[str, Any], console: Console | None = None) -> None:
    """Print a description of a run or of a config, with the drawing of its network."""
    console = console or Console(highlight=False, markup=False)
    console.print(_drawing(description))
    edges = "  ".join(f"{node['id']}─▶{recipient}" for node in description["nodes"] for recipient in node["writes_to"])
    messages = f"messages: {edges or 'none'}; every node reads the question as well"
    if rounds := description.get("debate_rounds"):
        messages = f"society: rounds of a debate: {rounds}, then a vote; layer 1 answers first, the last layer in later rounds"
    console.print(messages)
    for record in description.get("growth") or []:
        console.print(printable(describe_growth(record)), soft_wrap=True)
    if description.get("growth"):
        console.print(_opening(description))
    if origin := description.get("parent"):
        text = f"grown from: {origin['run']}, {origin['checkpoint']}, checksum {origin['checksum']}"
        console.print(one_line(text), soft_wrap=True)
    for key in ("task", "backbone", "backbone_parameters", "trainable_parameters", "trainable_parameters_per_node", "rank",
                "adapter_scope", "calls_per_answer", "max_tokens_per_answer", "training_rollouts", "training_sampled_tokens",
                "checkpoint"):  # fmt: skip
        if key in description:
            value = description[key]
            text = f"{value:,}" if isinstance(value, int) else one_line(str(value))
            console.print(f"{key.replace('_', ' ')}: {text}")
    ledger = dict(description.get("ledger") or {})
    phases = ledger.pop("phases", [])
    for key, value in ledger.items():
        console.print(f"spent in training, {key.replace('_', ' ')}: {value:,}")
    for number, phase in enumerate(phases, start=1):
        counts = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in phase.items())
        console.print(f"of that in phase {number}: {counts}", soft_wrap=True)
    for when, results in (description.get("evaluation") or {}).items():
        for name, result in results.items():
            console.print(Text(one_line(f"{when} training, {name}: {Evaluation(**result)}")), soft_wrap=True)


_MARKS = {"kept": "({})", "new": "[{}]", "opening": "<{}>"}


def _opening(description: dict[str, Any]) -> str:
    """Return the legend of the drawing of a grown network: which nodes are kept, new and open."""
    if description["open_probability"] >= 1:
        return "drawing: (k) kept, [k] new in the last growth; all open"
    share = f"{description['open_probability']:.0%}"
    return (
        f"drawing: (k) kept, <k> new in the last growth, open for {share} of the questions; the others run through its parent"
    )


def _drawing(description: dict[str, Any]) -> Table:
    """Return a drawing of one column per layer, with its nodes below each other; the edges are listed beneath."""
    nodes = description["nodes"]
    depth = max(node["layer"] for node in nodes)
    layers = [
        [_MARKS[node.get("state", "kept")].format(node["id"]) for node in nodes if node["layer"] == layer]
        for layer in range(1, depth + 1)
    ]
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
            console.print(message_panel(message))
    console.print(panel(f"node {rollout.completions[rollout.winner].node} answers", rollout.answer))
    console.print(answer_line(rollout, task))


def rollout_json(rollout: Rollout, task: Task) -> dict[str, Any]:
    """Return a rollout's messages and answer as JSON-ready data."""
    return {
        "question": rollout.example.question,
        "messages": [message.to_json() for completion in rollout.completions for message in completion.messages],
        "text": rollout.answer,
        "answer": task.parse_answer(rollout.answer),
        "calls": len(rollout.completions),
        "tokens": sum(len(c.sample.logprobs) for c in rollout.completions),
    }
