"""Configs as files, and what makes two configs the same run: which settings a resumed run may change, and which it may not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from neuromas.config import PRETRAINED, TrainConfig
from neuromas.system.files import checksum_of, read_toml
from neuromas.system.schema import from_dict, require

MAY_DIFFER = ("run_dir", "device", "save_every", "track", "task.file", "engine.logprob_bound", "engine.url", "grad_checkpoint")
"""Settings that a resumed run may change: they leave every step as it was. Of `task.file` it is the items that have to be the
same, which the run directory checks."""


def on_backbone(default: TrainConfig, backbone: str) -> TrainConfig:
    """Return default settings on a backbone: what they leave as `TrainConfig` has it is as a pretrained one needs it."""
    plain = TrainConfig()
    own = {} if backbone == "bundled" else PRETRAINED
    left = {name: value for name, value in own.items() if getattr(default, name) == getattr(plain, name)}
    return dataclasses.replace(default, backbone=backbone, **left)


def load_toml(path: Path, backbone: str | None = None, default: TrainConfig | None = None) -> TrainConfig:
    """Read a TrainConfig from a TOML file, over `default` (None: `TrainConfig`) on its backbone or on the one given instead.

    ValueError names the file and the key.
    """
    data = read_toml(path)
    if backbone:
        data["backbone"] = backbone
    base = on_backbone(default or TrainConfig(), str(data.get("backbone", "bundled")))
    return from_dict(TrainConfig, data, where=f"config {path}", base=base)


def to_json(config: TrainConfig) -> str:
    """Return the resolved config as JSON, paths as texts."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def from_json(text: str | bytes, where: str) -> TrainConfig:
    """Read a resolved config back; ValueError names `where` it came from and what is wrong with it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: not JSON ({error})") from error
    require(isinstance(data, dict), where, "a JSON object", data)
    return from_dict(TrainConfig, data, where=where)


def identity(config: TrainConfig) -> str:
    """Return a checksum of the settings that a resumed run may not change."""
    flat = {key: value for key, value in _flatten(dataclasses.asdict(config)).items() if key not in MAY_DIFFER}
    return checksum_of(json.dumps(flat, default=str, sort_keys=True).encode())


def differences(stored: TrainConfig, given: TrainConfig) -> str:
    """Return the settings of `stored` that `given` has otherwise, as text; empty if a run of one can go on as the other."""
    flat_stored, flat_given = (_flatten(dataclasses.asdict(config)) for config in (stored, given))
    different = [key for key in flat_stored if flat_stored[key] != flat_given[key] and key not in MAY_DIFFER]
    return ", ".join(f"{key} = {flat_stored[key]!r} (got {flat_given[key]!r})" for key in different)


def why_others(stored: dict[str, Any]) -> str:
    """Return why a stored config may have another checksum than its run was started with, and what to do, as text.

    Code that had fewer settings wrote one that lacks them; otherwise somebody has changed it.
    """
    found = _flatten(stored)
    if lacking := [key for key in _flatten(dataclasses.asdict(TrainConfig())) if key not in found]:
        return f"was written by other code, which had no setting {', '.join(lacking)}; go on with that code"
    return "has other settings than the run was started with; restore it"


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
