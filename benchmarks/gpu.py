"""Rollouts and updates on a GPU, ours beside PEFT and ours with a part left out: a random model of Qwen3-0.6B's shape in bf16.

    python -m benchmarks.gpu --out benchmarks/results/gpu      (under 8 minutes)
    python -m benchmarks.gpu --smoke                           (does every line run? On a CPU, at a tiny size)

Needs PEFT beside what the package requires (of that neither datasets nor math-verify nor sandlock) and downloads nothing; all
take turns in one process. Prints what the chip itself does, its rate in large matrix products and its memory's, how long the
weights take to load, and how far the log-probabilities of sampler and learner are apart. What fails is named with its reason,
its traceback goes to standard error, and the others go on. Results are written case by case.
"""

import argparse
import gc
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import RANK, make_model
from benchmarks.peers import limit, ours, peft_loop, peft_merged, peft_mixed
from benchmarks.peers.common import of_first_layer
from benchmarks.peers.protocol import Work
from benchmarks.report import table
from benchmarks.workloads import ROLLOUT_PEERS, UPDATE_PEERS, Case, Kind, write_spec
from neuromas.model.adapters import AdapterBank
from neuromas.model.backbone import Backbone
from neuromas.model.ops import TorchOps
from neuromas.model.policy import Policy
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.system.terminal import in_short
from neuromas.training.reinforce import Batch
from neuromas.types import Completion, Prompt, Request, Sample

SETUPS: dict[str, Callable[[dict[str, Any]], Work]] = {
    "ours": lambda spec: changed(spec, None), "peft_loop": peft_loop.setup, "peft_merged": peft_merged.setup,
    "peft_mixed": peft_mixed.setup, "limit": limit.setup,
}  # fmt: skip

Change = Callable[[Policy, TorchEngine | None], None]
CHANGES: dict[str, dict[str, Change]] = {
    "rollout": {"ours, without graphs": lambda policy, engine: setattr(engine, "graphs", False)},
    "update": {
        "ours, layers computed again": lambda policy, engine: policy.recompute_layers(),
        "ours, adapters node by node": lambda policy, engine: setattr(bank_of(policy).state, "groups", False),
    },
}
"""By kind of work, what else is measured: ours with one part changed."""
KINDS: tuple[tuple[str, Kind], ...] = (("W2", "update"), ("W1", "rollout"))


def bank_of(policy: Policy) -> AdapterBank:
    assert policy.adapters is not None
    return policy.adapters


def changed(spec: dict[str, Any], change: Change | None) -> Work:
    """Return our work with a change; on a CPU it decodes over fixed buffers and has grouped products as a GPU does."""
    work = ours.setup(spec)
    assert isinstance(work, ours.EngineWork | ours.UpdateWork)
    network = work.network if isinstance(work, ours.EngineWork) else work.trainer.network
    engine = network.engine
    assert isinstance(engine, TorchEngine)
    if spec["device"] == "cpu":
        network.policy.ops, bank_of(network.policy).state.groups = TorchOps(), True
    if change is not None:
        change(network.policy, engine)
    return work


def gap(spec: dict[str, Any]) -> dict[str, float]:
    """Return how far log-probabilities of sampled tokens are from those that the learner computes, in nats."""
    work = changed(spec, None)
    assert isinstance(work, ours.EngineWork)
    rows, found = sorted(of_first_layer(work.rows), key=lambda row: row.node), dict[int, Sample]()

    def receive(key: int, sample: Sample) -> list[tuple[int, Request]]:
        found[key] = sample
        return []

    network = work.network
    requests = [(row.place, Request(row.node, Prompt(row.prefix, row.prompt), (row.place,))) for row in rows]
    network.engine.generate(requests, receive, temperature=1.0, max_new_tokens=spec["new"])
    texts = [Completion(row.node, Prompt(row.prefix, row.prompt), found[row.place], ()) for row in rows]
    batch = Batch(tuple((text, 1.0) for text in texts), len(texts), network.policy.routing, 1.0)
    apart = []
    for part in batch.split(network.backbone.tokens_per_micro_batch, network.backbone.device):
        with torch.no_grad():
            apart.append((network.policy.logprobs(part.rows) - part.sampled_logprobs_K).abs())
    apart_K = torch.cat(apart)
    return {"tokens": float(len(apart_K)), "rms": apart_K.square().mean().sqrt().item(), "max": apart_K.max().item()}


