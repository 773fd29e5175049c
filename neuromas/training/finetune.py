"""Multiagent finetuning: a society that learns, without labels, from what its debates agree on.

Subramaniam, Du, Tenenbaum, Torralba, Li, Mordatch 2025, arXiv 2501.05707, algorithm 1. Differences: agents are adapters on one
frozen backbone, not copies of it that are tuned whole; an agent reads its own last answer as text, not a history of all rounds;
a critic learns its own answers of a dialogue, not its generation agent's first one too; texts are sampled without top_p.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from neuromas.rollout.network import Diverged
from neuromas.rollout.society import Society
from neuromas.system.files import damaged
from neuromas.tasks import rewards_of, with_repeats
from neuromas.training import checkpoint, diversity
from neuromas.training.evaluate import EXAMPLES_AT_ONCE, Evaluation, evaluate
from neuromas.training.learner import TorchLearner
from neuromas.training.learning_rate import learning_rate
from neuromas.training.ledger import Ledger, spending
from neuromas.training.metrics import rollout_metrics
from neuromas.training.plan import Plan
from neuromas.training.progress import Progress
from neuromas.training.pseudo_labels import Sets, collect, schedule
from neuromas.training.reinforce import Credits
from neuromas.training.run_directory import RunDirectory
from neuromas.training.scores import Validation, as_metrics, score_sets
from neuromas.training.setup import build_society, check_memory
from neuromas.training.signals import Stop, stop_signals
from neuromas.training.tracking import tracked
from neuromas.training.watch import group_answers
from neuromas.types import Completion, Example, Group, Rollout

ITERATIONS = "iterations.json"
"""The file of a run that holds what is measured before the first iteration and after each."""
FEW = 8
"""Questions that are asked at once where a budget of tokens is nearly spent."""
STOPPING = "stopping at the next break; the iteration in progress begins again with --resume"
NETWORKS_OWN = ("signal/frac", "mixed_groups/frac", "dropped_text/frac", "message_fault/")
"""Metrics of messages and of rewards in a group, which a debate does not have."""


def iterate(finetuner: "Finetuner") -> dict[str, float]:
    """Do one iteration; return its metrics, which are logged."""
    started = time.perf_counter()
    questions = finetuner.draw_questions()
    debates = finetuner.debate(questions)
    debated = time.perf_counter()
    sets = finetuner.collect(debates)
    metrics = finetuner.describe(debates, sets) | finetuner.tune(sets)
    ended = time.perf_counter()
    metrics["seconds/rollout/sum"], metrics["seconds/update/sum"] = debated - started, ended - debated
    metrics["sampled_tokens_per_second/mean"] = metrics["sampled_tokens/sum"] / (ended - started)
    return finetuner.finish_iteration(debates, metrics)


def iterate_to_end(finetuner: "Finetuner", progress: Progress) -> None:
    """Measure the society, then do the iterations that are left, each with a checkpoint."""
    finetuner.measure_start()
    while not finetuner.finished:
        metrics = iterate(finetuner)
        progress.step(finetuner.step, metrics, finetuner.ledger.sampled_tokens)
        finetuner.save()
        finetuner.leave_if_asked()
    if finetuner.step < finetuner.config.num_steps:
        progress.note(f"--train-tokens are spent after {finetuner.step} of {finetuner.config.num_steps} iterations")
    finetuner.society.backbone.check_unchanged(finetuner.checksum)


def finetune(plan: Plan, run: RunDirectory) -> dict[str, dict[str, Evaluation]]:
    """Finetune a society to its last iteration and return its scores, as `loop.train` does for a network."""
    with finetuner_of(plan, run) as (finetuner, progress):
        progress.note(f"run {run.path}: {finetuner.bank.trainable_parameters:,} trainable parameters")
        scores = {"before": finetuner.evaluate_once("before")}
        iterate_to_end(finetuner, progress)
        scores["after"] = finetuner.evaluate_once("after")
    return scores


@contextmanager
def finetuner_of(plan: Plan, run: RunDirectory) -> Iterator[tuple["Finetuner", Progress]]:
    """Yield the finetuner of a run at its newest checkpoint, while the run directory is locked; raises as `loop.trainer_of`."""
    run.check_files()
    society = build_society(plan.config)
    society.check_lengths(plan.questions.all)
    check_memory(plan.config, society, len(society.topology.nodes))
    with run.locked():
        run.initialise(plan.questions.task.held_out, plan.questions.checksums())
        with Progress(plan.config.num_steps) as progress, stop_signals(progress.note, STOPPING) as stop:
            finetuner = Finetuner(plan, society, run, progress, stop)
            if finetuner.task.remark:
                progress.note(finetuner.task.remark)
            with tracked(plan.config.track, run, progress.note):
                yield finetuner, progress


class Finetuner:
    """A run in progress: a society, and what is kept between iterations. A step of the run is an iteration."""

    def __init__(self, plan: Plan, society: Society, run: RunDirectory, progress: Progress, stop: Stop) -> None:
        self.config, self.society, self.run, self.progress, self.stop = plan.config, society, run, progress, stop
        self.task, self.sets = plan.questions.task, plan.questions.evaluation_sets
        self.bank, self.policy = society.adapters, society.policy
        self.checksum = society.backbone.checksum()
        state = checkpoint.load(run, self.bank)
        if state:
            run.check_backbone(self.checksum, state.backbone_checksum)
        else:
            run.check_start(self.checksum)
        self.step = state.step if state else 0
        self.ledger = state.ledger if state else Ledger(self.bank.trainable_parameters)
        run.forget_after(self.step)
        # A list may hold a question twice, and what is measured is told by question.
        validation = list({example.id: example for example in plan.questions.validation}.values())
        self.validation = Validation(validation, self.sets, run)
        # A killed run may have measured what it has not saved.
        self.measured = [measured for measured in read_iterations(run) if measured["iteration"] <= self.step]
        self.sampled_from = -1
        """The iteration after which the adapters have written finite numbers last."""

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.config.tokens_per_micro_batch or self.policy.backbone.tokens_per_micro_batch

    @property
    def finished(self) -> bool:
        """Whether all iterations are done, or those that are have spent the whole budget of tokens."""
        return self.step >= self.config.num_steps or 0 < self.config.train_tokens <= self.ledger.sampled_tokens

    def leave_if_asked(self) -> None:
        """Raise Interrupted if the user has asked to stop."""
        if self.stop.asked:
            # An iteration that is still being measured is not saved.
            self.stop.leave_if_asked(f"after {self.run.step} of {self.config.num_steps} iterations")

    # What an iteration is made of, in order.

    def draw_questions(self) -> list[Example]:
        """Return the questions of the iteration."""
        return with_repeats(self.task.training_batch(self.config.seed, self.step, self.config.examples_per_step))

    def debate(self, questions: Sequence[Example]) -> list[Rollout]:
        """Let the agents debate each question once, or, with a budget of tokens, let the agents answer until it is spent."""
        if self.config.train_tokens:
            return self._answer_to_budget(questions)
        return self._pass(self.society, questions, EXAMPLES_AT_ONCE, self.config.seed, self.step)

    def collect(self, debates: Sequence[Rollout]) -> Sets:
        """Return what each agent learns from."""
        sets = collect(self.society, self.task, debates, seed=(self.config.seed, self.step, "keeps"))
        if not any(sets.by_node().values()):
            why = "is right" if self.config.society.labels else "agrees with a vote that can be read"
            self.progress.note(f"{self._iteration}: nothing is learned, for no first answer or correction {why}")
        return sets

    def tune(self, sets: Sets) -> dict[str, float]:
        """Tune each adapter on its agents' sets, by AdamW that starts anew, and return the metrics of that."""
        config, routing = self.config, self.policy.routing
        own: dict[int, list[Completion]] = {}
        for node, texts in sorted(sets.by_node().items()):
            own.setdefault(routing.adapter_of(node), []).extend(texts)
        each = max(1, config.society.batch // len(self.bank.nodes))
        steps = max((-(-config.society.epochs * len(texts) // each) for texts in own.values()), default=0)
        seed = (config.seed, self.step)
        plans = {a: schedule(len(texts), config.society.epochs, steps, (*seed, a)) for a, texts in own.items()}
        # The schedule of the learning rate is that of an iteration.
        rates = replace(config, num_steps=max(1, steps), train_tokens=0)
        learner, losses = TorchLearner(self.policy, config), []
        for step in range(steps):
            self.leave_if_asked()
            texts = [own[adapter][index] for adapter, plan in plans.items() for index in plan[step]]
            try:
                found = learner.imitate(texts, lr=learning_rate(rates, step))
            except Diverged as error:
                raise self._diverged(self._iteration, error) from error
            losses.append(sum(found.values()) / len(found))
        self.ledger.optimizer_steps += steps
        return {
            "finetuning_steps/sum": float(steps),
            **({"nll/first/mean": losses[0], "nll/last/mean": losses[-1]} if losses else {}),
        }

    def describe(self, debates: Sequence[Rollout], sets: Sets) -> dict[str, float]:
        """Return the metrics of an iteration's debates and sets, and count what the debates have cost."""
        groups = [(debate,) for debate in debates]
        rewards = torch.tensor(rewards_of(self.task, [(debate.example, debate.answer) for debate in debates]))[:, None]
        answers, nobodys = group_answers(self.task, groups, rewards), Credits((), len(groups))
        found = rollout_metrics(answers, groups, rewards, nobodys, self.society.topology.output_node)
        self.ledger.record(groups, updated=False)
        kept = {
            f"kept/{kind}/sum": float(sum(map(len, of_kind.values())))
            for kind, of_kind in (
                ("first_answers", sets.first_answers), ("corrections", sets.corrections), ("keeps", sets.keeps)
            )
        }  # fmt: skip
        shown = {name: value for name, value in found.items() if not name.startswith(NETWORKS_OWN)}
        return shown | kept | {"kept/right/frac": sets.right, "questions/sum": float(len(debates))}

    def finish_iteration(self, debates: Sequence[Rollout], metrics: dict[str, float]) -> dict[str, float]:
        """Measure the tuned society if that is due, and log the iteration; return all its metrics."""
        step = self.step
        self.step = step + 1
        if self.validation.examples and (self.step % self.config.eval_every == 0 or self.finished):
            metrics |= {f"validation/{name}": value for name, value in self._measure().items()}
            accuracy = metrics["validation/accuracy/mean"]
            if self.validation.is_best(accuracy):
                self.save(validation_accuracy=accuracy)
        self.run.log_metrics(step, metrics)
        self.run.log_rollouts(step, [_record(debate) for debate in debates])
        return metrics

    # What those need.

    def _pass(self, society: Society, questions: Sequence[Example], at_once: int, *seed: int | str) -> list[Rollout]:
        """Debate questions part by part, so that memory does not grow with their number."""
        debates: list[Rollout] = []
        for start in range(0, len(questions), at_once):
            self.leave_if_asked()
            if at_once == EXAMPLES_AT_ONCE:
                self.progress.note(f"{self._iteration}: {start} of {len(questions)} questions debated")
            part = questions[start : start + at_once]
            try:
                groups = society.rollout(part, 1, seed=seed, temperature=self.config.temperature)
            except Diverged as error:
                raise self._diverged(self._iteration, error) from error
            self.sampled_from = self.step
            debates += [group[0] for group in groups]
        return debates

    def _answer_to_budget(self, questions: Sequence[Example]) -> list[Rollout]:
        """Let each agent answer all questions once, and then again and again, until the iteration's tokens are spent.

        The last pass asks a few questions at a time, so that what is spent exceeds the budget by a few texts at most. What an
        iteration spends too much, the next one spends less; the first pass asks all questions, whatever that spends.
        """
        config, once = self.config, self.society.with_samples(1)
        budget = config.train_tokens * (self.step + 1) // config.num_steps - self.ledger.sampled_tokens
        written: list[list[Completion]] = [[] for _ in questions]
        spent = of_pass = number = 0
        while number == 0 or spent < budget:
            at_once = EXAMPLES_AT_ONCE if number == 0 or budget - spent > of_pass else FEW
            before = spent
            for start in range(0, len(questions), at_once):
                part = questions[start : start + at_once]
                for index, debate in enumerate(self._pass(once, part, at_once, config.seed, self.step, "pass", number), start):
                    written[index] += debate.completions
                    spent += spending([(debate,)]).sampled_tokens
                if number and spent >= budget:
                    break
            of_pass, number = spent - before, number + 1
        return [self.society.voted(question, 0, texts) for question, texts in zip(questions, written, strict=True)]

    def measure_start(self) -> None:
        """Measure the society before the first iteration, unless that has been done."""
        if self.validation.examples and not self.measured and self.step == 0:
            self._measure()

    def _measure(self) -> dict[str, float]:
        """Let the society debate the validation questions; keep what was measured, and return it as metrics."""
        self.progress.note(f"iteration {self.step}: debating {len(self.validation.examples)} validation questions")
        seen, groups = self._evaluate(self.validation.examples, f"validation after iteration {self.step}")
        debates = [group[0] for group in groups]
        found = diversity.measure(self.society, self.task, debates, tokens_per_micro_batch=self.tokens_per_micro_batch)
        rewards = rewards_of(self.task, [(debate.example, debate.answer) for debate in debates])
        right = dict(zip((debate.example.id for debate in debates), rewards, strict=True))
        measured = {"iteration": self.step, "sampled_tokens": self.ledger.sampled_tokens, **asdict(found)}
        self.measured = [*self.measured, measured | {"accuracy": seen.accuracy, "floor": seen.floor, "right": right}]
        self.run.write_json(ITERATIONS, self.measured)
        if self.step == 0:
            self.progress.note(f"before the first iteration, validation: {seen}")
        named = {
            **as_metrics(seen), "first_answers/accuracy/mean": found.first_accuracy, "consensus/mean": found.consensus,
            "different_texts/frac": found.different_texts, "distinct_bigrams/mean": found.distinct_bigrams,
            "nll_own/mean": found.nll_own, "nll_other/mean": found.nll_other,
        }  # fmt: skip
        return {name: value for name, value in named.items() if value is not None}

    def evaluate_once(self, when: str) -> dict[str, Evaluation]:
        """Score every evaluation set by debate and vote, and store it; a resumed run reads what it has already measured."""
        return score_sets(
            self.run, self.sets, when, step=self.step, of="finetuning",
            measure=lambda examples: self._evaluate(examples, f"scoring {when} finetuning"),
            records=lambda groups, name: [_record(group[0], split=name) for group in groups], note=self.progress.note,
        )  # fmt: skip

    def _evaluate(self, examples: Sequence[Example], when: str) -> tuple[Evaluation, list[Group]]:
        """Let the society debate each question once and vote."""
        config = self.config
        try:
            found = evaluate(
                self.society, self.task, examples, temperature=config.temperature, seed=config.seed,
                between=self.leave_if_asked, tell=self.progress.tell,
            )  # fmt: skip
        except Diverged as error:
            raise self._diverged(when, error) from error
        self.sampled_from = self.step
        return found

    def save(self, *, validation_accuracy: float | None = None) -> None:
        """Save adapters and ledger; the optimizer begins anew in each iteration, so there is nothing to keep of it."""
        state = checkpoint.State(
            self.step, 0.0, self.checksum, self.ledger, topology=self.society.topology, validation_accuracy=validation_accuracy
        )
        checkpoint.save(self.run, self.bank, TorchLearner(self.policy, self.config), state)

    @property
    def _iteration(self) -> str:
        return f"iteration {self.step + 1}"

    def _diverged(self, when: str, error: Diverged) -> ValueError:
        """Return what to say of a run whose numbers are no longer finite; no checkpoint that cannot answer stays."""
        is_bad = self.sampled_from != self.step > 0
        left = self.run.drop_checkpoint(self.step) if is_bad else self.run.checkpoints()
        kept = f"the last good checkpoint is {left[-1].name}" if left else "there is no good checkpoint"
        return ValueError(
            f"--run-dir {self.run.path}: {when}: {error}. Finetuning has diverged and is stopped; {kept}. Start again, in "
            "another --run-dir, with a lower --lr"
        )


def read_iterations(run: RunDirectory) -> list[dict[str, Any]]:
    """Return what a run has measured before its first iteration and after each; ValueError if the file is damaged."""
    found = run.read_json(ITERATIONS, list) or []
    if not all(map(_is_measured, found)):
        raise damaged(run.path / ITERATIONS, "an entry is no iteration")
    if len({tuple(measured["right"]) for measured in found}) > 1:
        raise damaged(run.path / ITERATIONS, "its iterations have different questions")
    return found


def _is_measured(entry: object) -> bool:
    """Say whether this is what `_measure` keeps of an iteration."""
    if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
        return False
    if not isinstance(entry.get("right"), dict) or not entry["right"]:
        return False
    numbers = [entry.get("accuracy"), entry.get("floor"), *entry["right"].values()]
    measures = [entry.get(each.name, "missing") for each in fields(diversity.Diversity)]
    return all(isinstance(number, int | float) for number in (*numbers, *(m for m in measures if m is not None)))


def _record(debate: Rollout, split: str = "train") -> dict[str, Any]:
    """Return a debate as a JSON-ready record: who wrote what, in order."""
    return {
        "split": split,
        "example": debate.example.id,
        "question": debate.example.question,
        "gold": debate.example.answer,
        "texts": [[completion.node, completion.text] for completion in debate.completions],
        "answer": debate.answer,
    }
