"""Building the pixel cache: who may, how much room it takes, what is there already, and where the rest goes."""

import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from config import Preset
from data.images import UnreadableImage, open_image
from data.pixel_cache import (
    NOWHERE,
    TABLE_COLUMNS,
    VIEWS,
    CheckedImage,
    Entry,
    Kind,
    Slot,
    bytes_of_image,
    cache_folder,
    check_seal,
    pack_facts,
    pack_path,
    pack_state,
    read_table,
    table_line,
    writing,
)
from utils import UserError, available_cores, csv_line, sole_process, write_csv, write_json, write_text

BYTES_OF_A_LINE = 1000  # of a table and of a journal together, at most, for names that are not very long
BEGAN_AT = "began at byte "


@contextmanager
def one_builder(preset: Preset) -> Iterator[None]:
    """Hold the preset's cache folder for writing.

    Raises:
        UserError: another process is at it, or the folder cannot be made.
    """
    folder, root = cache_folder(preset), preset.settings.data_root.resolve()
    if folder.resolve().is_relative_to(root):
        raise UserError(f"{folder} is inside the data root {root}, which is never written to: set --cache-root")
    with sole_process(folder):
        yield


def plan_cache(preset: Preset, kinds: Sequence[Kind], files: Sequence[tuple[str, int]]) -> dict[Kind, "PackWriter"]:
    """A writer for each pack, for the images as they are now; to be called, and used, under `one_builder`.

    Prints the bytes that the packs take and those that are free.

    Args:
        files: relative path and label of each, in the order of the index.

    Raises:
        UserError: there is not enough space, or more would be taken than `cache_limit_gb`.
    """
    if not kinds:
        return {}
    settings, folder = preset.settings, cache_folder(preset)
    images = _readable_headers(preset, kinds, files)
    packs = {kind: PackWriter(preset, kind, images) for kind in kinds}
    total, missing = sum(pack.end for pack in packs.values()), sum(pack.missing_bytes for pack in packs.values())
    tables = BYTES_OF_A_LINE * sum(len(pack.slots) for pack in packs.values())
    free = shutil.disk_usage(folder).free + sum(pack.bytes_let_go for pack in packs.values())
    print(
        f"Pixel cache {folder}: {_size(total)}, {_size(missing)} of it still to be written; "
        f"{_size(free)} are free there",
        flush=True,
    )
    views = (
        "" if tuple(kinds) == (VIEWS,) else "; --cache views takes less, and spares the standard models all decoding"
    )
    if missing and missing + tables > free:
        raise UserError(
            f"{folder} needs {_size(missing)} more and {_size(free)} are free: make room, or set "
            f"--cache-root to a larger disk{views}"
        )
    if settings.cache_limit_gb != "disk" and total > settings.cache_limit_gb * 1e9:
        raise UserError(
            f"{folder} would take {_size(total)}, more than cache_limit_gb = {settings.cache_limit_gb}: raise it{views}"
        )
    return packs


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Header:
    """What a file is before it is decoded."""

    height: int
    width: int
    status: os.stat_result

    def is_of(self, image: CheckedImage) -> bool:
        """Whether the file is still the one that was checked, by its size and its time of modification."""
        size = (image.record.height, image.record.width)
        return image.is_of(self.status) and (image.record.problem != "" or size == (self.height, self.width))


def _readable_headers(preset: Preset, kinds: Sequence[Kind], files: Sequence[tuple[str, int]]) -> dict[str, Header]:
    """Header of each file that has one, by name; files that a table knows are not opened again."""
    settings = preset.settings
    known = read_table(pack_path(preset, kinds[-1]).with_suffix(".csv"), pack_facts(preset, kinds[-1]))
    headers = {}
    for name, _ in tqdm(files, desc="sizes", unit=" images", disable=None):
        try:
            status = (settings.data_root / name).stat()
            if name in known and known[name].image.is_of(status) and known[name].offset != NOWHERE:
                height, width = known[name].image.record.height, known[name].image.record.width
            else:
                with open_image(settings.data_root / name, settings.max_image_pixels) as image:
                    width, height = image.size
        except (UnreadableImage, OSError):
            continue  # the check will say why
        if height * width <= settings.max_image_pixels:
            headers[name] = Header(height, width, status)
    return headers


