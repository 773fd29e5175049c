"""NeuroMAS itself: the engine that a network samples with, and the trainer's own update and step."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.common import Row, of_first_layer, prepare, read_rows, score
from benchmarks.peers.protocol import Work, serve
from neuromas.config import AdapterConfig, PromptConfig, TopologyConfig, TrainConfig
from neuromas.model.backbone import Backbone
from neuromas.rollout.network import Network
from neuromas.tasks.task import Task
from neuromas.training.learner import TorchLearner
from neuromas.training.loop import train_step
from neuromas.training.plan import Plan
from neuromas.training.questions import Questions
from neuromas.training.reinforce import Batch, Credits
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import Setup
from neuromas.training.trainer import Trainer
from neuromas.types import Completion, Example, Group, Prompt, Request, Rollout, Sample


def load(spec: dict[str, Any], device: torch.device) -> Network:
    """Build the case's network with its adapters as they are on disk."""
    backbone = Backbone.load(spec["model_folder"], dtype=spec["dtype"], device=device.type)
    config = AdapterConfig(rank=spec["rank"], scope=spec["scope"])
    network = Network(
        TopologyConfig(widths=tuple(spec["widths"])).build(),
        backbone,
        adapter=config,
        max_new_tokens=spec["new"],
        prompt=PromptConfig(wording="terse"),
    )
    # Nothing stops a row but its length: every row samples as many tokens as it may.
    network.policy.frame = replace(network.policy.frame, stop_ids=frozenset({-1}))
    for node in network.adapters.nodes:
        network.adapters.load_peft(node, Path(spec["adapters_folder"]) / str(node))
    return network


class EngineWork:
    """The engine on prepared requests: a row is handed in when the rows that it waits for are written."""

    def __init__(self, spec: dict[str, Any]) -> None:
        device = prepare(spec)
        self.spec, self.rows, self.count = spec, read_rows(spec), 0
        self.network = load(spec, device)
        self.followers: dict[int, list[int]] = {}
        for row in self.rows:
            for sender in row.waits_for:
                self.followers.setdefault(sender, []).append(row.place)

    def _request(self, row: Row) -> tuple[int, Request]:
        return row.place, Request(row.node, Prompt(row.prefix, row.prompt), (self.count, row.place))

    def run(self) -> int:
        self.count += 1
        left = {row.place: len(row.waits_for) for row in self.rows}
        tokens = 0

        def receive(key: int, sample: Sample) -> list[tuple[int, Request]]:
            nonlocal tokens
            tokens += len(sample.token_ids)
            ready = []
            for follower in self.followers.get(key, ()):
                left[follower] -= 1
                if not left[follower]:
                    ready.append(self._request(self.rows[follower]))
            return ready

        first = [self._request(row) for row in self.rows if not row.waits_for]
        self.network.engine.generate(first, receive, temperature=1.0, max_new_tokens=self.spec["new"])
        return tokens

    def check(self) -> dict[str, Any]:
        rows, found = of_first_layer(self.rows), dict[int, list[int]]()

        def receive(key: int, sample: Sample) -> list[tuple[int, Request]]:
            found[key] = list(sample.token_ids)
            return []

        self.network.engine.generate([self._request(row) for row in rows], receive, temperature=0.0, max_new_tokens=8)
        return {"greedy": [found[row.place] for row in rows]}


class TextTask(Task):
    """Questions of a case, a few steps of them, and a reward that differs between rollouts."""

    name = "benchmark"
    answer_format = "Write the answer."

    def __init__(self, steps: Sequence[Sequence[str]]) -> None:
        self.steps = steps

    def parse_answer(self, text: str) -> str | None:
        return text

    def reward(self, example: Example, text: str) -> float:
        return score(text)

    def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
        questions = self.steps[step % len(self.steps)][:count]
        return [Example(f"{step}/{i}", question, "", self.answer_format) for i, question in enumerate(questions)]

    def _examples(self, split: str, count: int) -> list[Example]:
        return []


