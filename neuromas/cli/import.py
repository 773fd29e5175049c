"""`neuromas import`: make a run of what `neuromas export` has written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from neuromas.cli.flags import parse_flags
from neuromas.model.sources import find_backbone
from neuromas.training.exported import make_run, read


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportArguments:
    """Make a run of an exported folder, for `eval`, `ask`, `view`, `grow` and `train --resume`."""

    folder: tyro.conf.Positional[Path]
    """Folder that `neuromas export` has written."""
    run_dir: Path | None = None
    """Folder of the run. None: as `neuromas train` names it."""
    backbone: str | None = None
    """The same backbone under another name or in another folder. None: as the export names it."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(args: Sequence[str]) -> None:
    """Run the command `import`."""
    parsed = parse_flags(ImportArguments, args, "import")
    export = read(parsed.folder, parsed.backbone)
    find_backbone(export.config.backbone)
    from neuromas.training.import_check import check_weights

    check_weights(export, parsed.folder)
    made = make_run(export, parsed.run_dir)
    report = {"run": str(made.path), "step": export.step, "nodes": list(export.nodes)}
    print(json.dumps(report) if parsed.json else f"{made.path}: {len(export.nodes)} adapters after step {export.step}")
