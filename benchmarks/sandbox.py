"""Programs per second through the sandbox, against a bare subprocess that isolates nothing and believes the exit code.

    python benchmarks/sandbox.py --programs 200 --rounds 5 --workers 2

Every round runs the same small program and tests once through each way, in turn, so that a busy machine slows all of them;
printed are the medians over rounds, the range, and the ratio to the bare subprocess.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from neuromas.sandbox import ISOLATIONS, Program, Sandbox, choose_isolation

SOURCE = """
def longest_run(values):
    best = run = 0
    previous = None
    for value in values:
        run = run + 1 if value == previous else 1
        previous, best = value, max(best, run)
    return best
"""
TESTS = "\n".join(
    f"assert longest_run({values!r}) == {want}" for values, want in [([], 0), ([1], 1), ([1, 1, 2], 2), ("abbbb", 4)]
)


def bare(count: int, workers: int) -> int:
    command = [os.path.realpath(sys.executable), "-s", "-S", "-B", "-P", "-c", SOURCE + TESTS]
    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(lambda _: subprocess.run(command, check=False).returncode == 0, range(count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200, help="programs in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="programs at a time")
    options = parser.parse_args()
    ways = {"bare subprocess": lambda count: bare(count, options.workers)}
    for name in ISOLATIONS:
        try:
            sandbox = Sandbox(workers=options.workers, isolation=choose_isolation((name,)))
        except ValueError as error:
            print(error)
            continue
        ways[name] = lambda count, sandbox=sandbox: sum(
            outcome.passed for outcome in sandbox.check([Program(SOURCE, TESTS, "longest_run")] * count)
        )
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(options.workers)  # starts what stays
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            passed = way(options.programs)
            rates[name].append(options.programs / (time.perf_counter() - start))
            assert passed == options.programs, f"{name}: {passed} of {options.programs} passed"
    machine = f"Python {platform.python_version()}, Linux {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}; {options.workers} workers, {options.rounds} rounds of {options.programs}")
    reference = statistics.median(rates["bare subprocess"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:16} {median:6.1f} programs/s ({min(values):.1f} to {max(values):.1f}), {median / reference:.2f} of bare")


if __name__ == "__main__":
    main()
