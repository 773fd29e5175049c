"""Variance of the gradient by credit scheme, at equal sampled tokens, and what replays cost.

    neuromas train --num-steps 24 --examples-per-step 8 --eval-size 1 --eval-every 0 --run-dir runs/credit
    python -m benchmarks.credit runs/credit --estimates 40 --out benchmarks/results/credit

The run gives the adapters at which gradients are estimated: nothing is trained here but critics. An estimate is the gradient
of one step: some questions, a group of rollouts of each, and whatever the scheme samples beyond them. Every scheme gets the
same questions and rollouts. With V the trace of an estimate's covariance, which holds the draw of the questions too, and T
its sampled tokens, V * T is the variance at equal tokens: who spends half can average two. It is given relative to `shared`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from neuromas.config import Credit, TrainConfig
from neuromas.model.backbone import Backbone
from neuromas.rollout.network import Network
from neuromas.tasks import Task
from neuromas.training import reinforce
from neuromas.training.credit import SCHEMES, Step
from neuromas.training.credit.critic import Critic
from neuromas.training.ledger import spending
from neuromas.training.load_run import load_run
from neuromas.types import Group

RESAMPLES = 500


def gradient(network: Network, credits: reinforce.Credits, config: TrainConfig) -> Tensor:
    """Return the gradient of the loss, node after node, (N, parameters of a node)."""
    policy, bank = network.policy, network.adapters
    batch = reinforce.build_batch(
        credits, routing=policy.routing, adapter_version=policy.version, temperature=config.temperature
    )
    for part in batch.split(policy.backbone.tokens_per_micro_batch, policy.backbone.device):
        reinforce.loss(policy.logprobs(part.rows), part.advantages_K, batch.num_rollouts).backward()
    found = []
    for parameter in bank.parameters().values():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append(grad.flatten(1).cpu().clone())
        parameter.grad = None
    return torch.cat(found, 1)


class Measured:
    """The estimates of one scheme."""

    def __init__(self, credit: Credit, backbone: Backbone, nodes: Sequence[int], config: TrainConfig) -> None:
        self.credit: Credit = credit
        heads = {"none": (), "one": (0,), "one a node": tuple(nodes)}[SCHEMES[credit].heads]
        self.critic = Critic(backbone, heads, config.critic_lr) if heads else None
        self.gradients: list[Tensor] = []
        self.tokens: list[int] = []
        self.replayed: list[int] = []
        self.seconds: list[float] = []
        self.replay_seconds: list[float] = []

    def step(self, network: Network, task: Task, groups: list[Group], seed: tuple[int, int], config: TrainConfig) -> Step:
        """Return the rollouts as the scheme credits them; it then holds what the scheme samples beyond them."""
        rewards_PG = torch.tensor([task.rewards([(r.example, r.answer) for r in group]) for group in groups])
        return Step(config=replace(config, credit=self.credit), network=network, task=task, seed=seed, groups=groups,
                    terminal_PG=rewards_PG, critic=self.critic)  # fmt: skip

    def add(self, network: Network, task: Task, groups: list[Group], seed: tuple[int, int], config: TrainConfig) -> None:
        step = self.step(network, task, groups, seed, config)
        started = time.perf_counter()
        credits = SCHEMES[self.credit].credit(step)
        self.seconds.append(time.perf_counter() - started)
        self.gradients.append(gradient(network, credits, config))
        self.tokens.append(spending(groups, step.replays).sampled_tokens)
        self.replayed.append(spending([], step.replays).sampled_tokens)
        self.replay_seconds.append(step.metrics.get("seconds/replay/sum", 0.0))


def trace(products: np.ndarray) -> float:
    """Return the trace of the covariance of vectors, without bias, given all their inner products."""
    count = len(products)
    return (np.trace(products) - products.sum() / count) / (count - 1)


def squared_mean(products: np.ndarray) -> float:
    """Return the squared norm of the expected vector, without bias: the mean product of different vectors."""
    count = len(products)
    return (products.sum() - np.trace(products)) / (count * (count - 1))


def ratio(own: Measured, shared: Measured, nodes: Sequence[int], rng: np.random.Generator) -> dict[str, Any]:
    """Return V * T relative to `shared`, of all nodes and of each, with 95% intervals from resampled estimates."""
    tokens = [np.array(each.tokens, float) for each in (own, shared)]
    found: dict[str, Any] = {}
    for name, columns in {"all": slice(None), **{str(node): slice(i, i + 1) for i, node in enumerate(nodes)}}.items():
        vectors = [torch.stack(each.gradients)[:, columns].flatten(1).double().numpy() for each in (own, shared)]
        products = [each @ each.T for each in vectors]
        cross = vectors[0] @ vectors[1].T
        whole = np.block([[products[0], cross], [cross.T, products[1]]])

        def of(indices: np.ndarray, products: list[np.ndarray] = products) -> float:
            values = [trace(p[np.ix_(indices, indices)]) * t[indices].mean() for p, t in zip(products, tokens, strict=True)]
            return values[0] / values[1]

        everything = np.arange(len(own.tokens))
        resampled = [
            of(rng.integers(len(everything), size=len(everything))) for _ in range(RESAMPLES if own is not shared else 1)
        ]
        found[name] = {"ratio": of(everything), "low": float(np.quantile(resampled, 0.025)),
                       "high": float(np.quantile(resampled, 0.975))}  # fmt: skip
        n = len(everything)
        apart = whole[:n, :n] + whole[n:, n:] - whole[:n, n:] - whole[n:, :n]
        found[name]["difference"] = {
            # Of the expected gradients, squared; `error` is at least its standard error if they are the same, for the
            # products of vectors with themselves, which are larger, are among those that it is from.
            "squared": squared_mean(apart), "error": float(np.sqrt(2 / (n * (n - 1)) * (apart**2).sum() / n**2)),
            "signal": squared_mean(products[1]),
            "signal_error": float(np.sqrt(2 / (n * (n - 1)) * (products[1] ** 2).sum() / n**2)),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of `neuromas train`: its adapters")
    parser.add_argument("--estimates", type=int, default=40)
    parser.add_argument("--warm", type=int, default=8, help="steps in which critics learn before anything is measured")
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--replays", type=int, default=1)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/credit"))
    options = parser.parse_args()
    for name, least in {"estimates": 4, "warm": 0, "questions": 1, "group_size": 2, "replays": 1}.items():
        if (got := getattr(options, name)) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {got}")
    try:
        loaded = load_run(options.run)
    except ValueError as error:
        parser.error(str(error))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out} must be a folder that can be written, got {error.strerror}")
    network, task = loaded.network, loaded.task
    # Rollouts are drawn here one by one, also those of a run whose rollouts form a tree.
    config = replace(loaded.run.config, group_size=options.group_size, replays=options.replays, branches=1)
    nodes = network.topology.nodes
    names = cast(list[Credit], list(dict.fromkeys(["shared", *options.schemes])))
    schemes = [Measured(name, network.backbone, nodes, config) for name in names]
    base: list[float] = []
    for index in range(options.warm + options.estimates):
        # Steps that the run has not had: other questions and other draws.
        seed = (config.seed, 1_000_000 + index)
        examples, started = task.training_batch(*seed, options.questions), time.perf_counter()
        groups = network.rollout(examples, options.group_size, seed=seed, temperature=config.temperature)
        base.append(time.perf_counter() - started)
        for scheme in schemes:
            if index >= options.warm:
                scheme.add(network, task, groups, seed, config)
            elif scheme.critic:
                SCHEMES[scheme.credit].credit(scheme.step(network, task, groups, seed, config))
        done = index + 1 - options.warm
        if done == options.estimates or (done > 3 and done % 4 == 0):
            write(options, schemes, nodes, base, loaded.step)
            print(f"{done} of {options.estimates} estimates", flush=True)


def write(options: argparse.Namespace, schemes: list[Measured], nodes: Sequence[int], base: list[float], step: int) -> None:
    """Write the numbers as JSON and as a table; what is there so far is whole after every estimate."""
    rng, shared = np.random.default_rng(0), schemes[0]
    if not any(estimate.any() for estimate in shared.gradients):
        if len(shared.gradients) < options.estimates:
            return
        raise SystemExit("error: the rewards of no question differ, so no gradient varies; take a run that has begun to learn")
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("run", "out")}
    data: dict[str, Any] = {"settings": settings, "step": step, "estimates": len(shared.tokens), "schemes": {}}
    for scheme in schemes:
        rollout = float(np.mean(np.array(shared.tokens)))
        data["schemes"][scheme.credit] = {
            **ratio(scheme, shared, nodes, rng), "tokens": float(np.mean(scheme.tokens)) / rollout,
            "replayed_tokens": float(np.mean(scheme.replayed)), "rollout_tokens": rollout,
            "replay_seconds": float(np.mean(scheme.replay_seconds)), "credit_seconds": float(np.mean(scheme.seconds)),
            "rollout_seconds": float(np.mean(base)),
        }  # fmt: skip
    (options.out / "variance.json").write_text(json.dumps(data, indent=1))
    (options.out / "variance.md").write_text(table(data, nodes))


def table(data: dict[str, Any], nodes: Sequence[int]) -> str:
    def interval(cell: dict[str, float]) -> str:
        return f"{cell['ratio']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"

    head = ["scheme", "variance at equal tokens (95%)", *(f"node {node}" for node in nodes), "tokens", "replay s / rollout s",
            "squared difference of means / squared mean"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, row in data["schemes"].items():
        apart = row["all"]["difference"]
        cells = [
            name, interval(row["all"]), *(f"{row[str(node)]['ratio']:.2f}" for node in nodes), f"{row['tokens']:.2f}",
            f"{row['replay_seconds']:.2f} / {row['rollout_seconds']:.2f}",
            f"{apart['squared'] / apart['signal']:.2f} +- {apart['error'] / abs(apart['signal']):.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"{data['estimates']} estimates; settings: {json.dumps(data['settings'])}", "", *lines, ""])


if __name__ == "__main__":
    main()
