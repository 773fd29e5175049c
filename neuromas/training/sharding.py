"""One run by several workers: each samples and learns its share of a step, and all of them hold the same run.

Every worker runs the loop of `loop.py` on the whole step. What costs time is shared out: the texts of a question are sampled
by one worker and told to all (`ShardedEngine`), answers are rewarded in shares (`share_rewards`), and each worker's gradient is
of its share of the rows, added up over all (`ShardedLearner`). What follows from those - advantages, metrics, the optimizer's
step - every worker computes for itself, of the same numbers, so that their adapters stay equal without being sent. The first
worker alone writes the run directory (`SharedRun`).

A draw depends on (seed, step, example, rollout, node) and not on who draws it. So N workers train what one trains, but for
rounding: rows meet in other batches, and sums have another order.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn import Parameter

from neuromas.config import TrainConfig
from neuromas.model.policy import Policy
from neuromas.rollout.engine import Engine, OnSample
from neuromas.system.files import checksum_of
from neuromas.tasks import Task
from neuromas.training.learner import Sums, TorchLearner
from neuromas.training.reinforce import Advantage, Batch
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import Setup
from neuromas.training.signals import Stop
from neuromas.types import Completion, Example, Request, Sample

T = TypeVar("T")
PATIENCE = 30.0
"""Seconds that a worker waits for the run directory: one that has died a moment ago may hold it still."""


class Announced(ValueError):
    """A user's mistake that one worker has met and all of them know."""


@dataclass(slots=True)
class Exchange:
    """What the workers of a run tell each other, over the process group of torch.distributed that is there.

    All of them call the same methods in the same order, for each waits for the others.
    """

    is_asked: Callable[[], bool] = lambda: False
    """Whether the user has asked to stop; the first worker's is heard."""
    stop: Stop = field(default_factory=Stop)
    """The same on every worker: it changes where they meet."""
    rank: int = field(default_factory=dist.get_rank)
    workers: int = field(default_factory=dist.get_world_size)

    def gather(self, value: T) -> list[T]:
        """Return the values of all workers, in their order; `Announced` if one of them has met a mistake instead."""
        return self._meet(value, None)

    def announce(self, mistake: ValueError) -> None:
        """Tell all workers, who are about to gather, of a mistake, and raise it here as there."""
        self._meet(None, str(mistake))

    def _meet(self, value: Any, mistake: str | None) -> list[Any]:
        told = self.tell((value, mistake, self.rank == 0 and self.is_asked()))
        self.stop.asked = self.stop.asked or told[0][2]
        if mistakes := [text for _, text, _ in told if text is not None]:
            raise Announced(mistakes[0])
        return [value for value, _, _ in told]

    def tell(self, value: Any) -> list[Any]:
        """Return what all workers tell."""
        told: list[Any] = [None] * self.workers
        dist.all_gather_object(told, value)
        return told

    def sum(self, numbers: torch.Tensor) -> None:
        """Make numbers the sum of all workers', bit for bit the same for all of them."""
        dist.all_reduce(numbers)

    def add_up(self, parameters: Sequence[Parameter]) -> None:
        """Give every worker the sum of all workers' gradients; a parameter without one anywhere keeps none."""
        # One message for all of them. Where a worker has none, it adds zeros, and no vote that there is one.
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        votes = torch.tensor([float(p.grad is not None) for p in parameters], device=parts[0].device)
        whole = torch.cat([*(part.flatten() for part in parts), votes])
        self.sum(whole)
        *sums, votes = whole.split([*(part.numel() for part in parts), len(parts)])
        for parameter, total, vote in zip(parameters, sums, votes.tolist(), strict=True):
            parameter.grad = total.view_as(parameter) if vote else None


class ShardedEngine:
    """Samples the texts of this worker's questions and learns those of all others, which it passes on in the same way."""

    def __init__(self, engine: Engine, exchange: Exchange) -> None:
        self.engine, self.exchange = engine, exchange

    def generate(
        self, requests: Sequence[tuple[int, Request]], on_sample: OnSample, *, temperature: float, max_new_tokens: int
    ) -> None:
        order = {example: index for index, example in enumerate(dict.fromkeys(r.example for _, r in requests))}
        rank_of = {example: index % self.exchange.workers for example, index in order.items()}
        # A request's key follows from the order of one worker's texts: it is known to all workers by what decides its text.
        names = {key: _name(request) for key, request in requests}
        samples: dict[_Name, Sample] = {}

        def on_own(key: int, sample: Sample) -> Sequence[tuple[int, Request]]:
            samples[names[key]] = sample
            ready = on_sample(key, sample)
            names.update((key, _name(request)) for key, request in ready)
            return ready

        own = [(key, request) for key, request in requests if rank_of[request.example] == self.exchange.rank]
        if own:
            self.engine.generate(own, on_own, temperature=temperature, max_new_tokens=max_new_tokens)
        told = {name: sample for of_worker in self.exchange.gather(samples) for name, sample in of_worker.items()}
        left = [(key, request) for key, request in requests if rank_of[request.example] != self.exchange.rank]
        while left:
            left = [ready for key, request in left for ready in on_sample(key, told[_name(request)])]


