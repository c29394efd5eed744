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
from tests.benchmarks.common import (
    Measured,
    Repeat,
    Table,
    Way,
    cached_index,
    in_turn,
    make_preset,
    median,
    repeated,
    run,
    timed,
)
from utils import available_cores, find_experiment, keep_freed_memory


def through_loader(preset: Preset, experiment: GlassExperiment, index: Index, rows: list[int]) -> Repeat:
    """Epochs of the loader; its process does nothing with the batches."""
    torch.set_num_threads(1)
    loader = build_loader(preset, experiment, index, rows, training_seed=0)

    def epoch(number: int) -> None:
        loader.sampler.set_epoch(number)
        for _ in loader:
            pass

    return timed(epoch)


def direct(preset: Preset, experiment: GlassExperiment, index: Index, rows: list[int]) -> Repeat:
    """The same batches, from the data set."""
    torch.set_num_threads(1)
    keep_freed_memory()
    loader = build_loader(preset, experiment, index, rows, training_seed=0)

    def epoch(number: int) -> None:
        loader.sampler.set_epoch(number)
        for batch in loader.batch_sampler:
            loader.dataset.__getitems__(batch)

    return timed(epoch)


MEMORY = ("shared", "new", "kept")


def new_memory(kind: str, size: int) -> Repeat:
    """Seconds to get memory of one kind, to copy a batch there, and to let it go."""
    torch.set_num_threads(1)
    source, kept = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)

    def once(_: int) -> Measured:
        clock = [time.perf_counter()]
        if kind == "shared":
            memory = source.new(source._typed_storage()._new_shared(size, device=source.device))
        else:
            memory = kept if kind == "kept" else torch.empty(size, dtype=torch.uint8)
        clock.append(time.perf_counter())
        memory.copy_(source)
        clock.append(time.perf_counter())
        del memory
        clock.append(time.perf_counter())
        return dict(zip(("make", "fill", "let go"), np.diff(clock).tolist(), strict=True))

    return once


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    """The one table."""
    preset = make_preset(arguments.data_root, scratch)
    experiment = replace(
        find_experiment(preset, "glass_resnet"), batch_size=arguments.batch_size, num_crops=arguments.num_crops
    )
    index = cached_index(preset)
    rows = repeated(index, arguments.batches * arguments.batch_size)
    ways = {}
    for source, of in (("files", replace(index, cache=None)), ("pixel cache", index)):
        ways[source, "direct"] = Way(direct, preset, experiment, of, rows)
        for workers in sorted({0, 1, 2, min(available_cores(), 16)}):
            chosen = replace(preset, settings=replace(preset.settings, num_workers=workers))
            ways[source, str(workers)] = Way(through_loader, chosen, experiment, of, rows, one_core=False)
    results = in_turn(ways, arguments.repeats)
    rates = {way: len(rows) / median(found) for way, found in results.items()}
    table = [(*way, rate, rate / rates[way[0], "direct"]) for way, rate in rates.items()]
    title = f"{arguments.batches} batches of {arguments.batch_size} images, K = {arguments.num_crops}"
    columns = ("from", "processes", "images/s", "x direct")
    note = (
        "Whole epochs, the wait for the first batch included. Direct batches reuse memory; a loader's need new memory."
    )
    megabytes = 3 * PAPER.settings.patch_size**2 * (arguments.num_crops + 1) * arguments.batch_size / 1e6
    new = in_turn({kind: Way(new_memory, kind, int(1e6 * megabytes)) for kind in MEMORY}, arguments.repeats)
    steps = ("make", "fill", "let go")
    memory = Table(
        f"Memory for one such batch, {megabytes:.1f} MB: milliseconds",
        ("memory", *steps),
        [(kind, *(1000 * median(new[kind], step) for step in steps)) for kind in MEMORY],
        "Shared: what a loading process hands over. New: what a process that loads by itself gets. Kept: used before.",
        new,
    )
    return [Table(title, columns, table, note, {", ".join(way): found for way, found in results.items()}), memory]


if __name__ == "__main__":
    run(__doc__, measure, repeats=3, batch_size=32, batches=10)
