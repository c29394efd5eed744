"""Decodes any image files, or images in memory, a few ahead of the one in use."""

import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from unicodedata import normalize

from PIL import Image

from data.images import (
    IMAGE_ENDINGS,
    UnreadableImage,
    decode,
    is_image_name,
    notes_on,
    open_image,
    pixel_key,
    reencoded,
)
from data.layouts import list_files
from data.lists import read_columns
from data.perturbations import Perturbation, perturbation
from data.views import Picture
from utils import UserError

Source = str | Path | Image.Image


def read_pictures(
    sources: Iterable[Source],
    max_pixels: int,
    workers: int = 0,
    perturbations: Sequence[str] = ("native",),
    reencode_jpeg: int = 0,
) -> Iterator[Picture | UnreadableImage]:
    """Each source under each perturbation, in their order; an UnreadableImage for what cannot be read.

    Needs memory for `workers` + 2 decoded images.

    Args:
        workers: threads that decode ahead; 0: each image is decoded on demand.
        perturbations: names for `data.perturbations.perturbation`; an image is decoded once for all of them.
        reencode_jpeg: the setting, which is applied after the perturbation.
    """

    def read(source: Source) -> Picture:
        if not isinstance(source, str | Path | Image.Image):
            raise TypeError(f"{type(source).__name__} is no image: pass a path or a PIL image")
        if isinstance(source, Image.Image):
            with callers_images:  # one may come several times, and two threads must not load it at the same time
                return decoded(source)
        with open_image(source, max_pixels) as image:
            return decoded(image)

    def decoded(image: Image.Image) -> Picture:
        return Picture(rgb := decode(image), pixel_key(rgb), notes_on(image), image.format or "")

    def perturb(original: Future[Picture], change: Perturbation) -> Picture | UnreadableImage:
        try:
            picture = original.result()
            return replace(picture, image=reencoded(change(picture.image), reencode_jpeg))
        except UnreadableImage as error:
            return error
        except MemoryError:
            raise UserError("not enough memory for the decoded images: lower --num-workers") from None

    callers_images = Lock()
    changes = [perturbation(name) for name in perturbations]
    waiting: deque[Future[Picture | UnreadableImage]] = deque()
    with ThreadPoolExecutor(max(1, workers), "decoding") as pool:
        try:
            for source in sources:
                original = pool.submit(read, source)  # started before those that wait for it
                for change in changes:
                    waiting.append(pool.submit(perturb, original, change))
                    if len(waiting) > workers:
                        yield waiting.popleft().result()
                del original
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def find_images(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of the images that the arguments name, each once, in their order.

    An argument is a file, a folder (all images below it, by name), a pattern such as "photos/**/*.jpg", or
    FILE.csv:COLUMN (paths as they are, or relative to the CSV's folder).

    Returns:
        The images, and the files in folders that are ignored: hidden ones, and those without the ending of an image.

    Raises:
        UserError: an argument that names no file.
    """
    found: dict[str, None] = {}
    ignored: list[str] = []
    for argument in arguments:
        names, folder = list(_find(argument)), Path(argument)
        if folder.is_dir():
            known = {name: is_image_name(Path(name).relative_to(folder).as_posix()) for name in names}
            ignored += [name for name, is_image in known.items() if not is_image]
            names = [name for name, is_image in known.items() if is_image]
        if not names:
            raise UserError(f"{argument} holds no image file ({', '.join(IMAGE_ENDINGS)}): name another")
        found |= dict.fromkeys(names)
    return list(found), ignored


def _find(argument: str) -> Iterator[str]:
    """Files that an argument names; for a folder, all below it."""
    path, (table, _, column) = Path(argument), argument.rpartition(":")
    if path.is_dir():
        yield from (str(path / name) for name in list_files(path))
    elif argument.lower().endswith(".csv"):
        raise UserError(f"{argument} is a list: name its column of paths too, as {argument}:COLUMN")
    elif path.exists():
        yield argument
    elif table.lower().endswith(".csv") and Path(table).exists():
        for (name,) in read_columns(Path(table), [column]):
            spellings = (name, *(normalize(form, name) for form in ("NFC", "NFD")))  # of accented letters
            places = [str(folder / spelling) for folder in (Path(), Path(table).parent) for spelling in spellings]
            yield next(filter(os.path.exists, places), places[len(spellings)])
    elif glob.has_magic(argument):
        literal = argument.replace("[", "[[]")  # brackets may be part of a name, as in "shots [2023]/*.jpg"
        found = glob.glob(argument, recursive=True) or glob.glob(literal, recursive=True)
        yield from sorted(name for name in found if Path(name).is_file())
    else:
        raise UserError(f"{argument} does not exist: name files, folders, patterns or FILE.csv:COLUMN")
