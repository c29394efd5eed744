"""Decodes every image file once: is it readable, what is in it; and writes it to the pixel cache on request."""

import signal
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import Settings
from data.cache.builder import CacheBuilder
from data.images import UnreadableImage, check_reencoding, decode, open_image, pixel_key
from data.records import ImageRecord
from data.workers import exit_with_parent, keep_freed_memory, loading_processes, signals_held, worker_context
from utils import UserError, sha256_of

LARGE_PIXELS = 32_000_000  # larger images are decoded one at a time, so that memory does not grow with the workers
Result = TypeVar("Result")
Workers = int | Literal["auto"]  # number of processes, as in the settings; 0: work in this one


def check_images(
    settings: Settings, images: Sequence[ImageRecord], builder: CacheBuilder | None = None
) -> list[ImageRecord]:
    """`check_image` of all `images`, in their order; raises UserError as it and `in_processes` do."""
    limits = dict(max_pixels=settings.max_image_pixels, reencode_jpeg=settings.reencode_jpeg)
    check = partial(check_image, root=settings.data_root, **limits, builder=builder)
    modules = ("data.views",) if builder else ()  # with torch: seconds
    return in_processes(check, [(image,) for image in images], settings.num_workers, "checking", modules)


def in_processes(
    work: Callable[..., Result], tasks: Sequence[tuple], num_workers: Workers, title: str, modules: Sequence[str] = ()
) -> list[Result]:
    """`work(*task)` of all tasks, one for each image, in the order of the tasks.

    Args:
        title: of the progress bar.
        modules: what workers import before they start, besides what this process has imported.

    Raises:
        UserError: a worker process was killed.
    """
    workers = loading_processes(cpu_computes=False) if num_workers == "auto" else num_workers
    workers = min(workers, len(tasks))
    progress = partial(tqdm, total=len(tasks), desc=title, unit=" images", disable=None)
    if not workers:
        keep_freed_memory()  # here as in a worker
        return [work(*task) for task in progress(tasks)]
    context = worker_context(*modules)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (context.Lock(), workers))
    try:
        with signals_held():  # here its processes start
            futures = [pool.submit(work, *task) for task in tasks]  # pool.map can hang when a worker is killed
        return [future.result() for future in progress(futures)]
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, most likely because memory ran out: "
            f"set a smaller --num-workers than {workers} and run the command again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------- in a worker process
_large_images: AbstractContextManager = nullcontext()  # a lock that all workers share


def _start_worker(lock: AbstractContextManager, workers: int) -> None:
    global _large_images
    _large_images = lock
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # by which the pool ends them when one was killed
    keep_freed_memory(workers)
    exit_with_parent()


def decoding_turn(image: Image.Image) -> AbstractContextManager:
    """Held while an opened image is decoded: only one worker at a time decodes a large one."""
    return _large_images if image.width * image.height > LARGE_PIXELS else nullcontext()


def check_image(
    image: ImageRecord, root: Path, max_pixels: int, reencode_jpeg: int, builder: CacheBuilder | None = None
) -> ImageRecord:
    """Decode and measure one file, and write it to the cache that `builder` builds, unless that holds it already.

    Raises UserError if memory runs out, or the cache cannot be written.
    """
    path = root / image.path
    try:
        status = path.stat()
        content = sha256_of(path) if stat.S_ISREG(status.st_mode) else ""
        image = replace(image, bytes=status.st_size, content=content)
        known = builder.find(image) if builder else None
        if known and known.width * known.height <= max_pixels:
            return known
        with open_image(path, max_pixels) as opened, decoding_turn(opened):
            image = replace(image, format=opened.format or "", mode=opened.mode)
            decoded = decode(opened)
            check_reencoding(decoded.size, reencode_jpeg)
            size = {"width": decoded.width, "height": decoded.height}
            checked = replace(image, **size, key=pixel_key(decoded), sums=_sum_values(decoded))
            if builder:
                builder.write(checked, decoded)
            return checked
    except (UnreadableImage, OSError) as error:
        return replace(image, problem=problem_of(error, path))


def problem_of(error: UnreadableImage | OSError, path: Path) -> str:
    """Why a file cannot be decoded; raises UserError if memory ran out, which says nothing about the file."""
    if isinstance(error.__cause__, MemoryError):
        raise UserError(f"not enough memory to decode {path}: set a smaller --num-workers") from None
    return getattr(error, "strerror", None) or str(error)


def _sum_values(image: Image.Image) -> tuple[int, ...]:
    """`ImageRecord.sums`, from the histogram."""
    counts, values = np.array(image.histogram(), np.int64).reshape(3, 256), np.arange(256)
    return *(counts @ values).tolist(), *(counts @ values**2).tolist()
