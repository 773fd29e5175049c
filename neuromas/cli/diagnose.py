"""`neuromas diagnose`: say what each node and edge of a trained run is worth."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from neuromas.cli.flags import parse_flags, require_temperature
from neuromas.config import MOST_COUNTED, Split
from neuromas.diagnose import KINDS, Kind
from neuromas.model.sources import find_backbone
from neuromas.system.files import replace_file, require_writable
from neuromas.system.schema import require
from neuromas.system.terminal import printable
from neuromas.training.progress import StatusLine
from neuromas.training.questions import open_run
from neuromas.view.recorded import RunRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagnoseArguments:
    """Disturb a trained network and say what each node and edge is worth: messages emptied, shuffled among questions and
    swapped, adapters left out and exchanged. Writes diagnosis.json and diagnosis.png into the run's folder; `neuromas view`
    shows them.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    split: Split = "validation"
    """Split of the task's questions."""
    limit: int = 200
    """Most questions to ask; every intervention asks all of them."""
    interventions: tuple[Kind, ...] = KINDS
    """Which kinds of interventions."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy. All interventions use the same random numbers."""
    seed: int = 0
    """Decides which question's message a shuffled edge carries, and the samples where the temperature is above 0."""
    data: Path | None = None
    """File or folder of the benchmark's items. None: the run's."""
    allow_code: bool = False
    """Execute the Python file that holds the run's task (class:FILE.py:CLASS)."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(args: Sequence[str]) -> None:
    """Run the command `diagnose`."""
    parsed = parse_flags(DiagnoseArguments, args, "diagnose")
    require(1 <= parsed.limit <= MOST_COUNTED, "--limit", f"1 to {MOST_COUNTED:,}", parsed.limit)
    require(parsed.seed >= 0, "--seed", "at least 0", parsed.seed)
    require_temperature(parsed.temperature)
    opened, task = open_run(parsed.run, data=parsed.data, allow_code=parsed.allow_code)
    recorded = RunRecord(opened, task)
    for name in ("diagnosis.json", "diagnosis.png"):
        require_writable(opened.path / name, "RUN")
    task.check_ready()
    examples = task.examples(parsed.split, parsed.limit)
    in_training = recorded.rollouts(training_only=True)
    find_backbone(opened.config.backbone)
    # These load torch: mistakes and damaged files are reported before.
    from neuromas.diagnose.diagnosis import diagnose
    from neuromas.diagnose.history import history
    from neuromas.diagnose.picture import draw
    from neuromas.diagnose.report import report
    from neuromas.training.load_run import load_network

    network, step = load_network(opened)
    with StatusLine() as status:
        found = diagnose(
            network, task, examples, parsed.interventions, temperature=parsed.temperature, seed=parsed.seed, tell=status.tell
        )
        status.tell("texts of training")
        diagnosis = {"step": step, "split": parsed.split, **found, "training": history(in_training, task)}
        replace_file(opened.path / "diagnosis.json", json.dumps(diagnosis, indent=2, allow_nan=False).encode())
        replace_file(opened.path / "diagnosis.png", draw(diagnosis))
    where = f"{opened.path / 'diagnosis.json'} and diagnosis.png; `neuromas view {opened.path}` shows them with the messages"
    print(json.dumps(diagnosis) if parsed.json else printable(f"{report(diagnosis)}\n\n{where}"))
