"""The run directory: config, topology, metrics and rollouts as they come, and checkpoints that are whole or not there.

    RUN/config.json  topology.json  held_out.json  metrics.jsonl  rollouts.jsonl  evaluation.json  curve.png
    RUN/identity.json    what the run was started with: checksums of settings, questions and backbone
    RUN/growth.json  parent.json (where it has grown)
    RUN/checkpoints/step-000040/    adapters/<node>/ (PEFT)  optimizer.safetensors  ledger.json  state.json  checksum
    RUN/checkpoints/best-000020/    the same, after the validation with the highest accuracy (the first of equals)
    RUN/adapters -> checkpoints/<newest>/adapters
    RUN/lock             held while a process trains; NAME.new and NAME.partial are files that were not finished

A checkpoint is written under another name, flushed, and renamed when complete, so a killed run leaves the one before it.
`state.json` holds the checksum of every other file, `checksum` that of `state.json`: no bit of it changes unnoticed.
Draws are functions of (seed, step, example, rollout, node), so there is no generator state to save.
Imports no torch, so that a folder that cannot be used is refused at once.
"""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuromas.config import TrainConfig
from neuromas.graph.topology import Topology
from neuromas.system.files import checksum_of, damaged, parse_json, read_file, read_or_damaged, replace_file, sync, write_folder
from neuromas.training.config_file import differences, from_json, identity, to_json, why_others
from neuromas.training.going_on import make_room
from neuromas.training.sealed import check_seal, seal

KEPT_CHECKPOINTS = 2
LOGS = ("metrics.jsonl", "rollouts.jsonl")
MADE_FIRST = {"lock", "checkpoints"} | {
    f"{name}.json{end}"
    for name in ("config", "topology", "held_out", "identity", "parent", "evaluation", "growth")
    for end in ("", ".new")
} - {"config.json"}
"""What a run that is killed while its folder is being made may leave; it can be made again over them."""


