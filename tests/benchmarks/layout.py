"""Why the pixel cache stores strips of 112 columns: the same crops out of other layouts, cold and warm.

    python -m tests.benchmarks.layout [--data-root DIR] [--repeats 5] [--num-crops 10] [--json FILE] [--markdown FILE]

Each layout is a file for each decoded image: it is opened, every run of bytes that the crops need is announced to the
kernel (POSIX_FADV_WILLNEED), read, and the file closed. Cold: the page cache has none of the files, which means
something only where the scratch folder (TMPDIR) is on a disk; the files take 18 bytes a pixel there. Warm: the same
crops a second time. One process, one core.

Before it measures, it checks that every layout gives the crops of the decoded image.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from config import PAPER
from data.crops import crop_generator, sample_crop_boxes
from data.images import UnreadableImage, pixel_key, pixels_of, read_image
from data.layouts import read_data_set
from data.views import cut_crops
from tests.benchmarks.common import MAX_PIXELS, Measured, Table, forget, measured, median, run, take_turns

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

    def put(self, read: list[np.ndarray], width: int, box: Box, crop: np.ndarray) -> None:
        """Make a crop of the bytes of its runs."""
        *_, h, w = box
        crop[:h, :w] = np.concatenate(read).reshape(h, w, 3)


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

    def put(self, read: list[np.ndarray], width: int, box: Box, crop: np.ndarray) -> None:
        _, left, h, w = box
        for (first, strip, *_), part in zip(self._touched(0, width, box), read, strict=True):
            since, until = max(left, first), min(left + w, first + strip)
            crop[:h, since - left : until - left] = part.reshape(h, strip, 3)[:, since - first : until - first]


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

    def put(self, read: list[np.ndarray], width: int, box: Box, crop: np.ndarray) -> None:
        top, left, h, w = box
        for row, part in enumerate(read, top // TILE):
            tiles = part.reshape(-1, TILE, TILE, 3).swapaxes(0, 1).reshape(TILE, -1, 3)
            since, until = max(top, row * TILE), min(top + h, (row + 1) * TILE)
            crop[since - top : until - top, :w] = tiles[since - row * TILE : until - row * TILE, left % TILE :][:, :w]


@dataclass(frozen=True)
class Photo:
    key: str
    height: int
    width: int

    def boxes(self, num_crops: int, epoch: int) -> list[Box]:
        generator = crop_generator(0, self.key, epoch)
        return sample_crop_boxes(self.height, self.width, num_crops, P, generator).tolist()


class Files:
    """All images in one layout, a file each. `announce`: else the kernel reads ahead as it does by default."""

    def __init__(self, layout: Rows, folder: Path, announce: bool = True) -> None:
        self.layout, self.folder, self.announce = layout, folder, announce

    def add(self, photo: Photo, pixels: np.ndarray) -> None:
        self.folder.mkdir(exist_ok=True)
        with open(self.folder / photo.key, "wb") as file:
            for part in self.layout.parts(pixels):
                file.write(part)

    def crops(self, photo: Photo, boxes: list[Box], crops: np.ndarray) -> None:
        """An image's crops, over those of the one before."""
        file = os.open(self.folder / photo.key, os.O_RDONLY)
        runs = [self.layout.runs(photo.height, photo.width, box) for box in boxes]
        for begin, end in chain(*runs) if self.announce else ():
            os.posix_fadvise(file, begin, end - begin, os.POSIX_FADV_WILLNEED)
        for box, of_box, crop in zip(boxes, runs, crops, strict=True):
            read = [np.frombuffer(os.pread(file, end - begin, begin), np.uint8) for begin, end in of_box]
            self.layout.put(read, photo.width, box, crop)
        os.close(file)

    def measure(self, repeat: int, photos: list[Photo], num_crops: int) -> Measured:
        work = [(photo, photo.boxes(num_crops, repeat)) for photo in photos]
        crops = np.zeros((num_crops, P, P, 3), np.uint8)
        for photo in photos:
            forget(self.folder / photo.key)
        times = []
        for _ in ("cold", "warm"):
            with measured() as result:
                for photo, boxes in work:
                    self.crops(photo, boxes, crops)
            times.append(result)
        cold, warm = times
        runs = [len(self.layout.runs(photo.height, photo.width, box)) for photo, boxes in work for box in boxes]
        used = 3 * sum(height * width for _, boxes in work for *_, height, width in boxes)
        return {"cold": cold["wall"], "warm": warm["wall"], "read / used": cold["read"] / used, "runs": np.mean(runs)}

    def check(self, photo: Photo, pixels: np.ndarray, num_crops: int) -> None:
        """An image's file gives the crops that its pixels give."""
        boxes = photo.boxes(num_crops, 0)
        expected, found = np.zeros((2, num_crops, P, P, 3), np.uint8)
        cut_crops(pixels, np.array(boxes), expected)
        self.crops(photo, boxes, found)
        assert np.array_equal(expected, found), (self.folder.name, photo.key)


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Table]:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    layouts = {"rows as they are": Rows(), f"tiles of {TILE} x {TILE}": Tiles()}
    layouts |= {f"strips of {columns}": Strips(columns) for columns in (64, 112, 224)}
    files = {name: Files(layout, scratch / name) for name, layout in layouts.items()}
    files["strips of 112, default readahead"] = Files(Strips(112), scratch / "default", announce=False)
    photos = []
    for record in read_data_set(arguments.data_root).images:
        try:
            image = read_image(arguments.data_root / record.path, MAX_PIXELS)
        except UnreadableImage:
            continue
        pixels = np.ascontiguousarray(pixels_of(image)[:, :, :3])
        photos.append(Photo(pixel_key(image), image.height, image.width))
        for of_layout in files.values():
            of_layout.add(photos[-1], pixels)
            of_layout.check(photos[-1], pixels, arguments.num_crops)
    ways = {name: partial(of.measure, photos=photos, num_crops=arguments.num_crops) for name, of in files.items()}
    results = take_turns(ways, arguments.repeats)
    rows = []
    for name, found in results.items():
        times = (1000 * median(found, temperature) / len(photos) for temperature in ("warm", "cold"))
        size = sum(path.stat().st_size for path in files[name].folder.iterdir()) / 1e6
        rows.append((name, *times, median(found, "read / used"), median(found, "runs"), size))
    columns = ("layout", "warm, ms an image", "cold, ms an image", "bytes read / used", "runs a crop", "MB in all")
    note = "Used: the bytes of the crops, each counted in full. Runs: of neighbouring bytes."
    return [Table(f"{arguments.num_crops} crops of {P} x {P} from a file for each image", columns, rows, note, results)]


if __name__ == "__main__":
    run(__doc__, measure)
