"""One model's training step: takes built objects, knows no file, no plot and no Optuna. docs/method.md, Training."""

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

    `label_smoothing` is of the training loss only. Compilation, where the runtime has it, is for batches of
    `batch_size`; the smaller last batch of an epoch and evaluation run as they are, which saves three compilations,
    unless the runtime compiles all.
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
        alike = self.runtime.compile_all and processes.size() == 1
        self.valid_model = self.runtime.compiled(self.model) if alike else self.model  # as it is called in validation

    def train_step(
        self, views: Sequence[torch.Tensor], labels: torch.Tensor, images: int | None = None
    ) -> torch.Tensor:
        """One optimizer step on a batch of uint8 views; returns the loss, still on the device.

        Args:
            images: in the batch of all processes, of which this is a part, and whose loss is the sum of theirs; None:
                there is one process.

        Where a gradient is infinite or not a number, the weights stay as they are, as the paper's loss scaler has it.

        Raises:
            OutOfMemory: names the batch, the views and the precision that did not fit.
        """
        images = images or len(labels)
        whole = images == self.batch_size or self.runtime.compile_all
        forward = self.compiled_model if whole else self.parallel_model
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
        """For several processes: backward passes that change nothing, on a batch of any views; before the first step.

        It is after the first ones that processes decide how they put gradients together for exchange, by which sums
        are rounded: else the first steps after a resume would be others than without.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng(), self.runtime.memory_for("a first backward pass"):
            for _ in range(3):
                self.parallel_model.train()(*self.to_device(views)).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def steps_taken(self) -> int:
        """Steps that changed the weights, by the optimizer's own count; to ask is to wait for the device."""
        states = iter(self.optimizer.state.values())
        return int(next(states, {"step": 0})["step"])


def build_trainer(
    model: nn.Module, experiment: Experiment, settings: Settings, runtime: Runtime, epochs: int
) -> Trainer:
    """Place the model on the device and give it its optimizer and schedule over `epochs` epochs.

    Raises:
        UserError: its activations are to be computed again, and it has no blocks that can be.
    """
    if recomputes(experiment, settings, runtime):
        checkpoint_blocks(model)
    model = processes.synchronised(model)
    runtime.place(model)
    optimizer, scheduler = build_optimizer(model, experiment, epochs, settings.eta_min, settings.author_runtime)
    return Trainer(model, optimizer, scheduler, runtime, settings.label_smoothing, experiment.batch_size)
