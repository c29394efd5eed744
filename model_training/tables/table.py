"""A table: rows of values, written as CSV, Markdown and LaTeX. Reads no result files."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd

from data.lists import render_table, write_csv
from utils import write_text

MISSING = "missing"  # shown for None: a value that is not computed yet
TERMINAL_WIDTH = 80
UNDEFINED = "n/a"  # shown for NaN: a value that does not exist

Row = dict[str, Any]  # column of the CSV -> value
Cell = Callable[[Row], str]  # what Markdown and LaTeX show of a row

LATEX_ESCAPES = {character: rf"\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": "$<$", ">": "$>$", "±": r"$\pm$", "²": "$^2$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One table. Each row has a `model`, and in `missing` what it lacks ("" if nothing)."""

    name: str
    title: str
    rows: list[Row]
    columns: dict[str, Cell]  # heading -> cells
    notes: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)  # Python, below the Markdown

    @property
    def missing(self) -> list[str]:
        """What is missing, by model, each once."""
        return list(dict.fromkeys(f"{row['model']}: {row['missing']}" for row in self.rows if row["missing"]))

    def write(self, folder: Path) -> None:
        """Write <name>.csv, <name>.md and <name>.tex."""
        keys = [*dict.fromkeys(key for row in self.rows for key in row if key != "missing"), "missing"]
        values = pd.DataFrame(self.rows, columns=keys, dtype=object)
        write_csv(folder / f"{self.name}.csv", keys, values.where(values.notna(), "").itertuples(index=False))
        write_text(folder / f"{self.name}.md", self.markdown())
        write_text(folder / f"{self.name}.tex", self.latex())

    def markdown(self) -> str:
        """The table under its title, then notes and code."""
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self._cells())]
        code = ["", "```python", *self.code, "```"] if self.code else []
        notes = [f"- {note}" for note in self._all_notes()]
        return "\n".join([f"# {self.title}", "", *lines, "", *notes, *code]).rstrip() + "\n"

    def text(self) -> str:
        """For a terminal: the first columns, as many as fit in TERMINAL_WIDTH characters, then the notes."""
        columns, rows = list(self.columns), self._cells()
        widths = [max(map(len, column)) + 2 for column in zip(columns, *rows, strict=True)]
        count = sum(end - 2 <= TERMINAL_WIDTH for end in accumulate(widths))
        table = render_table(columns[:count], [row[:count] for row in rows])
        hidden = [f"In the files also: {', '.join(columns[count:])}."] if count < len(columns) else []
        return "\n".join([self.title, "", table, "", *(f"- {note}" for note in (*hidden, *self._all_notes())), ""])

    def latex(self) -> str:
        """A booktabs table, shrunk to the page if it is wider."""
        heading, *rows = [" & ".join(map(_latex, cells)) + r" \\" for cells in (self.columns, *self._cells())]
        text = (r" \\" + "\n").join(map(_latex, self._all_notes()))
        lines = [
            r"% needs \usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.title)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            *(r"\toprule", heading, r"\midrule", *rows, r"\bottomrule"),
            r"\end{tabular}}",
            *([rf"\par\medskip\parbox{{\linewidth}}{{\footnotesize\raggedright {text}}}"] if text else []),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def _cells(self) -> list[list[str]]:
        return [[cell(row) for cell in self.columns.values()] for row in self.rows]

    def _all_notes(self) -> list[str]:
        notes = list(self.notes)
        if any(UNDEFINED in cell for cells in self._cells() for cell in cells):
            notes.append(f"{UNDEFINED}: does not apply, is not defined or was not measured in this mode.")
        return notes + [f"Missing: {sentence}." for sentence in self.missing]


def _latex(text: str) -> str:
    escaped = text.translate(str.maketrans(LATEX_ESCAPES))
    return re.sub(r"(?<![\w$-])-(?=\d)", "$-$", escaped)  # a minus sign, not a hyphen


# ---------------------------------------------------------------------------------------------------- cells
def show(value: Any, form: str = "", scale: float = 1) -> str:
    """A value as text; numbers times `scale`, in a format such as ".2f"."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    return format(scale * value, form) if value == value else UNDEFINED


def value_of(key: str, form: str = "") -> Cell:
    """The value under `key`."""
    return lambda row: show(row.get(key), form)


def mean_and_std_of(key: str, scale: float = 1, form: str = ".2f") -> Cell:
    """<key>_mean ± <key>_std; empty for a row without these columns."""

    def cell(row: Row) -> str:
        if f"{key}_mean" not in row:
            return ""
        mean, std = (show(row[f"{key}_{part}"], form, scale) for part in ("mean", "std"))
        return mean if std in (MISSING, UNDEFINED) else f"{mean} ± {std}"

    return cell


def interval_of(key: str, scale: float = 1, form: str = "+.2f") -> Cell:
    """<key> [<key>_low, <key>_high], with signs."""

    def cell(row: Row) -> str:
        middle, low, high = (show(row[name], form, scale) for name in (key, f"{key}_low", f"{key}_high"))
        return middle if middle in (MISSING, UNDEFINED) else f"{middle} [{low}, {high}]"

    return cell


# ---------------------------------------------------------------------------------------------------- notes
def notes_of(named: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """One note for each label: its value if all names have the same one, else each value with its names."""
    by_label: dict[str, dict[str, dict[str, None]]] = {}  # label -> value as text -> names, each once
    for name, values in named:
        for label, value in values.items():
            by_label.setdefault(label, {}).setdefault(str(value), {})[name] = None
    notes = []
    for label, by_text in by_label.items():
        with_names = [f"{text} ({', '.join(names)})" for text, names in by_text.items()]
        notes.append(f"{label}: {'; '.join(with_names if len(by_text) > 1 else by_text)}.")
    return notes


def listed(numbers: Iterable[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(map(str, numbers))