def loading(folder: Path, dtype: str, device: torch.device) -> dict[str, float]:
    """Return the seconds that loading the backbone takes, and the memory of the GPU that it needs meanwhile and then.

    The first time in a process compiles what attention is computed by.
    """
    kept: list[Backbone] = []

    def load() -> None:
        kept.append(Backbone.load(str(folder), dtype=dtype, device=device.type))

    first = _seconds(load, device)
    kept.clear()
    _free(device)
    seconds, peak = _with_peak(load, device)
    weights = sum(w.nbytes for w in kept[0].model.parameters()) / 2**20
    return {"first_seconds": first, "seconds": seconds, "weights_mib": weights, "peak_mib": peak}


def chip(device: torch.device, dtype: torch.dtype, size: int) -> dict[str, float]:
    """Return TFLOP/s of a large square product and GB/s of a copy, the best of a few."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = min(_seconds(lambda: a @ b, device) for _ in range(10))
    copied = min(_seconds(lambda: a.clone(), device) for _ in range(10))
    return {"tflops": 2 * size**3 / product / 1e12, "gb_per_second": 2 * a.nbytes / copied / 1e9}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _settle(device)
    started = time.perf_counter()
    work()
    _settle(device)
    return time.perf_counter() - started


def _with_peak(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the seconds that a work takes, and the MiB of the GPU that it needs beyond what is held before."""
    if device.type != "cuda":
        return _seconds(work, device), 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return _seconds(work, device), (torch.cuda.max_memory_allocated() - before) / 2**20


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def reported(result: dict[str, Any]) -> Iterator[None]:
    """Put the error of what is done inside into its result: what fails is a line, and the others go on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {in_short(error)}"


def _free(device: torch.device) -> None:
    """Give back memory that nothing holds any more, and leave what an error was raised in.

    A recording that breaks off leaves torch on its stream, with random numbers for that recording alone.
    """
    gc.collect()
    if device.type == "cuda":
        # After some errors a GPU refuses everything, this too.
        with suppress(RuntimeError):
            torch.cuda.set_stream(torch.cuda.default_stream())
            fresh = torch.Generator("cuda").graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            torch.cuda.empty_cache()


def measure(
    case: Case, spec: dict[str, Any], rounds: int, until: float, deadline: float, device: torch.device
) -> dict[str, Any]:  # fmt: skip
    """Return the rounds of each way, in turn: no second round begins after `until`, and no way is set up after the deadline."""
    peft = ROLLOUT_PEERS if case.kind == "rollout" else UPDATE_PEERS
    setups = {n: setup for n, setup in SETUPS.items() if n in ("ours", "limit") or (case.scope == "all" and n in peft)}
    setups |= {name: partial(changed, change=change) for name, change in CHANGES[case.kind].items()}
    results: dict[str, Any] = {name: {"rounds": [], "dtype": spec["dtype"]} for name in setups}
    works: dict[str, Work] = {}
    for name, setup in setups.items():
        if time.monotonic() > deadline:
            results[name]["error"] = "the time was up before it was set up"
            continue
        print(f"{deadline - time.monotonic():.0f} s left: {case.name}: {name}", flush=True)
        with reported(results[name]):
            works[name] = _set_up(setup, spec, results[name])
        if "error" in results[name]:
            _free(device)
    for number in range(rounds):
        for name in list(works):
            if number and time.monotonic() > until:
                break
            with reported(results[name]):
                results[name]["rounds"].append(_round(works[name], device))
            if "error" in results[name]:
                del works[name]
                _free(device)
    works.clear()
    _free(device)
    return {"name": case.name, "case": asdict(case), "results": results}


def _set_up(setup: Callable[[dict[str, Any]], Work], spec: dict[str, Any], result: dict[str, Any]) -> Work:
    """Return a way's work after one round that is not counted."""
    work = setup(spec)
    result["check"] = work.check()
    work.run()
    return work


def _round(work: Work, device: torch.device) -> dict[str, float]:
    """Return a round's time, tokens and memory beyond what is loaded, which is all ways' together."""
    tokens: list[int] = []
    seconds, peak = _with_peak(lambda: tokens.append(work.run()), device)
    return {"seconds": seconds, "tokens": tokens[0], "peak_mib": peak}


