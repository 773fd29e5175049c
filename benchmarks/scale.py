"""Training on up to 4,096 workers, by discrete-event simulation (SimPy), from rates that were measured on one.

    python -m benchmarks.scale --out benchmarks/results/scale      (a few minutes; no cluster)

Two designs. `shared`: what `neuromas train --workers N` does, where every worker samples, learns and hears all texts. `fleet`:
engines that only sample, apart from learners that only learn; a learner's new adapters are broadcast, and no engine begins a
question more than `bound` updates ahead. docs/scale.md says what follows from it.
"""

import argparse
import json
import math
import pickle
import random
import statistics
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import simpy

from neuromas.types import Request

SPEED = Path(__file__).parent / "results" / "speed_full.json"
CASE = "bundled [1,1,1] 16 x 8, prefix 128, new 48"
WORKERS = (1, 4, 16, 64, 256, 1024, 4096)
STEPS = 8
"""Steps that count."""
WARM_UP = 6
"""Steps of a fleet before those: it begins with nothing to learn from, and takes a few steps to run as far ahead as it may."""
REMARK = (
    "The rates are those of 128 rows at once: what has fewer rows a worker is too fast here (docs/scale.md says by how much)."
)


@dataclass(frozen=True, slots=True)
class Rates:
    """What the simulation goes by; the first five are measured, the others assumed."""

    sampled_per_second: float
    """Tokens that one worker samples a second: W1 of `results/speed_full.json`, two threads."""
    learned_per_second: float
    """Sampled tokens that one worker learns from a second: W2 there."""
    text_seconds: float
    """Processor time of the prompt, the messages and the records of one text: of whoever writes it, and of whoever hears it."""
    text_bytes: float
    """Of a text as workers tell it."""
    adapter_bytes: int
    """Of all adapters of the network, in float32."""
    nodes: int = 3
    group: int = 8
    shortest: int = 16
    longest: int = 48
    """Tokens of a text: as likely any number from a third of the most to all of it, as in W2."""
    bytes_per_second: float = 125e6
    """Of each worker's link: 1 Gbit/s."""
    latency: float = 100e-6
    """Of a message."""


def measure() -> Rates:
    """Return the rates of this machine and of the results that are committed."""
    from neuromas import Backbone, Network, Topology
    from neuromas.rollout.scripted_engine import ScriptedEngine
    from neuromas.tasks import get_task

    records = {record["name"]: record["results"]["ours"]["rounds"] for record in json.loads(SPEED.read_text())["records"]}

    def rate(workload: str) -> float:
        return statistics.median(round_["tokens"] / round_["seconds"] for round_ in records[f"{workload} {CASE}"])

    network = Network(Topology.layered([1, 1, 1]), Backbone.load("bundled", device="cpu"))
    # As long as the texts that are simulated, in tokens and in characters.
    network.engine = ScriptedEngine(said)
    examples = get_task("navigate").training_batch(0, 0, 16)
    seconds, groups = [], []
    for step in range(5):
        started = time.process_time()
        groups = network.rollout(examples, 8, seed=(0, step))
        seconds.append(time.process_time() - started)
    samples = [
        replace(
            c.sample, token_ids=tuple(random.choices(range(1024), k=32)), logprobs=tuple(random.random() for _ in range(32))
        )
        for group in groups
        for rollout in group
        for c in rollout.completions
    ]
    told = {("seed", index, "0123456789abcdef", 0, 1): sample for index, sample in enumerate(samples)}
    return Rates(
        sampled_per_second=rate("W1 rollout"),
        learned_per_second=rate("W2 update"),
        text_seconds=statistics.median(seconds) / len(samples),
        text_bytes=len(pickle.dumps(told)) / len(samples),
        adapter_bytes=4 * network.adapters.trainable_parameters,
    )


def said(request: Request) -> str:
    """Return a text of a usual length that no other request gets, so that nothing is computed only once."""
    draws = random.Random(repr(request.seed))
    return "TO node 2: " + "; ".join(f"({draws.randint(-9, 9)},{draws.randint(-9, 9)}) {k} left" for k in range(4))


