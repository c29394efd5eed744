"""The training loop of all six models: takes built objects, returns numbers. SPEC, Training.

Knows no file, no Optuna, no plot.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.evaluation import evaluate, predict_batch
from training.runtime import Runtime


class NonFiniteLoss(Exception):
    """The loss of training became infinite or NaN at `step` of `epoch`, both counted from 0."""

    def __init__(self, epoch: int, step: int, loss: float) -> None:
        super().__init__(f"the training loss is {loss} at epoch {epoch + 1}, step {step + 1}")
        self.epoch, self.step = epoch, step


@dataclass(frozen=True)
class EpochRecord:
    """One line of a training history. Epochs count from 1; seconds are of training and validation together."""

    epoch: int
    train_loss: float
    valid_loss: float
    valid_accuracy: float
    epoch_seconds: float
    peak_memory_mb: float


@dataclass
class Trainer:
    """One model's training: the objects that every step needs, built by the caller.

    `label_smoothing` is of the training loss only.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    runtime: Runtime
    label_smoothing: float

    def __post_init__(self) -> None:
        self.scaler = self.runtime.grad_scaler()

    def train_step(self, views: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """One optimizer step on a batch of uint8 views; returns the loss, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.runtime.autocast():
            logits = self.model(*self.runtime.to_device(self.model, views))
            labels = labels.to(self.runtime.device, non_blocking=True)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def train_epoch(self, loader: DataLoader, epoch: int, description: str) -> float:
        """One pass over the loader, `epoch` counted from 0; returns the mean loss over images.

        Raises:
            NonFiniteLoss: for the first step whose loss is not finite.
        """
        self.model.train()
        loader.sampler.set_epoch(epoch)
        check_every = 1 if self.runtime.device.type == "cpu" else 20  # to look at a loss is to wait for the GPU
        losses, sizes, checked = [], [], 0
        for step, (*views, labels) in enumerate(tqdm(loader, desc=description, leave=False, disable=None)):
            losses.append(self.train_step(views, labels))
            sizes.append(len(labels))
            if (step + 1) % check_every == 0 or step + 1 == len(loader):
                for loss in torch.stack(losses[checked:]).tolist():
                    if not math.isfinite(loss):
                        raise NonFiniteLoss(epoch, checked, loss)
                    checked += 1
        image_counts = torch.tensor(sizes, dtype=torch.float64)
        return float((torch.stack(losses).double().cpu() * image_counts).sum() / image_counts.sum())


def fit(
    trainer: Trainer,
    train_loader: DataLoader,
    valid_loader: DataLoader,
    epochs: int,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> list[EpochRecord]:
    """Train for `epochs` epochs, validating after each.

    Args:
        on_epoch: called after each epoch with its record; what it raises ends the training.

    Returns:
        The history, one record an epoch.

    Raises:
        NonFiniteLoss: the training loss became infinite or NaN.
    """
    history = []
    for epoch in range(epochs):
        start, description = time.perf_counter(), f"epoch {epoch + 1}/{epochs}"
        with trainer.runtime.track_memory() as memory:
            train_loss = trainer.train_epoch(train_loader, epoch, description)
            trainer.scheduler.step()
            valid = evaluate(trainer.model, valid_loader, trainer.runtime, f"{description} validate")
        seconds = time.perf_counter() - start
        record = EpochRecord(epoch + 1, train_loss, valid.loss, valid.accuracy, seconds, memory.peak_mb)
        history.append(record)
        on_epoch(record)
    return history


@dataclass(frozen=True)
class StepCost:
    """Mean seconds of a training step and of a validation step, and peak memory of both."""

    train_step_seconds: float
    valid_step_seconds: float
    peak_memory_mb: float


def profile_steps(
    trainer: Trainer, train_loader: DataLoader, valid_loader: DataLoader, warmup: int, measured: int
) -> StepCost:
    """Time `measured` training steps and as many validation steps, each after `warmup` others, loading included."""
    runtime = trainer.runtime

    def mean_seconds(loader: DataLoader, step: Callable[[Sequence[torch.Tensor], torch.Tensor], object]) -> float:
        batches = _repeated(loader)
        for _ in range(warmup):
            *views, labels = next(batches)
            step(views, labels)
        runtime.wait()
        start = time.perf_counter()
        for _ in tqdm(range(measured), desc="measure steps", leave=False, disable=None):
            *views, labels = next(batches)
            step(views, labels)
        runtime.wait()
        return (time.perf_counter() - start) / measured

    with runtime.track_memory() as memory:
        trainer.model.train()
        train_seconds = mean_seconds(train_loader, trainer.train_step)
        trainer.model.eval()
        with torch.no_grad():
            valid_seconds = mean_seconds(
                valid_loader, lambda views, labels: predict_batch(trainer.model, views, runtime)
            )
    return StepCost(train_seconds, valid_seconds, memory.peak_mb)


def _repeated(loader: DataLoader) -> Iterator[Sequence[torch.Tensor]]:
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader
