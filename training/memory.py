"""What a training step needs of a GPU: memory and FLOPs, found without one on tensors that have sizes and no values.

The step is `Trainer.train_step`'s, uncompiled. Such tensors of CUDA have no backward pass on a machine without it: they
are the CPU's, with CUDA's rules of mixed precision. What CUDA's libraries need for themselves is not counted.
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

USABLE = 0.9  # of a card's memory: CUDA itself, workspaces of its libraries and gaps between tensors take the rest
ALLOCATED = 512  # bytes, of which CUDA's allocator gives out multiples
aten = torch.ops.aten
COUNTED_AS = {  # the CPU's attention, of which torch counts CUDA's alone
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


@dataclass(frozen=True)
class Needs:
    """Of a training step, in MB of 2**20 bytes.

    `activations` is what the forward pass leaves for the backward pass, with the weights in low precision. Gradients
    come as activations go: `peak` is less than the sum.
    """

    parameters: float  # and buffers
    gradients: float
    optimizer: float
    inputs: float
    activations: float
    peak: float


class PlannedTraining:
    """A model in training, on no device."""

    def __init__(self, experiment: Experiment, settings: Settings) -> None:
        """`settings` gives precision and layout, and whether activations are computed again: on or not.

        Raises:
            UserError: no such backbone, or none with blocks where activations are computed again.
        """
        self.chooses = getattr(experiment, "crop_sampler", None) == "cooi"  # among the crops of all places
        if isinstance(experiment, GlassExperiment) and not self.chooses:  # other samplers give K crops, too
            experiment = replace(experiment, crop_sampler="stratified")
        self.has_crops, self.P = experiment.crops_per_image > 0, settings.patch_size
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            self.model = build_model(experiment, replace(settings, pretrained=False, weights_files=())).train()
        if settings.activation_checkpointing == "on":
            checkpoint_blocks(self.model)
        for module in self.model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):  # on CUDA in float32, whatever the precision
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
            self.optimizer.step()  # makes its state

    def needs(self, images: int, num_crops: int) -> Needs:
        """Of a step on a batch of `images` with K = `num_crops`, of which a model may have none.

        Raises:
            UserError: batch normalisation does not take one image.
        """
        try:
            with self._without_values():
                return Needs(*(size / MEGABYTE for size in self._step(images, num_crops)))
        except ValueError as error:
            raise UserError(f"a batch of {images} cannot be trained ({first_line(error)}): raise batch_size") from None

    def flops(self, num_crops: int) -> int:
        """Of a training step, an image; a product and its sum count as two."""
        with self._without_values(), FlopCounterMode(display=False) as counter:  # which keeps what is computed again
            counter.flop_registry |= {own: counter.flop_registry[known] for own, known in COUNTED_AS.items()}
            self._step(2, num_crops)
        return counter.get_total_flops() // 2

    def _step(self, images: int, num_crops: int) -> tuple[int, ...]:
        """A training step; the fields of `Needs` in bytes."""
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
    """Whether activations are computed again; `auto`: on a GPU that has too little memory to keep them, and says so."""
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
    """The largest n from 1 to `most` for which peak(n), which grows nearly in a line, is within `limit`; 0: none."""
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
    """Counts the bytes of all storages that are alive, and their peak, as CUDA's allocator would."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run it, and enter the storages of what it gives."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                size = math.ceil(storage.nbytes() / ALLOCATED) * ALLOCATED
                self._known.add(storage._cdata)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, size)
        return result

    def _free(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.live -= size
