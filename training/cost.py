"""What a model costs: peak memory, seconds an epoch, and the validation accuracy it buys. SPEC, Experiments 3 and 4."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Experiment, NumCrops, Settings, StandardMemory
from training.checkpoints import Checkpoint
from training.evaluation import predict_batch
from training.loop import Trainer, fit
from training.runtime import Runtime
from utils import StopRequest, as_share, hardware, read_csv, reading, resolved


@dataclass(frozen=True)
class Cost:
    """Peak memory in MB (2**20 bytes; of which kind, `Runtime.memory_kind` says), seconds of an epoch with its
    validation, and the best validation accuracy as a fraction (None in quick mode, which trains too little for one).
    """

    peak_memory_mb: float
    epoch_seconds: float
    valid_accuracy: float | None


def read_costs(path: Path) -> dict[int | None, Cost]:
    """What costs.csv says of each number of crops, None for a standard model; nothing if there is no such file.

    Raises:
        UserError: it holds something else.
    """
    if not path.exists():
        return {}
    with reading(path):
        return {
            int(row["num_crops"]) if row["num_crops"] else None: Cost(
                float(row["peak_memory_mb"]),
                float(row["epoch_seconds"]),
                None if row["valid_accuracy"] == "" else as_share(row["valid_accuracy"]),
            )
            for row in read_csv(path)
        }


def cost_settings(
    settings: Settings,
    study: NumCrops | StandardMemory,
    experiment: Experiment,
    runtime: Runtime,
    cached: Sequence[str],
) -> dict[str, Any]:
    """What a measured cost depends on: the settings, and, since it is time and memory, the hardware and the loading.

    Args:
        cached: what of the images comes from the pixel cache.
    """
    machine = {"hardware": hardware(), "loading_processes": settings.num_workers, "cached": list(cached)}
    return resolved(settings, study, experiment) | runtime.facts() | machine


def measure_cost(
    trainer: Trainer,
    train_loader: DataLoader,
    valid_loader: DataLoader,
    study: NumCrops | StandardMemory,
    checkpoint: Checkpoint,
    stop: StopRequest,
) -> Cost:
    """Train and measure: all `study.epochs`, going on from `checkpoint`, or a few steps in quick mode, extrapolated.

    Full mode takes the maximum memory and the mean seconds over epochs, first epoch included, as the paper does.

    Raises:
        Stopped: `stop` asked for it; of a quick measurement nothing is saved.
    """
    if study.quick:
        return _measure_steps(trainer, train_loader, valid_loader, study.warmup_steps, study.measured_steps, stop)
    history = fit(trainer, train_loader, valid_loader, study.epochs, checkpoint=checkpoint, stop=stop)
    return Cost(
        peak_memory_mb=max(record.peak_memory_mb for record in history),
        epoch_seconds=sum(record.epoch_seconds for record in history) / len(history),
        valid_accuracy=max(record.valid_accuracy for record in history),
    )


def _measure_steps(
    trainer: Trainer,
    train_loader: DataLoader,
    valid_loader: DataLoader,
    warmup: int,
    measured: int,
    stop: StopRequest,
) -> Cost:
    runtime = trainer.runtime

    def mean_seconds(loader: DataLoader, step: Callable[[Sequence[torch.Tensor], torch.Tensor], object]) -> float:
        batches = _repeated(loader, stop)
        # Batches that workers have ready when the clock starts would hide what loading costs.
        in_flight = loader.num_workers * (loader.prefetch_factor or 0)
        for *views, labels in islice(batches, max(warmup, in_flight)):
            step(views, labels)
        runtime.wait()
        steps = max(measured, loader.num_workers)
        start = time.perf_counter()
        for *views, labels in islice(tqdm(batches, total=steps, leave=False, disable=None), steps):
            step(views, labels)
        runtime.wait()
        return (time.perf_counter() - start) / steps

    with runtime.track_memory() as memory:
        trainer.model.train()
        train_seconds = mean_seconds(train_loader, trainer.train_step)
        trainer.model.eval()
        with torch.no_grad():
            valid_seconds = mean_seconds(
                valid_loader, lambda views, labels: predict_batch(trainer.model, views, runtime)
            )
    epoch_seconds = train_seconds * len(train_loader) + valid_seconds * len(valid_loader)
    return Cost(memory.peak_mb, epoch_seconds, None)


def _repeated(loader: DataLoader, stop: StopRequest) -> Iterator[Sequence[torch.Tensor]]:
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            stop.leave_if_asked("in a quick measurement, which is made anew")
            yield batch
