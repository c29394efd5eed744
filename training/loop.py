"""The training loop of all six models. docs/method.md, Training."""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from training import processes
from training.checkpoints import Checkpoint
from training.evaluation import NonFiniteLoss, Predictions, evaluate
from training.progress import EpochRecord, Progress, duration
from training.runtime import MemoryMeter
from training.stopping import StopRequest
from training.trainer import Trainer
from utils import Stopped, UserError, first_line

SKIPPED_IN_A_ROW = 20  # halved this often, fp16's loss scale falls from 65,536 to below 1


@dataclass(frozen=True)
class Job:
    """All that one training needs; `label` names it in progress bars and logs.

    A loader yields `(*views, labels)`; its batch sampler is an `EpochBatches`, its dataset has `names`.
    """

    label: str
    trainer: Trainer
    train_loader: DataLoader
    valid_loader: DataLoader
    epochs: int
    tensorboard: bool = False  # also write TensorBoard files, beside the checkpoint


def fit(
    job: Job,
    checkpoint: Checkpoint | None = None,
    stop: StopRequest | None = None,
    on_start: Callable[[Progress], None] = lambda progress: None,
    on_epoch: Callable[[list[EpochRecord]], None] = lambda history: None,
) -> list[EpochRecord]:
    """Train for `job.epochs` epochs, validating after each.

    Args:
        checkpoint: training resumes from it if its file exists; the state is saved to it after epochs, always after
            the last.
        stop: checked after each step; if it is set, the training is saved, which needs a checkpoint, and ends.
        on_start: called before the first step, with the progress.
        on_epoch: called with the history after each epoch, before it is saved; what it raises ends the training.

    Returns:
        The history, one record per epoch.

    Raises:
        Stopped: `stop` was set.
        UserError: a validation loss, or the gradients of many steps in a row, are not finite; the device has no memory
            left; or the last batch is one image where batch normalisation needs more.
    """
    trainer, stop = job.trainer, stop or StopRequest()
    check_smallest_batch(job)
    if processes.size() > 1:
        trainer.settle([torch.stack([view] * 2) for view in job.train_loader.dataset[0, 0][:-1]])
    progress = checkpoint.load(trainer) if checkpoint else Progress()
    on_start(progress)
    if progress.epoch < job.epochs and (progress.epoch or progress.steps):
        print(f"{job.label}: resumed at epoch {progress.epoch + 1}, step {progress.steps + 1}", flush=True)
    first = progress.epoch
    watch = None
    if checkpoint and job.tensorboard and processes.is_main():
        from training.tensorboard import Watch  # here: its figures take two seconds to import

        folder = checkpoint.path.parent / "tensorboard"
        watch = Watch(folder, job.label, trainer.model, job.valid_loader, trainer.runtime)
    with checkpoint or nullcontext(), watch or nullcontext():
        while progress.epoch < job.epochs:
            with trainer.runtime.track_memory() as memory:
                epoch = _Epoch(job, progress, memory, checkpoint, stop)
                epoch.train()
                valid, rates = epoch.validate(), trainer.scheduler.get_last_lr()
                trainer.scheduler.step()
            progress = progress.after_epoch(valid.loss, valid.accuracy)
            if not sys.stderr.isatty():  # where there is no progress bar
                print(_log_line(job, progress.history, first), flush=True)
            if watch:
                watch.after_epoch(progress.history[-1], rates, valid, last=progress.epoch == job.epochs)
            on_epoch(progress.history)
            if checkpoint:
                stopping = stop.agreed()
                checkpoint.save(trainer, progress, must=stopping or progress.epoch == job.epochs)
                if stopping:
                    processes.on_main(checkpoint.wait)
                    raise Stopped(f"saved {checkpoint.path} after epoch {progress.epoch}")
    return progress.history


def check_smallest_batch(job: Job) -> None:
    """Try a batch of one image on a copy of the model, if an epoch has one.

    Raises:
        UserError: the model's batch normalisation needs more than one value, or a batch has fewer images than there
            are processes.
    """
    images, batch_size = len(job.train_loader.dataset), job.trainer.batch_size
    smallest = min(images, images % batch_size or batch_size)
    if smallest < processes.size():
        raise UserError(
            f"{images} training images in batches of {batch_size} leave a batch of {smallest} for {processes.size()} "
            f"processes: start fewer, or change the batch size or the splits' sizes"
        )
    if batch_size > 1 and images % batch_size != 1:
        return
    views = [torch.zeros_like(view[None]) for view in job.train_loader.dataset[0, 0][:-1]]
    # Uncompiled, since compiled code would wrap the error.
    with torch.no_grad(), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        model = copy.deepcopy(job.trainer.model).train()
        try:
            model(*job.trainer.runtime.to_device(model, views))
        except ValueError as error:
            raise UserError(
                f"{images} training images in batches of {batch_size} leave a batch of one image, which batch "
                f"normalisation does not take here ({first_line(error)}): change the batch size or the splits' sizes"
            ) from None


