"""Every image file decoded once: is it readable, what is on it, and, if wanted, its bytes for the pixel cache."""

import signal
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from config import Preset
from data.cache_builder import PackWriter
from data.images import UnreadableImage, decode, open_image, pixels_of
from data.index import ImageRecord
from data.perturbations import jpeg
from data.pixel_cache import NOWHERE, VIEWS, CheckedImage, Entry, Kind, Slot, strips, write_parts, writing
from utils import (
    UserError,
    keep_freed_memory,
    leave_with_parent,
    loading_processes,
    sha256_of,
    signals_held,
    worker_context,
)

LARGE_PIXELS = 32_000_000  # larger images are decoded one at a time, so that memory does not grow with the workers
File = tuple[str, int]  # path relative to the data root, with forward slashes; label
Found = tuple[CheckedImage, dict[Kind, Entry]]
Result = TypeVar("Result")


def check_images(preset: Preset, files: Sequence[File], packs: Mapping[Kind, PackWriter]) -> list[CheckedImage]:
    """`check_image` of all `files`, in their order whatever the number of workers.

    Args:
        packs: those of the pixel cache that are to be completed; an image that all of them hold is not decoded again.

    Raises:
        UserError: a worker process was killed, memory ran out, or the cache cannot be written.
    """
    settings, found, tasks = preset.settings, {}, []
    for name, label in files:
        held = [pack.done[name].image for pack in packs.values() if name in pack.done]
        if packs and len(held) == len(packs):
            found[name] = replace(held[0], record=replace(held[0].record, label=label))
        else:
            tasks.append(((name, label), [pack.slots[name] for pack in packs.values() if name in pack.slots]))
    check = partial(
        check_image,
        root=settings.data_root,
        max_pixels=settings.max_image_pixels,
        patch_size=settings.patch_size,
        reencode_jpeg=settings.reencode_jpeg,
    )
    modules = ("data.views",) if any(slots for _, slots in tasks) else ()  # with torch: seconds
    results = in_processes(check, tasks, settings.num_workers, modules)
    progress = partial(tqdm, total=len(files), initial=len(found), desc="checking", unit=" images", disable=None)
    for checked, entries in progress(results):
        found[checked.record.path] = checked
        for kind, entry in entries.items():
            packs[kind].add(entry)
    return [found[name] for name, _ in files]


def in_processes(
    work: Callable[..., Result], tasks: Sequence[tuple], num_workers: int | Literal["auto"], modules: Sequence[str] = ()
) -> Iterator[Result]:
    """`work(*task)` of all tasks that decode images, in their order whatever the number of workers.

    Args:
        num_workers: as in the settings; 0 works in this process.
        modules: what workers import before they begin, besides what this process has imported.

    Raises:
        UserError: a worker process was killed.
    """
    workers = loading_processes(cpu_computes=False) if num_workers == "auto" else num_workers
    workers = min(workers, len(tasks))
    if not workers:
        keep_freed_memory()  # here as in a worker
        yield from (work(*task) for task in tasks)
        return
    context = worker_context(*modules)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (context.Lock(),))
    try:
        with signals_held():  # here its processes start
            futures = [pool.submit(work, *task) for task in tasks]  # pool.map can hang when a worker is killed
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, most likely because memory ran out: "
            f"set a smaller --num-workers than {workers} and run the command again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------- in a worker process
_large_images: AbstractContextManager = nullcontext()  # a lock that all workers share


def _start_worker(lock: AbstractContextManager) -> None:
    global _large_images
    _large_images = lock
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # by which the pool ends them when one was killed
    keep_freed_memory()
    leave_with_parent()


def in_turn(image: Image.Image) -> AbstractContextManager:
    """The block in which an opened image is decoded: for large ones, by one worker at a time."""
    return _large_images if image.width * image.height > LARGE_PIXELS else nullcontext()


def check_image(
    file: File, slots: Sequence[Slot], root: Path, max_pixels: int, patch_size: int, reencode_jpeg: int = 0
) -> Found:
    """Decode one file, once; measure it, and write it to its slots in the pixel cache.

    Args:
        slots: none for an image that is not to be cached.
        patch_size: of the cached views.
        reencode_jpeg: what is cached is saved as JPEG of this quality first; 0: as it is.

    Returns:
        What was found, and the cache's entry for each slot.

    Raises:
        UserError: there is not enough memory to decode it, or the cache cannot be written.
    """
    name, label = file
    path, status, kind, mode, width, height, problem, content = root / name, None, "", "", 0, 0, "", ""
    sums, checksums, lasting = (0,) * 6, {}, False
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            content = sha256_of(path)
        with open_image(path, max_pixels) as image:
            kind, mode = image.format or "", image.mode
            with in_turn(image):
                decoded = decode(image)
                sums = _sums(decoded)
                width, height = decoded.size
                if slots and reencode_jpeg:
                    decoded = jpeg(decoded, reencode_jpeg)
                checksums = {slot: _write(slot, decoded, patch_size) for slot in slots}
    except UnreadableImage as error:
        if isinstance(error.__cause__, MemoryError):  # not the file's fault
            raise UserError(f"not enough memory to decode {path}: set a smaller --num-workers") from None
        problem, lasting = str(error), getattr(error.__cause__, "errno", None) is None
    except OSError as error:
        problem = error.strerror or str(error)
    size, modified = (status.st_size, status.st_mtime_ns) if status else (0, 0)
    checked = CheckedImage(ImageRecord(name, label, size, content, kind, mode, width, height, problem), modified, sums)
    if problem:  # the content's fault is remembered, so that the next build does not try again; a disk's may pass
        return checked, {slot.kind: Entry(checked, NOWHERE, 0) for slot in slots if lasting}
    return checked, {
        slot.kind: Entry(checked, slot.offset, checksum) for slot, checksum in checksums.items() if checksum is not None
    }


def _sums(image: Image.Image) -> tuple[int, ...]:
    """Of the values of red, green, blue, then of their squares, from the histogram."""
    counts, values = np.array(image.histogram(), np.int64).reshape(3, 256), np.arange(256)
    return *(counts @ values).tolist(), *(counts @ values**2).tolist()


def _write(slot: Slot, image: Image.Image, patch_size: int) -> int | None:
    """Write what belongs into the slot; returns its checksum, or None for a file that has changed its size since."""
    from data.views import global_view, standard_view  # here, because checking alone needs no torch

    pixels = pixels_of(image)
    if slot.kind == VIEWS:
        parts = (global_view(pixels, patch_size), standard_view(image, patch_size))
    elif slot.bytes == 3 * image.width * image.height:
        parts = strips(pixels)
    else:
        return None
    with writing(slot.path):
        return write_parts(slot, parts)
