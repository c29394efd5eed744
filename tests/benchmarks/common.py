"""What the benchmarks share: options, images, a process for each way that is measured, and the report. Linux only.

Times and ratios are of the wall clock, medians over the repeats: waiting for a disk or for another process is part of
what is compared. The ways take turns in each repeat, so that a machine that slows down slows all of them.

Nothing here imports torch: the processes that check images do not need it, and their start is measured.
"""

import argparse
import io
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import PAPER, Preset
from data.cache.pixel_cache import PIXELS, open_cache
from data.data_preprocess import preprocess
from data.images import UnreadableImage, open_image
from data.index import Index, read_index
from data.layouts import read_data_set
from data.records import CLASSES
from data.workers import exit_with_parent
from tests.proc import bytes_read, peak_bytes
from training.runs import git_commit, hardware, library_versions
from utils import UserError, write_json, write_text

Measured = dict[str, float]
Repeat = Callable[[int], Measured]  # called with the number of the repeat; does the work once
MAX_PIXELS = PAPER.settings.max_image_pixels


@contextmanager
def measured() -> Iterator[Measured]:
    """Wall-clock and processor seconds of the block, and the bytes that the disk read for it."""
    result: Measured = {}
    wall, processor, read = time.perf_counter(), time.process_time(), bytes_read()
    yield result
    result |= {
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "read": bytes_read() - read,
    }


def timed(work: Callable[[int], object]) -> Repeat:
    def once(repeat: int) -> Measured:
        with measured() as result:
            work(repeat)
        return result

    return once


class Way:
    """One way to do the work, in a process of its own, so that ways do not share memory and threads.

    Args:
        make: called in that process with `arguments`; returns a `Repeat`.
        one_core: keep the process on one core.
    """

    def __init__(self, make: Callable[..., Repeat], *arguments: Any, one_core: bool = True) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, _start, (make, arguments, one_core))

    def __call__(self, repeat: int) -> Measured:
        return self._process.submit(_once, repeat).result()

    def close(self) -> None:
        """End the process; otherwise it ends with this one."""
        self._process.shutdown()


_work: list[Repeat] = []  # set in the process of a way


def _start(make: Callable[..., Repeat], arguments: Sequence[Any], one_core: bool) -> None:
    exit_with_parent()
    if one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    _work.append(make(*arguments))


def _once(repeat: int) -> Measured:
    return _work[0](repeat)


def take_turns(ways: Mapping[Any, Repeat], repeats: int) -> dict[Any, list[Measured]]:
    """What each way measured in each repeat, without repeat 0, which warms them up."""
    results: dict[Any, list[Measured]] = {name: [] for name in ways}
    for repeat in tqdm(range(repeats + 1), desc="measuring", unit=" repeats", disable=None):
        for name, way in ways.items():
            results[name].append(way(repeat))
    return {name: measurements[1:] for name, measurements in results.items()}


def median(measurements: Sequence[Measured], quantity: str = "wall") -> float:
    return statistics.median(measurement[quantity] for measurement in measurements)


def peak_memory(make: Callable[..., Repeat], *arguments: object) -> Repeat:
    """Memory in bytes that the work needs in a new process, beyond what the process already has."""
    work = make(*arguments)

    def once(repeat: int) -> Measured:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak to the current memory
        before = peak_bytes()
        work(repeat)
        return {"peak": peak_bytes() - before}

    return once


def forget(path: Path) -> None:
    """Drop a file from the page cache; no process may have mapped it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_images(root: Path, side: int = 2000) -> None:
    """12 photographs whose shorter side is `side` to 2 `side` pixels: by default, 6 to 24 megapixels."""
    random = np.random.default_rng(0)
    for i in tqdm(range(12), desc="writing images", disable=None):
        short = side + side * i // 11
        width, height = (short, short * 3 // 2) if i % 3 == 2 else (short * 3 // 2, short)
        image = photograph(random, height, width)
        path = root / CLASSES[i % 2] / f"{i:02d}.{'png' if i % 4 == 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90, compress_level=1)


def photograph(random: np.random.Generator, height: int, width: int) -> Image.Image:
    """An image as expensive to decode as a photograph: smooth at all scales, with a little noise."""
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells in (5, 20, 80, 320):
        small = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += (np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) - np.float32(128)) / cells**0.4
    pixels += random.standard_normal(pixels.shape, np.float32) * 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_preset(data_root: Path, scratch: Path, **settings: Any) -> Preset:
    """The paper's preset over these images; what it writes goes to `scratch`."""
    folders = dict(data_root=data_root, results_root=scratch / "results", cache_root=scratch / "cache")
    return replace(PAPER, settings=replace(PAPER.settings, device="cpu", pretrained=False, **folders, **settings))


