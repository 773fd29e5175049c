"""What training and finetuning measure alike: validation, which chooses a checkpoint, and the scores before and after."""

from collections.abc import Callable, Mapping
from typing import Any

from neuromas.training.evaluate import Evaluation
from neuromas.training.run_directory import RunDirectory
from neuromas.types import Example, Group

Sets = Mapping[str, list[Example]]


class Validation:
    """The validation questions of a run, none where it does not validate, and the best accuracy on them so far."""

    def __init__(self, examples: list[Example], sets: Sets, run: RunDirectory) -> None:
        self.examples = examples
        scored = {example.id for examples in sets.values() for example in examples}
        # What is scored chooses nothing.
        self._chooses = not any(example.id in scored for example in self.examples)
        best = run.best()
        self.best_accuracy = best[1]["validation_accuracy"] if best else -1.0

    def is_best(self, accuracy: float) -> bool:
        """Take note of an accuracy, and say whether its adapters are the ones to keep."""
        if not self._chooses or accuracy <= self.best_accuracy:
            return False
        self.best_accuracy = accuracy
        return True


def as_metrics(seen: Evaluation) -> dict[str, float]:
    """Return a score on validation questions as metrics."""
    return {"accuracy/mean": seen.accuracy, "low/value": seen.low, "high/value": seen.high, "floor/value": seen.floor}


def score_sets(
    run: RunDirectory,
    sets: Sets,
    when: str,
    *,
    step: int,
    of: str,
    measure: Callable[[list[Example]], tuple[Evaluation, list[Group]]],
    records: Callable[[list[Group], str], list[dict[str, Any]]],
    note: Callable[[str], None],
) -> dict[str, Evaluation]:
    """Score every evaluation set `before` or `after` training, and store it; what is stored is read, not measured again.

    `of` names what is done between the two. `records` makes JSON-ready records of a set's rollouts.
    """
    stored = {moment: run.scores(moment) for moment in ("before", "after")}
    results: dict[str, Evaluation] = {}
    for name, examples in sets.items():
        if name in stored[when]:
            results[name] = Evaluation.from_json(stored[when][name], str(run.path / "evaluation.json"))
            continue
        # A run that has grown begins where its parent ended.
        if when == "before" and step != run.first_step:
            continue
        note(f"scoring {when} {of} on {name}: {len(examples)} questions")
        results[name], groups = measure(examples)
        run.log_rollouts(step, records(groups, name))
        stored[when][name] = results[name].to_json()
        run.write_json("evaluation.json", stored)
        note(f"{when} {of}, {name}: {results[name]}")
    return results
