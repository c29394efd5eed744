"""The pixel cache: every image decoded once, packed into memory-mapped files, its ready views beside it.

cache_root/<name of the data root>-<hash of its path>/ holds two packs: `pixels_<strip width>`, and `views_<P>` with
the two views of P x P pixels that GLASS and the standard models take. A pack is three files:

    X.bin    the bytes of its images, in the order of the index
    X.csv    a line an image: its record, the state of its source file, where its bytes begin, checksums of both
    X.json   the seal, written last: what the other two were when the pack was whole

Pixels lie in strips of STRIP_WIDTH columns, one strip after the other and each from top to bottom, so that a crop is
two to four runs of neighbouring bytes however wide the image is: a cold disk reads little more than the crop.

Training reads only what a valid seal vouches for. Without one (a build that was interrupted, a copied or a damaged
pack) the next build checks every checksum, keeps what is sound and writes the rest. Bytes under a seal are never
overwritten: a changed image gets new ones at the end, or a new file begins, so that whoever reads meanwhile sees the
old ones. A file that only keeps its size and time of modification is taken for unchanged.
"""

import csv
import hashlib
import json
import mmap
import os
import resource
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, features

from config import Preset
from data.index import ImageRecord
from utils import UserError, stat_of

FORMAT = 1  # of a pack's files; packs of another are not read
STRIP_WIDTH = 112  # columns; by measurement, see docs/performance.md
WARM = 64  # images
NOWHERE = -1  # offset of an image that has no bytes in a pack
PIXELS, VIEWS = "pixels", "views"
Kind = Literal["pixels", "views"]
GLOBAL_VIEW, STANDARD_VIEW = 0, 1  # the order of an image's two views


@dataclass(frozen=True)
class CheckedImage:
    """What the check of one file found, and the state of the file then.

    `sums` are of the values (0 to 255) of red, green, blue, then of their squares; all 0 for an unreadable file.
    """

    record: ImageRecord
    mtime_ns: int
    sums: tuple[int, ...]

    def is_of(self, status: os.stat_result) -> bool:
        """Whether the file is still the one that was checked, by its size and its time of modification."""
        return (self.record.bytes, self.mtime_ns) == (status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Entry:
    """One image in a pack: where its bytes begin, and their CRC-32 (NOWHERE and 0 if it could not be decoded)."""

    image: CheckedImage
    offset: int
    checksum: int


@dataclass(frozen=True)
class Slot:
    """Where a worker writes one image's bytes."""

    kind: Kind
    path: Path
    offset: int
    bytes: int


# ---------------------------------------------------------------------------------------------------- layout
def cache_folder(preset: Preset) -> Path:
    """Where the pixel cache of the preset's data root lies."""
    root = preset.settings.data_root.resolve()
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    return preset.settings.cache_root / f"{root.name}-{digest}"


def pack_path(preset: Preset, kind: Kind) -> Path:
    """A pack's .bin file; its name tells the layout, and what was done to the images."""
    settings = preset.settings
    layout = STRIP_WIDTH if kind == PIXELS else settings.patch_size
    done = f"_jpeg{settings.reencode_jpeg}" if settings.reencode_jpeg else ""
    return cache_folder(preset) / f"{kind}_{layout}{done}.bin"


def bytes_of_image(kind: Kind, height: int, width: int, patch_size: int) -> int:
    """Bytes of one image in a pack: its pixels, or its two views."""
    return 3 * height * width if kind == PIXELS else 2 * 3 * patch_size**2


def strips(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """An image (H, W, 3 or 4) cut into its strips (H, up to STRIP_WIDTH, 3), as they follow each other in a pack."""
    for left in range(0, pixels.shape[1], STRIP_WIDTH):
        yield np.ascontiguousarray(pixels[:, left : left + STRIP_WIDTH, :3])


def write_parts(slot: Slot, parts: Iterable[np.ndarray]) -> int:
    """Write the bytes of contiguous arrays, one after the other, to the slot; returns their CRC-32."""
    checksum, offset = 0, slot.offset
    with open(slot.path, "r+b", buffering=0) as file:
        for part in parts:
            left = memoryview(part).cast("B")
            checksum = zlib.crc32(left, checksum)
            while left:
                written = os.pwrite(file.fileno(), left, offset)
                left, offset = left[written:], offset + written
    return checksum


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the pack in what the system says of a disk that is full or may not be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): mend that, and the same command goes on where it was"
        ) from None