def cases(model: str, smoke: bool) -> list[Case]:
    size: dict[str, Any] = {"model": model, "questions": 2 if smoke else 8, "group": 2 if smoke else 8}
    size |= {"prefix": 16 if smoke else 256, "new": 4 if smoke else 64}
    shapes: list[dict[str, Any]] = [
        {"widths": (1, 1, 1)}, {"widths": (1, 1, 1), "scope": "suffix"}, {"widths": (2, 2, 2, 1)},
    ]  # fmt: skip
    # What takes most time comes last, and so does what records graphs: one that breaks off may harm what comes after it.
    return [Case(workload=workload, kind=kind, **shape, **size) for workload, kind in KINDS for shape in shapes]


def said(what: str, result: dict[str, Any]) -> str:
    """Return what is told of a measurement of ours alone."""
    if "error" in result:
        return f"**{what} did not run**: {result['error']}"
    if what == "loading":
        return (
            f"Loading takes {result['seconds']:.1f} s, the first time {result['first_seconds']:.1f} s, and at most "
            f"{result['peak_mib']:,.0f} MiB of the GPU for weights of {result['weights_mib']:,.0f} MiB."
        )
    return (
        f"Sampler and learner: log-probabilities of {result['tokens']:,.0f} tokens are {result['rms']:.2g} nats "
        f"apart (root mean square), {result['max']:.2g} at most."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny size on a CPU: does every line run? Figures mean nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=6.5, help="nothing is set up after this time, which all cases share")
    parser.add_argument("--out", type=Path, help="written with .json and .md added")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU found; --smoke runs all of it on a CPU, at a tiny size")
    # On a CPU the time is no matter: all of it is to run.
    deadline = math.inf if options.smoke else time.monotonic() + 60 * options.minutes
    device, model = torch.device("cpu" if options.smoke else "cuda"), "tiny" if options.smoke else "qwen3-0.6b"
    dtype = "float32" if options.smoke else "bfloat16"
    limits: dict[str, Any] = chip(device, getattr(torch, dtype), 512 if options.smoke else 8192)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    lines = [
        "# Speed on a GPU", "", f"Command: `{' '.join(['python -m benchmarks.gpu', *sys.argv[1:]])}`", "",
        f"{name}, torch {torch.__version__}, {dtype}; a large product reaches {limits['tflops']:,.1f} TFLOP/s, a copy "
        f"{limits['gb_per_second']:,.0f} GB/s. Model: {model}, random weights, adapters of rank {RANK}.", "",
    ]  # fmt: skip
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_model(model, Path(scratch), getattr(torch, dtype))

        def spec_of(case: Case) -> dict[str, Any]:
            return write_spec(
                case, Path(scratch) / "data", *folders, rank=RANK, threads=torch.get_num_threads(), dtype=dtype, lr=1e-6,
                device=device.type, max_rows=256, rows_per_micro_batch=32,
            )  # fmt: skip

        def tell(what: str, find: Callable[[], dict[str, float]]) -> None:
            result: dict[str, Any] = {}
            with reported(result):
                result |= find()
            _free(device)
            limits.update({f"{what}_{key}": value for key, value in result.items()})
            lines.extend([said(what, result), ""])

        tell("loading", lambda: loading(folders[0], dtype, device))
        planned = cases(model, options.smoke)
        for number, case in enumerate(planned):
            # The first that records graphs.
            if case.kind == "rollout" and "gap_rms" not in limits and "gap_error" not in limits:
                tell("gap", partial(gap, spec_of(case)))
            now = time.monotonic()
            until = now + (deadline - now) / (len(planned) - number)
            records.append(measure(case, spec_of(case), options.rounds, until, deadline, device))
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.with_suffix(".json").write_text(json.dumps({"limits": limits, "records": records}, indent=1))
                options.out.with_suffix(".md").write_text("\n".join([*lines, *table(records), ""]))
    print("\n".join([*lines, *table(records)]))
    failed = {key.removesuffix("_error") for key in limits if key.endswith("_error")}
    failed |= {name for record in records for name, result in record["results"].items() if "error" in result}
    if failed:
        sys.exit(f"did not run: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
