"""The training loop of all six models: takes built objects, returns numbers. SPEC, Training.

Knows no Optuna, no plot and no file. A loader yields `(*views, labels)`; its sampler has `set_epoch` and `order`,
its dataset `names`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Experiment, Settings
from training.evaluation import evaluate
from training.optimizer import build_optimizer
from training.runtime import Runtime, build_runtime
from utils import UserError


class OutOfMemory(UserError):
    """The device had no memory left for a step."""


class NonFiniteLoss(UserError):
    """The training loss became infinite or NaN."""


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

    `label_smoothing` is of the training loss only. Compilation, where the runtime has it, is for batches of
    `batch_size`; the smaller last batch of an epoch and evaluation run as they are, which saves three compilations.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    runtime: Runtime
    label_smoothing: float
    batch_size: int

    def __post_init__(self) -> None:
        self.scaler = self.runtime.grad_scaler()
        self.compiled_model = self.runtime.compiled(self.model)

    def train_step(self, views: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """One optimizer step on a batch of uint8 views; returns the loss, still on the device.

        Raises:
            OutOfMemory: names the batch, the views and the precision that did not fit.
            UserError: one image alone, where batch normalisation takes none.
        """
        forward = self.compiled_model if len(labels) == self.batch_size else self.model
        try:
            self.optimizer.zero_grad(set_to_none=True)
            with self.runtime.autocast():
                logits = forward(*self.runtime.to_device(self.model, views))
                labels = labels.to(self.runtime.device, non_blocking=True)
                loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        except torch.OutOfMemoryError:
            tried = " and ".join("x".join(map(str, view.shape)) for view in views)
            raise OutOfMemory(
                f"{self.runtime.device} has no memory left for a training step on views of {tried} (batch first) in "
                f"{self.runtime.precision}: lower --batch-size or, for GLASS, the number of crops"
            ) from None
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"batch normalisation needs more than one image, and the last batch of an epoch has only one: "
                f"change --batch-size from {self.batch_size}"
            ) from None
        return loss.detach()

    def train_epoch(self, loader: DataLoader, epoch: int, description: str) -> float:
        """One pass over the loader, `epoch` counted from 0; returns the mean loss over images.

        Raises:
            NonFiniteLoss: names the epoch, the step and its images.
        """
        self.model.train()
        loader.sampler.set_epoch(epoch)
        check_every = 1 if self.runtime.device.type == "cpu" else 20  # to look at a loss is to wait for the GPU
        losses, sizes = [], []
        for *views, labels in tqdm(loader, desc=description, leave=False, disable=None):
            losses.append(self.train_step(views, labels))
            sizes.append(len(labels))
            if len(losses) % check_every == 0 or len(losses) == len(loader):
                unchecked = (len(losses) - 1) // check_every * check_every
                self._check_finite(losses, unchecked, sizes, loader, epoch)
        image_counts = torch.tensor(sizes, dtype=torch.float64)
        return float((torch.stack(losses).double().cpu() * image_counts).sum() / image_counts.sum())

    def _check_finite(
        self, losses: list[torch.Tensor], unchecked: int, sizes: list[int], loader: DataLoader, epoch: int
    ) -> None:
        finite = torch.stack(losses[unchecked:]).isfinite()
        if finite.all():
            return
        step = unchecked + int(finite.logical_not().nonzero()[0])
        first = sum(sizes[:step])
        positions = loader.sampler.order()[first : first + sizes[step]]
        names = ", ".join(loader.dataset.names[position] for position in positions)
        raise NonFiniteLoss(
            f"the training loss became {losses[step].item()} at epoch {epoch + 1}, step {step + 1}: lower the "
            f"learning rate, try --precision fp32, and look at that batch's images: {names}"
        )


def build_trainer(model: nn.Module, experiment: Experiment, settings: Settings, epochs: int) -> Trainer:
    """Place the model on the device and give it its optimizer and schedule over `epochs` epochs."""
    runtime = build_runtime(settings)
    runtime.place(model)
    optimizer, scheduler = build_optimizer(model, experiment, epochs, settings.eta_min)
    return Trainer(model, optimizer, scheduler, runtime, settings.label_smoothing, experiment.batch_size)


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
        UserError: the loss is not finite, or the device has no memory left.
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