# --------------------------------------------------------------------------------------------------- reading
class Pack:
    """A sealed pack, open for reading.

    Another process that is sent one calls `open` first. As long as this process has the file open, no other file can
    be taken for it.

    Args:
        path: of the .bin file.
        offsets: int64, where the bytes of each row of the index begin, or NOWHERE.
    """

    def __init__(self, path: Path, offsets: np.ndarray) -> None:
        self.path, self.offsets = path, offsets
        self._identity: tuple[int, int] | None = None
        self._map: mmap.mmap | None = None
        self._disk_reads, self._warm_images = 0, 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None, "_bytes": None}

    def has(self, row: int) -> bool:
        """Whether the image of this row of the index is in the pack."""
        return self.offsets[row] != NOWHERE

    def open(self) -> bool:
        """Map the file, unless this process has; False if it is gone, or another one has taken its place."""
        if self._map is None:
            try:
                with open(self.path, "rb") as file:
                    status = os.fstat(file.fileno())
                    identity = (status.st_dev, status.st_ino)
                    if self._identity not in (None, identity):
                        return False
                    self._identity = identity
                    self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            except (FileNotFoundError, ValueError):  # ValueError: an empty file
                return False
            self._map.madvise(mmap.MADV_RANDOM)  # the kernel would read megabytes around each page
            self._bytes = np.frombuffer(self._map, np.uint8)
        return True

    def is_at_its_path(self) -> bool:
        """Whether the opened file is the one that the path leads to now."""
        status = stat_of(self.path)
        return status is not None and self._identity == (status.st_dev, status.st_ino)

    def _announce(self, begin: int, end: int) -> None:
        """Let the kernel read these bytes, all of them at once, before they are touched page by page.

        Where the last WARM images were in memory already, this is left out: it would be a fifth of their time.
        """
        if self._warm_images < WARM:
            begin -= begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def _note_disk(self) -> None:
        """Count the images since this process last had the disk read something, or waited for a page."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        reads = usage.ru_inblock + usage.ru_majflt
        self._warm_images = self._warm_images + 1 if reads == self._disk_reads else 0
        self._disk_reads = reads

    def view(self, row: int, which: int, patch_size: int) -> np.ndarray:
        """GLOBAL_VIEW or STANDARD_VIEW of an image, uint8 (P, P, 3), read-only."""
        size = 3 * patch_size**2
        begin = int(self.offsets[row]) + which * size
        self._announce(begin, begin + size)
        return self._bytes[begin : begin + size].reshape(patch_size, patch_size, 3)

    def crops(self, row: int, height: int, width: int, boxes: np.ndarray, crops: np.ndarray) -> None:
        """As `cut_crops`, of the image (height, width) in this pack."""
        offset, runs = int(self.offsets[row]), []
        for k, (top, left, rows, columns) in enumerate(boxes.tolist()):
            column, right = left, left + columns
            while column < right:  # strip by strip
                first = column - column % STRIP_WIDTH
                strip = min(STRIP_WIDTH, width - first)
                stop = min(first + strip, right)
                begin = offset + 3 * (height * first + top * strip)
                end = begin + 3 * rows * strip
                self._announce(begin, end)
                runs.append((k, rows, strip, begin, end, column - left, stop - left, column - first, stop - first))
                column = stop
        for k, rows, strip, begin, end, to, to_end, since, until in runs:
            crops[k, :rows, to:to_end] = self._bytes[begin:end].reshape(rows, strip, 3)[:, since:until]
        self._note_disk()

    def pixels(self, row: int, height: int, width: int) -> np.ndarray:
        """The whole image, uint8 (height, width, 3)."""
        offset = int(self.offsets[row])
        self._announce(offset, offset + 3 * height * width)
        pixels = np.empty((height, width, 3), np.uint8)
        for left in range(0, width, STRIP_WIDTH):
            strip = min(STRIP_WIDTH, width - left)
            begin = offset + 3 * height * left
            pixels[:, left : left + strip] = self._bytes[begin : begin + 3 * height * strip].reshape(height, strip, 3)
        return pixels


@dataclass(frozen=True)
class PixelCache:
    """What a data set's cache offers: either pack may be missing."""

    pixels: Pack | None
    views: Pack | None

    @property
    def kinds(self) -> list[Kind]:
        """Which packs there are."""
        return [kind for kind, pack in ((PIXELS, self.pixels), (VIEWS, self.views)) if pack]


def open_cache(preset: Preset, records: Sequence[ImageRecord]) -> tuple[PixelCache | None, str]:
    """The pixel cache of the preset's data set, for the rows of its index, and a sentence on what was found.

    Images whose source file changed since are left out; they will be decoded. The sentence is empty without a cache.

    Raises:
        UserError: a pack is damaged, changed after it was sealed, or of another data root or format.
    """
    settings, folder = preset.settings, cache_folder(preset)
    if not settings.use_cache or not folder.is_dir():
        return None, ""
    packs, said, status = {}, [], None
    for kind in (PIXELS, VIEWS):
        path, facts = pack_path(preset, kind), pack_facts(preset, kind)
        pack = Pack(path, np.full(len(records), NOWHERE, np.int64))
        if not pack.open():
            continue
        sealed = path.with_suffix(".json").exists()
        if sealed:
            check_seal(path, facts)
            entries = read_table(path.with_suffix(".csv"), facts)
        if not sealed or not pack.is_at_its_path():
            said.append(f"{path} is unfinished and not used (python -m data.data_preprocess --cache goes on with it)")
            continue
        status = status or [stat_of(settings.data_root / record.path) for record in records]
        for row, (record, now) in enumerate(zip(records, status, strict=True)):
            entry = entries.get(record.path)
            known = entry and (entry.image.record.height, entry.image.record.width) == (record.height, record.width)
            if known and now and entry.image.is_of(now):
                pack.offsets[row] = entry.offset
        packs[kind] = pack
        readable = sum(not record.problem for record in records)
        said.append(f"{path.stem} of {np.count_nonzero(pack.offsets != NOWHERE):,} of {readable:,} images")
    found = f"Pixel cache {folder}: {'; '.join(said)}" if said else ""
    return (PixelCache(packs.get(PIXELS), packs.get(VIEWS)) if packs else None), found


def check_seal(path: Path, facts: dict[str, Any]) -> None:
    """Check that the pack `path` (its .bin file) is what its seal says, and of `facts`, without reading it.

    Raises:
        UserError: says what is not as it was.
    """
    mend = "python -m data.data_preprocess --cache checks and mends it, --no-use-cache does without it"
    try:
        seal = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        stated = {name: seal.pop(name) for name in ("images", "bytes", "mtime_ns", "table_sha256")}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"the pixel cache {path} has a seal that cannot be read: {mend}") from None
    for name, value in facts.items():
        if seal.get(name) != value:
            raise UserError(f"the pixel cache {path} has {name} = {seal.get(name)}, not {value}: {mend}")
    now = pack_state(path)
    for name, what in (("bytes", "size"), ("mtime_ns", "time of modification"), ("table_sha256", "table")):
        if stated[name] != now[name]:
            raise UserError(
                f"the pixel cache {path} is not what it was when it was sealed (its {what} differs): {mend}"
            )


def pack_state(path: Path) -> dict[str, Any]:
    """What a seal says of a pack's files."""
    status, table = stat_of(path), path.with_suffix(".csv")
    return {
        "bytes": status and status.st_size,
        "mtime_ns": status and status.st_mtime_ns,
        "table_sha256": hashlib.sha256(table.read_bytes()).hexdigest() if table.exists() else None,
    }


def pack_facts(preset: Preset, kind: Kind) -> dict[str, Any]:
    """What a pack's bytes depend on besides its files: the format, the data root, the layout, and what made them.

    Lossy formats decode a little differently by another version of their library, and torch resizes bytes a little
    differently with another processor's instructions.
    """
    import torch  # here: checking alone needs none

    settings = preset.settings
    versions = {name: features.version(name) for name in ("libjpeg_turbo", "webp", "avif")}
    facts = {"format": FORMAT, "kind": kind, "data_root": str(settings.data_root.resolve()), "decoders": versions}
    if settings.reencode_jpeg:
        facts["reencode_jpeg"] = settings.reencode_jpeg
    if kind == PIXELS:
        return facts | {"strip_width": STRIP_WIDTH}
    resize = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    return facts | {"patch_size": settings.patch_size, "pillow": Image.__version__, "resize": resize}


# ---------------------------------------------------------------------------------------------------- tables
_RECORD = [field.name for field in fields(ImageRecord)]
_SUMS = ("red", "green", "blue", "red_squared", "green_squared", "blue_squared")
TABLE_COLUMNS = (*_RECORD, "mtime_ns", *_SUMS, "offset", "checksum", "line_checksum")
_TEXTS = ("path", "content", "format", "mode", "problem")


def table_line(entry: Entry, facts: dict[str, Any]) -> tuple[Any, ...]:
    """An entry as a row of TABLE_COLUMNS, for a pack of these facts."""
    image = entry.image
    values = (*astuple(image.record), image.mtime_ns, *image.sums, entry.offset, entry.checksum)
    return (*values, _line_checksum(map(str, values), facts))


def _line_checksum(values: Iterable[str], facts: dict[str, Any]) -> int:
    text = "\0".join((json.dumps(facts, sort_keys=True), *values))
    return zlib.crc32(text.encode("utf-8", "surrogateescape"))


def read_table(path: Path, facts: dict[str, Any]) -> dict[str, Entry]:
    """Image name -> entry, of a pack's table or journal; what is not whole, or of other facts, is passed over."""
    entries = {}
    if path.exists():
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            try:
                for row in csv.reader(file):
                    if len(row) == len(TABLE_COLUMNS) and row[-1] == str(_line_checksum(row[:-1], facts)):
                        values = dict(zip(TABLE_COLUMNS, row, strict=True))
                        numbers = {name: int(values[name]) for name in TABLE_COLUMNS if name not in _TEXTS}
                        record = ImageRecord(**{name: numbers.get(name, values[name]) for name in _RECORD})
                        image = CheckedImage(record, numbers["mtime_ns"], tuple(numbers[name] for name in _SUMS))
                        entries[record.path] = Entry(image, numbers["offset"], numbers["checksum"])
            except csv.Error:  # damaged: what came before may be sound
                pass
    return entries
