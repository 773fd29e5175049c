"""Rollouts and updates on a GPU, ours beside PEFT: a random model of Qwen3-0.6B's shape in bf16.

    python -m benchmarks.gpu --out benchmarks/results/gpu      (under 8 minutes)
    python -m benchmarks.gpu --tiny --device cpu               (does everything run?)

Needs torch, transformers and peft, downloads nothing, and starts no other process: all of them take turns in this one. Prints
what the chip itself does: its rate in large matrix products and its memory's.
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
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import RANK, make_model
from benchmarks.peers import limit, ours, peft_loop, peft_mixed
from benchmarks.peers.protocol import Work
from benchmarks.report import table
from benchmarks.workloads import Case, write_spec

SETUPS: dict[str, Callable[[dict[str, Any]], Work]] = {
    "ours": ours.setup, "peft_loop": peft_loop.setup, "peft_mixed": peft_mixed.setup, "limit": limit.setup,
}  # fmt: skip


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
    """Return the rounds of each way, in turn; no round begins after the deadline. Memory is that of the GPU."""
    results: dict[str, Any] = {name: {"rounds": []} for name in SETUPS if name in ("ours", "limit") or case.scope == "all"}
    works: dict[str, Work] = {}
    for name in results:
        try:
            works[name] = SETUPS[name](spec)
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
            tokens = 0

            def once(work: Work = work) -> None:
                nonlocal tokens
                tokens = work.run()

            seconds = _seconds(once, device)
            peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
            results[name]["rounds"].append({"seconds": seconds, "tokens": tokens, "peak_mib": peak})
    works.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"name": case.name, "case": asdict(case), "results": results}


def cases(model: str, tiny: bool) -> list[Case]:
    size: dict[str, Any] = {"model": model, "questions": 2 if tiny else 8, "group": 2 if tiny else 8}
    size |= {"prefix": 16 if tiny else 256, "new": 4 if tiny else 64}
    shapes: list[dict[str, Any]] = [
        {"widths": (1, 1, 1)}, {"widths": (1, 1, 1), "scope": "suffix"}, {"widths": (2, 2, 2, 1)},
    ]  # fmt: skip
    made = []
    for shape in shapes:
        made += [Case(workload="W1", kind="rollout", **shape, **size), Case(workload="W2", kind="update", **shape, **size)]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny cases, for a look on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=7.0, help="no round but the first of a case begins after this time")
    parser.add_argument("--out", type=Path, help="written with .json and .md added")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    device, model = torch.device(options.device), "tiny" if options.tiny else "qwen3-0.6b"
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    limits = chip(device, getattr(torch, dtype), 512 if options.tiny else 8192)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    lines = [
        "# Speed on a GPU", "", f"Command: `{' '.join(['python -m benchmarks.gpu', *sys.argv[1:]])}`", "",
        f"{name}, torch {torch.__version__}, {dtype}; a large product reaches {limits['tflops']:,.1f} TFLOP/s, a copy "
        f"{limits['gb_per_second']:,.0f} GB/s. Model: {model}, random weights, adapters of rank {RANK}.", "",
    ]  # fmt: skip
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_model(model, Path(scratch), getattr(torch, dtype))
        for case in cases(model, options.tiny):
            spec = write_spec(
                case, Path(scratch) / "data", *folders, rank=RANK, threads=torch.get_num_threads(), dtype=dtype, lr=1e-6,
                device=options.device, max_rows=256, rows_per_micro_batch=64,
            )  # fmt: skip
            records.append(measure(case, spec, options.rounds, deadline, device))
            print(f"{deadline - time.monotonic():.0f} s left after {case.name}", flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.with_suffix(".json").write_text(json.dumps({"limits": limits, "records": records}, indent=1))
                options.out.with_suffix(".md").write_text("\n".join([*lines, *table(records), ""]))
    print("\n".join([*lines, *table(records)]))


if __name__ == "__main__":
    main()
