"""Checking and measuring a data set: two plain passes over it, our one pass, and what the machine's cores can do.

    python -m tests.benchmarks.preprocess [--data-root DIR] [--repeats 5] [--json FILE] [--markdown FILE]

Plain: one pass decodes every file to see whether it can be read, a second one sums its values in float64; one
process. Ours: data.preparation.checks.check_images in a process that has yet to start its workers; the rows of one
small file show what that takes alone; with --cache, until the disk has the pixel cache. The last rows say what the
machine allows: writing as many bytes, and decoding in processes that are running already and share nothing.

Before it measures, it checks that both give the same mean and standard deviation.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from config import Preset
from data.cache.builder import building
from data.cache.pixel_cache import PIXELS, VIEWS
from data.images import UnreadableImage, read_image
from data.layouts import read_data_set
from data.preparation.checks import check_images
from data.preparation.report import moments
from data.records import ImageRecord
from data.workers import available_cores, keep_freed_memory
from tests.benchmarks import common
from tests.benchmarks.common import MAX_PIXELS, Measured, Repeat, Table, Way, measured, median, timed


def plain_statistics(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel."""
    readable = []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
            readable.append(path)
        except Exception:  # decoders raise many kinds
            continue
    count, sums, squares = 0, np.zeros(3), np.zeros(3)
    for path in readable:
        with Image.open(path) as image:
            values = np.asarray(image.convert("RGB"), np.float64) / 255
        count += values.shape[0] * values.shape[1]
        sums += values.sum((0, 1))
        squares += (values**2).sum((0, 1))
    return sums / count, np.sqrt(squares / count - (sums / count) ** 2)


def plain(paths: list[Path]) -> Repeat:
    """As `plain_statistics`, by Pillow as it is by default."""
    Image.core.set_use_block_allocator(0)  # data.images sets it to 1
    warnings.simplefilter("ignore")
    return timed(lambda _: plain_statistics(paths))


def check(preset: Preset, files: Sequence[ImageRecord], cache: bool = False) -> list[ImageRecord]:
    """Ours; `cache`: which also writes the pixel cache."""
    with building(preset.settings, (PIXELS, VIEWS), files) if cache else contextlib.nullcontext() as builder:
        return check_images(preset.settings, files, builder)


def quietly(work: Callable[..., object], *arguments: object) -> Repeat:
    def once(_: int) -> None:
        with common.quiet():
            work(*arguments)

    return timed(once)


def ours(preset: Preset, files: Sequence[ImageRecord], cache: bool) -> Repeat:
    """`check` as a command does it: in a new process, which starts its workers, with no cache yet."""

    def once(repeat: int) -> Measured:
        with contextlib.closing(Way(quietly, check, preset, files, cache, one_core=False)) as command:
            result = command(repeat)
        shutil.rmtree(preset.settings.cache_root, ignore_errors=True)
        return result

    return once


def decoding(paths: list[Path], processes: int) -> Repeat:
    """Nothing but decoding, in processes that share nothing but the list of files."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), keep_freed_memory)
    return timed(lambda _: list(pool.map(_decode, paths)))


def writing(path: Path, size: int) -> Repeat:
    """Nothing but writing as many bytes as the pixel cache takes, until the disk has them."""
    block = np.random.default_rng(0).bytes(2**22)

    def once(_: int) -> Measured:
        with measured() as result, open(path, "wb", buffering=0) as file:
            for begin in range(0, size, len(block)):
                file.write(block[: size - begin])
            os.fsync(file.fileno())
        path.unlink()
        return result

    return once


def _decode(path: Path) -> None:
    with contextlib.suppress(UnreadableImage):
        read_image(path, MAX_PIXELS)


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    root, files = arguments.data_root, read_data_set(arguments.data_root).images
    paths, preset = [root / image.path for image in files], partial(common.make_preset, root, scratch)
    images = check(preset(num_workers=0), files)
    readable, statistics = [image for image in images if not image.problem], moments(images)
    assert np.allclose(plain_statistics(paths), (statistics["mean"], statistics["std"]), rtol=0, atol=1e-9)

    alone = ("plain", 1)
    ways: dict[tuple[str, int], Repeat] = {alone: Way(plain, paths)}
    counts = sorted({1, 2, min(available_cores(), 16)})
    smallest = min(readable, key=lambda image: image.width * image.height)
    for name, cache in (("ours", False), ("ours, with --cache", True)):
        ways |= {(name, n): ours(preset(num_workers=n), files, cache) for n in (0, *counts)}
        ways[f"{name}, one small file", 1] = ours(preset(num_workers=1), [smallest], cache)
    cache_bytes = 3 * statistics["pixels"] + len(readable) * 2 * 3 * preset().settings.patch_size ** 2
    ways["writing the cache's bytes", 1] = writing(scratch / "bytes", cache_bytes)
    ways |= {("decoding alone", n): decoding(paths, n) for n in counts}
    results = common.take_turns(ways, arguments.repeats)
    wall = {way: median(found) for way, found in results.items()}
    rows = []
    for (way, processes), seconds in wall.items():
        whole = "one small file" not in way  # which shows what the start of the processes takes of the others
        rate = (1000 * seconds / len(paths), statistics["pixels"] / seconds / 1e6) if whole else (None, None)
        ratios = (wall[alone] / seconds, wall[way, 1] / seconds) if whole else (None, None)
        rows.append((way, processes, seconds, *rate, *ratios))
    columns = ("way", "processes", "s", "ms an image", "megapixels/s", "x plain", "x one process")
    note = "Times as fast as plain, and as the same way in one process. Processes 0: only the command's own."
    measurements = {f"{way}, {processes}": found for (way, processes), found in results.items()}
    return [Table("Checking and measuring a data set", columns, rows, note, measurements)]


if __name__ == "__main__":
    common.run(__doc__, measure)
