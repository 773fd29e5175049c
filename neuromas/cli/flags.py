"""Parses the flags of every command."""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro

from neuromas.config import COLDEST, TrainConfig
from neuromas.training.config_file import load_toml, on_backbone
from neuromas.training.run_directory import RunDirectory

T = TypeVar("T")


class WithSettings(Protocol):
    """Flags of a command that has all settings of a run."""

    @property
    def config(self) -> TrainConfig: ...


S = TypeVar("S", bound=WithSettings)


def parse_flags(kind: Callable[..., T], args: Sequence[str], command: str, **kwargs: Any) -> T:
    """Return the parsed flags; a mistake in them is a ValueError of one line, as every other mistake."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=args, prog=f"neuromas {command}", **kwargs)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = (line.strip("│╰╭─╮╯ ") for line in complaint.getvalue().splitlines() if not line.startswith("╭"))
        raise ValueError(" ".join(line for line in lines if line.strip("-"))) from stop


def parse_settings(
    kind: Callable[..., S], args: Sequence[str], command: str, default: TrainConfig, *, below_file: TrainConfig | None = None
) -> tuple[S, list[str]]:
    """Parse the flags of a command that has all settings of a run as `config`, and may be given a TOML file first.

    Flags win over the file, the file over the defaults of the backbone, which either may name: `default`, and
    `below_file` (None: those of `TrainConfig`) where there is a file. Returns the parsed flags, and
    the arguments without the file.
    """
    rest = list(args)
    file = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    base = load_toml(file, default=below_file) if file else default
    parsed = parse_flags(kind, rest, command, default=kind(config=base))
    if (backbone := parsed.config.backbone) != base.backbone:
        base = load_toml(file, backbone, below_file) if file else on_backbone(default, backbone)
        parsed = parse_flags(kind, rest, command, default=kind(config=base))
    return parsed, rest


def require_best(run: RunDirectory) -> None:
    """Raise ValueError if a run whose best adapters are asked for has none."""
    if run.best() is None:
        raise ValueError(f"{run.path} holds no best checkpoint: no validation was its best yet; leave --best out")


def require_temperature(temperature: float | None) -> None:
    """Raise ValueError if nothing can be sampled at this temperature; 0 is greedy, None is not given."""
    if temperature and not COLDEST <= temperature < math.inf:
        raise ValueError(f"--temperature must be 0 (greedy) or at least {COLDEST}, got {temperature}")
