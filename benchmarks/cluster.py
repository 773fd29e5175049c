"""Strong and weak scaling of `neuromas train --workers N` on this machine's cores, by Ray.

    python -m benchmarks.cluster --workers 1 2 --out benchmarks/results/scale/measured.md      (pip install 'neuromas[ray]')

Every worker has one thread. `strong` is 16 questions a step, `weak` 8 for each worker; the first step is not counted. Run it
on a machine that does nothing else: two workers that share a core with others measure those.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 8


def tokens_per_second(workers: int, questions: int, folder: Path) -> tuple[float, float, float]:
    """Train a few steps; return the median of sampled tokens a second, and the shares of sampling and update in a step."""
    run = folder / f"{workers}-{questions}"
    command = [
        sys.executable, "-m", "neuromas.cli", "train", "--num-steps", str(STEPS), "--examples-per-step", str(questions),
        "--eval-size", "8", "--eval-every", "0", "--save-every", "100", "--run-dir", str(run),
    ]  # fmt: skip
    # 0: without Ray.
    subprocess.run([*command, *(("--workers", str(workers)) if workers else ())], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    return tuple(
        statistics.median(step[name] for step in steps)
        for name in ("sampled_tokens_per_second/mean", "seconds/rollout/sum", "seconds/update/sum")
    )  # type: ignore[return-value]  # three names, three numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale/measured.md"))
    args = parser.parse_args()
    before, rows = os.getloadavg()[0], list[str]()
    with tempfile.TemporaryDirectory() as folder:
        for scaling, counts in (("strong", [0, *args.workers]), ("weak", args.workers)):
            for workers in counts:
                questions = 16 if scaling == "strong" else 8 * workers
                rate, rollout, update = tokens_per_second(workers, questions, Path(folder) / scaling)
                name = f"{workers}" if workers else "none, without Ray"
                rows.append(f"| {scaling} | {name} | {questions} | {rate:,.0f} | {rollout:.2f} | {update:.2f} |")
                print(rows[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        "# Measured scaling\n\n"
        f"Command: `python -m benchmarks.cluster --workers {' '.join(map(str, args.workers))}`, {os.cpu_count()} cores, load "
        f"{before:.1f} when it began, {os.getloadavg()[0]:.1f} when it ended. Medians of {STEPS - 1} steps of `[1,1,1]`.\n\n"
        "| scaling | workers | questions a step | sampled tokens/s | seconds of sampling | seconds of the update |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
