"""Why the pixel cache stores strips of 112 columns: the same crops out of other layouts, cold and warm.

    python -m tests.benchmarks.layout [--data-root DIR] [--repeats 5] [--num-crops 10] [--json FILE] [--markdown FILE]

Each layout is a file of all decoded images, read through a memory map as data/pixel_cache.py does: MADV_RANDOM for
the map, MADV_WILLNEED for the bytes of a crop. Cold: the page cache has none of the file, which means something only
where the scratch folder (TMPDIR) is on a disk; the files take 18 bytes a pixel there. Warm: the same crops a second
time. One process, one core.

Before it measures, it checks that every layout gives the crops of the decoded image.
"""

import argparse
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from config import PAPER
from data.crops import crop_generator, sample_crop_boxes
from data.images import UnreadableImage, pixels_of, read_image
from data.index import list_images
from data.views import cut_crops
from tests.benchmarks.common import MAX_PIXELS, Measured, Table, forget, in_turn, measured, median, run

P = PAPER.settings.patch_size
TILE = 64
Box = tuple[int, int, int, int]  # top, left, height, width
Runs = list[tuple[int, int]]  # begin and end of neighbouring bytes, from the image's first


class Rows:
    """The image as it is: a run for each row of a crop."""

    def parts(self, pixels: np.ndarray) -> Iterator[np.ndarray]:
        """The image (H, W, 3) as it lies in the file."""
        yield pixels

    def runs(self, height: int, width: int, box: Box) -> Runs:
        """Where a crop's bytes lie."""
        top, left, h, w = box
        return [(3 * (row * width + left), 3 * (row * width + left + w)) for row in range(top, top + h)]

    def copy(self, image: np.ndarray, height: int, width: int, box: Box, crop: np.ndarray) -> None:
        """Take a crop out of the image's bytes."""
        top, left, h, w = box
        crop[:h, :w] = image.reshape(height, width, 3)[top : top + h, left : left + w]


@dataclass(frozen=True)
class Strips(Rows):
    """Strips of `columns` columns, one after the other: a run for each strip that a crop touches."""

    columns: int

    def parts(self, pixels: np.ndarray) -> Iterator[np.ndarray]:
        for first in range(0, pixels.shape[1], self.columns):
            yield np.ascontiguousarray(pixels[:, first : first + self.columns])

    def _touched(self, height: int, width: int, box: Box) -> Iterator[tuple[int, int, int, int]]:
        top, left, h, w = box
        for first in range(left - left % self.columns, left + w, self.columns):
            strip = min(self.columns, width - first)
            begin = 3 * (height * first + top * strip)
            yield first, strip, begin, begin + 3 * h * strip

    def runs(self, height: int, width: int, box: Box) -> Runs:
        return [(begin, end) for _, _, begin, end in self._touched(height, width, box)]

    def copy(self, image: np.ndarray, height: int, width: int, box: Box, crop: np.ndarray) -> None:
        _, left, h, w = box
        for first, strip, begin, end in self._touched(height, width, box):
            since, until = max(left, first), min(left + w, first + strip)
            strip_rows = image[begin:end].reshape(h, strip, 3)
            crop[:h, since - left : until - left] = strip_rows[:, since - first : until - first]


