"""The layouts of data sets on disk: from files to images with class, given split and source. docs/own_images.md.

Here 0 is fake and 1 is real, whatever a data set calls them; a data set whose labels are ambiguous is refused.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from data.images import IMAGE_ENDINGS, is_image_name
from data.lists import comparable, read_columns
from data.records import CLASSES, ImageRecord
from utils import UserError

MARKER, MASKS = ".demo_dataset.json", "masks"  # of a demo data set: a file, and a folder of masks, which are no images
PLAIN, LIST = "fake_real", "list.csv"
CLASS_FOLDERS = {  # layout -> name of a class's folder -> label
    PLAIN: {"fake": 0, "real": 1},
    "0_real_1_fake": {"1_fake": 0, "0_real": 1},  # CNNDetection, ForenSynths, AIGCDetectBenchmark
    "ai_nature": {"ai": 0, "nature": 1},  # GenImage
}
REVERSED = {"0_fake": 0, "1_real": 1}  # not as CNNDetection numbers them
CERTAIN = CLASS_FOLDERS[PLAIN] | CLASS_FOLDERS["0_real_1_fake"] | REVERSED  # unlike "nature", never what images show
LABELS = CERTAIN | CLASS_FOLDERS["ai_nature"]
NUMBERS = {":0=fake": {"0": 0, "1": 1}, ":0=real": {"0": 1, "1": 0}}  # labels of a list, by the end of data_layout
PARTS = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid"}
PARTS |= {"test": "test", "testing": "test"}
COLUMNS = ("path|file|name", "label|labels", "split|", "generator|model|model_name|", "source|real_source|")  # of lists
AMBIGUOUS = (
    "so that labels might be reversed: list the images in a CSV (--data-layout LIST.csv), or name the right layout "
    "(--data-layout)"
)
KNOWN = (
    "a data root holds fake/ and real/; or, at any depth, 0_real/ and 1_fake/ (as CNNDetection), ai/ and nature/ (as "
    "GenImage) or fake/ and real/; or images that a CSV lists with path and label (--data-layout LIST.csv); python -m "
    "data.data_download fetches the paper's, a Hugging Face data set (--hugging-face) or a demo (--demo DIR)"
)


@dataclass(frozen=True)
class DataSet:
    """The images of a data root, all fake ones first."""

    layout: str  # as the setting; where that is auto, what was found
    images: list[ImageRecord]
    plain: bool = False  # fake/ and real/ are directly below the data root, without a split: paths say everything
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()  # hidden files, and those without the ending of an image

    def described(self) -> str:
        """The layout, which class is 0, the given split and the sources, in sentences."""
        sizes, sources = (Counter(getattr(image, name) for image in self.images) for name in ("part", "source"))
        swapped = "; 0 there is real, and becomes 1" if self.layout.endswith((":0=real", "0_real_1_fake")) else ""
        said = [f"Layout {self.layout}: here 0 is fake and 1 is real{swapped}.", *self.notes]
        if any(sizes):
            drawn = "" if "valid" in sizes else "; validation images are drawn from train (valid_size)"
            said.append(f"Split as given: {', '.join(f'{sizes[part]:,} {part}' for part in sorted(sizes))}{drawn}.")
        if any(sources) and not self.plain:
            shown = ", ".join(f"{name or 'none'} {count:,}" for name, count in sources.most_common(9))
            said.append(f"{len(sources):,} generators or sources: {shown}{', ...' if len(sources) > 9 else ''}.")
        return "\n".join(said)


def list_files(root: Path, start: str = "") -> list[str]:
    """Path relative to `root` of every file below root/start, in ImageFolder's order, which decides the split.

    Links are followed, except back to a folder that contains them. The masks of demo data are left out.

    Raises:
        UserError: a folder in it cannot be listed.
    """

    def cannot_list(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): fix that, or move it away")

    found: list[tuple[str, list[str]]] = []
    above: dict[str, frozenset[tuple[int, int]]] = {}  # the folders that contain a folder
    for folder, folders, names in os.walk(root / start, followlinks=True, onerror=cannot_list):
        status, parents = os.stat(folder), above.pop(folder, frozenset())
        here = (status.st_dev, status.st_ino)
        if here in parents:
            folders.clear()
            continue
        if MARKER in names and MASKS in folders:
            folders.remove(MASKS)
        found.append((folder, sorted(names)))
        above |= {os.path.join(folder, name): parents | {here} for name in folders}
    return [(Path(folder) / name).relative_to(root).as_posix() for folder, names in sorted(found) for name in names]


def read_data_set(root: Path, layout: str = "auto", classes: int = len(CLASSES)) -> DataSet:
    """The data set below `root`, in the layout that the setting `data_layout` names; no hidden images.

    Raises:
        UserError: images of fewer than `classes` classes, or a layout that is unknown or contradicts itself.
    """
    here = {path.name for path in root.glob("*") if path.is_dir()}
    plain = layout in ("auto", PLAIN) and any(name in CLASSES for name in here)
    starts = [name for name in CLASSES if name in here] if plain else [""] * root.is_dir()
    files = [name for start in starts for name in list_files(root, start)] if layout in ("auto", *CLASS_FOLDERS) else []
    images = [name for name in files if is_image_name(name)]
    folders = here if plain else {folder for name in images for folder in name.split("/")[:-1]}
    for name in sorted(folders - CERTAIN.keys()) if layout in ("auto", *CLASS_FOLDERS) else ():
        if name.lower() in CERTAIN:
            raise UserError(f"{root} has a folder {name}, to be called {name.lower()}: rename it, or link to it")
    present = [name for name, of in CLASS_FOLDERS.items() if len(of.keys() & folders) >= classes]
    if layout == "auto":
        listed = [LIST] * (not plain and (root / LIST).exists())
        present += [str(root / name) for name in listed]
        if len(present) > 1 or REVERSED.keys() & folders:
            raise UserError(f"{root} has {', '.join(sorted(folders & LABELS.keys()) + listed)}, {AMBIGUOUS}")
        layout = (*present, PLAIN)[0]
    if layout not in CLASS_FOLDERS:
        return _build_data_set(layout, _read_labelled_list(root, layout, classes))
    if layout not in present:
        missing = next(name for name in sorted(CLASS_FOLDERS[layout]) if name not in folders)
        raise UserError(f"{root} holds {_contents(root)}, and {root / missing} does not exist: {KNOWN}")
    found, outside = _sort_into_classes(root, layout, images, plain)
    if len(labels := {image.label for image in found}) < classes:
        folder = root / next(name for label, name in enumerate(CLASSES) if label not in labels)
        raise UserError(f"{folder} holds no image file ({', '.join(IMAGE_ENDINGS)}): it holds {_contents(folder)}")
    plain = plain and not any(image.part for image in found)
    return _build_data_set(layout, found, plain, outside, tuple(name for name in files if not is_image_name(name)))


def _sort_into_classes(
    root: Path, layout: str, paths: Sequence[str], plain: bool
) -> tuple[list[ImageRecord], list[str]]:
    """Images below class folders, with split and source from their other folders, and paths in no class folder."""
    of_class, images, around, outside = CLASS_FOLDERS[layout], [], [], []
    for path in paths:
        folders = path.split("/")[:-1]
        if len({LABELS[name] for name in folders if name in CERTAIN or name in of_class}) > 1:
            raise UserError(f"{root / path} lies in folders of both classes, {AMBIGUOUS}")
        place = next((place for place, name in enumerate(folders) if name in of_class), None)
        if place is None:
            outside.append(path)
        else:
            images.append(ImageRecord(path, of_class[folders.pop(place)]))
            around.append((folders, place))
    parts = _find_part_folders(root, around)
    for row, part in enumerate([""] * len(images) if plain and len(set(parts)) < 2 else parts):
        others = around[row][0]
        if part:
            others.remove(part)
        images[row] = replace(images[row], part=PARTS.get(part.lower(), ""), source=others[0] if others else "")
    return images, outside


def _find_part_folders(root: Path, around: Sequence[tuple[list[str], int]]) -> list[str]:
    """For each image the folder that names its part of the split, on one level for all; empty if there is none.

    `around` has an image's other folders, and the place of its class among them. On any other level, a folder "train"
    may hold pictures of trains.
    """
    for level in (lambda place: 0, lambda place: place - 1, lambda place: place):  # the last is below the class
        names = [folders[level(place)] if 0 <= level(place) < len(folders) else "" for folders, place in around]
        known = {name for name in names if name.lower() in PARTS}
        if known >= set(names):
            return names
        if len(known) > 1:
            others = ", ".join(sorted(set(names) - known)[:3]) or "images"
            raise UserError(f"{root} has {', '.join(sorted(known))} and beside them {others}: list the images in a CSV")
    return [""] * len(around)


def _read_labelled_list(root: Path, layout: str, classes: int) -> list[ImageRecord]:
    """The images that a CSV lists, by path; `layout` is LIST.csv, or LIST.csv:0=real if labels are numbers."""
    end = next((end for end in NUMBERS if layout.endswith(end)), "")
    file, words, images = layout.removesuffix(end), LABELS | NUMBERS.get(end, {}), {}
    if not file.lower().endswith(".csv"):
        known = ", ".join(CLASS_FOLDERS)
        raise UserError(f"data_layout is {layout}: expected auto, {known}, LIST.csv or LIST.csv:0=real")
    for path, label, split, generator, source in read_columns(Path(file), COLUMNS):
        label, part, wrong = label.strip().lower(), PARTS.get(split.strip().lower(), ""), ""
        if label not in words:
            wrong = f"labels {path} {label or 'nothing'}, which may mean either class: expected fake or real"
            wrong += f", or what the numbers mean, as --data-layout {file}:0=real" * (label in ("0", "1"))
        elif split and not part:
            wrong = f"has {path} in a split {split}: expected train, val or test, or none at all"
        elif comparable(path) in images:
            wrong = f"lists {path} twice: once is enough"
        elif posixpath.isabs(path) or comparable(path).startswith("../") or not (root / path).is_file():
            wrong = f"lists {path}, which is no file of {root}: paths are relative to the data root"
        if wrong:
            raise UserError(f"{file} {wrong}")
        path, source = posixpath.normpath(path), generator or source
        images[comparable(path)] = ImageRecord(path, words[label], part=part, source=source)
    if len({bool(image.part) for image in images.values()}) > 1:
        raise UserError(f"{file} has images with and without a split: expected train, val or test, or none at all")
    if len({image.label for image in images.values()}) < classes:
        raise UserError(f"{file} lists images of one class only: add some of the other")
    return sorted(images.values(), key=lambda image: image.path)


def _build_data_set(
    layout: str,
    images: list[ImageRecord],
    plain: bool = False,
    outside: Sequence[str] = (),
    ignored: tuple[str, ...] = (),
) -> DataSet:
    """Sort fake images first, and name given parts as they are used here."""
    parts, renamed = {image.part for image in images}, {}
    notes = [f"Left out, in no folder of a class: {len(outside):,} images ({outside[0]})."] if outside else []
    if "valid" in parts and "test" not in parts:
        renamed = {"valid": "test"}
        notes.append("There is no test part: val is tested on, as in GenImage's papers.")
    elif parts == {"train"}:  # which says nothing
        renamed = {"train": ""}
    images = [replace(image, part=renamed.get(image.part, image.part)) for image in images]
    return DataSet(layout, sorted(images, key=lambda image: image.label), plain, tuple(notes), ignored)


def _contents(folder: Path) -> str:
    """The first names in a folder, for a message."""
    if not folder.is_dir():
        return f"nothing, since it {'is no folder' if folder.exists() else 'does not exist'}"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "") or "nothing"
