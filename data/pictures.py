"""Any image files, or images in memory -> decoded pictures, a few ahead of the one that is looked at."""

import glob
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.crops import sample_crop_boxes
from data.images import IMAGE_ENDINGS, UnreadableImage, decode, pixels_of, read_image
from data.index import list_files
from data.perturbations import Perturbation, jpeg, perturbation
from data.views import cut_crops, global_view, standard_view
from utils import UserError, derived_seed, read_columns

Source = str | Path | Image.Image


@dataclass(frozen=True)
class Picture:
    """A decoded RGB image.

    `key` is of the pixels as they were in the file: crops are drawn by it, so that the same picture gets the same
    crops under any name, and as the perturbed image of the same size.
    """

    image: Image.Image
    key: str

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 4)."""
        return pixels_of(self.image)

    def boxes(self, num_crops: int, patch_size: int, draws: int, seed: int) -> np.ndarray:
        """Stratified crops, int64 (draws, K, 4) as `sample_crop_boxes` gives them; a function of the picture."""
        height, width = self.image.height, self.image.width
        drawn = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(derived_seed(seed, self.key, draw))
            drawn.append(sample_crop_boxes(height, width, num_crops, patch_size, generator))
        return np.stack(drawn)

    def crops(self, boxes: np.ndarray, patch_size: int) -> Iterator[np.ndarray]:
        """Each box (N, 4) as uint8 (P, P, 3), padded with black."""
        for box in boxes:
            crop = np.zeros((1, patch_size, patch_size, 3), np.uint8)
            cut_crops(self.pixels, box[None], crop)
            yield crop[0]

    def global_view(self, patch_size: int, exact: bool = False) -> np.ndarray:
        """As GLASS's data set makes it, (P, P, 3)."""
        return global_view(self.pixels, patch_size, exact)

    def standard_view(self, patch_size: int) -> np.ndarray:
        """As the standard models' data set makes it, (P, P, 3)."""
        return standard_view(self.image, patch_size)


def read_pictures(
    sources: Iterable[Source],
    max_pixels: int,
    workers: int = 0,
    perturbations: Sequence[str] = ("native",),
    reencode_jpeg: int = 0,
) -> Iterator[Picture | UnreadableImage]:
    """Each source under each perturbation, in their order; what cannot be read is given as its reason.

    Memory is that of `workers` + 1 decoded images, and of one more that is being worked on.

    Args:
        workers: threads that decode ahead; 0: none, each image when it is asked for.
        perturbations: names as `data.perturbations.perturbation` takes them; an image is decoded once for all of them.
        reencode_jpeg: as the setting; it comes after the perturbation.
    """

    def read(source: Source) -> Picture:
        if not isinstance(source, str | Path | Image.Image):
            raise TypeError(f"{type(source).__name__} is no image: pass a path or a PIL image")
        image = decode(source) if isinstance(source, Image.Image) else read_image(source, max_pixels)
        return Picture(image, _key(image))

    def perturb(original: Callable[[], Picture], change: Perturbation) -> Picture | UnreadableImage:
        try:
            picture = original()
            image = change(picture.image)
            if reencode_jpeg:
                image = jpeg(image, reencode_jpeg)
            return picture if image is picture.image else Picture(image, picture.key)
        except UnreadableImage as error:
            return error
        except MemoryError:
            raise UserError("not enough memory for the decoded images: lower --num-workers") from None

    changes = [perturbation(name) for name in perturbations]
    waiting: deque[Future[Picture | UnreadableImage]] = deque()
    with ThreadPoolExecutor(max(1, workers), "decoding") if workers else nullcontext() as pool:
        submit = pool.submit if pool else _now
        try:
            for source in sources:
                original = submit(read, source)  # started before those that wait for it
                for change in changes:
                    waiting.append(submit(perturb, original.result, change))
                    if len(waiting) > workers:
                        yield waiting.popleft().result()
                del original
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _now(function: Callable[..., object], *arguments: object) -> Future:
    """As a pool's `submit`, without a pool."""
    future: Future = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def _key(image: Image.Image) -> str:
    """Hash of the size and of every n-th pixel of every n-th row, some 4,000 in all."""
    pixels = pixels_of(image)
    rows, columns = (max(1, side // 64) for side in pixels.shape[:2])
    sample = np.ascontiguousarray(pixels[::rows, ::columns, :3])
    return hashlib.blake2b(sample.tobytes() + str(pixels.shape).encode(), digest_size=16).hexdigest()


def find_images(arguments: Sequence[str]) -> list[str]:
    """Paths of the images that a user names, each once, in the order of the arguments.

    An argument is a file, a folder (all images below it, by name), a pattern such as "photos/**/*.jpg", or
    FILE.csv:COLUMN (paths as they are, or relative to the CSV's folder).

    Raises:
        UserError: an argument that names no file.
    """
    found: dict[str, None] = {}
    for argument in arguments:
        names = list(_find(argument))
        if not names:
            raise UserError(f"{argument} holds no image file ({', '.join(IMAGE_ENDINGS)}): name another")
        found |= dict.fromkeys(names)
    return list(found)


def other_files(arguments: Sequence[str]) -> list[str]:
    """Files in the folders that a user names, but hidden ones, that `find_images` takes for no images."""
    found = []
    for argument in arguments:
        if Path(argument).is_dir():
            folder = Path(argument).absolute()
            names = (Path(name) for name in list_files(folder.parent, folder.name))
            found += [
                str(name)
                for name in names
                if not name.name.lower().endswith(IMAGE_ENDINGS) and not name.name.startswith(".")
            ]
    return found


def _find(argument: str) -> Iterator[str]:
    path, (table, _, column) = Path(argument), argument.rpartition(":")
    if path.is_dir():
        folder = path.absolute()
        for name in list_files(folder.parent, folder.name):
            if name.lower().endswith(IMAGE_ENDINGS):
                yield str(path / Path(name).relative_to(folder.name))
    elif argument.lower().endswith(".csv"):
        raise UserError(f"{argument} is a list: name its column of paths too, as {argument}:COLUMN")
    elif path.exists():
        yield argument
    elif table.lower().endswith(".csv") and Path(table).exists():
        for (name,) in read_columns(Path(table), [column]):
            yield name if Path(name).exists() else str(Path(table).parent / name)
    elif glob.has_magic(argument):
        yield from sorted(name for name in glob.glob(argument, recursive=True) if Path(name).is_file())
    else:
        raise UserError(f"{argument} does not exist: name files, folders, patterns or FILE.csv:COLUMN")
