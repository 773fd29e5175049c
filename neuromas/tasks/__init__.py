"""Tasks by name: `get_task` returns any of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from neuromas.config import TaskConfig, VerifierName
from neuromas.tasks.boolean_expressions import BooleanExpressions
from neuromas.tasks.code import HumanEval, HumanEvalPlus, Mbpp
from neuromas.tasks.dyck_languages import DyckLanguages
from neuromas.tasks.multistep_arithmetic_two import MultistepArithmeticTwo
from neuromas.tasks.navigate import Navigate
from neuromas.tasks.published import BBH, SUBJECTS, ArcChallenge, Benchmark, BigBenchHard, Gsm8k, Mmlu
from neuromas.tasks.reasoning_gym import ReasoningGym
from neuromas.tasks.task import (
    SPLITS,
    DatasetTask,
    GeneratedTask,
    Problem,
    Split,
    Task,
    checksum_of,
    question_id,
    rewards_of,
    split_of,
    with_repeats,
)
from neuromas.tasks.tracking_shuffled_objects import TrackingShuffledObjects
from neuromas.tasks.user_tasks import JsonlCodeTask, JsonlTask, load_class
from neuromas.tasks.web_of_lies import WebOfLies

TASKS: dict[str, Callable[[int | None], GeneratedTask]] = {
    "boolean_expressions": BooleanExpressions,
    "dyck_languages": DyckLanguages,
    "multistep_arithmetic_two": MultistepArithmeticTwo,
    "navigate": Navigate,
    "tracking_shuffled_objects_three_objects": partial(TrackingShuffledObjects, 3),
    "tracking_shuffled_objects_five_objects": partial(TrackingShuffledObjects, 5),
    "tracking_shuffled_objects_seven_objects": partial(TrackingShuffledObjects, 7),
    "web_of_lies": WebOfLies,
}
"""Name -> function that returns the task, given its difficulty."""


BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "arc_challenge": ArcChallenge,
    "gsm8k": Gsm8k,
    "humaneval": HumanEval,
    "humaneval_plus": HumanEvalPlus,
    "mbpp": Mbpp,
    **{f"bbh:{name}": partial(BigBenchHard, name, family=TASKS.get(name)) for name in BBH},
    **{f"mmlu:{name}": partial(Mmlu, name) for name in ("physics", *SUBJECTS)},
}
"""Name -> function that returns the benchmark, given its data and `train_on_evaluation`."""

FORMS = ("bbh:TASK", "mmlu:SUBJECT", "reasoning_gym:NAME[,SETTING=VALUE...]", "jsonl:PATH", "class:FILE.py:CLASS")


def get_family(name: str, difficulty: int | None = None) -> GeneratedTask:
    """Return the generated family of that name; ValueError lists the known names, or its allowed difficulties."""
    if name not in TASKS:
        raise ValueError(f"family must be one of {sorted(TASKS)}, got {name!r}")
    return TASKS[name](difficulty)


def get_task(
    name: str,
    difficulty: int | None = None,
    *,
    data: Path | None = None,
    verifier: VerifierName = "exact",
    train_on_evaluation: bool = False,
) -> Task:
    """Return the task of that name, without reading its data; ValueError lists the known names, or names the wrong setting."""
    kind, colon, rest = name.partition(":")
    if name in TASKS:
        return get_family(name, difficulty)
    if difficulty is not None:
        raise ValueError(f"--task.difficulty must be left out for task {name}, got {difficulty!r}: it has no generator")
    if name in BENCHMARKS:
        return BENCHMARKS[name](data, train_on_evaluation=train_on_evaluation)
    if colon and kind == "mmlu":
        return Mmlu(rest, data)
    if colon and kind == "bbh":
        return BigBenchHard(rest, data)
    if colon and kind == "reasoning_gym":
        return ReasoningGym(rest)
    if colon and kind == "class":
        return load_class(rest)
    if colon and kind == "jsonl":
        if verifier == "python":
            return JsonlCodeTask(Path(rest), train_on_evaluation=train_on_evaluation)
        return JsonlTask(Path(rest), verifier, train_on_evaluation=train_on_evaluation)
    plain = sorted([*TASKS, *(known for known in BENCHMARKS if ":" not in known)])
    raise ValueError(f"task must be one of {plain} or {', '.join(FORMS)}, got {name!r}")


def from_config(config: TaskConfig) -> Task:
    """Return the task that a config describes."""
    return get_task(
        config.name,
        config.difficulty,
        data=config.data,
        verifier=config.verifier,
        train_on_evaluation=config.train_on_evaluation,
    )


__all__ = [
    "BENCHMARKS",
    "SPLITS",
    "TASKS",
    "BooleanExpressions",
    "DatasetTask",
    "DyckLanguages",
    "GeneratedTask",
    "MultistepArithmeticTwo",
    "Navigate",
    "Problem",
    "Split",
    "Task",
    "TrackingShuffledObjects",
    "WebOfLies",
    "checksum_of",
    "from_config",
    "get_family",
    "get_task",
    "question_id",
    "rewards_of",
    "split_of",
    "with_repeats",
]
