"""The processes that torchrun started for one command; the only place that knows torch.distributed. docs/cluster.md.

All run the same code, each on its share of every batch; only the first, main, writes files and prints. Without
torchrun there is one process, and nothing here has an effect.
"""

import gc
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from utils import Stopped, UserError, first_line

T = TypeVar("T")
REASON_SECONDS = 10  # how long the others wait for the reason of a process that has left
START_SECONDS = 60


# --------------------------------------------------------------------------------------------- process groups
@dataclass
class _Job:
    """The processes of the command. After an error they leave their group and join a new one."""

    rank: int
    size: int
    store: dist.Store  # torchrun's, which outlives groups
    on_cuda: bool
    groups: int = 0  # so far

    def join_group(self) -> None:
        """Make a new group of all processes."""
        self.groups += 1
        store = dist.PrefixStore(f"group {self.groups}", self.store)
        backend = "cpu:gloo,cuda:nccl" if self.on_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
        if self.on_cuda:
            threading.Thread(target=self._abort_after_error, args=(self.groups,), daemon=True).start()

    def leave_group(self) -> None:
        """Leave the group; processes that wait in it for this one get a RuntimeError, once no model refers to it."""
        if dist.is_initialized():
            gc.collect()
            distributed_c10d._abort_process_group() if self.on_cuda else dist.destroy_process_group()

    def error_of_all(self, error: Exception) -> Exception:
        """The first error of any process, for all of them; they then join a new group.

        Args:
            error: this process's. A lost connection only means that another process has left; if that one gives no
                reason, it was killed.
        """
        if isinstance(error, OSError):  # `run_command` shows it as a sentence too
            error = UserError(error).with_traceback(error.__traceback__)
        key = f"error {self.groups}"
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "onnection" in str(error))
        try:
            if not lost:
                self.store.compare_set(key, "", json.dumps([type(error).__name__, str(error)]))
            traceback.clear_frames(error.__traceback__)  # they refer to the model
            self.leave_group()
            self.store.wait([key], timedelta(seconds=REASON_SECONDS))
            kind, message = json.loads(self.store.get(key))
            self.join_group()
        except RuntimeError:
            what = f"a process of this command has ended ({first_line(error)}): run the same command again to resume"
            return UserError(what) if lost else error
        known = {each.__name__: each for each in (UserError, *UserError.__subclasses__())}
        shared = error if kind == type(error).__name__ else known.get(kind, RuntimeError)(message)
        shared.of_all = True
        return shared

    def _abort_after_error(self, group: int) -> None:
        """End the CUDA kernel in which this process waits for one that has left; nothing else does."""
        with suppress(RuntimeError):
            while self.groups == group and not self.store.check([f"error {group}"]):
                time.sleep(1)
            if self.groups == group:
                self.leave_group()


_job: _Job | None = None


@contextmanager
def joined(device: str) -> Iterator[None]:
    """In the block, the processes that torchrun started are one group; without torchrun nothing changes.

    Args:
        device: of the settings: auto, cpu or cuda.

    Raises:
        UserError: the processes do not find one another.
    """
    global _job
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        _job = _Job(rank, size, store, on_cuda=device != "cpu" and torch.cuda.is_available())
        _job.join_group()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes that torchrun started did not meet ({first_line(error)})") from None
    if not is_main():  # not restored: commands print after the block too
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        with errors_shared():
            yield
            same(None)  # the others wait for main, which may still fail at work that it alone does
    except (UserError, Stopped) as error:
        if not is_main() and (isinstance(error, Stopped) or hasattr(error, "of_all")):
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (main prints it)
        raise
    finally:
        _job.leave_group()
        _job = None


@contextmanager
def errors_shared() -> Iterator[None]:
    """All processes raise what one of them raises in the block, so that none waits for it; all can then continue.

    `Stopped` is not passed on: all processes raise it themselves.
    """
    try:
        yield
    except Exception as error:
        if _job is None or isinstance(error, Stopped) or hasattr(error, "of_all"):
            raise
        raise _job.error_of_all(error) from None


def rank() -> int:
    """The number of this process; 0 is main."""
    return _job.rank if _job else 0


def size() -> int:
    """The number of processes."""
    return _job.size if _job else 1


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process.

    Raises:
        UserError: the settings name one GPU for all, or there are fewer GPUs than processes.
    """
    number, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise UserError(f"device is {device}, and torchrun gives each process a GPU of its own: set --device cuda")
    if number >= found:
        raise UserError(
            f"torchrun has started {os.environ['LOCAL_WORLD_SIZE']} processes on a machine where torch sees {found} "
            f"CUDA devices: lower --nproc_per_node, or set --device cpu"
        )
    return torch.device("cuda", number)


def no_bar() -> bool | None:
    """tqdm's `disable`: True for all processes but main, whose None disables bars where there is no terminal."""
    return None if is_main() else True


# ----------------------------------------------------------------------------------------------- exchange
def same(value: T) -> T:
    """Main's value, in all processes."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main(action: Callable[[], T]) -> T:
    """Call `action` in main only; all processes return or raise what it does."""
    if size() == 1:
        return action()
    result, error = None, None
    if is_main():
        try:
            result = action()
        except Exception as raised:
            error = raised
    result, error = same((result, error))
    if error:
        error.of_all = True
        raise error
    return result


def check_alike(values: Mapping[str, object]) -> None:
    """Raise UserError if these values differ between processes."""
    first, *others = gathered(values)
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise UserError(
                    f"process {number} of this command has {name} = {other[name]}, and process 0 has {value}: start "
                    f"all alike, with the same flags, code, libraries and data set on each machine"
                )


def any_of(flag: bool) -> bool:
    """Whether the flag is set in at least one process."""
    return flag if size() == 1 else bool(total(torch.tensor(int(flag))) > 0)


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum of a CPU tensor over all processes."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------------- models
def same_weights(model: nn.Module) -> None:
    """Give the model main's weights and buffers."""
    if size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def synchronised(model: nn.Module) -> nn.Module:
    """The model, with batch normalisation in training over the images of all processes."""
    if size() == 1:
        return model
    if _job.on_cuda:
        return convert_sync_batchnorm(model)
    for module in model.modules():  # torch's own layer is for GPUs only
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _BatchNorm
    return model


def parallel(model: nn.Module) -> nn.Module:
    """The model as training calls it: gradients are means over processes, exchanged during the backward pass."""
    if size() == 1:
        return model
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "static_graph": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers, whose new name torch 2.11 lacks
        return DistributedDataParallel(model, **options)


class _Sum(torch.autograd.Function):
    """`total`, with its gradient."""

    @staticmethod
    def forward(_: object, value: torch.Tensor) -> torch.Tensor:
        return total(value)

    @staticmethod
    def backward(_: object, gradient: torch.Tensor) -> torch.Tensor:
        return total(gradient)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over all processes, on the CPU; with the activation that some layers of timm carry."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        places, shape = [d for d in range(input.ndim) if d != 1], [1, -1] + [1] * (input.ndim - 2)
        mean, variance = self.running_mean, self.running_var
        if self.training or mean is None:
            n = total(torch.tensor(float(input.numel() // input.shape[1])))
            mean = _Sum.apply(input.sum(places)) / n
            variance = _Sum.apply((input - mean.view(shape)).square().sum(places)) / n
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
            with torch.no_grad():
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * n / (n - 1), share)
        factor = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        output = (input - mean.view(shape)) * factor.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        for layer in ("drop", "act"):
            output = getattr(self, layer, nn.Identity())(output)
        return output
