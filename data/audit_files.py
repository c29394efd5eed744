"""The audit's look at each file: its header, its hashes, and whether it can be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from config import Preset
from data.checks import File, in_processes, in_turn
from data.duplicates import THUMBNAIL_SIDE, perceptual_hash
from data.headers import Header, read_header
from data.images import UnreadableImage, grey_thumbnail, open_image
from utils import UserError, sha256_of


@dataclass(frozen=True)
class AuditedFile:
    """One readable image file."""

    path: str  # relative to the data root, with forward slashes
    label: int
    content: str  # SHA-256 of its bytes
    header: Header
    hash: np.ndarray  # perceptual, uint64 (4,)
    thumbnail: np.ndarray  # grey, uint8 (32, 32)
    problem: ClassVar[str] = ""


@dataclass(frozen=True)
class UnreadableFile:
    """One file that gives no image, and why."""

    path: str
    label: int
    problem: str


def audit_files(preset: Preset, files: Sequence[File]) -> list[AuditedFile | UnreadableFile]:
    """`audit_file` of all files, in their order.

    Raises:
        UserError: a worker process was killed, or memory ran out.
    """
    settings = preset.settings
    look = partial(audit_file, root=settings.data_root, max_pixels=settings.max_image_pixels)
    found = in_processes(look, files, settings.num_workers, ("imagehash", "scipy.fftpack"))
    return list(tqdm(found, total=len(files), desc="auditing", unit=" images", disable=None))


def audit_file(name: str, label: int, root: Path, max_pixels: int) -> AuditedFile | UnreadableFile:
    """Read a file's header, then decode it as coarsely as its hash allows.

    Raises:
        UserError: there is not enough memory to decode it.
    """
    path = root / name
    try:
        with open_image(path, max_pixels) as image:
            header = read_header(image, name, path.stat().st_size)
            with in_turn(image):
                thumbnail = grey_thumbnail(image, THUMBNAIL_SIDE)
        small = np.asarray(thumbnail.reduce(2))
        return AuditedFile(name, label, sha256_of(path), header, perceptual_hash(thumbnail), small)
    except UnreadableImage as error:
        if isinstance(error.__cause__, MemoryError):  # not the file's fault
            raise UserError(f"not enough memory to decode {path}: set a smaller --num-workers") from None
        return UnreadableFile(name, label, str(error))
    except OSError as error:
        return UnreadableFile(name, label, error.strerror or str(error))
