"""Speed and memory beside peers on the same work, measured in turn in one run.

    python -m benchmarks.run --quick
    python -m benchmarks.run --only W1 W2 --rounds 7 --peers peft_loop limit

Workloads W1 to W5 are described in docs/benchmarks.md. Every case is loaded by us and by each peer, each in a process of its
own; then each does a round, in turn, several times. Results are written as JSON and as a Markdown table.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.environments import PEERS, PeerMissing
from benchmarks.models import RANK, SMOLLM2, make_model
from benchmarks.report import report
from benchmarks.workers import PeerFailed, Worker
from benchmarks.workloads import Case, cases, smoke, write_spec

WORKLOADS = ("W1", "W2", "W3", "W4", "W5")
MODELS = ("bundled", "60m", SMOLLM2)
DTYPES = ("float32", "bfloat16")
ROUND_PATIENCE, SETUP_PATIENCE = 600.0, 900.0


class Crew:
    """Workers by name, started when they are first needed. A peer that cannot be started is not tried again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.workers: dict[str, Worker] = {}
        self.missing: dict[str, str] = {}

    def worker(self, name: str) -> Worker:
        if name in self.missing:
            raise PeerFailed(self.missing[name])
        if name not in self.workers:
            options = self.options
            try:
                self.workers[name] = Worker(name, options.folder, threads=options.threads, install=not options.no_install)
            except PeerMissing as error:
                self.missing[name] = str(error)
                raise PeerFailed(str(error)) from error
        return self.workers[name]

    def dismiss(self, names: Sequence[str] = ()) -> None:
        """End these workers, or all."""
        for name in names or list(self.workers):
            if worker := self.workers.pop(name, None):
                worker.stop()


def measure(case: Case, crew: Crew, options: argparse.Namespace) -> dict[str, Any]:
    """Return a case's rounds by peer, ours first."""
    model, adapters, vocabulary = make_model(case.model, options.folder / "models")
    spec = write_spec(
        case, options.folder / "data", model, adapters, vocabulary, rank=RANK, threads=options.threads, dtype=options.dtype,
        max_rows=256, rows_per_micro_batch=64, lr=1e-6,
    )  # fmt: skip
    peers = ["ours", *(peer for peer in case.peers if not options.peers or peer in options.peers)]
    results: dict[str, Any] = {peer: {"rounds": []} for peer in peers}
    if case.workload == "W5":
        # What a process has once held stays with it: memory is measured in fresh ones.
        crew.dismiss(peers)
    for peer in peers:
        # The limit is that of our format.
        wanted = results["ours"].get("dtype", options.dtype) if peer == "limit" else options.dtype
        if wanted == "best":
            set_up_fastest(peer, results[peer], crew, spec)
        else:
            set_up(peer, results[peer], crew, spec, wanted)
    for number in range(options.rounds if case.workload != "W5" else 1):
        # Each begins as often as the others do: who comes after whom is then no advantage.
        shift = number % len(peers)
        for peer in peers[shift:] + peers[:shift]:
            if "error" not in results[peer]:
                attempt(peer, results[peer], crew, {"do": "round"}, ROUND_PATIENCE)
    return {"name": case.name, "case": asdict(case), "results": results}


def set_up(peer: str, result: dict[str, Any], crew: Crew, spec: dict[str, Any], dtype: str) -> None:
    """Have a worker load the case in a number format."""
    result["dtype"] = dtype
    attempt(peer, result, crew, {"do": "setup", "spec": spec | {"dtype": dtype}}, SETUP_PATIENCE)


def set_up_fastest(peer: str, result: dict[str, Any], crew: Crew, spec: dict[str, Any]) -> None:
    """Have a worker load the case in each number format and do a round, and then again in the one that was faster."""
    seconds: dict[str, float] = {}
    for dtype in DTYPES:
        trial: dict[str, Any] = {"rounds": []}
        set_up(peer, trial, crew, spec, dtype)
        if "error" not in trial:
            attempt(peer, trial, crew, {"do": "round"}, ROUND_PATIENCE)
        if "error" in trial:
            result |= trial
            return
        seconds[dtype] = trial["rounds"][0]["seconds"]
    set_up(peer, result, crew, spec, min(seconds, key=seconds.__getitem__))


def attempt(peer: str, result: dict[str, Any], crew: Crew, message: dict[str, Any], patience: float) -> None:
    """Ask a worker; what it answers, or why it does not, goes into its result."""
    try:
        reply = crew.worker(peer).ask(message, patience)
    except PeerFailed as error:
        result["error"] = str(error)
        crew.dismiss([peer])
        return
    if message["do"] == "round":
        result["rounds"].append(reply)
    else:
        result |= reply


def machine() -> str:
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cases, three rounds: 9 to 10 minutes on two cores")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run? The figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default all, with --quick the first two")
    parser.add_argument("--peers", nargs="+", choices=[name for name in PEERS if name != "ours"], help="leave out the others")
    parser.add_argument("--rounds", type=int, help="default 7, with --quick 3")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=[*DTYPES, "best"], default="float32", help="best: for each the faster one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed"), help="written with .json and .md added")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"), help="environments, models, data, logs")
    parser.add_argument("--no-install", action="store_true", help="leave out peers whose environment is not there yet")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.models = options.models or (MODELS[:2] if options.quick else MODELS)
    options.folder = options.folder.resolve()
    return options


def main() -> None:
    options = parse()
    # Workers are in sessions of their own and may be stopped: they end when this process does what is under `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    chosen = [case for case in cases(options.quick, options.only) if case.model in options.models]
    chosen = smoke(chosen) if options.smoke else chosen
    about: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]), "machine": machine(), "threads": options.threads,
        "rounds": options.rounds, "load": os.getloadavg()[0], "commit": commit(), "dtype": options.dtype,
    }  # fmt: skip
    if any(case.model == SMOLLM2 for case in chosen):
        try:
            make_model(SMOLLM2, options.folder / "models")
        except ValueError as error:
            print(f"{SMOLLM2} is left out: {error}", flush=True)
            chosen = [case for case in chosen if case.model != SMOLLM2]
    crew, records, spent = Crew(options), [], 0.0
    for peer in {peer for case in chosen for peer in case.peers if not options.peers or peer in options.peers}:
        try:
            crew.worker(peer)
        except PeerFailed as error:
            print(f"{PEERS[peer].title}: {error}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for case in chosen:
            started = time.perf_counter()
            records.append(measure(case, crew, options))
            spent += time.perf_counter() - started
            about |= {"minutes": spent / 60, "load_after": os.getloadavg()[0]}
            print(f"{spent:6.0f} s  {case.name}", flush=True)
            # Written after every case: what is measured survives whatever comes next.
            options.out.with_suffix(".json").write_text(json.dumps({"about": about, "records": records}, indent=1))
            options.out.with_suffix(".md").write_text(report(records, about))
    finally:
        crew.dismiss()
    print(report(records, about))


if __name__ == "__main__":
    main()
