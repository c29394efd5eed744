"""Device, precision and compilation, chosen once; the only place that knows the device. docs/method.md, Training."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.backends import cudnn

from config import Settings
from data.workers import available_cores, loading_processes
from models.backbones import normalised
from models.compilation import compile_blocks
from training import processes
from utils import UserError

MEGABYTE = 2**20  # as in the paper's tables
CUDA_MEMORY = "cuda_max_memory_allocated"
CPU_MEMORY = "saved_for_backward"

# What errors of torch's allocators, CUDA (AcceleratorError) and cuBLAS contain, and those of Triton.
NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
NO_COMPILER = ("Failed to find C compiler", "No working C++ compiler")


def _causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class OutOfMemory(UserError):
    """The device had no memory left."""


@dataclass(frozen=True)
class Runtime:
    """How and where models compute. `compile` applies to full training batches, with `compile_all` to every batch."""

    device: torch.device
    precision: str  # of the forward pass: fp16, bf16 or fp32; always fp32 on the CPU
    compile: bool
    channels_last: str  # auto, on or off
    deterministic: bool
    matmul_precision: str
    compile_all: bool = False
    compile_blocks: bool = False

    @property
    def memory_kind(self) -> str:
        """What `track_memory` measures here: CUDA's peak of allocated bytes, or bytes saved for backward."""
        return CUDA_MEMORY if self.device.type == "cuda" else CPU_MEMORY

    def resolved(self) -> dict[str, Any]:
        """The resolved choices that numbers depend on, for a run's metadata; the settings may be auto."""
        return {"device_type": self.device.type, "precision": self.precision, "compile": self.compile}

    @contextmanager
    def switched(self) -> Iterator[None]:
        """In the block, torch's global switches are set for this runtime, and its device is the current one."""
        before = {name: read() for name, (read, _) in SWITCHES.items()}
        wanted = before | {
            "matmul_precision": self.matmul_precision,
            "tf32": self.matmul_precision != "highest",
            "benchmark": not self.deterministic,
            "deterministic": (self.deterministic, False),
            "fill_memory": False,  # deterministic algorithms fill new memory with NaN by default: a tenth of a step
        }
        if self.device.type == "cpu":
            # The same for any num_workers: the number of threads may change the rounding of sums.
            computing = max(1, available_cores() - loading_processes(cpu_computes=True))
            wanted["threads"] = min(before["threads"], computing)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first use
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            try:
                _set_switches(wanted)
                yield
            finally:
                _set_switches(before)

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in its memory layout; memory of earlier models is freed first."""
        if self.compile:  # compiled code refers to its model; and many of them exceed the recompilation limit
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with self.memory_for("the model"):
            model.to(self.device)
        model.channels_last = self._suits_channels_last(model)
        return lay_out(model)

    def _suits_channels_last(self, model: nn.Module) -> bool:
        """Whether the model can be channels_last; on the CPU, where it is up to twice as fast, some models crash.

        oneDNN writes past its memory in the backward pass of 1x1 convolutions with a stride and few channels (seen with
        fewer than 16, in timm:fastvit_t8), and the process dies without a message.
        """
        if self.channels_last != "auto" or self.device.type == "cuda":
            return self.channels_last != "off"
        convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
        return not any(c.kernel_size == (1, 1) and max(c.stride) > 1 and c.in_channels < 64 for c in convolutions)

    def compiled(self, model: nn.Module) -> nn.Module:
        """The model's forward pass, compiled if `compile` is set, for one shape of views unless `compile_all`.

        With `compile_blocks`, returns the model itself, whose repeated blocks are compiled from now on, in evaluation
        too: once for all equal blocks.
        """
        if not self.compile:
            return model
        if self.compile_blocks:
            compile_blocks(model)
            return model
        return torch.compile(model, dynamic=None if self.compile_all else False)  # None is torch's default

    def to_device(self, model: nn.Module, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views (..., 3, P, P) of 0 to 255 on the device, normalised for the model."""
        return [normalised(model, view.to(self.device, non_blocking=True)) for view in views]

    @contextmanager
    def memory_for(self, what: str) -> Iterator[None]:
        """Raise `OutOfMemory`, which names `what`, if memory runs out in it; a UserError without a C compiler."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is what its compiler wraps it in
            causes = list(_causes_of(error))
            if any(sign in str(cause) for cause in causes for sign in NO_COMPILER):
                raise UserError(
                    f"torch.compile finds no C compiler ({causes[-1]}): install gcc, or pass --no-compile"
                ) from None
            if not any(sign in str(cause) for cause in causes for sign in NO_MEMORY):
                raise
            raise OutOfMemory(
                f"{self.device} has no memory left for {what} in {self.precision}: lower --batch-size or, for GLASS, "
                f"the number of crops, or train with --activation-checkpointing on"
            ) from None

    def batches(self, loader: Iterable[Sequence[torch.Tensor]]) -> Iterator[Sequence[torch.Tensor]]:
        """The loader's batches; raises `OutOfMemory` where its thread that pins memory runs out of it."""
        iterator = iter(loader)
        while True:
            with self.memory_for("a batch in pinned memory"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for a forward pass; no effect in fp32."""
        if self.precision == "fp32":
            return nullcontext()
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]
        return torch.autocast(self.device.type, dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16; in other precisions the scale is 1, and only steps that are not finite are skipped."""
        if self.precision == "fp16":
            return torch.amp.GradScaler(self.device.type)
        # A skipped step multiplies the scale by a factor that float32 rounds to 1.
        return torch.amp.GradScaler(self.device.type, init_scale=1.0, backoff_factor=1 - 1e-12, growth_interval=2**30)

    @contextmanager
    def track_memory(self) -> Iterator["MemoryMeter"]:
        """Measure peak memory of the block; the meter's `peak_mb` holds it afterwards."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield CudaMemoryMeter(self.device)
        else:
            meter = MemoryMeter()
            with torch.autograd.graph.saved_tensors_hooks(meter.save, meter.load):
                yield meter

    def wait(self) -> None:
        """Wait until the device has finished, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def lay_out(model: nn.Module) -> nn.Module:
    """The model, in channels_last format if its `channels_last` is set and it has more convolutions than a ViT."""
    if model.channels_last and sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 2:
        model.to(memory_format=torch.channels_last)
    return model


def build_runtime(settings: Settings) -> Runtime:
    """Choose the device; `Runtime.switched` sets torch's global switches.

    Raises:
        UserError: a device that is missing, or a precision that it does not support.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name}, and torch sees {torch.cuda.device_count()} CUDA devices: set --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name}: this project runs on cpu and cuda")
    on_cuda = device.type == "cuda"
    if on_cuda and processes.size() > 1:
        device = processes.own_device(device)
    if on_cuda and settings.precision == "bf16":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not supported:
            raise UserError(
                f"precision is bf16, which {torch.cuda.get_device_name(device)} lacks: set --precision fp16"
            )
    return Runtime(
        device,
        precision=settings.precision if on_cuda else "fp32",
        compile=settings.compile and on_cuda,
        channels_last="off" if settings.author_runtime else settings.channels_last,
        deterministic=settings.deterministic,
        matmul_precision=settings.matmul_precision,
        compile_all=settings.author_runtime,
        compile_blocks=settings.compile_blocks and not settings.author_runtime,
    )


SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {  # torch's: how to read and to set each
    "threads": (torch.get_num_threads, lambda n: n == torch.get_num_threads() or torch.set_num_threads(n)),
    "matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "tf32": (lambda: cudnn.allow_tf32, partial(setattr, cudnn, "allow_tf32")),
    "benchmark": (lambda: cudnn.benchmark, partial(setattr, cudnn, "benchmark")),
    "deterministic": (  # with whether it only warns
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "fill_memory": (
        lambda: torch.utils.deterministic.fill_uninitialized_memory,
        partial(setattr, torch.utils.deterministic, "fill_uninitialized_memory"),
    ),
}


def _set_switches(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        SWITCHES[name][1](value)


class MemoryMeter:
    """Peak of the bytes that autograd keeps for the backward pass, each storage counted once, without weights."""

    def __init__(self) -> None:
        self.peak_bytes = self._live_bytes = 0
        self._uses: dict[int, int] = {}  # storage -> saved tensors in it

    @property
    def peak_mb(self) -> float:
        """Megabytes of 2**20 bytes."""
        return self.peak_bytes / MEGABYTE

    def save(self, tensor: torch.Tensor) -> Any:
        """Called by autograd for each tensor it keeps."""
        owner = tensor if tensor._base is None else tensor._base  # linear layers keep a view of their weight
        return tensor if owner.is_leaf and owner.requires_grad else _Saved(self, tensor)

    def load(self, saved: Any) -> torch.Tensor:
        """Called by autograd when it needs the tensor again."""
        return saved.tensor if isinstance(saved, _Saved) else saved

    def count(self, storage: int, size: int, change: int) -> None:
        """Autograd keeps one tensor more (`change` 1) or fewer (-1) in a storage of this many bytes."""
        before = self._uses.pop(storage, 0)
        if after := before + change:
            self._uses[storage] = after
        if not before or not after:
            self._live_bytes += change * size
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)


class CudaMemoryMeter(MemoryMeter):
    """Peak of the bytes that CUDA's allocator has given out, since it was last reset."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def peak_mb(self) -> float:
        """Megabytes of 2**20 bytes, up to now."""
        return torch.cuda.max_memory_allocated(self.device) / MEGABYTE


class _Saved:
    """A tensor that autograd keeps; its meter counts it from its creation to its deletion."""

    def __init__(self, meter: MemoryMeter, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.meter, self.tensor, self.storage, self.size = meter, tensor, storage.data_ptr(), storage.nbytes()
        meter.count(self.storage, self.size, 1)

    def __del__(self) -> None:
        self.meter.count(self.storage, self.size, -1)