def cached_index(preset: Preset) -> Index:
    """Make and open the preset's index and its pixel cache."""
    with quiet():
        preprocess(preset, (PIXELS,))
        index = read_index(preset)
        cache, _ = open_cache(preset.settings, index.records)
    return replace(index, cache=cache)


def repeated(index: Index, length: int) -> list[int]:
    """`length` rows of readable images, repeated if there are fewer."""
    rows = index.readable(list(range(len(index.records))))
    return [rows[i % len(rows)] for i in range(length)]


@contextmanager
def quiet() -> Iterator[None]:
    """In the block, nothing is printed, and no progress bars are shown."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@dataclass(frozen=True)
class Table:
    """A table of the report, with its measurements; None in a cell that does not apply."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""
    measurements: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """As aligned Markdown, text to the left and numbers to the right."""
        rows = [[_cell(value) for value in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.columns, *rows, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (self.columns, rule, *rows)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"### {self.title}\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")


def _cell(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if 0 < value < 0.1:
        return f"{value:.2g}"
    return f"{value:,.{0 if isinstance(value, int) or value >= 100 else 1 if value >= 10 else 2}f}"


def run(
    doc: str,
    measure: Callable[[argparse.Namespace, Path], list[Table]],
    repeats: int = 5,
    num_crops: int = 10,
    write: Callable[[Path, argparse.Namespace], None] = lambda root, _: write_images(root),
    **options: int,
) -> None:
    """Read the command line, measure, print the tables and write them to the files that the flags name.

    Args:
        doc: the benchmark's docstring, shown by `--help`.
        measure: called with the options, in which `data_root` is set, and with a scratch folder.
        write: writes images to `data_root` if the command line gives none.
        options: the benchmark's own integer flags, with their defaults.
    """
    parser = make_parser(doc)
    parser.add_argument("--data-root", type=Path, help="holds fake/ and real/; default: synthetic images")
    for name, default in (dict(repeats=repeats, num_crops=num_crops) | options).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:  # in TMPDIR; cold measurements need a disk
            if arguments.data_root is None:
                arguments.data_root = Path(folder, "images")
                write(arguments.data_root, arguments)
            metadata = _metadata(arguments.data_root)
            tables = measure(arguments, Path(folder))
    except UserError as error:
        sys.exit(f"error: {error}")
    size = "{images:,} images, {megapixels:,.1f} megapixels, {megabytes:,.1f} MB".format(**metadata)
    metadata["tables"] = [asdict(table) for table in tables]
    print(write_report(arguments, metadata, tables, f"{size}, {arguments.repeats} repeats"))


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags of all benchmarks, which `write_report` reads."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=layout, allow_abbrev=False)
    for ending in ("json", "markdown"):
        parser.add_argument(f"--{ending}", type=Path, metavar="FILE", help="write the report there too")
    return parser


def write_report(
    arguments: argparse.Namespace, metadata: Mapping[str, Any], tables: Sequence[Table], *facts: str
) -> str:
    """Write `metadata` as JSON, and a Markdown report, to the files that the flags name; returns the Markdown."""
    machine = (
        ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in metadata[part].items())
        for part in ("hardware", "versions")
    )
    lines = (f"`{metadata['command']}`", *facts, f"commit {metadata['commit']}", *machine)
    text = "\n".join(f"- {line}" for line in lines) + "\n\n" + "\n".join(table.markdown() for table in tables)
    if arguments.markdown:
        write_text(arguments.markdown, text)
    if arguments.json:
        write_json(arguments.json, metadata)
    return text


def _metadata(data_root: Path) -> dict[str, Any]:
    pixels, sizes = [], []
    for path in (data_root / image.path for image in read_data_set(data_root).images):
        try:
            with open_image(path, MAX_PIXELS) as image:
                pixels.append(image.width * image.height)
        except UnreadableImage:
            continue
        sizes.append(path.stat().st_size)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "command": shlex.join(["python", "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),
        "commit": git_commit(),
        "hardware": {**hardware(), "processor": processor, "load_before": round(os.getloadavg()[0], 2)},
        "versions": {"python": platform.python_version(), **library_versions()},
        "images": len(pixels),
        "megapixels": sum(pixels) / 1e6,
        "megabytes": sum(sizes) / 1e6,
    }
