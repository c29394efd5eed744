"""An epoch of training on the CPU: how much of it is waiting for images, by how they are loaded.

    python -m tests.benchmarks.epoch [--data-root DIR] [--repeats 3] [--num-crops 4] [--patch-size 64] [--batches 10]
                                     [--workers 1] [--json FILE] [--markdown FILE]

The demo's glass_resnet, from random weights. Plain: a Dataset as straightforward code writes it, which gives normalised
floats, in a DataLoader of as many processes. No loading: the same step on one batch that stays in memory, the least
that an epoch can take. Images are repeated until an epoch has its batches.
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from config import DEMO, GlassExperiment, Preset
from data.index import Index
from data.loaders import build_loader
from models.build import build_model
from tests.benchmarks.common import (
    Measured,
    Repeat,
    Table,
    Way,
    cached_index,
    in_turn,
    make_preset,
    measured,
    median,
    repeated,
    run,
)
from tests.benchmarks.views import plain_process, plain_views
from training.loop import build_trainer
from training.runtime import Runtime
from utils import find_experiment, loading_processes, seed_everything


class PlainDataset(Dataset):
    """A file -> its views, normalised, and its label."""

    def __init__(self, index: Index, rows: list[int], num_crops: int, patch_size: int) -> None:
        self.files = [(index.root / index.records[row].path, index.records[row].label) for row in rows]
        self.num_crops, self.patch_size = num_crops, patch_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[torch.Tensor | int, ...]:
        path, label = self.files[position]
        return *plain_views(path, self.num_crops, self.patch_size, torch.default_generator), label


class NormalisedViews(Runtime):
    """For views that are normalised already."""

    def to_device(self, model: nn.Module, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [view.to(self.device) for view in views]


def epochs(way: str, preset: Preset, experiment: GlassExperiment, index: Index, rows: list[int]) -> Repeat:
    """Epochs of training, as Trainer.train_epoch has them, with a clock around the waiting."""
    settings = preset.settings
    seed_everything(0)
    trainer = build_trainer(build_model(experiment, settings), experiment, settings, epochs=1)
    trainer.model.train()
    loader: Iterable[Sequence[torch.Tensor]]
    if way == "plain":
        trainer.runtime = NormalisedViews(**vars(trainer.runtime))
        loader = DataLoader(
            PlainDataset(index, rows, experiment.num_crops, settings.patch_size),
            batch_size=experiment.batch_size,
            shuffle=True,
            num_workers=settings.num_workers,
            persistent_workers=settings.num_workers > 0,
            worker_init_fn=plain_process,
        )
    else:
        loader = build_loader(preset, experiment, index, rows, training_seed=0)
    if way == "no loading":
        first = next(iter(loader))
        loader = [first] * len(loader)

    def epoch(number: int) -> Measured:
        if isinstance(loader, DataLoader) and way != "plain":
            loader.sampler.set_epoch(number)
        waiting = 0.0
        with measured() as result:
            start = time.perf_counter()
            batches = iter(loader)
            while batch := next(batches, None):
                waiting += time.perf_counter() - start
                *views, labels = batch
                trainer.train_step(views, labels).item()  # looks at every loss, as training does on the CPU
                start = time.perf_counter()
        return result | {"waiting": waiting}

    return epoch


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    """The one table."""
    preset = make_preset(arguments.data_root, scratch, patch_size=arguments.patch_size, num_workers=arguments.workers)
    experiment = replace(find_experiment(DEMO, "glass_resnet"), num_crops=arguments.num_crops)
    index = cached_index(preset)
    files, rows = replace(index, cache=None), repeated(index, arguments.batches * experiment.batch_size)
    sources = {"plain": files, "from the files": files, "pixel cache": index, "no loading": index}
    ways = {way: Way(epochs, way, preset, experiment, of, rows, one_core=False) for way, of in sources.items()}
    results = in_turn(ways, arguments.repeats)
    table = [
        (
            way,
            median(found),
            median(found, "waiting"),
            100 * median([{"share": one["waiting"] / one["wall"]} for one in found], "share"),
            len(rows) / median(found),
            median(results["plain"]) / median(found),
        )
        for way, found in results.items()
    ]
    title = (
        f"An epoch of {len(rows)} images, batches of {experiment.batch_size}, K = {arguments.num_crops}, "
        f"P = {arguments.patch_size}, loading processes: {arguments.workers}"
    )
    columns = ("way", "s an epoch", "s waiting", "% waiting", "images/s", "x plain")
    return [Table(title, columns, table, "Waiting: inside iter() and next() of the loader.", results)]


if __name__ == "__main__":
    workers = loading_processes(cpu_computes=True)
    run(__doc__, measure, repeats=3, num_crops=4, patch_size=64, batches=10, workers=workers)
