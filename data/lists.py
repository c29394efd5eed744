"""Reads and writes CSV files, overwrites only those that our commands wrote, and renders tables as text."""

import csv
import hashlib
import io
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils import UserError, check_replaceable, first_line, write_text


def read_columns(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Columns of a CSV file of the user's, row by row; "a|b" is a or, if there is none, b; "a|" is optional.

    Raises:
        UserError: it cannot be read, or lacks a column or rows.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read as CSV ({reason}): correct its name, or fix it") from None
    chosen = [
        next((name for name in column.split("|") if name in names or (column and not name)), None) for column in columns
    ]
    if None in chosen:
        wanted = columns[chosen.index(None)].replace("|", " or ")
        raise UserError(f"{path} has no column {wanted}: it has {', '.join(names) or 'none'}")
    if not rows:
        raise UserError(f"{path} has a heading and no rows: add some")
    return [tuple(row.get(name) or "" for name in chosen) for row in rows]


def comparable(path: str) -> str:
    """A path normalised for comparisons: without ./, and accented letters as one character (macOS uses two)."""
    return unicodedata.normalize("NFC", posixpath.normpath(path))


def check_output(path: Path, columns: Sequence[str]) -> None:
    """Check that writing a table to `path` overwrites no more than an earlier table with these columns.

    Raises:
        UserError: it is another file, a pipe or a device.
    """
    if not (path.exists() or path.is_symlink()):
        return
    check_replaceable(path)
    heading = csv_line(columns).encode()
    with suppress(OSError), open(path, "rb") as file:
        if file.readline(2 * len(heading)).rstrip() == heading:
            return
    raise UserError(f"{path} exists, and is not a table that this command wrote: name another file")


def render_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], markdown: bool = False) -> str:
    """A table as aligned text, or as Markdown: numbers to the right, text to the left."""
    table = []
    for column, values in zip(columns, zip(*rows, strict=True), strict=True):
        is_text = isinstance(values[0], str)
        digits = 0 if isinstance(values[0], int) else 4 if not is_text and max(values) <= 1 else 2
        cells = [column.replace("_", " "), *(value if is_text else f"{value:,.{digits}f}" for value in values)]
        width = max(map(len, cells))
        if markdown:
            cells.insert(1, "-" * width if is_text else "-" * (width - 1) + ":")
        table.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in cells])
    lines = zip(*table, strict=True)
    return "\n".join(f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines)


def name_of_root(root: Path, *choices: str) -> str:
    """A unique name for results on a data root: its folder's name, and 8 digits of a hash of its path and `choices`.

    `choices` are what else the results depend on, such as a list of some of the images; "" for none.
    """
    root = root.resolve()
    key = os.fsencode(root) + (repr(choices).encode() if any(choices) else b"")
    return f"{root.name}-{hashlib.sha256(key).hexdigest()[:8]}"


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, complete or not at all; floats keep all their digits."""
    write_text(path, "".join(f"{csv_line(row)}\n" for row in (columns, *rows)))


def csv_line(row: Sequence[Any]) -> str:
    """A line of a CSV file, without its line end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(row)  # this terminator makes it quote "\r" in names
    return buffer.getvalue().removesuffix("\r\n")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file that this project wrote, as column -> text."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))
