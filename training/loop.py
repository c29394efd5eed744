"""The training loop of all six models: takes built objects, returns numbers. SPEC, Training.

Knows no Optuna, no plot and no file. A loader yields `(*views, labels)`; its sampler has `set_epoch` and `order`,
its dataset `names`.
"""

import math
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
from training.checkpoints import Checkpoint
from training.evaluation import NonFiniteLoss, evaluate, sizes_of
from training.optimizer import build_optimizer
from training.progress import EpochRecord, Progress
from training.runtime import MemoryMeter, Runtime, build_runtime
from utils import Stopped, StopRequest, UserError


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
        self._pending: list[torch.Tensor] = []  # losses that are still on the device

    def train_step(self, views: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """One optimizer step on a batch of uint8 views; returns the loss, still on the device.

        Raises:
            OutOfMemory: names the batch, the views and the precision that did not fit.
            UserError: one image alone, where batch normalisation takes none.
        """
        forward = self.compiled_model if len(labels) == self.batch_size else self.model
        try:
            with self.runtime.memory_for(f"a training step on {sizes_of(views)}"):
                self.optimizer.zero_grad(set_to_none=True)
                with self.runtime.autocast():
                    logits = forward(*self.runtime.to_device(self.model, views))
                    labels = labels.to(self.runtime.device, non_blocking=True)
                    loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"batch normalisation needs more than one image, and the last batch of an epoch has only one: "
                f"change --batch-size from {self.batch_size}"
            ) from None
        return loss.detach()

    def train_epoch(
        self, loader: DataLoader, progress: Progress, after_step: Callable[[], None], description: str
    ) -> None:
        """What is left of the epoch in progress, whose losses go to `progress`.

        Args:
            after_step: called after each step, when `progress` is up to date but for the latest losses, which
                `flush` adds.

        Raises:
            NonFiniteLoss: names the epoch, the step and its images.
        """
        self.model.train()
        loader.sampler.set_epoch(progress.epoch, first=sum(progress.sizes))
        check_every = 1 if self.runtime.device.type == "cpu" else 20  # to look at a loss is to wait for the GPU
        done = len(progress.sizes)
        for *views, labels in tqdm(
            loader, desc=description, initial=done, total=done + len(loader), leave=False, disable=None
        ):
            self._pending.append(self.train_step(views, labels))
            progress.sizes.append(len(labels))
            if len(self._pending) == check_every:
                self.flush(loader, progress)
            after_step()
        self.flush(loader, progress)

    def flush(self, loader: DataLoader, progress: Progress) -> None:
        """Bring the latest losses from the device to `progress`; see `train_epoch`."""
        losses = torch.stack(self._pending).tolist() if self._pending else []
        self._pending.clear()
        for loss in losses:
            step = len(progress.losses)
            progress.losses.append(loss)
            if not math.isfinite(loss):
                first = sum(progress.sizes[:step])
                positions = loader.sampler.order()[first : first + progress.sizes[step]]
                names = ", ".join(loader.dataset.names[position] for position in positions)
                raise NonFiniteLoss(
                    f"the training loss became {loss} at epoch {progress.epoch + 1}, step {step + 1}: lower the "
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
    on_epoch: Callable[[list[EpochRecord]], None] = lambda history: None,
    checkpoint: Checkpoint | None = None,
    stop: StopRequest | None = None,
) -> list[EpochRecord]:
    """Train for `epochs` epochs, validating after each.

    With a checkpoint, training goes on from where it is, and is saved there after every epoch.

    Args:
        on_epoch: called after each epoch, and before it is saved, with the history so far; what it raises ends the
            training.
        stop: looked at after each step, and at the end; the training is then saved, for which it needs a checkpoint.

    Returns:
        The history, one record an epoch.

    Raises:
        Stopped: `stop` asked for it.
        UserError: a loss is not finite, or the device has no memory left.
    """
    progress = checkpoint.load(trainer) if checkpoint else Progress()
    stop = stop or StopRequest()
    watch = _Watch(trainer, train_loader, progress, checkpoint, stop)
    while progress.epoch < epochs:
        description = f"epoch {progress.epoch + 1}/{epochs}"
        with trainer.runtime.track_memory() as memory:
            watch.begin_epoch(memory)
            trainer.train_epoch(train_loader, progress, watch.after_step, description)
            valid = evaluate(
                trainer.model, valid_loader, trainer.runtime, f"{description} validate", watch.leave_if_asked
            )
            trainer.scheduler.step()
            watch.note()
        progress.finish_epoch(valid.loss, valid.accuracy)
        on_epoch(progress.history)
        if checkpoint:
            checkpoint.save(trainer, progress)
            stop.leave_if_asked(f"saved {checkpoint.path} after epoch {progress.epoch}")
    return progress.history


@dataclass
class _Watch:
    """Looks up after each step: notes time and memory, saves when that is due, leaves when that was asked for."""

    trainer: Trainer
    loader: DataLoader
    progress: Progress
    checkpoint: Checkpoint | None
    stop: StopRequest

    def begin_epoch(self, memory: MemoryMeter) -> None:
        self.memory, self.last = memory, time.perf_counter()

    def note(self) -> None:
        """Add the time since the last note, and the peak memory, to the epoch in progress."""
        now = time.perf_counter()
        self.progress.seconds += now - self.last
        self.progress.peak_memory_mb = max(self.progress.peak_memory_mb, self.memory.peak_mb)
        self.last = now

    def after_step(self) -> None:
        every = self.checkpoint.every_steps if self.checkpoint else 0
        if every and len(self.progress.sizes) % every == 0 and not self.stop.requested:
            self._save()
        self.leave_if_asked()

    def leave_if_asked(self) -> None:
        if self.stop.requested:
            self._save()
            raise Stopped(f"saved {self.checkpoint.path} in epoch {self.progress.epoch + 1}")

    def _save(self) -> None:
        self.trainer.flush(self.loader, self.progress)
        self.note()
        self.checkpoint.save(self.trainer, self.progress)
