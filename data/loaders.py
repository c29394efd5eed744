"""The only `DataLoader` call."""

import math
import multiprocessing
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing import util
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from config import Experiment, Settings
from data.datasets import ImageDataset
from data.index import Index
from data.views import ViewSettings
from data.workers import (
    exit_with_parent,
    keep_freed_memory,
    loading_processes,
    processes_here,
    signals_held,
    worker_context,
)
from utils import UserError, first_line

SHARED_MEMORY = Path("/dev/shm")  # on Linux, batches come from the workers through it; 64 MB in most containers
PREFETCHED = 2  # batches of each process; one more is in use
FULL = ("No space left on device", "Bus error")  # torch's errors if shared memory is full


class EpochBatches(Sampler[list[tuple[int, int | None]]]):
    """Yields batches of (position, epoch), so that a worker process knows the epoch.

    In training the order is the paper's shuffle, a function of (seed, epoch): docs/method.md, Training. In evaluation
    it is 0..n-1 and the epoch None. Call `set_epoch` before each pass over the loader. Each of N processes gets a slice
    of every training batch, and every N-th batch of evaluation.

    Args:
        share: rank of this process, and number of processes.
    """

    def __init__(
        self, length: int, seed: int, training: bool, batch_size: int = 1, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.length, self.seed, self.training, self.batch_size = length, seed, training, batch_size
        self.share, self.epoch, self.first = share, 0, 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch of the next pass, and how many positions at its start to skip."""
        self.epoch, self.first = epoch, first

    def order(self) -> list[int]:
        """Positions in the order of a pass, of all processes together."""
        if not self.training:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epoch + 1):  # what torch's shuffling loader draws in an epoch, all from one generator
            torch.empty((), dtype=torch.int64).random_(generator=generator)
            order = torch.randperm(self.length, generator=generator)
            torch.randperm(self.length, generator=generator)
        return order.tolist()

    def slice_of(self, batch: list) -> list:
        """This process's part of a training batch."""
        rank, size = self.share
        return batch[len(batch) * rank // size : len(batch) * (rank + 1) // size]

    @property
    def sizes(self) -> list[int]:
        """Images in each batch of the pass, of all processes together."""
        left = self.length - self.first
        return [min(self.batch_size, left - start) for start in range(0, left, self.batch_size)]

    @property
    def rounds(self) -> int:
        """The largest number of batches that one process gets."""
        return len(self.sizes if self.training else self.sizes[:: self.share[1]])

    def __iter__(self) -> Iterator[list[tuple[int, int | None]]]:
        epoch = self.epoch if self.training else None
        order = [(position, epoch) for position in self.order()[self.first :]]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        rank, size = self.share
        return iter([self.slice_of(batch) for batch in batches] if self.training else batches[rank::size])

    def __len__(self) -> int:
        rank, size = self.share
        return len(self.sizes if self.training else self.sizes[rank::size])


class ImageLoader(DataLoader):
    """A DataLoader whose iteration raises UserError if one of its processes was killed or shared memory is full."""

    batch_bytes: int  # of a batch of views

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        try:
            with signals_held() if self.num_workers else nullcontext():  # here its processes start
                batches = super().__iter__()
            yield from batches
        except (EOFError, ConnectionError, FileNotFoundError, RuntimeError) as error:
            if SHARED_MEMORY.is_dir() and any(text in str(error) for text in FULL):
                raise UserError(_shared_memory_is_full(self.num_workers, self.batch_bytes)) from None
            # The first three if its batches are lost with it; RuntimeError if torch noticed its end.
            raised_by_worker = str(error).startswith("Caught")
            if raised_by_worker or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                raise
            raise UserError(
                f"a process that loads images was killed ({first_line(error)}): lower --num-workers"
            ) from None


def _shared_memory_is_full(workers: int, batch_bytes: int) -> str:
    need, free = (PREFETCHED * workers + 1) * batch_bytes / 1e6, shutil.disk_usage(SHARED_MEMORY).free / 1e6
    return (
        f"shared memory ({SHARED_MEMORY}) is full or too small: loading with --num-workers {workers} needs "
        f"{need:,.0f} MB, and {free:,.0f} MB are free: start the container with --shm-size={math.ceil(need / 800)}g or "
        f"--ipc=host, or lower --num-workers (0 needs none)"
    )


def _fit_workers_to_shared_memory(workers: int, batch_bytes: int, say: bool) -> int:
    """`workers`, or as many as shared memory can hold the batches of; raises UserError if that is none."""
    if not workers or not SHARED_MEMORY.is_dir():
        return workers
    free = shutil.disk_usage(SHARED_MEMORY).free // processes_here()
    fit = min(workers, (free // batch_bytes - 1) // PREFETCHED)
    if fit < 1:
        raise UserError(_shared_memory_is_full(workers, batch_bytes))
    if fit < workers and say:
        print(f"{_shared_memory_is_full(workers, batch_bytes)}; loading with {fit}", flush=True)
    return fit


def build_loader(
    settings: Settings,
    experiment: Experiment,
    index: Index,
    rows: list[int],
    training_seed: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> ImageLoader:
    """Batches `(*views, labels)` of the index's `rows` as the experiment's model takes them.

    Views are uint8: global_view (B, 3, P, P) and local_crops (B, K, 3, P, P), or view (B, 3, P, P); labels int64 (B,);
    with `exact_resize`, global_view is float32 from 0 to 255. The last batch may be smaller.

    Args:
        training_seed: of the shuffle and the crops of training; None: evaluation, with fixed order and the crops
            of the settings' main seed.
        share: as for `EpochBatches`.
    """
    training = training_seed is not None
    seed = training_seed if training else settings.main_seed
    views = ViewSettings.of(settings, experiment, seed)
    dataset = ImageDataset(index, rows, views, settings.max_image_pixels, settings.reencode_jpeg)
    workers = settings.num_workers
    if workers == "auto":
        workers = loading_processes(cpu_computes=settings.device == "cpu" or not torch.cuda.is_available())
    # One at a time if images have different numbers of crops.
    batch_size = min(1 if views.every_tile and not training else experiment.batch_size, len(rows))
    batches = EpochBatches(len(dataset), seed, training, batch_size, share)
    workers = min(workers, batches.rounds)
    crops = views.most_crops([(record.height, record.width) for record in dataset.records], training)
    batch_bytes = batch_size * 3 * views.patch_size**2 * (crops + (4 if views.exact_resize else 1))
    workers = _fit_workers_to_shared_memory(workers, batch_bytes, say=training)
    loader = ImageLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=tuple,  # the data set makes complete batches, which are tuples
        num_workers=workers,
        persistent_workers=workers > 0 and not settings.author_runtime,
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=settings.device != "cpu" and torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that loading does not advance the global generator
        multiprocessing_context=worker_context(__name__) if workers else None,
        worker_init_fn=_start_worker,
    )
    loader.batch_bytes = batch_bytes
    return loader


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the processes are the parallelism
    keep_freed_memory(3 * get_worker_info().num_workers)  # the workers of training, validation and test all stay
    exit_with_parent()


def _end_workers() -> None:
    """Kill workers that an error left behind: multiprocessing would send SIGTERM, which they ignore, and wait."""
    for process in multiprocessing.active_children():
        process.kill()


util.Finalize(None, _end_workers, exitpriority=100)  # at the end of any process, workers included
