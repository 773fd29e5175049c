"""The thread that owns the network: it takes new jobs between decoding steps, and tells each what its nodes have said."""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from neuromas.rollout.live import LiveRollout, LiveRollouts, Said, Terms
from neuromas.rollout.network import Network
from neuromas.types import Example, Rollout

Seed = tuple[int | str, ...]

REMEMBERED = 2**22
"""Characters of questions and messages after which the token ids of all are forgotten: strangers never ask the same again."""
CHARACTERS_OF_MESSAGES = 2000
"""What a rollout's messages have, roughly."""


class QueueFull(Exception):
    """As many rollouts wait as may."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a job has no answer; `ours` says that it is the server's fault."""

    reason: str
    ours: bool


@dataclass(frozen=True, slots=True)
class Begun:
    """Says that a job's rollout runs."""


Event = Begun | Said | Rollout | Refused
"""What becomes of a job, in order: it begins, its nodes speak, and it ends with its rollout. `Refused` ends it at any time."""


@dataclass(eq=False, slots=True)
class Job:
    """One rollout that somebody waits for."""

    example: Example
    index: int
    seed: Seed
    terms: Terms
    hear: Callable[[Event], None]
    """Called in the thread of the listener, see `Worker`."""


Deliver = Callable[[Sequence[tuple[Job, Event]]], None]


class Worker(threading.Thread):
    """Runs jobs, at most `most_running` at once, and hands what becomes of them to `deliver`, in this thread."""

    def __init__(self, network: Network, deliver: Deliver, *, most_running: int, most_waiting: int) -> None:
        super().__init__(name="rollouts", daemon=True)
        self.most_running, self.most_waiting = most_running, most_waiting
        self.steps = 0
        self._network, self._deliver = network, deliver
        self._rollouts = LiveRollouts(network)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._dropped: set[Job] = set()
        self._running: dict[LiveRollout, Job] = {}
        self._closing = False
        self._remembered = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Return the number of rollouts that run."""
        return len(self._running)

    @property
    def rows(self) -> int:
        return self._rollouts.rows

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of these jobs or, if there is no room for them, none and raise QueueFull."""
        with self._changed:
            if len(self._waiting) + len(jobs) > self.most_waiting:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify()

    def drop(self, jobs: Collection[Job]) -> None:
        """Forget jobs: those that run end with the next step. Those that have ended are none of the worker's any more."""
        with self._changed:
            gone = set(jobs)
            self._waiting = deque(job for job in self._waiting if job not in gone)
            self._dropped |= gone
            self._changed.notify()

    def close(self) -> None:
        """Let the thread end as soon as no job is left."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self) -> None:
        with self._rollouts.running():
            while (new := self._next()) is not None:
                try:
                    events = self._begin(new) + self._step()
                except Exception as error:
                    events = self._fail(new, error)
                if events:
                    self._deliver(events)

    def _next(self) -> list[Job] | None:
        """Wait until there is something to do; return the jobs to begin, or None if the thread is to end."""
        with self._changed:
            while not self._waiting and not self._rollouts.busy:
                self._dropped.clear()
                if self._closing:
                    return None
                self._changed.wait()
            room = self.most_running - len(self._running)
            new = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            dropped, self._dropped = self._dropped, set()
        for rollout in [rollout for rollout, job in self._running.items() if job in dropped]:
            self._rollouts.drop(rollout)
            del self._running[rollout]
        return new

    def _begin(self, jobs: Sequence[Job]) -> list[tuple[Job, Event]]:
        events: list[tuple[Job, Event]] = []
        for job in jobs:
            self._remembered += len(job.example.question) + CHARACTERS_OF_MESSAGES
            if self._remembered > REMEMBERED:
                self._network.backbone.forget_texts()
                self._remembered = 0
            try:
                rollout = self._rollouts.begin(job.example, job.index, seed=job.seed, terms=job.terms)
            except ValueError as error:
                events.append((job, Refused(str(error), ours=False)))
            else:
                self._running[rollout] = job
                events.append((job, Begun()))
        return events

    def _step(self) -> list[tuple[Job, Event]]:
        self.steps += 1
        found = self._rollouts.step()
        events: list[tuple[Job, Event]] = [(self._running[said.rollout], said) for said in found]
        # Several nodes that answer may end with the same step.
        ended = {said.rollout: result for said in found if (result := said.rollout.result) is not None}
        return events + [(self._running.pop(rollout), result) for rollout, result in ended.items()]

    def _fail(self, new: Sequence[Job], error: Exception) -> list[tuple[Job, Event]]:
        """End everything that runs, say why, and start afresh: a step that has failed leaves rows in an unknown state."""
        traceback.print_exception(error, file=sys.stderr)
        failed = dict.fromkeys([*self._running.values(), *new])
        self._running.clear()
        self._rollouts = LiveRollouts(self._network)
        return [(job, Refused(f"the network failed: {type(error).__name__}", ours=True)) for job in failed]
