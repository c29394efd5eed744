"""What is known of one image file."""

from dataclasses import dataclass

CLASSES = ("fake", "real")  # label 0 and label 1: folder names in alphabetical order


@dataclass(frozen=True)
class ImageRecord:
    """One image: the layout of its data set gives path, label, part and source; the check of its file, the rest."""

    path: str = ""  # relative to the data root, with forward slashes
    label: int = 0
    bytes: int = 0
    content: str = ""  # SHA-256 of the bytes; empty if they cannot be read
    format: str = ""  # of the content, such as JPEG, whatever the ending
    mode: str = ""  # Pillow's, such as RGB or P
    width: int = 0  # pixels, as height; 0 if unreadable
    height: int = 0
    problem: str = ""  # why it cannot be decoded; empty for a readable image
    key: str = ""  # `data.images.pixel_key` of the decoded image, by which its crops are drawn; empty if unreadable
    part: str = ""  # train, valid or test, if the data set gives its split
    source: str = ""  # its generator, or where it comes from
    sums: tuple[int, ...] = ()  # of red, green, blue (0 to 255), then of their squares; of a checked, readable image

    @property
    def identity(self) -> str:
        """A short name of the file, by which runs on other machines know it too."""
        return identity(self.bytes, self.content)


def identity(size: int, content: str) -> str:
    """A short name of a file of `size` bytes and the hash `content`; the size can be compared without reading it."""
    return f"{size}-{content[:12]}"
