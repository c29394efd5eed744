"""One model's training step, without files, plots or Optuna. docs/method.md, Training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from config import Experiment, Settings
from models.backbones import NormalisedInput
from models.checkpointing import checkpoint_blocks
from training import processes
from training.copies import Copies
from training.evaluation import sizes_of
from training.memory import recomputes
from training.optimizer import build_optimizer
from training.runtime import Runtime


@dataclass
class Trainer:
    """One model's training: the objects that every step needs, built by the caller.

    `label_smoothing` applies to the training loss only. Where the runtime compiles, it compiles batches of `batch_size`
    only: the smaller last batch of an epoch and evaluation run uncompiled, which saves three compilations, unless
    `compile_all` is set.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    runtime: Runtime
    label_smoothing: float
    batch_size: int

    def __post_init__(self) -> None:
        self.scaler = self.runtime.grad_scaler()
        self.to_device = Copies(self.runtime.device)
        self.parallel_model = processes.parallel(NormalisedInput(self.model))
        self.compiled_model = self.runtime.compiled(self.parallel_model)
        compile_valid = self.runtime.compile_all and processes.size() == 1
        self.valid_model = self.runtime.compiled(self.model) if compile_valid else self.model  # called in validation

    def train_step(
        self, views: Sequence[torch.Tensor], labels: torch.Tensor, images: int | None = None
    ) -> torch.Tensor:
        """One optimizer step on a batch of uint8 views; returns the loss, still on the device.

        Args:
            images: in the batch of all processes together, whose losses are added up; None: there is one process.

        Where a gradient is infinite or not a number, the weights do not change, as with the paper's loss scaler.

        Raises:
            OutOfMemory: names the batch, the views and the precision that did not fit.
        """
        images = images or len(labels)
        full = images == self.batch_size or self.runtime.compile_all
        forward = self.compiled_model if full else self.parallel_model
        with self.runtime.memory_for(f"a training step on {sizes_of(views)}"):
            self.optimizer.zero_grad(set_to_none=True)
            with self.runtime.autocast():
                *views, labels = self.to_device([*views, labels])
                logits = forward(*views)
                loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing) / images
            self.scaler.scale(loss * processes.size()).backward()  # gradients become means over processes
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def settle(self, views: Sequence[torch.Tensor]) -> None:
        """With several processes, before the first step: backward passes on any views, which change nothing.

        Only after the first passes do processes fix how they bundle gradients for exchange, on which the rounding of
        sums depends: without this, the first steps after a resume would differ from those without one.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng(), self.runtime.memory_for("a first backward pass"):
            for _ in range(3):
                self.parallel_model.train()(*self.to_device(views)).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def steps_taken(self) -> int:
        """Steps that changed the weights, by the optimizer's own count; reading it waits for the device."""
        states = iter(self.optimizer.state.values())
        return int(next(states, {"step": 0})["step"])


def build_trainer(
    model: nn.Module, experiment: Experiment, settings: Settings, runtime: Runtime, epochs: int
) -> Trainer:
    """Place the model on the device, and build its optimizer and its schedule over `epochs` epochs.

    Raises:
        UserError: activation checkpointing of a model without blocks.
    """
    if recomputes(experiment, settings, runtime):
        checkpoint_blocks(model)
    model = processes.synchronised(model)
    runtime.place(model)
    optimizer, scheduler = build_optimizer(model, experiment, epochs, settings.eta_min, settings.author_runtime)
    return Trainer(model, optimizer, scheduler, runtime, settings.label_smoothing, experiment.batch_size)