def make_trainer(spec: dict[str, Any], steps: Sequence[Sequence[str]]) -> Trainer:
    """Return the trainer of a run in a new folder, which goes when the worker ends."""
    device = prepare(spec)
    folder = Path(tempfile.mkdtemp(prefix="neuromas-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = TrainConfig(
        topology=TopologyConfig(widths=tuple(spec["widths"])), adapter=AdapterConfig(rank=spec["rank"], scope=spec["scope"]),
        backbone=spec["model_folder"], dtype=spec["dtype"], device="cuda" if device.type == "cuda" else "cpu",
        num_steps=100_000, examples_per_step=spec["questions"], group_size=spec["group"], max_new_tokens=spec["new"],
        lr=spec["lr"], eval_every=0, run_dir=folder / "run",
    )  # fmt: skip
    run = RunDirectory.create(config)
    run.initialise()
    network = load(spec, device)
    plan = Plan(config, config.topology.build(), (), Questions(TextTask(steps), [], {}, []))
    return Trainer(Setup(plan, network, TorchLearner(network.policy, config)), run)


class UpdateWork:
    """The trainer's own joint update of all nodes on prepared completions."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.rows, self.group = read_rows(spec), spec["group"]
        self.trainer = make_trainer(spec, [])
        self.by_rollout: dict[int, list[Row]] = {}
        for row in self.rows:
            self.by_rollout.setdefault(row.rollout, []).append(row)
        advantages_PG = torch.tensor([rows[0].advantage for rows in self.by_rollout.values()]).view(-1, self.group)
        self.advantages = dict.fromkeys(self.trainer.bank.nodes, advantages_PG)
        self.sampled = self._logprobs()

    def _logprobs(self) -> dict[int, tuple[float, ...]]:
        """Return the log-probabilities of every row's tokens as if this policy had sampled them, by place.

        In bfloat16 an update weighs each token by how much less likely it was to its sampler.
        """
        policy, rows = self.trainer.network.policy, sorted(self.rows, key=lambda row: row.node)
        texts = tuple((_completion(row, 0, (0.0,) * len(row.written)), 1.0) for row in rows)
        batch = Batch(texts, len(texts), policy.routing, 1.0)
        found: list[float] = []
        with torch.no_grad():
            for part in batch.split(policy.backbone.tokens_per_micro_batch, policy.backbone.device):
                found += policy.logprobs(part.rows).tolist()
        each = iter(found)
        return {row.place: tuple(islice(each, len(row.written))) for row in rows}

    def _groups(self) -> list[Group]:
        version = self.trainer.bank.version
        rollouts = [
            Rollout(
                Example(str(rows[0].question), "", "", ""),
                i % self.group,
                tuple(_completion(r, version, self.sampled[r.place]) for r in rows),
            )
            for i, rows in enumerate(self.by_rollout.values())
        ]
        return [tuple(rollouts[i : i + self.group]) for i in range(0, len(rollouts), self.group)]

    def run(self) -> int:
        groups = self._groups()
        self.trainer.update(groups, Credits.of(groups, self.advantages))
        return sum(len(row.written) for row in self.rows)

    def check(self) -> dict[str, Any]:
        groups = self._groups()
        metrics = self.trainer.update(groups, Credits.of(groups, self.advantages))
        norms = [metrics[f"grad_norm/node/{node}/max"] for node in self.trainer.bank.nodes]
        return {"loss": metrics["loss/mean"], "grad_norms": norms}


def _completion(row: Row, version: int, logprobs: tuple[float, ...]) -> Completion:
    sample = Sample(row.written, logprobs, ("",), True, version)
    return Completion(row.node, Prompt(row.prefix, row.prompt), sample, ())


class StepWork:
    """A whole step of the trainer: questions, rollouts with messages, rewards, update, metrics and records on disk."""

    def __init__(self, spec: dict[str, Any]) -> None:
        steps = json.loads(Path(spec["data"]).read_text())["steps"]
        self.trainer = make_trainer(spec, steps)

    def run(self) -> int:
        metrics = train_step(self.trainer)
        return int(metrics["sampled_tokens/sum"])

    def check(self) -> dict[str, Any]:
        return {}


def setup(spec: dict[str, Any]) -> Work:
    return {"rollout": EngineWork, "update": UpdateWork, "step": StepWork}[spec["kind"]](spec)


if __name__ == "__main__":
    serve(setup)
