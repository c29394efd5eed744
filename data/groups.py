"""Which images belong together: pairs, sources, generators. Splits by group keep them on one side."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from utils import UserError, read_columns

NAME_COLUMN = "path|file|name"  # of a CSV, the first that is there: of paths below the data root, or of file names


def groups_of(paths: Sequence[str], group_by: str) -> list[str]:
    """The group of each image.

    Args:
        paths: relative to the data root, beginning with fake/ or real/.
        group_by: stem (the file name without its ending, as of pairs), folder (the first folder below fake/ or real/;
            an image in none is a group of its own), or FILE.csv:COLUMN.

    Raises:
        UserError: no such kind, or a CSV that cannot be read or lacks an image.
    """
    if group_by == "stem":
        return [PurePosixPath(path).stem for path in paths]
    if group_by == "folder":
        return [parts[1] if len(parts := PurePosixPath(path).parts) > 2 else path for path in paths]
    file, _, column = group_by.rpartition(":")
    if not file or not column:
        raise UserError(f"group_by is {group_by}: expected none, stem, folder or FILE.csv:COLUMN")
    return _looked_up(paths, file, column)


def _looked_up(paths: Sequence[str], file: str, column: str) -> list[str]:
    groups = dict(read_columns(Path(file), (NAME_COLUMN, column)))
    found = [groups.get(path, groups.get(PurePosixPath(path).name)) for path in paths]
    if None in found:
        raise UserError(f"{file} has no row for {paths[found.index(None)]}: add it, or choose another group_by")
    return found


def held_out(groups: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The groups that `patterns` name, as "camera" or "camera_*".

    Raises:
        UserError: a pattern that names none, which would silently hold nothing out.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        named = {group for group in groups if fnmatchcase(group, pattern)}
        if not named:
            raise UserError(f"hold_out names {pattern}, and no group is called so: the groups are {_some(groups)}")
        chosen |= named
    return chosen


def _some(groups: Sequence[str]) -> str:
    names = sorted(set(groups))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
