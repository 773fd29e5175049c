"""What a run asks: its task, what it trains on, and what it is scored on. Loads no torch, so that a mistake is told at once."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from neuromas.config import TaskConfig, TrainConfig
from neuromas.system import files
from neuromas.tasks import DatasetTask, Task, checksum_of, from_config, question_id
from neuromas.tasks.item_files import read_question_file
from neuromas.tasks.published import Benchmark
from neuromas.tasks.user_tasks import OWN_CODE
from neuromas.training.run_directory import RunDirectory
from neuromas.types import Example

LOOKED_AT = 64
"""Generated training problems that are looked at before a run begins."""


@dataclass(frozen=True, slots=True)
class Questions:
    """The task of a config, and examples by what they are for."""

    task: Task
    training: list[Example]
    """All that training draws from, or, where problems are generated, some of what the first step draws."""
    evaluation_sets: dict[str, list[Example]]
    validation: list[Example]
    """What chooses a checkpoint; empty where a run does not validate."""

    @classmethod
    def of(cls, config: TrainConfig) -> "Questions":
        """Read or generate them; ValueError names the flag that is wrong."""
        with _own_code(config.task):
            task = from_config(config.task)
            task.check_ready()
            sets = evaluation_sets(config, task)
            # A task with nothing to train on says so now, not after the first evaluation.
            first = task.training_batch(config.seed, 0, min(config.drawn_per_step, LOOKED_AT))
            drawn = task.training_examples() if isinstance(task, DatasetTask) and not task.generates else first
            validates = config.eval_every > 0 and task.has("validation")
            return cls(task, drawn, sets, task.examples("validation", config.validation_size) if validates else [])

    @property
    def all(self) -> list[Example]:
        """All of them, whatever they are for."""
        return [*self.training, *chain(*self.evaluation_sets.values()), *self.validation]

    def checksums(self) -> dict[str, str]:
        """Return checksums of questions and answers, by what they are for."""
        asked = {"training": self.training, **self.evaluation_sets, "validating": self.validation}
        return {name: checksum_of(examples) for name, examples in asked.items()}


@contextmanager
def _own_code(config: TaskConfig) -> Iterator[None]:
    """Turn whatever the user's own class raises into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) or not config.name.startswith(OWN_CODE):
            raise
        raise ValueError(f"--task {config.name}: {type(error).__name__}: {error}") from error


def questions_to_screen(configs: Sequence[TrainConfig], count: int) -> list[tuple[Task, list[Example]]]:
    """Return the tasks of these configs, each with `count` different validation questions, or training questions where it has
    no validation split. Neither test questions nor those of `task.file`, which are scored, are among them.

    Raises ValueError for a name that is wrong before any task's data is read, and for data that are missing.
    """
    tasks, found = [], []
    for config in configs:
        with _own_code(config.task):
            # Else the training questions of a benchmark might be its test questions.
            tasks.append(from_config(dataclasses.replace(config.task, train_on_evaluation=False)))
    for config, task in zip(configs, tasks, strict=True):
        with _own_code(config.task):
            task.check_ready()
            # The file may be another task's: its answers are not looked at.
            records = read_question_file(config.task.file, "task.file") if config.task.file else ()
            task.held_out = frozenset(question_id(*record.texts("question")) for record in records)
            examples = task.examples("validation", count) if task.has("validation") else _to_train_on(task, config, count)
            asked = {example.id: example for example in examples if example.id not in task.held_out}
            if not asked:
                raise ValueError(f"task {task.name}: --task.file holds all questions to screen; leave it out")
            found.append((task, list(asked.values())))
    return found


def _to_train_on(task: Task, config: TrainConfig, count: int) -> list[Example]:
    try:
        return task.training_batch(config.seed, 0, count)
    except ValueError as error:
        raise ValueError(
            f"task {task.name} has neither validation nor training questions here, and test questions are not screened; leave "
            "the task out, or give --task.data that holds some"
        ) from error


def data_checksum(config: TaskConfig) -> str:
    """Return a checksum of all examples that come from files, and of a task's own code; empty where all are generated."""
    task, parts = from_config(config), list[str]()
    if isinstance(task, DatasetTask):
        parts += [f"{split} {checksum_of(examples)}" for split, examples in task.splits.items()]
    if config.file:
        parts.append(f"file {checksum_of(task.load(config.file))}")
    if config.name.startswith(OWN_CODE):
        code = Path(config.name.removeprefix(OWN_CODE).rpartition(":")[0])
        parts.append(f"code {files.checksum_of(code.read_bytes())}")
    return files.checksum_of("\n".join(parts).encode()) if parts else ""


def evaluation_sets(config: TrainConfig, task: Task) -> dict[str, list[Example]]:
    """Return what is scored, by name; ValueError if that is what is trained on. The task then never draws a file's items."""
    split = config.task.split
    if split == "train" and not config.task.train_on_evaluation:
        raise ValueError("--task.split train would score what is trained on; say --task.train-on-evaluation if that is meant")
    # First what takes no time to go wrong.
    of_file = task.load(config.task.file) if config.task.file else []
    sets: dict[str, list[Example]] = {split: task.examples(split, config.eval_size)}
    if config.task.file:
        sets[f"file {config.task.file.name}"] = of_file
        task.held_out = frozenset(example.id for example in of_file)
    return sets


def open_run(
    path: Path, *, untrained: bool = False, data: Path | None = None, allow_code: bool = False
) -> tuple[RunDirectory, Task]:
    """Return a run and its task, without its network; a benchmark's items are taken from `data`, if given.

    Raises ValueError if there is no run or checkpoint, if another task than a benchmark is given data, or as `check_code`.
    """
    run = RunDirectory.open(path)
    if not untrained and not run.checkpoints():
        raise ValueError(f"{path} holds no checkpoint yet; train it first")
    check_code(run, allow_code)
    config = run.config.task
    task = from_config(dataclasses.replace(config, data=data) if data else config)
    if data and not isinstance(task, Benchmark):
        raise ValueError(f"--data must be left out for task {config.name}, which is no benchmark; --file FILE scores on a file")
    return run, task


def check_code(run: RunDirectory, allow_code: bool) -> None:
    """Raise ValueError if a run's task is code of its own and that was not allowed: a run may come from anywhere."""
    if run.config.task.name.startswith(OWN_CODE) and not allow_code:
        raise ValueError(
            f"the task of run {run.path} is a Python file, {run.config.task.name}, which this would execute; look at the file, "
            "then say --allow-code"
        )


def drawn_in_training(run: RunDirectory, steps: int, examples: Iterable[Example]) -> set[str]:
    """Return the ids of those examples that the first `steps` steps of a run drew: its batches, made once more.

    Raises ValueError if the data that it was trained on is no longer where it was.
    """
    config, wanted, drawn = run.config, {example.id for example in examples}, set[str]()
    task = from_config(config.task)
    task.held_out = run.held_out()
    for step in range(steps):
        drawn |= wanted & {example.id for example in task.training_batch(config.seed, step, config.drawn_per_step)}
    return drawn
