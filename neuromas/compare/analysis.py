"""Scores methods on tasks, and compares the pairs of methods that are matched as declared.

Nothing is left out in silence: a cell that died or is not made yet, and a pair that is not matched, is one line instead of its
number.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from neuromas.compare import statistics
from neuromas.compare.budget_match import QUANTITIES, Amounts, compare_amounts, difference, mismatches, shorten
from neuromas.compare.cells import Stored
from neuromas.compare.findings import Comparison, Difference, Problem, RunScore, Score, Table, Trials, format_problem
from neuromas.compare.grid import Grid, Pair, find_method, problem_of
from neuromas.compare.methods.method import Answer, CellResult, CellSpec
from neuromas.training.evaluate import UNPARSED
from neuromas.training.intervals import independent, wilson

Adapters = Literal["best", "last"]
"""The adapters of a run that answer: those of its best validation, or the last. Untrained methods have one answer."""

CEILING = 0.95
"""Accuracy from which on two methods cannot be told apart."""


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One method on one problem with one seed."""

    seed: int
    answers: tuple[Answer, ...]
    amounts: dict[str, float]
    result: CellResult

    @property
    def right(self) -> np.ndarray:
        """Return one value for each distinct question; their mean is the mean reward of all answers.

        A question that is published twice counts once in every interval and test, and twice in the mean. Its value is
        linearised around that: mean + weight * (own mean - mean), with weights of mean 1.
        """
        rewards: dict[str, list[float]] = {}
        for answer in self.answers:
            rewards.setdefault(answer.example, []).append(answer.reward)
        own = np.array([sum(each) / len(each) for each in rewards.values()])
        weights = np.array([len(each) for each in rewards.values()]) * len(rewards) / len(self.answers)
        mean = sum(answer.reward for answer in self.answers) / len(self.answers)
        return mean + weights * (own - mean)

    @property
    def independent(self) -> float:
        """Return the number of independent questions that its answers are worth."""
        return independent(list(Counter(answer.example for answer in self.answers).values()))

    @property
    def questions(self) -> list[tuple[str, str]]:
        """Return the id and the gold answer of each question, in order."""
        return [(answer.example, answer.gold) for answer in self.answers]


def amounts_of(spec: CellSpec, result: CellResult, answers: Sequence[Answer]) -> dict[str, float]:
    """Return the costs of a cell, one amount for each of QUANTITIES."""
    training, n = result.training or {}, len(answers)
    calls = sum(answer.calls for answer in answers) / n
    amounts = {
        "trainable_parameters": result.trainable_parameters,
        "training_questions": training.get("questions", 0),
        "training_rollouts": training.get("rollouts", 0),
        "training_steps": training.get("steps", 0),
        "updates": training.get("optimizer_steps", 0),
        "training_calls": training.get("calls", 0),
        "training_sampled_tokens": training.get("sampled_tokens", 0),
        "training_prompt_tokens": training.get("prompt_tokens", 0),
        "calls_per_answer": calls,
        "most_tokens_per_answer": calls * result.settings.get("max_new_tokens", spec.config.max_new_tokens),
        "tokens_per_answer": sum(answer.sampled_tokens for answer in answers) / n,
        "prompt_tokens_per_answer": sum(answer.prompt_tokens for answer in answers) / n,
    }
    return {name: float(amount) for name, amount in amounts.items()}


def compare(
    grid: Grid, found: Sequence[tuple[CellSpec, Stored | None]], notes: Sequence[str] = (), trials: Trials | None = None
) -> Comparison:
    """Return a grid's scores and differences: those of the best validation's adapters, and in `last` of the last ones."""
    last = _compare(grid, found, "last", notes, trials or {})
    return replace(_compare(grid, found, "best", notes, trials or {}), last=last)


def _compare(
    grid: Grid, found: Sequence[tuple[CellSpec, Stored | None]], adapters: Adapters, notes: Sequence[str], trials: Trials
) -> Comparison:
    runs: dict[Problem, dict[str, list[SeedResult]]] = {}
    lost: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}
    for spec, stored in found:
        problem = problem_of(spec)
        if stored is None or stored.result is None:
            reason = "not run yet" if stored is None else f"died: {stored.error}" if stored.code else stored.error or ""
            lost.setdefault(problem, {}).setdefault(spec.method, {}).setdefault(reason, []).append(str(spec.config.seed))
            continue
        result = stored.result
        sets = result.best_answers if adapters == "best" and result.best_answers else result.answers
        for which, answers in sets.items():
            run = SeedResult(spec.config.seed, answers, amounts_of(spec, stored.result, answers), stored.result)
            runs.setdefault((*problem, which), {}).setdefault(spec.method, []).append(run)
    for backbone, task in lost:
        # A problem without any answers is in the report too.
        if not any(problem[:2] == (backbone, task) for problem in runs):
            split = next(spec.config.task.split for spec in grid.cells if problem_of(spec) == (backbone, task))
            runs[backbone, task, split] = {}
    order = {(backbone, task): index for index, (backbone, task) in enumerate(dict.fromkeys(map(problem_of, grid.cells)))}
    tables, estimates = [], []
    for problem in sorted(runs, key=lambda problem: order[problem[:2]]):
        table, of_pairs = _table(grid, problem, runs[problem], lost.get(problem[:2], {}))
        tables.append(table)
        estimates.append(of_pairs)
    # One correction for all tasks and pairs, another for the means over the tasks.
    adjusted = iter(_adjusted([found for table in tables for found in table.differences]))
    tables = [replace(table, differences=[next(adjusted) for _ in table.differences]) for table in tables]
    overall = [_overall(pair, [row[i] for row in estimates], tables, i) for i, pair in enumerate(grid.pairs)]
    floorless = [
        f"{format_problem(table.problem)}: no floor, since no two questions have the same answer; scores stand against 0%"
        for table in tables
        if table.scores and all(score.floor is None for score in table.scores.values())
    ]
    return Comparison(grid, tables, _adjusted(overall), [*notes, *floorless], trials)


