"""A table: rows of values, and how CSV, Markdown and LaTeX show them; knows no result file."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import write_csv, write_text

MISSING = "missing"  # how None is shown: a value that is still to come
UNDEFINED = "n/a"  # how NaN is shown: a value that there cannot be

Row = dict[str, Any]  # column of the CSV -> value
Cell = Callable[[Row], str]  # what Markdown and LaTeX show of a row

LATEX_ESCAPES = {
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "²": "$^2$",
}


@dataclass(frozen=True)
class Table:
    """One table. Each row names its `model`, and in `missing` what it lacks ("" if nothing)."""

    name: str
    title: str
    rows: list[Row]
    columns: dict[str, Cell]  # under their headings
    notes: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)  # Python, below the Markdown

    @property
    def missing(self) -> list[str]:
        """What is missing, by name."""
        sentences = [f"{row['model']}: {row['missing']}" for row in self.rows if row["missing"]]
        return list(dict.fromkeys(sentences))  # each once, in order

    def write(self, folder: Path) -> None:
        """Write <name>.csv, <name>.md and <name>.tex."""
        keys = dict.fromkeys(key for row in self.rows for key in row)  # an ordered set
        del keys["missing"]
        keys["missing"] = None  # the last column
        values = [[_csv_value(row.get(key)) for key in keys] for row in self.rows]
        write_csv(folder / f"{self.name}.csv", list(keys), values)
        write_text(folder / f"{self.name}.md", self.markdown())
        write_text(folder / f"{self.name}.tex", self.latex())

    def markdown(self) -> str:
        """The table under its title, then notes and code."""
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [f"# {self.title}", ""]
        for cells in [list(self.columns), rule, *self._cells()]:
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        lines += [f"- {note}" for note in self._all_notes()]
        if self.code:
            lines += ["", "```python", *self.code, "```"]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self) -> str:
        """A booktabs table, shrunk to the page if it is wider."""
        lines = [
            r"% needs \usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.title)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            r"\toprule",
            _latex_row(self.columns),
            r"\midrule",
            *[_latex_row(cells) for cells in self._cells()],
            r"\bottomrule",
            r"\end{tabular}}",
        ]
        notes = [_latex(note) for note in self._all_notes()]
        if notes:
            text = (r" \\" + "\n").join(notes)
            lines.append(rf"\par\medskip\parbox{{\linewidth}}{{\footnotesize\raggedright {text}}}")
        lines.append(r"\end{table}")
        return "\n".join(lines) + "\n"

    def _cells(self) -> list[list[str]]:
        return [[cell(row) for cell in self.columns.values()] for row in self.rows]

    def _all_notes(self) -> list[str]:
        notes = list(self.notes)
        if any(UNDEFINED in cell for cells in self._cells() for cell in cells):
            notes.append(f"{UNDEFINED}: does not apply, is not defined or was not measured in this mode.")
        return notes + [f"Missing: {sentence}." for sentence in self.missing]


def _csv_value(value: Any) -> Any:
    return "" if value is None or value != value else value  # only NaN differs from itself


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(_latex(cell) for cell in cells) + r" \\"


def _latex(text: str) -> str:
    escaped = text.translate(str.maketrans(LATEX_ESCAPES))
    return re.sub(r"(?<![\w$-])-(?=\d)", "$-$", escaped)  # a minus sign, where it is no hyphen


# ---------------------------------------------------------------------------------------------------- cells
def show(value: Any, form: str = "") -> str:
    """A value as text; `form` is a format specification, such as ".2f"."""
    if value is None:
        return MISSING
    if value != value:
        return UNDEFINED
    return format(value, form)


def value_of(key: str, form: str = "") -> Cell:
    """The value under `key`."""
    return lambda row: show(row.get(key), form)


def mean_and_std_of(key: str) -> Cell:
    """<key>_mean ± <key>_std."""

    def cell(row: Row) -> str:
        mean, std = show(row[f"{key}_mean"], ".2f"), show(row[f"{key}_std"], ".2f")
        return mean if std in (MISSING, UNDEFINED) else f"{mean} ± {std}"

    return cell


def interval_of(key: str) -> Cell:
    """<key> [<key>_low, <key>_high], with signs."""

    def cell(row: Row) -> str:
        middle = show(row[key], "+.2f")
        if middle in (MISSING, UNDEFINED):
            return middle
        return f"{middle} [{show(row[f'{key}_low'], '+.2f')}, {show(row[f'{key}_high'], '+.2f')}]"

    return cell


# ---------------------------------------------------------------------------------------------------- notes
def note_of_values(label: str, values: Iterable[tuple[str, Any]]) -> list[str]:
    """At most one note: the value that all names share, or each value with its names."""
    names_of: dict[str, list[str]] = {}
    for name, value in values:
        text = str(value)
        if isinstance(value, Mapping):
            text = ", ".join(f"{key} {item}" for key, item in value.items())
        names = names_of.setdefault(text, [])
        if name not in names:
            names.append(name)
    if not names_of:
        return []
    parts = list(names_of)
    if len(parts) > 1:
        parts = [f"{text} ({', '.join(names)})" for text, names in names_of.items()]
    return [f"{label}: {'; '.join(parts)}."]


def listed(numbers: Iterable[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(str(number) for number in numbers)
