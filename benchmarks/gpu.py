"""Rollouts and updates on a GPU, ours beside PEFT and ours with a part left out: a random model of Qwen3-0.6B's shape in bf16.

    python -m benchmarks.gpu --out benchmarks/results/gpu      (under 8 minutes)
    python -m benchmarks.gpu --smoke                           (does every line run? On a CPU, at a tiny size)

Needs torch, transformers and peft, downloads nothing, and starts no other process: all of them take turns in this one. Prints
what the chip itself does, its rate in large matrix products and its memory's, how long the weights take to load, and how far
the log-probabilities of sampler and learner are apart.
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
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
from benchmarks.workloads import ROLLOUT_PEERS, UPDATE_PEERS, Case, write_spec
from neuromas.model.adapters import AdapterBank
from neuromas.model.backbone import Backbone
from neuromas.model.ops import TorchOps
from neuromas.model.policy import Policy
from neuromas.rollout.torch_engine import TorchEngine
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
    """Return the seconds that loading the backbone takes, and the memory of the GPU that it needs meanwhile and then."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    kept: list[Backbone] = []
    seconds = _seconds(lambda: kept.append(Backbone.load(str(folder), dtype=dtype, device=device.type)), device)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
    return {"seconds": seconds, "weights_mib": sum(w.nbytes for w in kept[0].model.parameters()) / 2**20, "peak_mib": peak}


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


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(case: Case, spec: dict[str, Any], rounds: int, deadline: float, device: torch.device) -> dict[str, Any]:
    """Return the rounds of each way, in turn; no round begins after the deadline.

    Memory is that of the GPU beyond what is loaded, which is all ways' together.
    """
    peft = ROLLOUT_PEERS if case.kind == "rollout" else UPDATE_PEERS
    setups = {n: setup for n, setup in SETUPS.items() if n in ("ours", "limit") or (case.scope == "all" and n in peft)}
    setups |= {name: partial(changed, change=change) for name, change in CHANGES[case.kind].items()}
    results: dict[str, Any] = {name: {"rounds": []} for name in setups}
    works: dict[str, Work] = {}
    for name, setup in setups.items():
        try:
            works[name] = setup(spec)
            results[name]["check"] = works[name].check()
            works[name].run()
        except Exception as error:  # one way that fails is a line in the table
            results[name]["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for number in range(rounds):
        for name, work in works.items():
            if "error" in results[name] or (number and time.monotonic() > deadline):
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            tokens = 0

            def once(work: Work = work) -> None:
                nonlocal tokens
                tokens = work.run()

            seconds = _seconds(once, device)
            peak = (torch.cuda.max_memory_allocated() - resident) / 2**20 if device.type == "cuda" else 0.0
            results[name]["rounds"].append({"seconds": seconds, "tokens": tokens, "peak_mib": peak})
    works.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"name": case.name, "case": asdict(case), "results": results}


def cases(model: str, smoke: bool) -> list[Case]:
    size: dict[str, Any] = {"model": model, "questions": 2 if smoke else 8, "group": 2 if smoke else 8}
    size |= {"prefix": 16 if smoke else 256, "new": 4 if smoke else 64}
    shapes: list[dict[str, Any]] = [
        {"widths": (1, 1, 1)}, {"widths": (1, 1, 1), "scope": "suffix"}, {"widths": (2, 2, 2, 1)},
    ]  # fmt: skip
    made = []
    for shape in shapes:
        made += [Case(workload="W1", kind="rollout", **shape, **size), Case(workload="W2", kind="update", **shape, **size)]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny size on a CPU: does every line run? Figures mean nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=7.0, help="no round but the first of a case begins after this time")
    parser.add_argument("--out", type=Path, help="written with .json and .md added")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU found; --smoke runs all of it on a CPU, at a tiny size")
    deadline = time.monotonic() + 60 * options.minutes
    device, model = torch.device("cpu" if options.smoke else "cuda"), "tiny" if options.smoke else "qwen3-0.6b"
    dtype = "float32" if options.smoke else "bfloat16"
    limits = chip(device, getattr(torch, dtype), 512 if options.smoke else 8192)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    lines = [
        "# Speed on a GPU", "", f"Command: `{' '.join(['python -m benchmarks.gpu', *sys.argv[1:]])}`", "",
        f"{name}, torch {torch.__version__}, {dtype}; a large product reaches {limits['tflops']:,.1f} TFLOP/s, a copy "
        f"{limits['gb_per_second']:,.0f} GB/s. Model: {model}, random weights, adapters of rank {RANK}.", "",
    ]  # fmt: skip
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_model(model, Path(scratch), getattr(torch, dtype))
        loaded = loading(folders[0], dtype, device)
        lines += [
            f"Loading takes {loaded['seconds']:.1f} s, the first kernels of attention compiled, and at most "
            f"{loaded['peak_mib']:,.0f} MiB of the GPU for weights of {loaded['weights_mib']:,.0f} MiB.", "",
        ]  # fmt: skip
        for case in cases(model, options.smoke):
            spec = write_spec(
                case, Path(scratch) / "data", *folders, rank=RANK, threads=torch.get_num_threads(), dtype=dtype, lr=1e-6,
                device=device.type, max_rows=256, rows_per_micro_batch=64,
            )  # fmt: skip
            if not records:
                apart = gap(spec)
                lines += [
                    f"Sampler and learner: log-probabilities of {apart['tokens']:,.0f} tokens are {apart['rms']:.2g} nats "
                    f"apart (root mean square), {apart['max']:.2g} at most.", "",
                ]  # fmt: skip
                limits |= {f"gap_{name}": value for name, value in apart.items()}
                limits |= {f"loading_{name}": value for name, value in loaded.items()}
            records.append(measure(case, spec, options.rounds, deadline, device))
            print(f"{deadline - time.monotonic():.0f} s left after {case.name}", flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.with_suffix(".json").write_text(json.dumps({"limits": limits, "records": records}, indent=1))
                options.out.with_suffix(".md").write_text("\n".join([*lines, *table(records), ""]))
    print("\n".join([*lines, *table(records)]))
    if failed := [name for record in records for name, result in record["results"].items() if result.get("error")]:
        sys.exit(f"{len(failed)} did not run: {', '.join(sorted(set(failed)))}")


if __name__ == "__main__":
    main()