@dataclass(slots=True)
class Outcome:
    """What a simulation gives."""

    design: str
    workers: int
    questions: int
    """In a step."""
    seconds: float = 0.0
    tokens: int = 0
    stale: list[int] = field(default_factory=list)
    """Updates between the adapters that wrote a group and those that learn from it."""
    busy: dict[str, float] = field(default_factory=dict)
    """Seconds that a part of the whole was busy or waited for."""

    def row(self) -> dict[str, Any]:
        shares = {name: round(seconds / self.seconds, 3) for name, seconds in self.busy.items()}
        return {
            "design": self.design, "workers": self.workers, "questions": self.questions,
            "tokens_per_second": round(self.tokens / self.seconds), "seconds_per_step": round(self.seconds / STEPS, 3),
            "staleness_mean": round(statistics.mean(self.stale), 2) if self.stale else 0.0,
            "staleness_max": max(self.stale, default=0), "busy": shares, "bottleneck": self._bottleneck(shares),
        }  # fmt: skip

    def _bottleneck(self, shares: dict[str, float]) -> str:
        """Return who is busy longest, and with what most."""
        whole = {"workers": tuple(shares)} if self.design == "shared" else {
            "engines": ("sampling",), "learners": ("learning", "adding up"), "links": ("collecting",),
        }  # fmt: skip
        busy = {who: sum(shares[part] for part in parts) for who, parts in whole.items()}
        who = max(busy, key=busy.__getitem__)
        most = max(whole[who], key=shares.__getitem__)
        return f"{who} {min(1.0, busy[who]):.0%}" if len(whole[who]) == 1 else f"{who}: {most} {shares[most]:.0%}"


def group_tokens(rates: Rates, draws: random.Random) -> int:
    """Return the tokens of all texts of a question: a sum of so many draws, as good as normal."""
    texts, widest = rates.nodes * rates.group, rates.longest - rates.shortest + 1
    return round(draws.gauss(texts * (rates.shortest + rates.longest) / 2, math.sqrt(texts * (widest**2 - 1) / 12)))


def add_up_seconds(rates: Rates, workers: int) -> float:
    """Return the seconds of a ring that adds up gradients, as gloo does."""
    if workers == 1:
        return 0.0
    return 2 * (workers - 1) * (rates.adapter_bytes / workers / rates.bytes_per_second + rates.latency)


def shared(rates: Rates, workers: int, questions: int) -> Outcome:
    """Simulate `--workers`: sample a share, tell all texts to all, learn a share, add up."""
    env, draws, found = simpy.Environment(), random.Random(0), Outcome("shared", workers, questions)
    parts: dict[str, float] = dict.fromkeys(("sampling", "telling", "texts", "learning", "adding up"), 0.0)

    def worker(tokens: list[int]) -> Generator[Any, Any, None]:
        for count in tokens:
            yield env.timeout(count / rates.sampled_per_second)

    def run() -> Generator[Any, Any, None]:
        for _ in range(STEPS):
            groups = [group_tokens(rates, draws) for _ in range(questions)]
            began = env.now
            yield env.all_of([env.process(worker(groups[rank::workers])) for rank in range(min(workers, questions))])
            parts["sampling"] += env.now - began
            texts = questions * rates.group * rates.nodes
            after = {
                "telling": texts * (workers - 1) / workers * rates.text_bytes / rates.bytes_per_second
                + (workers - 1) * rates.latency,
                "texts": texts * rates.text_seconds,
                "learning": sum(groups) / workers / rates.learned_per_second,
                "adding up": add_up_seconds(rates, workers),
            }
            for part, seconds in after.items():
                parts[part] += seconds
                yield env.timeout(seconds)
            found.tokens += sum(groups)

    env.run(env.process(run()))
    found.seconds, found.busy = env.now, parts
    return found


