"""`neuromas eval`: score a trained run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from neuromas.cli.flags import parse_flags, require_best, require_temperature
from neuromas.config import MOST_COUNTED, Split
from neuromas.model.sources import find_backbone
from neuromas.system.schema import require
from neuromas.system.terminal import printable
from neuromas.training.progress import StatusLine
from neuromas.training.questions import drawn_in_training, open_run


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalArguments:
    """Score a trained run: accuracy with n, 95% interval, floor, parse rate and cost of an answer."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    file: Annotated[Path | None, tyro.conf.arg(aliases=["--task.file"])] = None
    """File to score on: BIG-Bench-Hard JSON, or JSONL with `question` and `answer`. None: the task's own problems."""
    data: Annotated[Path | None, tyro.conf.arg(aliases=["--task.data"])] = None
    """File or folder of the benchmark's items. None: the run's."""
    split: Split = "test"
    """Split of the task's problems."""
    size: int = 500
    """Most problems to score on."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy. None: greedy, and a society debates at the temperature of its run."""
    seed: int | None = None
    """Seed of the samples where the temperature is above 0. None: 0, and a society's is that of its run."""
    untrained: bool = False
    """Score the network before training."""
    best: bool = False
    """Score the adapters of the run's best validation, not its last ones."""
    allow_code: bool = False
    """Execute the Python file that holds the run's task (class:FILE.py:CLASS)."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(args: Sequence[str]) -> None:
    """Run the command `eval`."""
    parsed = parse_flags(EvalArguments, args, "eval")
    require(1 <= parsed.size <= MOST_COUNTED, "--size", f"1 to {MOST_COUNTED:,}", parsed.size)
    require_temperature(parsed.temperature)
    if parsed.best and parsed.untrained:
        raise ValueError("--best and --untrained exclude each other; give one of them")
    opened, task = open_run(parsed.run, untrained=parsed.untrained, data=parsed.data, allow_code=parsed.allow_code)
    if parsed.best:
        require_best(opened)
    task.check_ready()
    examples = task.load(parsed.file) if parsed.file else task.examples(parsed.split, parsed.size)
    find_backbone(opened.config.backbone)
    from neuromas.training.evaluate import evaluate, score
    from neuromas.training.load_run import load_network, load_society

    debates = opened.config.society.rounds > 0
    load = load_society if debates else load_network
    answering, step = load(opened, untrained=parsed.untrained, best=parsed.best)
    temperature = (opened.config.temperature if debates else 0.0) if parsed.temperature is None else parsed.temperature
    seed = (opened.config.seed if debates else 0) if parsed.seed is None else parsed.seed
    with StatusLine() as status:
        result, groups = evaluate(answering, task, examples, temperature=temperature, seed=seed, tell=status.tell)
    report, lines = result.to_json(), [str(result)]
    if parsed.file:
        # A score on items that training has drawn says little about new ones.
        try:
            drawn = drawn_in_training(opened, step, examples)
        except ValueError as error:
            report["drawn_in_training"] = None
            lines.append(f"{parsed.file.name}: the number of its items that were drawn in training is unknown: {error}")
        else:
            others = [group for group in groups if group[0].example.id not in drawn]
            report["drawn_in_training"] = len(groups) - len(others)
            lines.append(f"{parsed.file.name}: {len(groups) - len(others)} of {len(groups)} items were drawn in training")
            if 0 < len(others) < len(groups):
                unseen = score(task, others)
                report["not_drawn"] = unseen.to_json()
                lines.append(f"the other {len(others)}: {unseen}")
    print(json.dumps(report) if parsed.json else printable("\n".join(lines)))
