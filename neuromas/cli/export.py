"""`neuromas export`: write a trained network as a folder to keep or to hand on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from neuromas.cli.flags import parse_flags, require_best
from neuromas.model.sources import find_backbone
from neuromas.training.exported import check_out, collect, write
from neuromas.training.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportArguments:
    """Write a run's adapters as PEFT folders, with topology, settings and a model card; `neuromas import` takes them back."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """Folder to write; it must not be there yet."""
    best: bool = False
    """Export the adapters of the run's best validation, not its last ones."""
    rollouts: bool = False
    """Export as well what the nodes have said in training and in scores, with the questions: `neuromas view` shows it."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(args: Sequence[str]) -> None:
    """Run the command `export`."""
    parsed = parse_flags(ExportArguments, args, "export")
    opened = RunDirectory.open(parsed.run)
    check_out(parsed.out)
    if parsed.best:
        require_best(opened)
    export = collect(opened, best=parsed.best, rollouts=parsed.rollouts)
    find_backbone(opened.config.backbone)
    from neuromas.training.load_run import load_network, load_society
    from neuromas.training.model_card import card

    # Loading checks that the backbone is the one of the checkpoint, and the adapters' shapes.
    load = load_society if opened.config.society.rounds else load_network
    answering, _ = load(opened, best=parsed.best)
    write(export, card(export, answering.backbone), parsed.out)
    report = {"export": str(parsed.out), "step": export.step, "nodes": list(export.nodes)}
    print(json.dumps(report) if parsed.json else f"{parsed.out}: {len(export.nodes)} adapters after step {export.step}")