class Tiles(Rows):
    """Squares of TILE x TILE, row by row, the last ones filled up: a run for each row of tiles that a crop touches."""

    def parts(self, pixels: np.ndarray) -> Iterator[np.ndarray]:
        height, width = pixels.shape[:2]
        down, across = -(-height // TILE), -(-width // TILE)
        filled = np.pad(pixels, ((0, down * TILE - height), (0, across * TILE - width), (0, 0)))
        yield np.ascontiguousarray(filled.reshape(down, TILE, across, TILE, 3).swapaxes(1, 2))

    def runs(self, height: int, width: int, box: Box) -> Runs:
        top, left, h, w = box
        across, size = -(-width // TILE), 3 * TILE**2
        first, last = left // TILE, -(-(left + w) // TILE)
        return [
            ((row * across + first) * size, (row * across + last) * size)
            for row in range(top // TILE, -(-(top + h) // TILE))
        ]

    def copy(self, image: np.ndarray, height: int, width: int, box: Box, crop: np.ndarray) -> None:
        top, left, h, w = box
        for row, (begin, end) in enumerate(self.runs(height, width, box), top // TILE):
            tiles = image[begin:end].reshape(-1, TILE, TILE, 3).swapaxes(0, 1).reshape(TILE, -1, 3)
            since, until = max(top, row * TILE), min(top + h, (row + 1) * TILE)
            crop[since - top : until - top, :w] = tiles[since - row * TILE : until - row * TILE, left % TILE :][:, :w]


@dataclass(frozen=True)
class Photo:
    """A readable image file: its name and its size."""

    name: str
    height: int
    width: int

    def boxes(self, num_crops: int, epoch: int) -> np.ndarray:
        """The crops of an epoch."""
        return sample_crop_boxes(self.height, self.width, num_crops, P, crop_generator(0, self.name, epoch))


class File:
    """All images in one layout. `announce`: MADV_RANDOM and MADV_WILLNEED, else the kernel's default readahead."""

    def __init__(self, layout: Rows, path: Path, announce: bool = True) -> None:
        self.layout, self.path, self.announce, self.begins = layout, path, announce, [0]

    def add(self, pixels: np.ndarray) -> None:
        """Append an image."""
        with open(self.path, "ab") as file:
            for part in self.layout.parts(pixels):
                file.write(part)
            self.begins.append(file.tell())

    def crops(self, mapped: mmap.mmap, images: list[Photo], boxes: list[list[Box]], crops: np.ndarray) -> None:
        """All crops of all images, each image's over those of the one before."""
        held = np.frombuffer(mapped, np.uint8)
        for image, of_image, (begin, end) in zip(images, boxes, pairwise(self.begins), strict=True):
            size = image.height, image.width
            if self.announce:
                for since, until in (run for box in of_image for run in self.layout.runs(*size, box)):
                    page = (begin + since) // mmap.PAGESIZE * mmap.PAGESIZE
                    mapped.madvise(mmap.MADV_WILLNEED, page, begin + until - page)
            for box, crop in zip(of_image, crops, strict=True):
                self.layout.copy(held[begin:end], *size, box, crop)

    def measure(self, repeat: int, images: list[Photo], num_crops: int) -> Measured:
        """Cold and warm, with a map of its own."""
        boxes = [image.boxes(num_crops, repeat).tolist() for image in images]
        crops = np.zeros((num_crops, P, P, 3), np.uint8)
        forget(self.path)
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            if self.announce:
                mapped.madvise(mmap.MADV_RANDOM)
            with measured() as cold:
                self.crops(mapped, images, boxes, crops)
            with measured() as warm:
                self.crops(mapped, images, boxes, crops)
        runs = [
            len(self.layout.runs(i.height, i.width, box)) for i, of in zip(images, boxes, strict=True) for box in of
        ]
        used = 3 * sum(height * width for of_image in boxes for *_, height, width in of_image)
        return {"cold": cold["wall"], "warm": warm["wall"], "read / used": cold["read"] / used, "runs": np.mean(runs)}

    def check(self, photo: Photo, pixels: np.ndarray, num_crops: int) -> None:
        """The image that was just added gives the crops that its pixels give."""
        boxes, begin = photo.boxes(num_crops, 0), self.begins[-2]
        expected, found = np.zeros((2, num_crops, P, P, 3), np.uint8)
        cut_crops(pixels, boxes, expected)
        image = np.fromfile(self.path, np.uint8, offset=begin)
        for box, crop in zip(boxes.tolist(), found, strict=True):
            self.layout.copy(image, photo.height, photo.width, box, crop)
        assert np.array_equal(expected, found), (self.path.name, photo.name)


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    """The one table."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    layouts = {"rows as they are": Rows(), f"tiles of {TILE} x {TILE}": Tiles()}
    layouts |= {f"strips of {columns}": Strips(columns) for columns in (64, 112, 224)}
    files = {name: File(layout, scratch / f"{name}.bin") for name, layout in layouts.items()}
    files["strips of 112, default readahead"] = File(Strips(112), scratch / "default.bin", announce=False)
    images = []
    for name, _ in list_images(arguments.data_root):
        try:
            pixels = np.ascontiguousarray(pixels_of(read_image(arguments.data_root / name, MAX_PIXELS))[:, :, :3])
        except UnreadableImage:
            continue
        images.append(Photo(name, *pixels.shape[:2]))
        for file in files.values():
            file.add(pixels)
            file.check(images[-1], pixels, arguments.num_crops)
    ways = {name: partial(file.measure, images=images, num_crops=arguments.num_crops) for name, file in files.items()}
    results = in_turn(ways, arguments.repeats)
    rows = [
        (
            name,
            *(1000 * median(found, temperature) / len(images) for temperature in ("warm", "cold")),
            median(found, "read / used"),
            median(found, "runs"),
            files[name].path.stat().st_size / 1e6,
        )
        for name, found in results.items()
    ]
    columns = ("layout", "warm, ms an image", "cold, ms an image", "bytes read / used", "runs a crop", "MB in all")
    note = "Used: the bytes of the crops, each counted in full. Runs: of neighbouring bytes."
    return [Table(f"{arguments.num_crops} crops of {P} x {P} from a memory map", columns, rows, note, results)]


if __name__ == "__main__":
    run(__doc__, measure)
