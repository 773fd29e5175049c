"""Exports: a trained network as a folder to keep or to hand on, and back. Loads no torch before the adapters are looked at.

    DIR/README.md        the model card, which may be edited
    DIR/adapters/<node>/ PEFT
    DIR/config.json  topology.json (of the network as it is in this checkpoint)  ledger.json  metrics.jsonl  evaluation.json ...
    DIR/state.json  checksum    the seal of all but the card (sealed.py)

What learns is left out: the optimizer's moments, and a critic.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuromas.config import AdapterConfig, TrainConfig
from neuromas.graph.topology import Topology
from neuromas.system.files import parse_json, read_file, write_folder
from neuromas.training.config_file import from_json, identity, to_json
from neuromas.training.run_directory import RunDirectory
from neuromas.training.sealed import check_seal, seal

FORMAT = 1
AS_IN_RUN = ("held_out.json", "identity.json", "growth.json", "parent.json", "evaluation.json")
"""Files of a run that an export holds as they are, where the run has them."""
NOT_HERE = ("optimizer.safetensors", "critic.safetensors")


@dataclass(frozen=True, slots=True)
class Export:
    """A checkpoint with what says what it is: files by name, and the head of their seal."""

    config: TrainConfig
    topology: Topology
    head: Mapping[str, Any]
    files: Mapping[str, bytes]

    @property
    def step(self) -> int:
        return self.head["step"]

    @property
    def nodes(self) -> tuple[int, ...]:
        """The nodes that have an adapter: all, or one that serves all."""
        return self.config.topology.build().nodes[:1] if self.config.adapter.shared else self.topology.nodes

    @property
    def adapter(self) -> dict[str, Any]:
        """PEFT's settings, which all adapters have."""
        return json.loads(self.files[f"adapters/{self.nodes[0]}/adapter_config.json"])

    def json(self, name: str) -> Any:
        """Return what a file of it holds; None: it has no such file."""
        return json.loads(self.files[name]) if name in self.files else None


def topology_at(config: TrainConfig, step: int) -> Topology:
    """Return the topology that a config's network has after `step` steps."""
    taken = [growth.grown for growth in config.growths() if growth.at_step < step]
    return taken[-1] if taken else config.topology.build()


def collect(run: RunDirectory, *, best: bool = False, rollouts: bool = False) -> Export:
    """Return the export of a run's newest checkpoint, or of its best; with `rollouts`, of all that its nodes have said."""
    folder, state = (run.best() if best else None) or run.newest()
    step, config = state["step"], dataclasses.replace(run.config, run_dir=None, device="auto")
    topology = topology_at(config, step)
    files = {name: (folder / name).read_bytes() for name in state.pop("files") if name not in NOT_HERE}
    files["config.json"] = to_json(config).encode()
    files["topology.json"] = json.dumps(topology.to_json(), indent=2).encode()
    for name in AS_IN_RUN:
        if (run.path / name).exists():
            files[name] = read_file(run.path / name)
    if origin := run.read_json("parent.json", dict):
        # Where it lies is nobody else's matter.
        files["parent.json"] = json.dumps({**origin, "run": Path(str(origin.get("run"))).name}, indent=2).encode()
    if best:
        # These are of the last adapters.
        files["evaluation.json"] = json.dumps({"before": run.scores("before")}, indent=2).encode()
    files["metrics.jsonl"] = _lines(record for record in run.metrics() if record["step"] < step)
    if rollouts:
        is_of_last = "after" if best else ""
        files["rollouts.jsonl"] = _lines(record for record in run.rollouts() if _is_said(record, step, run, is_of_last))
    return Export(config, topology, {"format": FORMAT, "checkpoint": folder.name, **state}, files)