_Name = tuple[tuple[int | str, ...], int]


def _name(request: Request) -> _Name:
    """Return what names a request in all workers: its draws and what it reads.

    Rollouts that are continued without a message draw as they did, so that the same draws may follow several prompts. The hash
    of whole numbers is the same in every process.
    """
    return request.seed, hash(request.prompt)


class ShardedLearner(TorchLearner):
    """AdamW on the sum of all workers' gradients, each of its share of the rows."""

    def __init__(self, policy: Policy, config: TrainConfig, exchange: Exchange) -> None:
        super().__init__(policy, config)
        self.exchange = exchange

    def gradient(self, batch: Batch) -> Sums:
        own = super().gradient(replace(batch, completions=share(batch, self.exchange.rank, self.exchange.workers)))
        self.exchange.add_up(list(self.bank.parameters().values()))
        return Sums.of(self.exchange.gather(own))


def share(batch: Batch, rank: int, workers: int) -> tuple[tuple[Completion, Advantage], ...]:
    """Return a worker's rows of a batch: adjacent ones, about as many tokens for each worker."""
    lengths = [len(text.prompt.suffix_ids) + len(text.sample.token_ids) for text, _ in batch.completions]
    total, before, own = max(1, sum(lengths)), 0, []
    for row, length in zip(batch.completions, lengths, strict=True):
        if (2 * before + length) * workers // (2 * total) == rank:
            own.append(row)
        before += length
    return tuple(own)


def share_rewards(task: Task, exchange: Exchange) -> None:
    """Let each worker reward its share of answers: a program is run once, and all workers see the same outcome of it."""
    alone = task.rewards

    def rewards(pairs: Sequence[tuple[Example, str]]) -> list[float]:
        found, failure = [], None
        try:
            found = alone(pairs[exchange.rank :: exchange.workers])
        except Exception as error:  # a user's own class may raise anything: all workers have to know
            failure = error
        told = exchange.gather((found, failure))
        if failures := [failure for _, failure in told if failure is not None]:
            raise failures[0]
        shared = [0.0] * len(pairs)
        for rank, (of_worker, _) in enumerate(told):
            shared[rank :: exchange.workers] = of_worker
        return shared

    task.rewards = rewards


def shard(setup: Setup, exchange: Exchange) -> Setup:
    """Return a setup whose sampling, rewarding and learning is shared out to all workers."""
    network, plan = setup.network, setup.plan
    network.engine = ShardedEngine(network.engine, exchange)
    share_rewards(plan.questions.task, exchange)
    return replace(setup, learner=ShardedLearner(network.policy, plan.config, exchange))


class SharedRun(RunDirectory):
    """A run directory that all workers read and the first one writes: its folder is one that all their machines see."""

    def __init__(self, run: RunDirectory, exchange: Exchange) -> None:
        super().__init__(run.path, run.config, run.topology)
        self.exchange = exchange

    @property
    def _writes(self) -> bool:
        return self.exchange.rank == 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        deadline = time.monotonic() + PATIENCE
        with ExitStack() as held:
            while self._writes:
                try:
                    held.enter_context(super().locked())
                    break
                except ValueError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(1.0)
            yield

    def initialise(self, held_out: Iterable[str] = (), questions: Mapping[str, str] | None = None) -> None:
        if self._writes:
            super().initialise(held_out, questions)
        self.exchange.gather(None)
        if not (self.path / "config.json").exists():
            raise ValueError(f"--run-dir {self.path} is not seen by all workers; name a folder that their machines share")

    def forget_after(self, step: int) -> None:
        if self._writes:
            super().forget_after(step)

    def save(self, step: int, head: Mapping[str, Any], files: Mapping[str, bytes], *, best: bool = False) -> None:
        found = self.exchange.gather(checksum_of(b"".join(files[name] for name in sorted(files))))
        if len(set(found)) > 1:
            raise ValueError(
                f"--workers: after step {step} the workers' adapters differ, which must be equal bit for bit; "
                "let workers run on processors of one kind"
            )
        if self._writes:
            super().save(step, head, files, best=best)

    def agreed(self, own: bool) -> bool:
        return self.exchange.gather(own)[0]

    def drop_checkpoint(self, step: int) -> list[Path]:
        return super().drop_checkpoint(step) if self._writes else self.checkpoints()

    def write_json(self, name: str, data: object) -> None:
        if self._writes:
            super().write_json(name, data)

    def _append(self, name: str, *records: Mapping[str, Any]) -> None:
        if self._writes:
            super()._append(name, *records)
