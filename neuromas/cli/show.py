"""`neuromas show`: draw a network and its budget."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from neuromas.cli.flags import parse_flags
from neuromas.training.config_file import load_toml
from neuromas.training.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowArguments:
    """Draw a network, its edges and its budget."""

    what: tyro.conf.Positional[Path]
    """Folder of a run, or a TOML config."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(args: Sequence[str]) -> None:
    """Run the command `show`."""
    parsed = parse_flags(ShowArguments, args, "show")
    what = load_toml(parsed.what).check() if parsed.what.suffix == ".toml" else RunDirectory.open(parsed.what)
    from neuromas.cli.describe import describe, print_description

    description = describe(what)
    if parsed.json:
        print(json.dumps(description))
    else:
        print_description(description)
