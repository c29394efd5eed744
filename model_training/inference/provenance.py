"""Whose answer it is: what a model was trained on, how it did on its own test, and which images are unlike those."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
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
    shortest: int  # side of an image, in pixels
    longest: int
    drawn: bool = False  # by this project's program, as demo data are

    @staticmethod
    def of(index: Index, rows: Iterable[int]) -> "TrainingData":
        """Of the index's `rows`."""
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
    """Of a weights file.

    Args:
        data: of the model's own training, last, and of those that its weights went through before.
        test: None before it was tested.
    """

    data: tuple[TrainingData, ...] = ()
    test: Tested | None = None

    @staticmethod
    def read(about: Mapping[str, Any]) -> "Provenance":
        """What the metadata of a weights file says; an earlier version, and the author's code, say nothing.

        Raises UserError if that is not what `as_json` gives.
        """
        try:
            return TypeAdapter(Provenance).validate_python(about.get("provenance", {}))
        except ValidationError as error:
            raise UserError(f"provenance: {first_line(error)}") from None

    def as_json(self) -> dict[str, Any]:
        """What `read` takes, as "provenance" of the metadata."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """For whoever reads a verdict."""
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
        """In what an image differs from all that the model was trained on: format, size.

        Args:
            format: of the file; empty if there is none.
        """
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
