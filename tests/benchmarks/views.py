"""One core's time to load an image: what straightforward code takes, decoding alone, and our data set.

    python -m tests.benchmarks.views [--data-root DIR] [--repeats 5] [--num-crops 10] [--json FILE] [--markdown FILE]

Every way runs in a process of its own, on the same core. Warm: the page cache holds the pixel cache. Cold: it is
dropped from there before each repeat. The cold numbers mean something only where the scratch folder (TMPDIR) is on a
disk; they are from a copy of the cache, so that the warm ones stay warm.

Before it measures, it checks that views from the pixel cache are those from the files, bit by bit.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F

from config import PAPER
from data.cache.pixel_cache import mapped_files
from data.crops import crop_generator, sample_crop_boxes
from data.datasets import ImageDataset
from data.images import read_image
from data.index import Index
from data.views import ViewSettings
from data.workers import keep_freed_memory
from tests.benchmarks import common
from tests.benchmarks.common import MAX_PIXELS, Measured, Repeat, Table, Way, measured, median, timed

P = PAPER.settings.patch_size
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain_process(_: int = 0) -> None:
    """Pillow as it is by default, and one thread."""
    Image.core.set_use_block_allocator(0)  # data.images sets it to 1
    torch.set_num_threads(1)


def plain_views(path: Path, num_crops: int | None, P: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A model's views of one file, normalised; a standard model's if `num_crops` is None."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if num_crops is None:
        return (F.normalize(F.to_tensor(F.resize(image, [P, P])), MEAN, STD),)
    pixels = F.to_tensor(image)
    crops = []
    for top, left, height, width in sample_crop_boxes(*pixels.shape[1:], num_crops, P, generator).tolist():
        crop = pixels[:, top : top + height, left : left + width]
        crops.append(crop if height == width == P else F.pad(crop, [0, 0, P - width, P - height]))
    resized = F.resize(pixels, [P, P], antialias=True)
    return F.normalize(resized, MEAN, STD), F.normalize(torch.stack(crops), MEAN, STD)


def plain(index: Index, rows: list[int], num_crops: int | None) -> Repeat:
    plain_process()

    def load(epoch: int) -> None:
        for record in (index.records[row] for row in rows):
            plain_views(index.root / record.path, num_crops, P, crop_generator(0, record.key, epoch))

    return timed(load)


def worker_process() -> None:
    """As data.loaders starts a process that loads."""
    torch.set_num_threads(1)
    keep_freed_memory()


def decode(index: Index, rows: list[int]) -> Repeat:
    worker_process()

    def load(_: int) -> None:
        for row in rows:
            read_image(index.root / index.records[row].path, MAX_PIXELS)

    return timed(load)


def dataset(index: Index, rows: list[int], num_crops: int | None, exact_resize: bool = False) -> ImageDataset:
    views = ViewSettings(P, num_crops or 0, exact_resize=exact_resize, standard=not num_crops)
    return ImageDataset(index, rows, views, MAX_PIXELS)


def ours(index: Index, rows: list[int], num_crops: int | None, normalise: bool = False) -> Repeat:
    """The data set, from the pixel cache if the index has one; `normalise` as a model without our step would need."""
    worker_process()
    data, mean, std = dataset(index, rows, num_crops), *(torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    passes = 1 if index.cache is None else 20  # one pass over cached images is over before the process has woken up

    def load(repeat: int) -> None:
        for epoch in range(repeat * passes, (repeat + 1) * passes):
            for position in range(len(data)):
                *views, _ = data[position, epoch]
                if normalise:
                    views = [(view.float() / 255 - mean) / std for view in views]

    def once(repeat: int) -> Measured:
        return {quantity: value / passes for quantity, value in timed(load)(repeat).items()}

    return once


def cold(index: Index, rows: list[int], num_crops: int) -> Repeat:
    """The data set from a pixel cache that only the disk has; `used` bytes are those of the views."""
    worker_process()
    data = dataset(index, rows, num_crops)

    def once(epoch: int) -> Measured:
        mapped_files.cache_clear()
        for kind in index.cache.folders:
            for record in data.records:
                common.forget(index.cache.path(kind, record))
        with measured() as result:
            for position in range(len(data)):
                data[position, epoch]
        return result | used_bytes(data, epoch)

    return once


def used_bytes(data: ImageDataset, epoch: int) -> Measured:
    """Of all crops and global views; and with what several crops of an image share counted once."""
    views = 3 * P * P * len(data)
    used, distinct = views, views
    for record in data.records:
        seen = np.zeros((record.height, record.width), bool)
        for top, left, h, w in data.views.boxes(record, record.key, epoch):
            used += 3 * int(h * w)
            seen[top : top + h, left : left + w] = True
        distinct += 3 * int(np.count_nonzero(seen))
    return {"used": used, "distinct": distinct}


def check_views(index: Index, rows: list[int], num_crops: int) -> None:
    """The cache's views are the files', and the global view is within a grey level of the exact one."""
    files = replace(index, cache=None)
    for views in (num_crops, None):
        for i, row in enumerate(rows):
            from_cache, from_file = (dataset(source, [row], views)[0, i] for source in (index, files))
            assert all(map(torch.equal, from_cache, from_file)), index.records[row].path
            if views:
                exact = dataset(files, [row], views, exact_resize=True)[0, i][0]
                assert (exact.round() - from_file[0].float()).abs().max() <= 1, index.records[row].path


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    K, index = arguments.num_crops, common.cached_index(common.make_preset(arguments.data_root, scratch))
    rows, files = index.readable(range(len(index.records))), replace(index, cache=None)
    check_views(index, rows, K)
    folders = {kind: Path(shutil.copytree(folder, scratch / kind)) for kind, folder in index.cache.folders.items()}
    disk = replace(index, cache=replace(index.cache, folders=folders))
    ways = {  # the plain way first, then what is compared with it
        "GLASS, plain": (plain, (files, rows, K)),
        "decoding alone": (decode, (files, rows)),
        "GLASS, from the files": (ours, (files, rows, K)),
        "GLASS, pixel cache, warm": (ours, (index, rows, K)),
        "... and normalised on the CPU": (ours, (index, rows, K, True)),
        "GLASS, pixel cache, cold": (cold, (disk, rows, K)),
        "standard, plain": (plain, (files, rows, None)),
        "standard, from the files": (ours, (files, rows, None)),
        "standard, pixel cache, warm": (ours, (index, rows, None)),
    }
    results = common.take_turns({name: Way(make, *given) for name, (make, given) in ways.items()}, arguments.repeats)
    wall = {name: median(found) for name, found in results.items()}
    table = []
    for name in ways:
        plain_wall = (
            None if name == "decoding alone" else wall["standard, plain" if "standard" in name else "GLASS, plain"]
        )
        milliseconds = (1000 * median(results[name], quantity) / len(rows) for quantity in ("wall", "processor"))
        faster = plain_wall and plain_wall / wall[name]
        table.append((name, *milliseconds, len(rows) / wall[name], faster, wall[name] / wall["decoding alone"]))
    times = Table(
        f"Loading an image on one core, K = {K}, P = {P}",
        ("way", "ms an image", "processor ms", "images/s", "x plain", "time / decoding"),
        table,
        "x plain: N x faster than plain code for the same model, by wall-clock medians. From the warm "
        "cache a repeat is 20 passes, each of another epoch.",
        results,
    )
    cold_pass = "GLASS, pixel cache, cold"
    read, used, once = (median(results[cold_pass], quantity) / 1e6 for quantity in ("read", "used", "distinct"))
    reading = Table(
        "What the disk reads for a cold pass over all images",
        ("way", "s", "MB read", "MB used", "read / used", "MB used once", "read / used once"),
        [("GLASS", wall[cold_pass], read, used, read / used, once, read / once)],
        "Used once: bytes that several crops of an image share are counted once.",
    )

    largest = max(rows, key=lambda row: index.records[row].width * index.records[row].height)
    record = index.records[largest]
    memory = {
        name: Way(common.peak_memory, make, given[0], [largest], *given[2:])(0)["peak"]
        for name, (make, given) in ways.items()
        if make is not cold
    }
    peaks = Table(
        f"Peak memory for the largest image, {record.width} x {record.height}",
        ("way", "MB", "bytes a pixel"),
        [(name, peak / 1e6, peak / (record.width * record.height)) for name, peak in memory.items()],
        "Beyond what a new process that has imported torch takes; pages of the pixel cache count.",
        memory,
    )
    return [times, reading, peaks]


if __name__ == "__main__":
    common.run(__doc__, measure)
