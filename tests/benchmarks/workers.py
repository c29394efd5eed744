"""Wall time of a study whose trials sleep, with one worker and with two: the cost of sharing it.

    python -m tests.benchmarks.workers [--trials 20] [--seconds 5] [--repeats 2]

From the start of the first worker to the end of the last; nothing is pruned. The server runs on the same machine, and
the libraries are imported before the clock starts. Prints a Markdown table.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.conftest import PREPROCESS_FLAGS, copy_index, succeed, write_toy_images
from tests.postgres import Postgres
from tests.toy_workers import EPOCHS, start, trials_of, workers_preset


def measure(scratch: Path, count: int, trials: int, seconds: float) -> float:
    """Seconds that `count` workers take."""
    results = copy_index(scratch / "results", Path(tempfile.mkdtemp(dir=scratch)) / "results")
    with Postgres() as server:
        preset = workers_preset(scratch / "data", results, server.url, trials, heartbeat=60)
        preset = replace(preset, tuning=replace(preset.tuning, min_resource=EPOCHS))
        before = time.perf_counter()
        workers = [start(preset, seconds / EPOCHS, f"log{n}") for n in range(count)]
        for worker in workers:
            worker.join()
        taken = time.perf_counter() - before
    assert len(trials_of(results)) == trials and not any(worker.exitcode for worker in workers)
    return taken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_toy_images(scratch / "data")
        roots = ("--data-root", scratch / "data", "--results-root", scratch / "results")
        succeed("data.data_preprocess", *PREPROCESS_FLAGS, *roots)
        measure(scratch, 1, 1, arguments.seconds)  # starts the process that imports the libraries
        for _ in range(arguments.repeats):
            for count, taken in times.items():
                taken.append(measure(scratch, count, arguments.trials, arguments.seconds))
    one, two = (statistics.median(seconds) for seconds in times.values())
    print(f"\n{arguments.trials} trials of {arguments.seconds:g} s, medians over {arguments.repeats} repeats\n")
    print("| workers | s | s beyond the trials' own | time / one worker |\n|---:|---:|---:|---:|")
    for count, taken in ((1, one), (2, two)):
        least = -(-arguments.trials // count) * arguments.seconds
        print(f"| {count} | {taken:.1f} | {taken - least:.1f} | {taken / one:.2f} |")
