"""An epoch of training on the CPU: the share of waiting for images, for several ways to load them.

    python -m tests.benchmarks.epoch [--data-root DIR] [--repeats 3] [--num-crops 4] [--patch-size 64] [--batches 10]
                                     [--workers 1] [--json FILE] [--markdown FILE]

The demo's glass_resnet, from random weights. Plain: straightforward code reads the files, to normalised floats, in a
DataLoader with the same number of processes. No loading: the same step on one batch that stays in memory, the least
that an epoch can take. Images are repeated until an epoch has its batches.
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, default_collate

from config import DEMO, GlassExperiment, Preset, Settings
from data.index import Index
from data.loaders import build_loader
from data.workers import loading_processes
from models.build import build_model
from tests.benchmarks import common
from tests.benchmarks.common import Measured, Repeat, Table, Way, measured, median
from tests.benchmarks.views import plain_process, plain_views
from training.runs import seed_everything
from training.runtime import build_runtime
from training.trainer import Trainer, build_trainer
from utils import find_experiment


def plain_batch(num_crops: int, patch_size: int, files: list[tuple[Path, int]]) -> list[torch.Tensor]:
    """Files and labels -> their views, normalised, and the labels."""
    views = [plain_views(path, num_crops, patch_size, torch.default_generator) for path, _ in files]
    return default_collate([(*of_file, label) for of_file, (_, label) in zip(views, files, strict=True)])


def straightforward_loader(
    settings: Settings, experiment: GlassExperiment, index: Index, rows: list[int], workers: int
) -> DataLoader:
    """Batches of normalised float views, made one by one from the files."""
    return DataLoader(
        [(index.root / index.records[row].path, index.records[row].label) for row in rows],
        batch_size=experiment.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=plain_process,
        collate_fn=partial(plain_batch, experiment.num_crops, settings.patch_size),
    )


def take_normalised_views(trainer: Trainer) -> None:
    """Let the trainer take views that are already normalised."""
    trainer.parallel_model, trainer.compiled_model = trainer.model, trainer.runtime.compiled(trainer.model)


def epochs(way: str, preset: Preset, experiment: GlassExperiment, index: Index, rows: list[int]) -> Repeat:
    """Epochs of training as in the training loop, with the time spent waiting for batches."""
    settings = preset.settings
    seed_everything(0)
    trainer = build_trainer(build_model(experiment, settings), experiment, settings, build_runtime(settings), epochs=1)
    trainer.model.train()
    loader: Iterable[Sequence[torch.Tensor]]
    if way == "plain":
        take_normalised_views(trainer)
        loader = straightforward_loader(settings, experiment, index, rows, settings.num_workers)
    else:
        loader = build_loader(preset.settings, experiment, index, rows, training_seed=0)
    if way == "no loading":
        first = next(iter(loader))
        loader = [first] * len(loader)

    def epoch(number: int) -> Measured:
        if isinstance(loader, DataLoader) and way != "plain":
            loader.batch_sampler.set_epoch(number)
        waiting = 0.0
        with measured() as result:
            start = time.perf_counter()
            batches = iter(loader)
            while batch := next(batches, None):
                waiting += time.perf_counter() - start
                *views, labels = batch
                trainer.train_step(views, labels).item()  # reads every loss, as training does on the CPU
                start = time.perf_counter()
        return result | {"waiting": waiting}

    return epoch


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    preset = common.make_preset(
        arguments.data_root, scratch, patch_size=arguments.patch_size, num_workers=arguments.workers
    )
    experiment = replace(find_experiment(DEMO, "glass_resnet"), num_crops=arguments.num_crops)
    index = common.cached_index(preset)
    files, rows = replace(index, cache=None), common.repeated(index, arguments.batches * experiment.batch_size)
    sources = {"plain": files, "from the files": files, "pixel cache": index, "no loading": index}
    ways = {way: Way(epochs, way, preset, experiment, of, rows, one_core=False) for way, of in sources.items()}
    results = common.take_turns(ways, arguments.repeats)
    table = []
    for way, found in results.items():
        wall, share = median(found), median([{"share": one["waiting"] / one["wall"]} for one in found], "share")
        speed = (len(rows) / wall, median(results["plain"]) / wall)
        table.append((way, wall, median(found, "waiting"), 100 * share, *speed))
    title = (
        f"An epoch of {len(rows)} images, batches of {experiment.batch_size}, K = {arguments.num_crops}, "
        f"P = {arguments.patch_size}, loading processes: {arguments.workers}"
    )
    columns = ("way", "s an epoch", "s waiting", "% waiting", "images/s", "x plain")
    return [Table(title, columns, table, "Waiting: inside iter() and next() of the loader.", results)]


if __name__ == "__main__":
    workers = loading_processes(cpu_computes=True)
    common.run(__doc__, measure, repeats=3, num_crops=4, patch_size=64, batches=10, workers=workers)
