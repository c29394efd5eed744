"""What the index says of one image file."""

from dataclasses import dataclass

CLASSES = ("fake", "real")  # label 0 and label 1: folder names in alphabetical order


@dataclass(frozen=True)
class ImageRecord:
    """What one file is. `problem` is empty for a readable image, else the reason; width and height are then 0."""

    path: str  # relative to the data root, with forward slashes
    label: int
    bytes: int
    content: str  # SHA-256 of the bytes; empty if they cannot be read
    format: str  # of the content, such as JPEG, whatever the ending
    mode: str  # Pillow's, such as RGB or P
    width: int
    height: int
    problem: str
    key: str = ""  # `data.images.pixel_key` of the decoded image, by which its crops are drawn; empty if unreadable

    @property
    def identity(self) -> str:
        """By which the same file is known elsewhere."""
        return identity(self.bytes, self.content)


def identity(size: int, content: str) -> str:
    """Of a file of `size` bytes and the hash `content`, short, and with what can be compared without reading it."""
    return f"{size}-{content[:12]}"


@dataclass(frozen=True)
class CheckedImage:
    """What the check of one file found.

    `sums` are of the values (0 to 255) of red, green, blue, then of their squares; all 0 for an unreadable file.
    """

    record: ImageRecord
    sums: tuple[int, ...]