def _is_said(record: Mapping[str, Any], step: int, run: RunDirectory, left_out: str) -> bool:
    """Say whether a rollout belongs to a checkpoint: one of training before it, or one of a score that is kept."""
    if record.get("split", "train") == "train":
        return record["step"] < step
    return ("after" if record["step"] > run.first_step else "before") != left_out


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def check_out(out: Path) -> None:
    """Raise ValueError if a folder cannot be made there; asked before any long work."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out {out} exists already; name a folder that does not")


def write(export: Export, card: str, out: Path) -> None:
    """Write an export with its card, all or nothing; ValueError if the folder is there or cannot be written."""
    check_out(out)
    try:
        write_folder(out, {**seal(export.head, export.files), "README.md": card.encode()})
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error


def read(folder: Path, backbone: str | None = None) -> Export:
    """Read an export, on its backbone or on the same one under another name.

    ValueError says what is missing, damaged or does not fit together.
    """
    remedy = "export the run again, or get the folder again"
    if not (folder / "state.json").is_file() or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no export: expected config.json and state.json in it; neuromas export makes such a folder"
        )
    state = parse_json(folder / "state.json", read_file(folder / "state.json"), dict)
    if state.get("format") != FORMAT or not isinstance(state.get("files"), dict):
        raise ValueError(
            f"{folder} is no export of format {FORMAT}: its state.json has format {state.get('format')!r}; import what "
            "neuromas export has made"
        )
    for name, sealed in state["files"].items():
        # Whoever made the folder chose these names.
        if ".." in Path(name).parts or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder} is no export: its file {name!r} leads out of it")
        if not isinstance(sealed, list) or [type(part) for part in sealed] != [int, str]:
            raise ValueError(f"{folder} is no export: its state.json says of {name} {sealed!r}, expected a size and a checksum")
    if not isinstance(state.get("step"), int) or not isinstance(state.get("backbone_checksum"), str):
        raise ValueError(f"{folder} is no export: its state.json lacks step or backbone_checksum")
    config = from_json(read_file(folder / "config.json"), f"{folder / 'config.json'}").check()
    config = dataclasses.replace(config, backbone=backbone or config.backbone)
    # What is wrong is said before that something is.
    _check_adapters(folder, state["files"], config.adapter)
    state = check_seal(folder, "export", remedy)
    files = {name: read_file(folder / name, most=None) for name in state.pop("files")}
    topology = topology_at(config, state["step"])
    if "topology.json" not in files or json.loads(files["topology.json"]) != topology.to_json():
        raise ValueError(f"export {folder}: topology.json is not that of config.json after {state['step']} steps; {remedy}")
    export = Export(config, topology, state, files)
    for node in export.nodes:
        if f"adapters/{node}/adapter_model.safetensors" not in files:
            raise ValueError(f"export {folder} holds no adapter of node {node}; {remedy}")
    return export


def _check_adapters(folder: Path, names: Iterable[str], adapter: AdapterConfig) -> None:
    """Raise ValueError if a file is missing, or an adapter has another rank, scale or other modules than the first one."""
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"export {folder} lacks {name}; get the folder again, with all its files")
    first: tuple[str, dict[str, Any]] | None = None
    for name in names:
        if not name.endswith("/adapter_config.json"):
            continue
        found = parse_json(folder / name, read_file(folder / name), dict)
        shape = {"r": found.get("r"), "lora_alpha": found.get("lora_alpha"), "target_modules": found.get("target_modules")}
        first = first or (name, shape)
        wanted = first[1] | {"target_modules": sorted(adapter.target_modules)}
        wanted |= {"r": adapter.rank} if adapter.rank is not None else {}
        for key, value in wanted.items():
            if shape[key] != value:
                raise ValueError(f"export {folder}: {name} has {key} {shape[key]!r}, expected {value!r}: it is of another run")


def make_run(export: Export, run_dir: Path | None) -> RunDirectory:
    """Make a run of an export, all or nothing; ValueError if its folder is there or cannot be written."""
    config = dataclasses.replace(export.config, run_dir=run_dir)
    if config.run_path.exists():
        raise ValueError(f"--run-dir {config.run_path} exists already; name another --run-dir")
    run = RunDirectory.create(config)
    checkpoint = {n: data for n, data in export.files.items() if n.startswith("adapters/") or n == "ledger.json"}
    head = {name: value for name, value in export.head.items() if name not in ("format", "checkpoint")}
    folder = f"checkpoints/step-{export.step:06d}"
    files = {f"{folder}/{name}": data for name, data in seal(head, checkpoint).items()}
    files |= {name: data for name, data in export.files.items() if name not in checkpoint}
    # The backbone may have another name here.
    named = {"settings": identity(run.config)}
    started_with = {**named, "questions": {}} | (export.json("identity.json") or {}) | named
    files["identity.json"] = json.dumps(started_with, indent=2).encode()
    files["topology.json"] = json.dumps(run.topology.to_json(), indent=2).encode()
    files["config.json"] = to_json(run.config).encode()
    try:
        write_folder(run.path, files)
    except OSError as error:
        raise ValueError(f"--run-dir {run.path} cannot be written: {error.strerror}") from error
    run.link_adapters(run.path / folder)
    return run
