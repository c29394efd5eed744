"""Every image file decoded once: is it readable, what is in it, and, if wanted, its files in the pixel cache."""

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
from data.records import CheckedImage, ImageRecord
from data.workers import exit_with_parent, keep_freed_memory, loading_processes, signals_held, worker_context
from utils import UserError, sha256_of

LARGE_PIXELS = 32_000_000  # larger images are decoded one at a time, so that memory does not grow with the workers
File = tuple[str, int]  # path relative to the data root, with forward slashes; label
Result = TypeVar("Result")
Workers = int | Literal["auto"]  # number of processes, as in the settings; 0 works in this one


def check_images(settings: Settings, files: Sequence[File], builder: CacheBuilder | None = None) -> list[CheckedImage]:
    """`check_image` of all `files`, in their order; raises UserError as it and `in_processes` do."""
    limits = dict(max_pixels=settings.max_image_pixels, reencode_jpeg=settings.reencode_jpeg)
    check = partial(check_image, root=settings.data_root, **limits, builder=builder)
    modules = ("data.views",) if builder else ()  # with torch: seconds
    return in_processes(check, [(file,) for file in files], settings.num_workers, "checking", modules)


def in_processes(
    work: Callable[..., Result], tasks: Sequence[tuple], num_workers: Workers, title: str, modules: Sequence[str] = ()
) -> list[Result]:
    """`work(*task)` of all tasks, one for each image, in their order whatever the number of workers.

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


def in_turn(image: Image.Image) -> AbstractContextManager:
    """The block in which an opened image is decoded: for large ones, by one worker at a time."""
    return _large_images if image.width * image.height > LARGE_PIXELS else nullcontext()


def check_image(
    file: File, root: Path, max_pixels: int, reencode_jpeg: int, builder: CacheBuilder | None = None
) -> CheckedImage:
    """Decode one file, once; measure it, and write it to the cache that `builder` builds, unless it is there already.

    Raises UserError if memory runs out, or the cache cannot be written.
    """
    name, label = file
    path, unreadable = root / name, ImageRecord(name, label, 0, "", "", "", 0, 0, "")
    try:
        status = path.stat()
        content = sha256_of(path) if stat.S_ISREG(status.st_mode) else ""
        unreadable = replace(unreadable, bytes=status.st_size, content=content)
        known = builder.known(content) if builder else None
        if known and known.record.width * known.record.height <= max_pixels:
            record = replace(known.record, path=name, label=label, bytes=status.st_size)
            return replace(known, record=record)
        with open_image(path, max_pixels) as image, in_turn(image):
            unreadable = replace(unreadable, format=image.format or "", mode=image.mode)
            decoded = decode(image)
            check_reencoding(decoded.size, reencode_jpeg)
            record = replace(unreadable, width=decoded.width, height=decoded.height, key=pixel_key(decoded))
            checked = CheckedImage(record, _sums(decoded))
            if builder:
                builder.write(checked, decoded)
            return checked
    except (UnreadableImage, OSError) as error:
        return CheckedImage(replace(unreadable, problem=problem_of(error, path)), (0,) * 6)


def problem_of(error: UnreadableImage | OSError, path: Path) -> str:
    """Why a file cannot be decoded; raises UserError if memory ran out, which says nothing about the file."""
    if isinstance(error.__cause__, MemoryError):
        raise UserError(f"not enough memory to decode {path}: set a smaller --num-workers") from None
    return getattr(error, "strerror", None) or str(error)


def _sums(image: Image.Image) -> tuple[int, ...]:
    """Of the values of red, green, blue, then of their squares, from the histogram."""
    counts, values = np.array(image.histogram(), np.int64).reshape(3, 256), np.arange(256)
    return *(counts @ values).tolist(), *(counts @ values**2).tolist()
