"""Audits one file: its header, its hashes, and whether it can be decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from config import Settings
from data.audit.duplicates import THUMBNAIL_SIDE, perceptual_hash
from data.audit.headers import read_header
from data.images import UnreadableImage, grey_thumbnail, open_image
from data.preparation.checks import decoding_turn, in_processes, problem_of
from data.records import ImageRecord
from utils import sha256_of


@dataclass(frozen=True)
class AuditedFile:
    """One image file; what comes after `problem` is empty for an unreadable one."""

    path: str  # relative to the data root, with forward slashes
    label: int
    problem: str = ""  # why it cannot be decoded
    header: dict[str, Any] = field(default_factory=dict)  # from `read_header`
    content: str = ""  # SHA-256 of its bytes
    hash: np.ndarray | None = None  # perceptual, uint64 (4,)
    thumbnail: np.ndarray | None = None  # grey, uint8 (32, 32)


def audit_files(settings: Settings, images: Sequence[ImageRecord]) -> list[AuditedFile]:
    """`audit_file` of all images, in their order; raises UserError as it and `in_processes` do."""
    audit = partial(audit_file, root=settings.data_root, max_pixels=settings.max_image_pixels)
    files = [(image.path, image.label) for image in images]
    return in_processes(audit, files, settings.num_workers, "auditing", ("imagehash", "scipy.fftpack"))


def audit_file(name: str, label: int, root: Path, max_pixels: int) -> AuditedFile:
    """Read a file's header, then decode it as coarsely as its hash allows; raises UserError if memory runs out."""
    path = root / name
    try:
        with open_image(path, max_pixels) as image:
            header = read_header(image, name, path.stat().st_size)
            with decoding_turn(image):
                thumbnail = grey_thumbnail(image, THUMBNAIL_SIDE)
        small = np.asarray(thumbnail.reduce(2))
        return AuditedFile(name, label, "", header, sha256_of(path), perceptual_hash(thumbnail), small)
    except (UnreadableImage, OSError) as error:
        return AuditedFile(name, label, problem_of(error, path))