def _log_line(job: Job, history: list[EpochRecord], first: int) -> str:
    """The last epoch, for a log; `first` is the number of epochs that earlier processes trained."""
    last, done = history[-1], history[first:]
    left = sum(record.epoch_seconds for record in done) / len(done) * (job.epochs - len(history))
    return (
        f"{job.label}, epoch {last.epoch}/{job.epochs}: training loss {last.train_loss:.4f}, validation loss "
        f"{last.valid_loss:.4f}, validation accuracy {last.valid_accuracy:.2%}, {last.images_per_second:.1f} images/s, "
        f"{last.data_wait_share:.0%} of the time waiting for data, {duration(left)} left"
        + (f", {last.skipped_steps} steps skipped: gradients not finite" if last.skipped_steps else "")
    )


@dataclass
class _Epoch:
    """The epoch in progress: its steps, time and memory, and saving within it."""

    job: Job
    progress: Progress
    memory: MemoryMeter
    checkpoint: Checkpoint | None
    stop: StopRequest

    def __post_init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, int]] = []  # losses still on the device, with their batch sizes
        self.description = f"{self.job.label}, epoch {self.progress.epoch + 1}/{self.job.epochs}"

    def train(self) -> None:
        """Take the remaining steps of the epoch.

        Raises:
            NonFiniteLoss: at least `SKIPPED_IN_A_ROW` steps in a row changed nothing.
        """
        trainer, progress = self.job.trainer, self.progress
        trainer.model.train()
        self.taken = trainer.steps_taken()
        check_every = 1 if trainer.runtime.device.type == "cpu" else 20  # reading a loss waits for the GPU
        self.last = time.perf_counter()
        for (*views, labels), images in self._batches():
            self.pending.append((trainer.train_step(views, labels, images), images))
            if len(self.pending) == check_every:
                self._collect()
            progress.train_seconds += self._elapsed()
            every = self.checkpoint.every_steps if self.checkpoint else 0
            if self.stop.agreed():
                self._save_and_stop()
            elif every and (progress.steps + len(self.pending)) % every == 0:
                self._save()
        self._collect()
        trainer.runtime.wait()
        progress.train_seconds += self._elapsed()

    def validate(self) -> Predictions:
        """Predict the validation images."""

        def after_batch() -> None:
            self.progress.valid_seconds += self._elapsed()
            if self.stop.agreed():
                self._save_and_stop()

        trainer = self.job.trainer
        self.progress.valid_seconds = 0.0  # a validation that was stopped starts over
        description = f"{self.description}, validation"
        predictions = evaluate(trainer.valid_model, self.job.valid_loader, trainer.runtime, description, after_batch)
        self.progress.valid_seconds += self._elapsed()
        self._note_memory()
        return predictions

    def _batches(self) -> Iterator[tuple[Sequence[torch.Tensor], int]]:
        """The epoch's remaining batches, each with its number of images in all processes together.

        Measures the time that training waits for them.
        """
        loader, progress = self.job.train_loader, self.progress
        loader.batch_sampler.set_epoch(progress.epoch, first=progress.images)
        steps, off = progress.steps + len(loader), processes.no_bar()
        with tqdm(desc=self.description, initial=progress.steps, total=steps, leave=False, disable=off) as bar:
            batches, sizes = self.job.trainer.runtime.batches(loader), iter(loader.batch_sampler.sizes)
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                progress.wait_seconds += time.perf_counter() - start
                if batch is None:
                    return
                yield batch, next(sizes)
                bar.update()

    def _elapsed(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def _collect(self) -> None:
        """Add the pending losses and the skipped steps to the progress, which waits for the device."""
        progress, steps = self.progress, len(self.pending)
        losses = processes.total(torch.stack([loss for loss, _ in self.pending]).cpu()).tolist() if steps else []
        for loss, (_, size) in zip(losses, self.pending, strict=True):
            progress.steps += 1
            progress.images += size
            if math.isfinite(loss):
                progress.loss_sum += loss * size
                progress.loss_images += size
        self.pending.clear()
        before, self.taken = self.taken, self.job.trainer.steps_taken()
        skipped = steps - (self.taken - before)
        progress.skipped_steps += skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + steps if skipped == steps else 0
        if progress.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise NonFiniteLoss(
                f"{progress.skipped_in_a_row} steps in a row, up to epoch {progress.epoch + 1}, step {progress.steps}, "
                f"had gradients that are infinite or not a number (the last loss is {losses[-1]:g}): lower the "
                f"learning rate, or try --precision fp32"
            )

    def _note_memory(self) -> None:
        self.progress.peak_memory_mb = max(self.progress.peak_memory_mb, self.memory.peak_mb)

    def _save(self) -> None:
        self._collect()
        self.progress.train_seconds += self._elapsed()  # of steps that were still on the device
        self._note_memory()
        self.checkpoint.save(self.job.trainer, self.progress)
        self._elapsed()  # the time of an epoch is without saving

    def _save_and_stop(self) -> None:
        self._save()
        processes.on_main(self.checkpoint.wait)
        raise Stopped(f"saved {self.checkpoint.path} in epoch {self.progress.epoch + 1}")