class PackWriter:
    """Completes one pack for the images as they are now.

    Args:
        images: those that the pack shall hold, by name, in the order of the index.

    `done` are the entries that need no work; `slots` is where the bytes of the others go, a function of the last
    sealed table and of `images`, so that an interrupted build ends with the same files as one in one go.
    """

    def __init__(self, preset: Preset, kind: Kind, images: dict[str, Header]) -> None:
        self.path, self.facts = pack_path(preset, kind), pack_facts(preset, kind)
        self.table, self.journal, self.seal_path = (self.path.with_suffix(end) for end in (".csv", ".journal", ".json"))
        self.names = list(images)
        self._patch_size, self._kind = preset.settings.patch_size, kind

        before = read_table(self.table, self.facts)
        self.done = {name: before[name] for name in images if name in before and images[name].is_of(before[name].image)}
        self._sealed = self._seal_holds()
        if not self._sealed:
            self.done = self._sound(self.done)
        self.end = self._base = self._end_of_sealed(before)
        unused = self.end - sum(map(self._bytes_of, self.done.values()))
        # Too much of images that are gone: begin a new file.
        self._anew = unused > sum(map(self._bytes_of, images.values())) / 2
        if self._anew:
            self._sealed, self.done, self.end, self._base = False, {}, 0, 0

        self.slots: dict[str, Slot] = {}
        for name, header in images.items():
            if name not in self.done:
                self.slots[name] = Slot(kind, self.path, self.end, self._bytes_of(header))
                self.end += self.slots[name].bytes
        journal = {} if self._anew else read_table(self.journal, self.facts)
        self._journaled = self._sound(
            {
                name: entry
                for name, entry in journal.items()
                if name in self.slots
                and entry.offset in (self.slots[name].offset, NOWHERE)
                and images[name].is_of(entry.image)
            }
        )
        self._table_differs = self.slots or self.done.keys() != before.keys()
        self.done |= self._journaled
        self.slots = {name: slot for name, slot in self.slots.items() if name not in self._journaled}

    def _end_of_sealed(self, before: dict[str, Entry]) -> int:
        """Where the bytes end that have ever been under a seal: what is new comes after them."""
        end = max((entry.offset + self._bytes_of(entry) for entry in before.values()), default=0)
        if self.journal.exists():  # a build was interrupted; its first line says where it began
            first = self.journal.read_text(encoding="utf-8", errors="surrogateescape").partition("\n")[0]
            base = first.removeprefix(BEGAN_AT)
            return max(end, int(base)) if base != first and base.isdecimal() else end
        return max(end, self.path.stat().st_size) if self.table.exists() and self.path.exists() else end

    @property
    def bytes_let_go(self) -> int:
        """Of an old file that will be replaced."""
        return self.path.stat().st_blocks * 512 if self._anew and self.path.exists() else 0

    @property
    def missing_bytes(self) -> int:
        """That are still to be written."""
        return sum(slot.bytes for slot in self.slots.values())

    @property
    def images(self) -> int:
        """How many images have their bytes in the pack."""
        return sum(entry.offset != NOWHERE for entry in self.done.values())

    def begin(self) -> None:
        """Break the seal, if there is anything to do, and make the file as long as it will be."""
        if self._sealed and not self._table_differs:
            return
        self._sealed = False
        with writing(self.path):
            if self._anew:
                for path in (self.seal_path, self.table, self.journal, self.path):
                    path.unlink(missing_ok=True)
            # The journal again, without what is stale or was torn when a process was killed.
            lines = [csv_line(table_line(entry, self.facts)) for entry in self._journaled.values()]
            write_text(self.journal, "\n".join([f"{BEGAN_AT}{self._base}", *lines]) + "\n")
            self.seal_path.unlink(missing_ok=True)
            with open(self.path, "ab") as file:
                if os.fstat(file.fileno()).st_size < self.end:
                    file.truncate(self.end)

    def add(self, entry: Entry) -> None:
        """Note that an image's bytes are written, or that it has none because it cannot be decoded."""
        name = entry.image.record.path
        line = csv_line(table_line(entry, self.facts)) + "\n"
        with (
            writing(self.path),
            open(self.journal, "a", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            file.write(line)
        self.done[name] = entry
        self.slots.pop(name)

    def seal(self) -> None:
        """Vouch for the pack as it is now."""
        if self._sealed:
            return
        entries = [self.done[name] for name in self.names if name in self.done]
        with writing(self.path):
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
            write_csv(self.table, TABLE_COLUMNS, [table_line(entry, self.facts) for entry in entries])
            write_json(self.seal_path, self.facts | {"images": self.images} | pack_state(self.path))
            self.journal.unlink(missing_ok=True)

    def _bytes_of(self, of: Entry | Header) -> int:
        if isinstance(of, Entry) and of.offset == NOWHERE:
            return 0
        image = of.image.record if isinstance(of, Entry) else of
        return bytes_of_image(self._kind, image.height, image.width, self._patch_size)

    def _seal_holds(self) -> bool:
        try:
            check_seal(self.path, self.facts)
        except UserError:
            return False
        return True

    def _sound(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        """Those of `entries` whose bytes have their checksum."""
        if not entries or not self.path.exists():
            return {}
        progress = partial(tqdm, total=len(entries), desc=f"checking {self.path.name}", unit=" images", disable=None)
        with open(self.path, "rb") as file, ThreadPoolExecutor(available_cores()) as threads:  # zlib frees the GIL
            sums = threads.map(
                lambda entry: _checksum(file.fileno(), entry.offset, self._bytes_of(entry)), entries.values()
            )
            return {
                name: entry
                for (name, entry), checksum in zip(entries.items(), progress(sums), strict=True)
                if checksum == entry.checksum
            }


def _checksum(file: int, offset: int, size: int) -> int:
    checksum = 0
    for begin in range(offset, offset + size, 2**22):
        checksum = zlib.crc32(os.pread(file, min(2**22, offset + size - begin), begin), checksum)
    return checksum
