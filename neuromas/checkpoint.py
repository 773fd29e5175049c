"""The run directory: config, topology, metrics and rollouts as they come, and checkpoints that are whole or not there.

    RUN/config.json  topology.json  held_out.json  metrics.jsonl  rollouts.jsonl  evaluation.json  curve.png
    RUN/growth.json  parent.json (where it has grown)
    RUN/checkpoints/step-000040/    adapters/<node>/ (PEFT)  optimizer.safetensors  ledger.json  state.json
    RUN/checkpoints/best-000020/    the same, after the validation with the highest accuracy (the first of equals)
    RUN/adapters -> checkpoints/<newest>/adapters

A checkpoint is written under another name, flushed, and renamed when complete, so a killed run leaves the one before it.
Draws are functions of (seed, step, example, rollout, node), so there is no generator state to save.
"""

import fcntl
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from neuromas.adapters import AdapterBank
from neuromas.budget import Ledger, Pace
from neuromas.config import TrainConfig, differences, from_json, to_json
from neuromas.files import replace_file, sync_folder, write_file
from neuromas.metrics import check_names
from neuromas.topology import Topology

KEPT_CHECKPOINTS = 2
MADE_FIRST = {"lock", "checkpoints"} | {
    f"{name}.json{end}" for name in ("config", "topology", "held_out", "parent", "evaluation", "growth") for end in ("", ".new")
} - {"config.json"}
"""What a run that is killed while its folder is being made may leave; it can be made again over them."""


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint holds besides adapters and optimizer."""

    step: int
    """Optimizer steps done."""
    running_mean: float
    """Mean reward for `--centring ema`."""
    backbone_checksum: str
    ledger: Ledger
    pace: Pace = field(default_factory=Pace)
    topology: Topology | None = None
    """Of the network whose adapters these are; None: that of the run."""
    validation_accuracy: float | None = None
    """Of the checkpoint that is kept as the best; None in all others."""


class RunDirectory:
    """One run on disk. `create` and `open` raise ValueError that says what to do."""

    def __init__(self, path: Path, config: TrainConfig, topology: Topology) -> None:
        self.path, self.config, self.topology = path, config, topology

    @classmethod
    def create(cls, config: TrainConfig) -> "RunDirectory":
        """Return a new run; nothing is written before `initialise`."""
        path = config.run_path
        if (path / "config.json").exists():
            raise ValueError(f"--run-dir {path} exists already; continue it with --resume or name another --run-dir")
        if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - MADE_FIRST):
            raise ValueError(f"--run-dir {path} exists already and is no run; name another --run-dir")
        return cls(path, config, config.topology.build())

    def initialise(self, held_out: Iterable[str] = ()) -> None:
        """Make the folder with config, topology and the ids of examples that training never draws, unless it is there.

        Raises ValueError if it is there with other ids: a step would draw other examples.
        """
        held = sorted(held_out)
        if (self.path / "config.json").exists():
            if held != sorted(self.held_out()):
                raise ValueError(
                    f"--run-dir {self.path} was started with other items in --task.file ({self.config.task.file}); "
                    "resume with the same items or name another --run-dir"
                )
            return
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            replace_file(self.path / "held_out.json", json.dumps(held).encode())
            # The config comes last: a folder that has one has everything.
            replace_file(self.path / "topology.json", json.dumps(self.topology.to_json(), indent=2).encode())
            replace_file(self.path / "config.json", to_json(self.config).encode())
        except OSError as error:
            raise ValueError(f"--run-dir {self.path} cannot be written: {error.strerror}") from error

    def adopt(self, parent: "RunDirectory") -> None:
        """Make this new run, before `initialise`, the continuation of another one, which stays as it is.

        Its newest checkpoint, scores after training and growths are copied; `parent.json` says where they come from.
        """
        folder = parent.checkpoints()[-1]
        _verified_state(folder, older=None)
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        origin = {
            "run": str(parent.path.resolve()),
            "checkpoint": folder.name,
            # state.json lists the checksums of all other files.
            "checksum": hashlib.blake2b(files[Path("state.json")], digest_size=16).hexdigest(),
        }
        with self._writing("checkpoints"):
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
            partial = self.path / "checkpoints" / f"{folder.name}.partial"
            for name, data in files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                write_file(partial / name, data)
            partial.rename(partial.with_suffix(""))
            sync_folder(partial.parent)
        scores = parent.read_json("evaluation.json") or {}
        self.write_json("evaluation.json", {"before": scores["after"]} if "after" in scores else {})
        self.write_json("growth.json", parent.read_json("growth.json") or [])
        self.write_json("parent.json", origin)

    def held_out(self) -> frozenset[str]:
        """Return the ids of the examples that training never draws."""
        return frozenset(self.read_json("held_out.json") or ())

    def check_backbone(self, state: State | None, checksum: str) -> None:
        """Raise ValueError if a backbone is not the one that a checkpoint, None: the newest, was trained on."""
        stored = state.backbone_checksum if state else self.backbone_checksum
        if checksum != stored:
            raise ValueError(
                f"--backbone {self.config.backbone} has other weights now (checksum {checksum}) than run {self.path} was "
                f"trained on ({stored}); restore the backbone that the run had"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; ValueError if one is in it."""
        with self._writing("lock"):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"--run-dir {self.path} is in use by another process; wait for it or name another") from error
            yield

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open an existing run with its own config."""
        try:
            config = from_json((path / "config.json").read_text(encoding="utf-8"), f"{path / 'config.json'}").check()
            drawn = (path / "topology.json").read_bytes()
        except OSError as error:
            raise ValueError(f"{path} is no run: expected {Path(error.filename).name} in it, {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path / 'config.json'} is damaged ({error})") from error
        topology = config.topology.build()
        if _parse_json(path / "topology.json", drawn) != topology.to_json():
            raise ValueError(f"{path / 'topology.json'} is not the topology of config.json beside it; restore them both")
        return cls(path, config, topology)

    @classmethod
    def resume(cls, config: TrainConfig) -> "RunDirectory":
        """Open the config's run, or create it if it is not there yet; ValueError if it was made with another config."""
        if not (config.run_path / "config.json").is_file():
            return cls.create(config)
        run = cls.open(config.run_path)
        if other := differences(run.config, config):
            raise ValueError(
                f"--run-dir {run.path} belongs to another config, which has {other}; resume with its own settings or name "
                "another --run-dir"
            )
        return run

    @property
    def step(self) -> int:
        """Optimizer steps done by the newest checkpoint, 0 if there is none."""
        folders = self.checkpoints()
        return _step_of(folders[-1]) if folders else 0

    @property
    def backbone_checksum(self) -> str:
        """That of the backbone on which the newest checkpoint was trained; ValueError if there is none or it is damaged."""
        folders = self.checkpoints()
        if not folders:
            raise ValueError(f"{self.path} holds no checkpoint yet; train it first")
        return _verified_state(folders[-1], older=folders[-2] if len(folders) > 1 else None)["backbone_checksum"]

    def checkpoints(self) -> list[Path]:
        """Return complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob(f"step-{'[0-9]' * 6}"))

    def best(self) -> Path | None:
        """Return the checkpoint of the best validation so far, None if there is none.

        What a killed run saved behind its newest checkpoint does not count: it comes again.
        """
        folders = sorted((self.path / "checkpoints").glob(f"best-{'[0-9]' * 6}"))
        return next((folder for folder in reversed(folders) if _step_of(folder) <= self.step), None)

    def best_accuracy(self) -> float:
        """Return the validation accuracy of the best checkpoint, -1 if there is none."""
        folder = self.best()
        return _verified_state(folder, older=None)["validation_accuracy"] if folder else -1.0

    def load_best(self, bank: AdapterBank) -> int:
        """Read the adapters of the best validation, or the newest where nothing was validated, and return their step."""
        folder = self.best() or self.checkpoints()[-1]
        _verified_state(folder, older=None)
        for node in bank.nodes:
            bank.load_peft(node, folder / "adapters" / str(node))
        return _step_of(folder)

    def save(self, bank: AdapterBank, optimizer: torch.optim.Optimizer, state: State) -> None:
        """Write a checkpoint, all or nothing; ValueError with the last good one if the disk refuses."""
        is_best = state.validation_accuracy is not None
        final = self.path / "checkpoints" / f"{'best' if is_best else 'step'}-{state.step:06d}"
        partial = final.with_suffix(".partial")
        files = _files(bank, optimizer, state, self.config.backbone)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            for name, data in files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                write_file(partial / name, data)
            if is_best:
                shutil.rmtree(final, ignore_errors=True)  # of a run that was killed behind it, and goes on
            partial.rename(final)
            sync_folder(final.parent)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = self.checkpoints()
            kept = f"the last good one is {last[-1].name}" if last else "there is none yet"
            raise ValueError(
                f"--run-dir {self.path}: checkpoint {final.name} cannot be saved ({error.strerror}); {kept}. "
                "Make room and run the same command with --resume"
            ) from error
        if is_best:
            for other in final.parent.glob("best-*"):
                if other != final:
                    shutil.rmtree(other, ignore_errors=True)
            return
        self._link_adapters(final)
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, bank: AdapterBank, optimizer: torch.optim.Optimizer | None = None) -> State | None:
        """Read the newest checkpoint into bank and optimizer; None if there is none yet.

        Raises ValueError that names the file if a checkpoint is truncated or damaged.
        """
        folders = self.checkpoints()
        if not folders:
            return None
        folder = folders[-1]
        state = _verified_state(folder, older=folders[-2] if len(folders) > 1 else None)
        topology = Topology.from_json(state["topology"]) if state.get("topology") else None
        # One adapter may serve all nodes.
        if topology and not self.config.adapter.shared and set(topology.nodes) != set(bank.nodes):
            raise ValueError(
                f"checkpoint {folder} holds nodes {sorted(topology.nodes)}, by the run's config it has {sorted(bank.nodes)} at "
                "that step; restore config.json"
            )
        for node in bank.nodes:
            bank.load_peft(node, folder / "adapters" / str(node))
        bank.version = state["step"]
        if optimizer is not None:
            _load_optimizer(optimizer, bank, load((folder / "optimizer.safetensors").read_bytes()))
        ledger = Ledger(**json.loads((folder / "ledger.json").read_text()))
        pace = Pace(**state.get("pace", {}))
        return State(state["step"], state["running_mean"], state["backbone_checksum"], ledger, pace, topology)

    def _link_adapters(self, newest: Path) -> None:
        """Point RUN/adapters at the newest adapters: a convenience that a run does without where the disk knows no links."""
        link, fresh = self.path / "adapters", self.path / "adapters.new"
        try:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(Path("checkpoints") / newest.name / "adapters")
            if link.is_dir() and not link.is_symlink():
                shutil.rmtree(link)  # what copying a run makes of the link
            fresh.replace(link)
        except OSError as error:
            warnings.warn(f"{link} cannot be linked to {newest / 'adapters'}: {error.strerror}", stacklevel=2)

    def forget_after(self, step: int) -> None:
        """Drop what a killed run logged after its last checkpoint, and rollouts of an evaluation that it did not finish."""
        scores: dict[str, Any] = self.read_json("evaluation.json") or {}

        def is_kept(record: dict[str, Any]) -> bool:
            split = record.get("split", "train")
            if split == "train":
                return record["step"] < step
            # A score that is stored is not measured again, so its rollouts stay.
            return split in scores.get("after" if record["step"] else "before", {})

        for name in ("metrics.jsonl", "rollouts.jsonl"):
            lines = self._read_lines(name)
            with self._writing(name):
                replace_file(self.path / name, b"".join(line for line, record in lines if is_kept(record)))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        check_names(list(metrics))
        self._append("metrics.jsonl", {"step": step, **metrics})

    def log_rollouts(self, step: int, records: list[dict[str, Any]]) -> None:
        self._append("rollouts.jsonl", *({"step": step, **record} for record in records))

    def metrics(self) -> list[dict[str, int | float]]:
        return [record for _, record in self._read_lines("metrics.jsonl")]

    def _append(self, name: str, *records: Mapping[str, Any]) -> None:
        with self._writing(name), (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def write_json(self, name: str, data: object) -> None:
        with self._writing(name):
            replace_file(self.path / name, json.dumps(data, indent=2).encode())

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn a refusal of the disk into a ValueError that says what to do."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"--run-dir {self.path}: {name} cannot be written ({error.strerror}). "
                "Make room and run the same command with --resume"
            ) from error

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content, None if it is not there; ValueError names a damaged one."""
        path = self.path / name
        return _parse_json(path, path.read_bytes()) if path.exists() else None

    def _read_lines(self, name: str) -> list[tuple[bytes, dict[str, Any]]]:
        """Return the whole lines of a JSONL file, raw and parsed; a killed run's last line may be cut off."""
        path = self.path / name
        raw = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        lines = [(line, _parse_json(path, line)) for line in raw if line.endswith(b"\n")]
        if any(not isinstance(record, dict) or "step" not in record for _, record in lines):
            raise ValueError(f"{path} is damaged: a line is no record with a step; delete the file to go on without it")
        return lines


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or delete it to go on without it") from error


