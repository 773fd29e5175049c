"""`neuromas compare`: run methods x tasks x seeds and write the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from neuromas.cli.flags import parse_flags
from neuromas.config import Device
from neuromas.system.schema import require


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareArguments:
    """Run a comparison, methods x tasks x seeds, and write its report. Cells that are done are not run again."""

    grid: tyro.conf.Positional[Path]
    """TOML file that names methods, tasks, seeds and pairs."""
    quick: bool = False
    """Use the file's [quick] table: a smaller comparison, in minutes."""
    jobs: int = 1
    """Cells that run at a time, in processes that share the cores."""
    workers: str = ""
    """Make cells as tasks of a Ray cluster: `ray` (the one of RAY_ADDRESS, or this machine's cores) or `ray://HOST:PORT`."""
    out: Path | None = None
    """Folder of cells and report. None: runs/compare-NAME."""
    dry_run: bool = False
    """Print cells, budgets and matched quantities, and stop."""
    report_only: bool = False
    """Write the report of the cells that are done; run nothing."""
    keep_old: bool = False
    """Keep cells that other code made; the report names them."""
    methods: tuple[str, ...] = ()
    """Methods instead of the file's; pairs that name a method left out are left out too."""
    tasks: tuple[str, ...] = ()
    """Tasks instead of the file's."""
    seeds: tuple[int, ...] = ()
    """Seeds instead of the file's."""
    backbone: tuple[str, ...] = ()
    """Backbones instead of the file's."""
    data: Annotated[Path | None, tyro.conf.arg(aliases=["--task.data"])] = None
    """Folder of benchmark files. None: the file's."""
    device: Device | None = None
    """Device to run on. None: the file's."""


def run(args: Sequence[str]) -> None:
    """Run the command `compare`."""
    parsed = parse_flags(CompareArguments, args, "compare")
    require(parsed.jobs >= 1, "--jobs", "at least 1", parsed.jobs)
    if parsed.workers and parsed.jobs != 1:
        raise ValueError("--jobs and --workers exclude each other: a cluster makes as many cells at a time as it has cores")
    from neuromas.compare.grid import load_grid

    grid = load_grid(
        parsed.grid, quick=parsed.quick, methods=parsed.methods, tasks=parsed.tasks, seeds=parsed.seeds,
        backbones=parsed.backbone, data=parsed.data, device=parsed.device,
    )  # fmt: skip
    from neuromas.compare.run import make_comparison, print_plan, print_result

    if parsed.dry_run:
        print_plan(grid)
        return
    out = parsed.out or Path("runs") / f"compare-{grid.name}"
    comparison = make_comparison(
        grid, out, jobs=parsed.jobs, workers=parsed.workers, keep_old=parsed.keep_old, report_only=parsed.report_only
    )
    print_result(comparison, out)