def _table(
    grid: Grid, problem: Problem, runs: Mapping[str, list[SeedResult]], lost: Mapping[str, dict[str, list[str]]]
) -> tuple[Table, list[statistics.Estimate | None]]:
    scores, missing = {}, {}
    for method in grid.methods:
        own = runs.get(method, [])
        reasons = [f"seed {', '.join(seeds)} {reason}" for reason, seeds in lost.get(method, {}).items()]
        if not own and not reasons:
            reasons = [f"has no answers to {problem[2]}"]
        if own and any(run.questions != own[0].questions for run in own):
            reasons.append("its seeds answered different questions, so they have no common score")
        elif own:
            scores[method] = _score(method, own)
        if reasons:
            missing[method] = "; ".join(reasons)
    differences, estimates = [], []
    for pair in grid.pairs:
        difference, estimate = _difference(pair, runs, missing, scores)
        differences.append(difference)
        estimates.append(estimate)
    return Table(problem, scores, missing, differences), estimates


def _score(name: str, runs: Sequence[SeedResult]) -> Score:
    method = find_method(name)
    right = np.array([run.right for run in runs])
    n, distinct = len(runs[0].answers), right.shape[1]
    low, high = statistics.share_interval(right, runs[0].independent)
    given = Counter(UNPARSED if a.given is None else a.given for run in runs for a in run.answers)
    (best, count), *_ = Counter(answer.gold for answer in runs[0].answers).most_common(1)
    floor = count / n if count > 1 else None
    each = [
        RunScore(seed=run.seed, accuracy=float(right.mean()), low=interval[0], high=interval[1])
        for run, right in zip(runs, right, strict=True)
        for interval in [wilson(float(right.mean()) * run.independent, run.independent)]
    ]
    score = Score(
        method=name, title=method.title, trained=method.trained, n=n, distinct=distinct,
        accuracy=float(right.mean()), low=low, high=high, runs=each,
        floor=floor, floor_answer=best if floor else None, parse_rate=1 - given[UNPARSED] / given.total(),
        answers=dict(given.most_common()),
        amounts={key: float(np.mean([run.amounts[key] for run in runs])) for key in QUANTITIES},
        best_steps=[step for run in runs if (step := run.result.best_step) is not None],
        curve=[{"seed": run.seed, **asdict(point)} for run in runs for point in run.result.curve],
        iterations=[{"seed": run.seed, **measured} for run in runs for measured in run.result.iterations],
        growths=[growth["at_step"] for growth in runs[0].result.settings.get("growth", ())],
    )  # fmt: skip
    score.flags.extend(_flags(score, runs))
    return score


def _flags(score: Score, runs: Sequence[SeedResult]) -> list[str]:
    flags = []
    if score.floor is None:
        flags.append("no floor")
    elif score.accuracy <= score.floor:
        flags.append("at or below floor")
    elif score.low <= score.floor:
        flags.append("interval reaches floor")
    if score.floor is not None and score.accuracy > score.floor:
        low = [str(run.seed) for run in score.runs if run.accuracy <= score.floor]
        flags += [f"at or below floor with seed {', '.join(low)}"] if low else []
    fallen: dict[str, list[str]] = {}
    for run in runs:
        given = Counter(UNPARSED if answer.given is None else answer.given for answer in run.answers)
        if answer := statistics.collapsed(given, score.floor):
            fallen.setdefault(answer, []).append(str(run.seed))
    for answer, seeds in fallen.items():
        where = "" if len(seeds) == len(runs) else f" with seed {', '.join(seeds)}"
        flags.append(f"answers collapsed to {shorten(answer)!r}{where}")
    return flags


