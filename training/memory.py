"""GPU memory and FLOPs of a training step, found without a GPU on fake tensors, which have sizes and no values.

The step is `Trainer.train_step`'s, uncompiled. Fake CUDA tensors have no backward pass on a machine without CUDA, so
they are CPU tensors with CUDA's rules of mixed precision. What CUDA's libraries need for themselves is not counted.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from config import Experiment, GlassExperiment, Settings
from data.samplers import MAP_SIDE
from models.build import build_model
from models.checkpointing import checkpoint_blocks
from training import processes
from training.optimizer import parameter_groups
from training.runtime import MEGABYTE, Runtime, lay_out
from utils import UserError, first_line

USABLE = 0.9  # share of a card's memory: CUDA, workspaces of its libraries and gaps between tensors take the rest
ALLOCATION = 512  # bytes: CUDA's allocator gives out multiples of it
aten = torch.ops.aten
COUNTED_AS = {  # attention on the CPU, whose FLOPs torch counts on CUDA only
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


@dataclass(frozen=True)
class Needs:
    """Memory of a training step, in MB of 2**20 bytes.

    `activations` is what the forward pass keeps for the backward pass, with the weights in low precision. Gradients
    are made while activations are freed: `peak` is less than the sum.
    """

    parameters: float  # and buffers
    gradients: float
    optimizer: float
    inputs: float
    activations: float
    peak: float


class PlannedTraining:
    """A model in training, as fake tensors."""

    def __init__(self, experiment: Experiment, settings: Settings) -> None:
        """`settings` gives precision and layout, and whether activations are checkpointed ("auto": they are not).

        Raises:
            UserError: no such backbone, or activation checkpointing of a backbone without blocks.
        """
        self.chooses = getattr(experiment, "crop_sampler", None) == "cooi"  # the model chooses K of all places' crops
        if isinstance(experiment, GlassExperiment) and not self.chooses:  # all other samplers give K crops
            experiment = replace(experiment, crop_sampler="stratified")
        self.has_crops, self.P = experiment.crops_per_image > 0, settings.patch_size
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            self.model = build_model(experiment, replace(settings, pretrained=False, weights_files=())).train()
        if settings.activation_checkpointing == "on":
            checkpoint_blocks(self.model)
        for module in self.model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):  # CUDA computes them in float32 in any precision
                module.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))
        self.model.channels_last = settings.channels_last != "off" and not settings.author_runtime
        lay_out(self.model)
        device = torch.device("cpu")
        self.runtime = Runtime(device, settings.precision, False, settings.channels_last, True, "high")
        self.fake, self.memory = FakeTensorMode(allow_non_fake_inputs=True), _LiveBytes()
        with self._without_values():
            self.model.to_empty(device=device)
            self.parameters = self.memory.live
            self.optimizer = torch.optim.AdamW(parameter_groups(self.model, experiment), fused=True)
            for parameter in self.model.parameters():
                parameter.grad = torch.empty_like(parameter)
            self.gradients = self.memory.live - self.parameters
            self.optimizer.step()  # creates its state

    def needs(self, images: int, num_crops: int) -> Needs:
        """Memory of a step on a batch of `images` with K = `num_crops`, which a model without crops ignores.

        Raises:
            UserError: batch normalisation does not take one image.
        """
        try:
            with self._without_values():
                return Needs(*(size / MEGABYTE for size in self._step(images, num_crops)))
        except ValueError as error:
            raise UserError(f"a batch of {images} cannot be trained ({first_line(error)}): raise batch_size") from None

    def flops(self, num_crops: int) -> int:
        """FLOPs of a training step per image, recomputed activations included; a multiply-add counts as two."""
        with self._without_values(), FlopCounterMode(display=False) as counter:
            counter.flop_registry |= {own: counter.flop_registry[known] for own, known in COUNTED_AS.items()}
            self._step(2, num_crops)
        return counter.get_total_flops() // 2

    def _step(self, images: int, num_crops: int) -> tuple[int, ...]:
        """Take a training step; returns the fields of `Needs` in bytes."""
        self.model.num_chosen, given = num_crops * self.chooses, MAP_SIDE**2 if self.chooses else num_crops
        shapes = [(images, 3, self.P, self.P), (images, given, 3, self.P, self.P)][: 1 + self.has_crops]
        self.optimizer.zero_grad()
        self.memory.peak = before = self.memory.live
        views = self.runtime.to_device(self.model, [torch.empty(shape, dtype=torch.uint8) for shape in shapes])
        inputs = self.memory.live - before
        with self.runtime.autocast():
            loss = self.model(*views).float().sum()
        del views
        activations = self.memory.live - before
        loss.backward()
        self.optimizer.step()
        return self.parameters, self.gradients, before - self.parameters, inputs, activations, self.memory.peak

    @contextmanager
    def _without_values(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=()), self.fake, self.memory:
            yield


def recomputes(experiment: Experiment, settings: Settings, runtime: Runtime) -> bool:
    """Whether activations are checkpointed; `auto`: on a GPU without the memory to keep them, which is then printed."""
    if settings.activation_checkpointing != "auto" or runtime.device.type != "cuda":
        return settings.activation_checkpointing == "on"
    images = math.ceil(experiment.batch_size / processes.size())
    needs = PlannedTraining(experiment, settings).needs(images, experiment.crops_per_image)
    usable = USABLE * torch.cuda.get_device_properties(runtime.device).total_memory / MEGABYTE
    if needs.peak > usable:
        planned = f"{needs.peak:,.0f} MB planned, uncompiled"
        print(f"{experiment.name}: activation checkpointing ({planned}; {usable:,.0f} MB usable)")
    return needs.peak > usable


def largest(peak: Callable[[int], float], limit: float, start: int, most: int) -> int:
    """The largest n from 1 to `most` with peak(n) within `limit`; 0 if there is none. peak grows nearly linearly."""
    low, high, n = 0, most + 1, start
    slope = (peak(start + 1) - peak(start)) or 1
    while high - low > 1:
        n = min(max(n, low + 1), high - 1)
        try:
            left = limit - peak(n)
        except UserError:  # a batch of one
            left = -1.0
        low, high = (n, high) if left >= 0 else (low, n)
        n += math.floor(left / slope)
    return low


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages, and their peak, as CUDA's allocator would."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run `function`, and count the storages of its results."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                size = math.ceil(storage.nbytes() / ALLOCATION) * ALLOCATION
                self._known.add(storage._cdata)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, size)
        return result

    def _free(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.live -= size
