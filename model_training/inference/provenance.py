"""Where a verdict comes from: the model's training data, its own test, and how an image differs from that data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data.index import Index
from data.layouts import MARKER
from data.records import CLASSES
from utils import UserError, first_line

DRAWN = "These are images that a program drew: it knows nothing of real generators, nor of photographs. "


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained and validated on."""

    name: str  # of the data root
    fingerprint: str
    fake: int  # images
    real: int
    formats: tuple[str, ...]  # of the files
    shortest: int  # side of any image, in pixels
    longest: int
    drawn: bool = False  # whether the images are demo data

    @staticmethod
    def of(index: Index, rows: Iterable[int]) -> "TrainingData":
        """The images in these `rows` of the index."""
        records = [index.records[row] for row in rows]
        counts = [sum(record.label == label for record in records) for label in range(len(CLASSES))]
        sides = [side for record in records for side in (record.width, record.height)]
        formats = tuple(sorted({record.format for record in records}))
        drawn = (index.root / MARKER).exists()
        return TrainingData(index.root.name, index.fingerprint, *counts, formats, min(sides), max(sides), drawn)


@dataclass(frozen=True)
class Tested:
    """How a model did on its own test, in fractions."""

    images: int
    accuracy: float
    auc: float


@dataclass(frozen=True)
class Provenance:
    """What the metadata of a weights file says about training and test.

    Args:
        data: of each training that the weights went through, the model's own last.
        test: None before the test.
    """

    data: tuple[TrainingData, ...] = ()
    test: Tested | None = None

    @staticmethod
    def read(about: Mapping[str, Any]) -> "Provenance":
        """From the metadata of a weights file; empty for an earlier version and for the author's code.

        Raises UserError for metadata of another form.
        """
        try:
            return TypeAdapter(Provenance).validate_python(about.get("provenance", {}))
        except ValidationError as error:
            raise UserError(f"provenance: {first_line(error)}") from None

    @property
    def sentence(self) -> str:
        """Training and test in words, to be shown beside a verdict."""
        if not self.data:
            return "The weights do not say what they were trained on, nor how they did in a test of their own."
        *earlier, own = self.data
        before = f", after {' and '.join(each.name for each in earlier)}" if earlier else ""
        tested = "It was not tested."
        if self.test:
            tested = (
                f"On {self.test.images:,} other images of that data set: accuracy {self.test.accuracy:.1%}, "
                f"AUC {100 * self.test.auc:.1f}."
            )
        return (
            f"Trained on {own.fake + own.real:,} images of the data set {own.name}{before} ({own.fake:,} fake, "
            f"{own.real:,} real; {', '.join(own.formats)}; sides of {own.shortest:,} to {own.longest:,} pixels). "
            f"{tested} {DRAWN * own.drawn}How it does on images of other origin, only a test on such images can tell."
        )

    def unlike(self, width: int, height: int, format: str) -> list[str]:
        """How an image differs from all training images: its format (empty if unknown), "smaller", "larger"."""
        if not self.data:
            return []
        found = []
        if format and not any(format in each.formats for each in self.data):
            found.append(format)
        if min(width, height) < min(each.shortest for each in self.data):
            found.append("smaller")
        if max(width, height) > max(each.longest for each in self.data):
            found.append("larger")
        return found