def _difference(
    pair: Pair, runs: Mapping[str, list[SeedResult]], missing: Mapping[str, str], scores: Mapping[str, Score]
) -> tuple[Difference, statistics.Estimate | None]:
    """Return the difference of a pair on one problem, or why it can't be compared."""
    if gaps := [f"{name}: {missing[name]}" for name in (pair.first, pair.second) if name in missing]:
        return Difference(refused="; ".join(gaps)), None
    seed_pairs = list(zip(runs[pair.first], runs[pair.second], strict=True))
    for first, second in seed_pairs:
        if first.questions != second.questions:
            unshared = len(set(first.questions) ^ set(second.questions))
            what = f"{unshared} questions are in one only" if unshared else "their order differs"
            return Difference(refused=f"seed {first.seed}: not the same questions ({what})"), None
        if wrong := mismatches(first.amounts, second.amounts, pair.matched, pair.tolerance):
            limit = f"declared as matched to within {pair.tolerance:.0%}"
            return Difference(refused=f"seed {first.seed}: {'; '.join(wrong)}; {limit}"), None
    rights = [np.array([run.right for run in side]) for side in zip(*seed_pairs, strict=True)]
    differences_of_runs = rights[0] - rights[1]
    estimate = statistics.crossed_estimate(differences_of_runs)
    these, p_these = statistics.bootstrap_interval(differences_of_runs), statistics.permutation_test(differences_of_runs)
    # With one run the interval and the test are over questions alone.
    (low, high), p = (estimate.interval(), estimate.p_value()) if len(seed_pairs) > 1 else (these, p_these)
    found = Difference(
        mean=estimate.mean, low=max(-1.0, low), high=min(1.0, high), p=p, detectable=estimate.detectable(),
        low_these_runs=these[0], high_these_runs=these[1], p_these_runs=p_these,
        runs=[_of_one_seed(first, second) for first, second in seed_pairs],
        unmatched=_unmatched(pair, *([run.amounts for run in runs[name]] for name in (pair.first, pair.second))),
        uninformative=_uninformative([scores[pair.first], scores[pair.second]], rights, p),
    )  # fmt: skip
    return found, estimate


def _uninformative(scores: Sequence[Score], rights: Sequence[statistics.Table], p: float) -> str | None:
    """Return why a difference of two scores is uninformative; None where it is informative."""
    if min(score.accuracy for score in scores) >= CEILING and p >= statistics.SIGNIFICANT:
        return f"both at the ceiling ({CEILING:.0%} or more)"
    # Intervals over questions alone: of two runs that are both clear of the floor, those over runs may reach it.
    intervals = [statistics.crossed_estimate(right.mean(0, keepdims=True)).interval() for right in rights]
    floors = [score.floor or 0.0 for score in scores]
    if all(low <= floor <= high for floor, (low, high) in zip(floors, intervals, strict=True)):
        return "both at the floor (it lies in the intervals of these runs)"
    if all(low <= floor for floor, (low, _) in zip(floors, intervals, strict=True)):
        return "neither is clear of the floor"
    return None


def _of_one_seed(first: SeedResult, second: SeedResult) -> dict[str, int | float]:
    """Return the difference of one seed, with McNemar's test."""
    # The first answer to each distinct question: McNemar's test counts questions.
    rewards = [{answer.example: answer.reward for answer in reversed(run.answers)} for run in (first, second)]
    only_first, only_second, p = statistics.mcnemar(*([value == 1 for value in side.values()] for side in rewards))
    mean = float(np.mean(first.right) - np.mean(second.right))
    return {"seed": first.seed, "mean": mean, "only_first": only_first, "only_second": only_second, "p_mcnemar": p}


def _unmatched(pair: Pair, first: Sequence[Amounts], second: Sequence[Amounts]) -> list[str]:
    """Return descriptions of the quantities that differ on average and are not declared as matched."""
    texts = []
    for key in QUANTITIES:
        means = [float(np.mean([amounts[key] for amounts in side])) for side in (first, second)]
        if key not in pair.matched and difference(*means) > pair.tolerance:
            texts.append(compare_amounts(key, *means))
    return texts


def _adjusted(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences of one table with Holm's p-values."""
    adjusted = iter(statistics.holm([found.p for found in differences if found.p is not None]))
    return [replace(found, p_holm=next(adjusted)) if found.p is not None else found for found in differences]


def _overall(pair: Pair, estimates: Sequence[statistics.Estimate | None], tables: Sequence[Table], index: int) -> Difference:
    """Return the mean difference of a pair over all problems; refused if any of them is."""
    # A further set of the same task is answered by the same runs: it does not count as another task.
    first = {table.problem[:2]: index for index, table in reversed(list(enumerate(tables)))}
    tables = [tables[index] for index in sorted(first.values())]
    known = [estimate for index in sorted(first.values()) if (estimate := estimates[index]) is not None]
    refused = [(format_problem(t.problem), reason) for t in tables if (reason := t.differences[index].refused)]
    if refused:
        where, reason = refused[0]
        return Difference(refused=f"refused on {len(refused)} of {len(tables)} tasks: {where}: {reason}")
    mean = statistics.mean_of(known)
    empty = [(format_problem(t.problem), reason) for t in tables if (reason := t.differences[index].uninformative)]
    low, high = mean.interval()
    return Difference(
        mean=mean.mean, low=max(-1.0, low), high=min(1.0, high), p=mean.p_value(), detectable=mean.detectable(),
        unmatched=_unmatched(pair, *([t.scores[name].amounts for t in tables] for name in (pair.first, pair.second))),
        uninformative=f"on {len(empty)} of {len(tables)} tasks: {', '.join(f'{where} ({why})' for where, why in empty)}"
        if empty else None,
    )  # fmt: skip