class RunDirectory:
    """One run on disk. `create` and `open` raise ValueError that says what to do."""

    def __init__(self, path: Path, config: TrainConfig, topology: Topology) -> None:
        self.path, self.config, self.topology = path, config, topology
        self.on_metrics: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None
        """Is told each step's metrics once they are logged."""

    @classmethod
    def find(cls, config: TrainConfig, *, resume: bool) -> "RunDirectory":
        """Return the run to start or to go on with; nothing is written. ValueError if it can't be."""
        return cls.resume(config) if resume else cls.create(config)

    @classmethod
    def create(cls, config: TrainConfig) -> "RunDirectory":
        """Return a new run; nothing is written before `initialise`."""
        path = config.run_path
        if (path / "config.json").exists():
            raise ValueError(f"--run-dir {path} exists already; continue it with --resume or name another --run-dir")
        if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - MADE_FIRST):
            raise ValueError(f"--run-dir {path} exists already and is no run; name another --run-dir")
        return cls(path, config, config.topology.build())

    def initialise(self, held_out: Iterable[str] = (), questions: Mapping[str, str] | None = None) -> None:
        """Make the folder with config, topology and the ids of examples that training never draws, unless it is there.

        `questions` are checksums of what the run trains on and is scored on, by name. Raises ValueError if the run is there
        and was started with other settings or questions: it would go on as another run.
        """
        questions = {_kind(name): checksum for name, checksum in (questions or {}).items()}
        if (self.path / "config.json").exists():
            self._check_identity(questions)
            return
        made = {"settings": identity(self.config), "questions": questions}
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            replace_file(self.path / "held_out.json", json.dumps(sorted(held_out)).encode())
            replace_file(self.path / "identity.json", json.dumps(made, indent=2).encode())
            # The config comes last: a folder that has one has everything.
            replace_file(self.path / "topology.json", json.dumps(self.topology.to_json(), indent=2).encode())
            replace_file(self.path / "config.json", to_json(self.config).encode())
        except OSError as error:
            raise ValueError(f"--run-dir {self.path} cannot be written: {error.strerror}") from error

    def _check_identity(self, questions: Mapping[str, str]) -> None:
        before = self._started_with
        if before.get("settings", settings := identity(self.config)) != settings:
            why = why_others(self.read_json("config.json", dict) or {})
            why = f"{why}, or delete {self.path / 'identity.json'} to go on with them all the same"
            raise ValueError(f"{self.path / 'config.json'} {why}")
        asked = before.get("questions", questions)
        if changed := [name for name in {**asked, **questions} if asked.get(name) != questions.get(name)]:
            raise ValueError(
                f"--run-dir {self.path} was started with other questions or answers ({', '.join(changed)}); resume "
                "with the same data or name another --run-dir"
            )

    @property
    def _started_with(self) -> dict[str, Any]:
        """Checksums of the settings and, by name, of the questions that the run was started with; empty if they are gone."""
        found = self.read_json("identity.json", dict) or {}
        if not isinstance(found.get("questions", {}), dict):
            raise damaged(self.path / "identity.json", "its questions are no JSON object")
        return found

    def adopt(self, parent: "RunDirectory", questions: Mapping[str, str]) -> None:
        """Make this new run, before `initialise`, the continuation of another one, which stays as it is.

        Its newest checkpoint and growths are copied, and its scores after training on `questions` that are the same;
        `parent.json` says where they come from.
        """
        folder, _ = parent.newest()
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        origin = {
            "run": str(parent.path.resolve()),
            "checkpoint": folder.name,
            # state.json lists the checksums of all other files.
            "checksum": checksum_of(files["state.json"]),
        }
        with self._writing("checkpoints"):
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
            write_folder(self.path / "checkpoints" / folder.name, files)
        # What the parent has answered last is where this run begins, if it is asked the same.
        asked = parent._started_with.get("questions", {})
        same = [name for name, checksum in questions.items() if asked.get(_kind(name)) == checksum]
        before = {name: score for name, score in parent.scores("after").items() if name in same}
        self.write_json("evaluation.json", {"before": before})
        self.write_json("growth.json", parent.read_json("growth.json", list) or [])
        self.write_json("parent.json", origin)

    def check_files(self) -> None:
        """Raise ValueError if a file that a run goes on from is damaged: asked before anything is written."""
        self.held_out()
        self.scores("after")
        _ = self.read_json("growth.json", list), self.first_step, self._started_with

    def held_out(self) -> frozenset[str]:
        """Return the ids of the examples that training never draws."""
        return frozenset(id for id in self.read_json("held_out.json", list) or () if isinstance(id, str))

    def scores(self, when: str) -> dict[str, Any]:
        """Return what is stored of the scores `before` or `after` training, by set of examples."""
        found = (self.read_json("evaluation.json", dict) or {}).get(when, {})
        return found if isinstance(found, dict) else {}

    @property
    def first_step(self) -> int:
        """Training steps done when this run began: those of the run that it has grown from, else 0."""
        origin = self.read_json("parent.json", dict) or {}
        digits = str(origin.get("checkpoint", "step-0")).removeprefix("step-")
        return int(digits) if digits.isdecimal() else 0

    def check_backbone(self, checksum: str, stored: str | None = None) -> None:
        """Raise ValueError if a backbone is not the one that a checkpoint, None: the newest, was trained on."""
        stored = stored or self.newest()[1]["backbone_checksum"]
        if checksum != stored:
            raise ValueError(
                f"--backbone {self.config.backbone} has other weights now (checksum {checksum}) than run {self.path} was "
                f"trained on ({stored}); restore the backbone that the run had"
            )

    def check_start(self, checksum: str) -> None:
        """Keep the backbone's checksum of a run without checkpoints, whose score before training is that backbone's.

        Raises ValueError if the run has begun on another one.
        """
        if before := self._started_with.get("backbone"):
            self.check_backbone(checksum, before)
        else:
            self.write_json("identity.json", {**self._started_with, "backbone": checksum})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; ValueError if one is in it."""
        with self._writing("lock"):
            self.path.mkdir(parents=True, exist_ok=True)
            # Nonblocking: whatever lies there must not keep anybody waiting.
            file = os.fdopen(os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC), "wb")
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
            config = from_json(read_file(path / "config.json"), f"{path / 'config.json'}").check()
            drawn = read_file(path / "topology.json")
        except OSError as error:
            missing = Path(error.filename).name
            raise ValueError(f"{path} is no run: expected {missing} in it, {error.strerror}") from error
        topology = config.topology.build()
        if parse_json(path / "topology.json", drawn, dict) != topology.to_json():
            other = path / "topology.json"
            raise ValueError(f"{other} is not the topology of config.json in the same folder; restore them both")
        return cls(path, config, topology)

    @classmethod
    def resume(cls, config: TrainConfig) -> "RunDirectory":
        """Open the config's run, or create it if there is no such folder yet.

        Raises ValueError for a folder that is no run, unless one was killed as it began there, and for a run that was made with
        another config.
        """
        path = config.run_path
        if not (path / "config.json").exists():
            # Whoever makes a run makes its lock first.
            if path.is_dir() and not (path / "lock").exists():
                raise ValueError(f"--run-dir {path} is no run, there is nothing to --resume; start one there without it")
            return cls.create(config)
        run = cls.open(path)
        if other := differences(run.config, config):
            counts_steps = not (run.config.society.rounds or run.config.train_tokens)
            may_go_on = counts_steps and run.config.num_steps <= run.step < config.num_steps
            on = f"; neuromas grow {path} --steps {config.num_steps - run.step} trains it on" if may_go_on else ""
            what = f"--run-dir {path} belongs to another config, which has {other}"
            raise ValueError(f"{what}; resume with its own settings or name another --run-dir{on}")
        return run

    @property
    def step(self) -> int:
        """Training steps done by the newest checkpoint, 0 if there is none."""
        return max(map(_step_of, self.checkpoints()), default=0)

    def checkpoints(self) -> list[Path]:
        """Return complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob(f"step-{'[0-9]' * 6}"))

    def best(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the checkpoint of the best validation so far as `newest` does, None if there is none.

        What a killed run saved after its newest checkpoint does not count: it is done again.
        """
        found = self._bests(self.step)
        return (found[-1], _verified_state(found[-1], f"delete {found[-1]} to go on without this best")) if found else None

    def _bests(self, step: int) -> list[Path]:
        """Return checkpoints that were the best when they were made, at most `step` steps into the run, oldest first."""
        folders = sorted((self.path / "checkpoints").glob(f"best-{'[0-9]' * 6}"))
        return [folder for folder in folders if _step_of(folder) <= step]

    def newest(self) -> tuple[Path, dict[str, Any]]:
        """Return the newest checkpoint and what its state.json says.

        Raises ValueError if there is none, or a file of it is not what it was when it was saved.
        """
        folders = self.checkpoints()
        if not folders:
            raise ValueError(f"{self.path} holds no checkpoint yet; train it first")
        onwards = f"continue from {folders[-2].name}" if len(folders) > 1 else "start again"
        return folders[-1], _verified_state(folders[-1], f"delete {folders[-1]} to {onwards}")

    def save(self, step: int, head: Mapping[str, Any], files: Mapping[str, bytes], *, best: bool = False) -> None:
        """Write a checkpoint, all or nothing; ValueError with the last good one if the disk refuses.

        `head` goes to state.json, with the checksums of the files. A `best` one is kept besides the others.
        """
        final = self.path / "checkpoints" / f"{'best' if best else 'step'}-{step:06d}"
        try:
            # The log up to here is part of what a resumed run goes on from.
            for name in LOGS:
                if (self.path / name).exists():
                    sync(self.path / name)
            if best:
                shutil.rmtree(final, ignore_errors=True)  # of a run that was killed after it, and goes on
            write_folder(final, seal({"step": step, **head}, files))
        except OSError as error:
            shutil.rmtree(final.with_name(f"{final.name}.partial"), ignore_errors=True)
            last = self.checkpoints()
            kept = f"the last good one is {last[-1].name}" if last else "there is none yet"
            what = f"checkpoint {final.name} cannot be saved ({error.strerror}); {kept}"
            raise ValueError(f"--run-dir {self.path}: {what}. {make_room(self.path)}") from error
        if best:
            return
        # The best before this one is kept until the run can no longer fall back to before the newer one.
        for other in self._bests(step)[:-1]:
            shutil.rmtree(other, ignore_errors=True)
        self.link_adapters(final)
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def agreed(self, own: bool) -> bool:
        """Return what all workers of the run go by, which is the first one's; here there is one."""
        return own

    def drop_checkpoint(self, step: int) -> list[Path]:
        """Delete the checkpoint of a step, if it is there, and return those that are left."""
        shutil.rmtree(self.path / "checkpoints" / f"step-{step:06d}", ignore_errors=True)
        left = self.checkpoints()
        if left:
            self.link_adapters(left[-1])
        else:
            (self.path / "adapters").unlink(missing_ok=True)
        return left

    def link_adapters(self, newest: Path) -> None:
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
        """Drop what a killed run logged, or saved as best, after its last checkpoint, and rollouts of unfinished scores."""
        past = set(self._bests(step))
        for folder in (self.path / "checkpoints").glob("best-*"):
            if folder not in past:
                shutil.rmtree(folder, ignore_errors=True)
        scores = {when: self.scores(when) for when in ("before", "after")}
        first = self.first_step

        def is_kept(record: dict[str, Any]) -> bool:
            split = record.get("split", "train")
            if split == "train":
                return record["step"] < step
            # A score that is stored is not measured again, so its rollouts stay.
            return split in scores["after" if record["step"] > first else "before"]

        for name in LOGS:
            lines = self._read_lines(name)
            with self._writing(name):
                replace_file(self.path / name, b"".join(line for line, record in lines if is_kept(record)))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        from neuromas.training.metrics import check_names  # loads torch

        check_names(list(metrics))
        self._append("metrics.jsonl", {"step": step, **metrics})
        self.on_metrics(step, metrics)

    def log_rollouts(self, step: int, records: list[dict[str, Any]]) -> None:
        self._append("rollouts.jsonl", *({"step": step, **record} for record in records))

    def metrics(self) -> list[dict[str, int | float]]:
        return [record for _, record in self._read_lines("metrics.jsonl")]

    def rollouts(self) -> list[dict[str, Any]]:
        return [record for _, record in self._read_lines("rollouts.jsonl")]

    def _append(self, name: str, *records: Mapping[str, Any]) -> None:
        with self._writing(name), (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)

    def write_json(self, name: str, data: object) -> None:
        with self._writing(name):
            replace_file(self.path / name, json.dumps(data, indent=2, allow_nan=False).encode())

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn a refusal of the disk into a ValueError that says what to do."""
        try:
            yield
        except OSError as error:
            what = f"{name} cannot be written ({error.strerror})"
            raise ValueError(f"--run-dir {self.path}: {what}. {make_room(self.path)}") from error

    def read_json(self, name: str, kind: type) -> Any:
        """Return a JSON file's content, None if it is not there; ValueError names one that is damaged or holds no `kind`."""
        path = self.path / name
        return parse_json(path, read_or_damaged(path), kind) if path.exists() else None

    def _read_lines(self, name: str) -> list[tuple[bytes, dict[str, Any]]]:
        """Return the whole lines of a JSONL file, raw and parsed; a killed run's last line may be cut off."""
        path = self.path / name
        raw = read_or_damaged(path, most=None).splitlines(keepends=True) if path.exists() else []
        lines = [(line, parse_json(path, line, dict)) for line in raw if line.endswith(b"\n")]
        values = (record.values() if name == "metrics.jsonl" else () for _, record in lines)
        fits = all(isinstance(value, int | float) for of_record in values for value in of_record)
        steps = all(isinstance(record.get("step"), int) and isinstance(record.get("split", ""), str) for _, record in lines)
        if not (fits and steps):
            raise ValueError(f"{path} is damaged: a line is no record with a step; delete the file to go on without it")
        return lines


def _kind(name: str) -> str:
    """Return what a set of examples is called wherever it lies: a file may be moved."""
    return "--task.file" if name.startswith("file ") else name


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _verified_state(folder: Path, remedy: str) -> dict[str, Any]:
    """Return state.json after checking every file of the checkpoint against it; ValueError names the file and the remedy."""
    state = check_seal(folder, "checkpoint", remedy)
    if folder.name not in (f"step-{state['step']:06d}", f"best-{state['step']:06d}"):
        raise ValueError(f"checkpoint {folder}: its state.json is of step {state['step']}; {remedy}")
    return state
