"""Images a second through the loader, by the number of its processes, with the pixel cache and without.

    python -m tests.benchmarks.loader [--data-root DIR] [--repeats 3] [--num-crops 10] [--batch-size 32] [--batches 10]
                                      [--json FILE] [--markdown FILE]

Whole epochs, batches of GLASS's views, after an epoch that starts the processes. Direct: the data set in one process,
set up as a loader's, without a loader. Images are repeated until an epoch has its batches.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from config import PAPER, GlassExperiment, Preset
from data.index import Index
from data.loaders import build_loader
from data.workers import available_cores, keep_freed_memory
from tests.benchmarks import common
from tests.benchmarks.common import Measured, Repeat, Table, Way, median, timed
from utils import find_experiment


def loading(preset: Preset, experiment: GlassExperiment, index: Index, rows: list[int], direct: bool) -> Repeat:
    """Epochs of the loader, whose batches are not used; `direct`: the same batches, from the data set."""
    torch.set_num_threads(1)
    if direct:
        keep_freed_memory()
    loader = build_loader(preset.settings, experiment, index, rows, training_seed=0)

    def epoch(number: int) -> None:
        loader.batch_sampler.set_epoch(number)
        for batch in loader.batch_sampler if direct else loader:
            if direct:
                loader.dataset.__getitems__(batch)

    return timed(epoch)


MEMORY, STEPS = ("shared", "new", "reused"), ("make", "fill", "release")


def new_memory(kind: str, size: int) -> Repeat:
    """Seconds to allocate memory of one kind, to copy a batch there, and to release it."""
    torch.set_num_threads(1)
    source, reused = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)

    def once(_: int) -> Measured:
        clock = [time.perf_counter()]
        memory = reused if kind == "reused" else torch.empty(size, dtype=torch.uint8)
        if kind == "shared":
            memory.share_memory_()
        clock.append(time.perf_counter())
        memory.copy_(source)
        clock.append(time.perf_counter())
        del memory
        clock.append(time.perf_counter())
        return dict(zip(STEPS, np.diff(clock).tolist(), strict=True))

    return once


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    preset = common.make_preset(arguments.data_root, scratch)
    sizes = dict(batch_size=arguments.batch_size, num_crops=arguments.num_crops)
    experiment = replace(find_experiment(preset, "glass_resnet"), **sizes)
    index = common.cached_index(preset)
    rows = common.repeated(index, arguments.batches * arguments.batch_size)
    ways = {}
    for source, of in (("files", replace(index, cache=None)), ("pixel cache", index)):
        ways[source, "direct"] = Way(loading, preset, experiment, of, rows, True)
        for workers in sorted({0, 1, 2, min(available_cores(), 16)}):
            chosen = replace(preset, settings=replace(preset.settings, num_workers=workers))
            ways[source, str(workers)] = Way(loading, chosen, experiment, of, rows, False, one_core=False)
    results = common.take_turns(ways, arguments.repeats)
    rates = {way: len(rows) / median(found) for way, found in results.items()}
    table = [(*way, rate, rate / rates[way[0], "direct"]) for way, rate in rates.items()]
    title = f"{arguments.batches} batches of {arguments.batch_size} images, K = {arguments.num_crops}"
    columns = ("from", "processes", "images/s", "x direct")
    note = "Whole epochs, with the wait for the first batch. Direct batches reuse memory; a loader's need new memory."
    megabytes = 3 * PAPER.settings.patch_size**2 * (arguments.num_crops + 1) * arguments.batch_size / 1e6
    new = common.take_turns({kind: Way(new_memory, kind, int(1e6 * megabytes)) for kind in MEMORY}, arguments.repeats)
    memory = Table(
        f"Memory for one such batch, {megabytes:.1f} MB: milliseconds",
        ("memory", *STEPS),
        [(kind, *(1000 * median(new[kind], step) for step in STEPS)) for kind in MEMORY],
        "Shared: from a loading process. New: what a process that loads by itself allocates. Reused: used before.",
        new,
    )
    return [Table(title, columns, table, note, {", ".join(way): found for way, found in results.items()}), memory]


if __name__ == "__main__":
    common.run(__doc__, measure, repeats=3, batch_size=32, batches=10)