def _files(bank: AdapterBank, optimizer: torch.optim.Optimizer, state: State, backbone: str) -> dict[str, bytes]:
    files = {f"adapters/{node}/{name}": data for node in bank.nodes for name, data in bank.peft_files(node, backbone).items()}
    moments = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in bank.parameters().items()
        for key, value in optimizer.state[parameter].items()
    }
    files["optimizer.safetensors"] = save(moments)
    files["ledger.json"] = json.dumps(state.ledger.to_json(), indent=2).encode()
    listing = {name: [len(data), hashlib.blake2b(data, digest_size=16).hexdigest()] for name, data in files.items()}
    head = {
        "step": state.step,
        "running_mean": state.running_mean,
        "backbone_checksum": state.backbone_checksum,
        "pace": asdict(state.pace),
        "topology": state.topology.to_json() if state.topology else None,
        "validation_accuracy": state.validation_accuracy,
    }
    files["state.json"] = json.dumps({**head, "files": listing}, indent=2).encode()
    return files


def _verified_state(folder: Path, older: Path | None) -> dict[str, Any]:
    """Return state.json after checking every file of the checkpoint against it."""
    remedy = f"delete {folder} to continue from {older.name}" if older else f"delete {folder} to start again"
    try:
        state = json.loads((folder / "state.json").read_text())
        whole = _step_of(folder) == state["step"]
        files = {name: (size, digest) for name, (size, digest) in state["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"checkpoint {folder}: state.json is missing or damaged; {remedy}") from error
    if not whole:
        raise ValueError(f"checkpoint {folder}: state.json is damaged (it names step {state['step']}); {remedy}")
    for name, (size, digest) in files.items():
        path = folder / name
        data = path.read_bytes() if path.is_file() else b""
        if len(data) != size:
            raise ValueError(f"checkpoint {folder}: {name} is truncated ({len(data)} of {size} bytes); {remedy}")
        if hashlib.blake2b(data, digest_size=16).hexdigest() != digest:
            raise ValueError(f"checkpoint {folder}: {name} is damaged (its checksum differs); {remedy}")
    return state


def _load_optimizer(optimizer: torch.optim.Optimizer, bank: AdapterBank, moments: dict[str, torch.Tensor]) -> None:
    # Until some rollout has been right, no step has had a gradient, and there are no moments yet.
    for name, parameter in bank.parameters().items():
        # Nodes that have joined have none of their own until they have learned something.
        for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.step" in moments else ():
            value = moments[f"{name}.{key}"]
            optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