def fleet(rates: Rates, workers: int, questions: int, bound: int) -> Outcome:
    """Simulate engines apart from learners, in the numbers that their rates ask for."""
    env, draws = simpy.Environment(), random.Random(0)
    engines = max(1, round(workers * rates.learned_per_second / (rates.sampled_per_second + rates.learned_per_second)))
    learners = max(1, workers - engines)
    found = Outcome(f"fleet, bound {bound}", workers, questions)
    parts = dict.fromkeys(("sampling", "collecting", "learning", "adding up", "broadcast"), 0.0)
    texts = questions * rates.group * rates.nodes
    # Each learner collects the texts of its own share of questions: as many links as learners.
    link, ready = simpy.Resource(env, capacity=learners), simpy.Store(env)
    begun, done, moved = 0, 0, env.event()
    # Adapters go down a binary tree of engines.
    broadcast = math.ceil(math.log2(engines + 1)) * (rates.adapter_bytes / rates.bytes_per_second + rates.latency)
    reached = [0]
    began, parts_before = 0.0, dict(parts)

    def deliver(version: int) -> Generator[Any, Any, None]:
        nonlocal moved
        parts["broadcast"] += broadcast
        yield env.timeout(broadcast)
        reached[0] = version
        moved, before = env.event(), moved
        before.succeed()

    def engine() -> Generator[Any, Any, None]:
        nonlocal begun
        while True:
            while begun >= (reached[0] + 1 + bound) * questions:
                yield moved
            begun += 1
            version, tokens = reached[0], group_tokens(rates, draws)
            seconds = tokens / rates.sampled_per_second + rates.nodes * rates.group * rates.text_seconds
            parts["sampling"] += seconds / engines
            yield env.timeout(seconds)
            with link.request() as mine:
                yield mine
                seconds = rates.nodes * rates.group * rates.text_bytes / rates.bytes_per_second + rates.latency
                parts["collecting"] += seconds / learners
                yield env.timeout(seconds)
            yield ready.put((version, tokens))

    def learner() -> Generator[Any, Any, None]:
        nonlocal done, began, parts_before
        while done < WARM_UP + STEPS:
            if done == WARM_UP:
                began, parts_before, found.stale, found.tokens = env.now, dict(parts), [], 0
            groups = []
            for _ in range(questions):
                groups.append((yield ready.get()))
            found.stale += [done - version for version, _ in groups]
            tokens = sum(count for _, count in groups)
            seconds = tokens / learners / rates.learned_per_second + texts / learners * rates.text_seconds
            parts["learning"] += seconds
            parts["adding up"] += add_up_seconds(rates, learners)
            yield env.timeout(seconds + add_up_seconds(rates, learners))
            done += 1
            found.tokens += tokens
            env.process(deliver(done))

    for _ in range(engines):
        env.process(engine())
    env.run(env.process(learner()))
    found.seconds = env.now - began
    found.busy = {part: seconds - parts_before[part] for part, seconds in parts.items()}
    return found


def simulate(rates: Rates) -> list[dict[str, Any]]:
    """Return a row for each design and number of workers: the work of a step fixed (strong), or grown with them (weak)."""
    rows = []
    for scaling, questions in (("strong", lambda count: 1024), ("weak", lambda count: 4 * count)):
        for workers in WORKERS:
            asked = questions(workers)
            # The program refuses more workers than a step has questions.
            outcomes = [shared(rates, workers, asked)] if workers <= asked else []
            outcomes += [fleet(rates, workers, asked, bound) for bound in (0, 1, 4) if workers > 1]
            rows += [{"scaling": scaling, **outcome.row()} for outcome in outcomes]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| scaling | design | workers | questions a step | tokens/s | seconds a step | staleness, mean (max) | busiest part |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = [
            row["scaling"], row["design"], f"{row['workers']:,}", f"{row['questions']:,}", f"{row['tokens_per_second']:,}",
            f"{row['seconds_per_step']:.3g}", f"{row['staleness_mean']:g} ({row['staleness_max']})",
            row["bottleneck"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens per second against workers, for work that is fixed and work that grows."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    alone = next(row["tokens_per_second"] for row in rows if row["workers"] == 1)
    for axis, scaling, title in (
        (axes[0], "strong", "1,024 questions a step"), (axes[1], "weak", "4 questions a step for each worker"),
    ):  # fmt: skip
        axis.plot(WORKERS, [alone * count for count in WORKERS], color="0.7", linestyle=":", label="one worker, times workers")
        for design in dict.fromkeys(row["design"] for row in rows):
            of_design = [row for row in rows if row["design"] == design and row["scaling"] == scaling]
            label = "--workers N (shared)" if design == "shared" else f"{design} ahead"
            axis.plot(
                [row["workers"] for row in of_design], [row["tokens_per_second"] for row in of_design], marker="o",
                markersize=3, linewidth=2 if design == "shared" else 1.2, linestyle="--" if design.endswith("4") else "-",
                label=label,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="workers of two cores", title=title)
        axis.set_xticks(WORKERS, [f"{count:,}" for count in WORKERS], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens sampled and learned a second")
    axes[1].legend(fontsize=8, loc="upper left")
    figure.suptitle("Simulated from the rates of one worker", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale"))
    args = parser.parse_args()
    rates = measure()
    rows = simulate(rates)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "simulated.json").write_text(json.dumps({"rates": asdict(rates), "rows": rows}, indent=1) + "\n")
    (args.out / "simulated.md").write_text(
        f"# Simulated scaling\n\nCommand: `python -m benchmarks.scale`. Rates: `{json.dumps(asdict(rates))}`\n\n"
        f"{REMARK}\n\n{table(rows)}\n"
    )
    draw(rows, args.out / "simulated.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
