"""Every table and figure of the paper, from whatever results exist.

    python -m model_training.results_tables

Writes each table as CSV, Markdown and LaTeX and each figure as PNG to results/<preset>/tables/, prints the test
metrics, and names what is missing. Needs no GPU and takes seconds: run it as often as you like, also between
experiments.
"""

import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial
from scipy import stats
from sqlalchemy.exc import SQLAlchemyError

from config import GlassExperiment, Preset, Settings, StandardExperiment, Training
from model_training import figures
from training.loop import EpochRecord
from training.metrics import fit_line
from utils import (
    _DO_NOT_CHANGE_NUMBERS,
    UserError,
    preset_folder,
    read_csv,
    read_json,
    run_door,
    write_csv,
    write_text,
)

METRICS = {
    "accuracy": "Accuracy",
    "auc_score": "AUC",
    "f1_score": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "conf_correct": "Confidence, correct",
    "conf_incorrect": "Confidence, incorrect",
    "overall_conf": "Confidence, all",
    "ece": "ECE",
}
COMPARED_METRICS = ("accuracy", "auc_score", "f1_score", "ece")
MEMORY_KINDS = {
    "cuda_max_memory_allocated": "peak GPU memory",
    "saved_for_backward": "memory kept for the backward pass, CPU",
}
NAN = float("nan")
UNDEFINED = "n/a"  # how a NaN is shown


# --------------------------------------------------------------------------------------------------- tables
Row = dict[str, Any]  # column of the CSV -> value: None where it is missing, NaN where it is not defined
Cell = Callable[[Row], str]  # what Markdown and LaTeX show of a row


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
        return list(dict.fromkeys(f"{row['model']}: {row['missing']}" for row in self.rows if row["missing"]))

    def write(self, folder: Path) -> None:
        """Write <name>.csv, <name>.md and <name>.tex."""
        keys = [*dict.fromkeys(key for row in self.rows for key in row if key != "missing"), "missing"]
        values = ([row.get(key) for key in keys] for row in self.rows)
        write_csv(folder / f"{self.name}.csv", keys, (["" if v != v else v for v in row] for row in values))
        write_text(folder / f"{self.name}.md", self.markdown())
        write_text(folder / f"{self.name}.tex", self.latex())

    def markdown(self) -> str:
        """The table under its title, then notes and code."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in [list(self.columns), rule, *self._cells()]]
        notes = [f"- {note}" for note in self._all_notes()]
        code = ["", "```python", *self.code, "```"] if self.code else []
        return "\n".join([f"# {self.title}", "", *lines, "", *notes, *code]).rstrip() + "\n"

    def latex(self) -> str:
        """A booktabs table, shrunk to the page if it is wider."""
        head, *body = [" & ".join(map(_latex, cells)) + r" \\" for cells in [list(self.columns), *self._cells()]]
        notes = (r" \\" + "\n").join(map(_latex, self._all_notes()))
        lines = [
            r"% needs \usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.title)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}}",
            *([rf"\par\medskip\parbox{{\linewidth}}{{\footnotesize\raggedright {notes}}}"] if notes else []),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def _cells(self) -> list[list[str]]:
        return [[cell(row) for cell in self.columns.values()] for row in self.rows]

    def _all_notes(self) -> list[str]:
        undefined = any(UNDEFINED in cell for cells in self._cells() for cell in cells)
        legend = [f"{UNDEFINED}: does not apply, is not defined or was not measured in this mode."] if undefined else []
        return [*self.notes, *legend, *(f"Missing: {text}." for text in self.missing)]


def _latex(text: str) -> str:
    escapes = {char: "\\" + char for char in "&%$#_{}"} | {"\\": r"\textbackslash{}", "±": r"$\pm$", "²": "$^2$"}
    escapes |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    return re.sub(r"(?<![\w$-])-(?=\d)", "$-$", text.translate(str.maketrans(escapes)))


def _show(value: Any, form: str = "") -> str:
    if value is None:
        return "missing"
    return UNDEFINED if value != value else value if isinstance(value, str) else format(value, form)


def _value(key: str, form: str = "") -> Cell:
    return lambda row: _show(row.get(key), form)


def _spread(key: str) -> Cell:
    def cell(row: Row) -> str:
        mean, std = (_show(row[f"{key}_percent_{part}"], ".2f") for part in ("mean", "std"))
        return mean if mean in ("missing", UNDEFINED) else f"{mean} ± {std}"

    return cell


def _interval(key: str) -> Cell:
    def cell(row: Row) -> str:
        middle, low, high = (_show(row[f"{key}_points{part}"], "+.2f") for part in ("", "_low", "_high"))
        return middle if middle in ("missing", UNDEFINED) else f"{middle} [{low}, {high}]"

    return cell


def _by_value(label: str, values: Iterable[tuple[str, Any]]) -> list[str]:
    """At most one note: the value that all names share, or each value with its names."""
    names_of: dict[str, dict[str, None]] = {}
    for name, value in values:
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        names_of.setdefault(text, {})[name] = None
    parts = [f"{text} ({', '.join(names)})" if len(names_of) > 1 else text for text, names in names_of.items()]
    return [f"{label}: {'; '.join(parts)}."] if parts else []


# -------------------------------------------------------------------------------------- reading what is there
@dataclass(frozen=True)
class Run:
    """One seed of one experiment; `test` is None while it is not finished, a metric NaN where it is not defined."""

    folder: Path
    seed: int
    facts: Mapping[str, Any]
    history: list[EpochRecord]
    test: Mapping[str, float] | None


@dataclass(frozen=True)
class Costs:
    """What one cost study has measured: a row for each crop count, or one row for a standard model."""

    experiment: str
    mode: str | None
    facts: Mapping[str, Any]
    rows: list[dict[str, float]]

    def row(self, number: Mapping[str, float] | None) -> Row:
        """One of its rows as a table has it."""
        columns = ("num_crops", "peak_memory_mb", "epoch_seconds", "valid_accuracy_percent")
        about = {"model": self.experiment, "mode": self.mode, "memory_kind": self.facts.get("memory_kind")}
        return about | {name: number[name] if number else None for name in columns}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not hold what this project writes there ({type(error).__name__}: {error}): "
            f"move it away and run the command that writes it"
        ) from None


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    facts = read_json(path) if path.exists() else {"settings": {}}
    with _reading(path):
        return facts | {"settings": dict(facts["settings"])}


def _read_run(folder: Path) -> Run:
    history, test = [], None
    if (folder / "history.csv").exists():
        with _reading(folder / "history.csv"):
            for row in read_csv(folder / "history.csv"):
                values = {name: float(text) for name, text in row.items()}
                history.append(EpochRecord(**values | {"epoch": int(row["epoch"])}))
    if (folder / "metrics.json").exists():
        with _reading(folder / "metrics.json"):
            values = read_json(folder / "metrics.json")["test"]
            test = {name: NAN if values[name] is None else float(values[name]) for name in METRICS}
    return Run(folder, int(folder.name.removeprefix("seed_")), _read_facts(folder), history, test)


def _read_runs(folder: Path) -> list[Run]:
    """The runs of one experiment, in the order of their seeds.

    Raises:
        UserError: two finished ones differ in a setting or in their data, so that no mean may be taken.
    """
    folders = [path for path in folder.glob("seed_*") if path.name.removeprefix("seed_").isdecimal()]
    runs = sorted(map(_read_run, folders), key=lambda run: run.seed)
    finished = [run for run in runs if run.test]
    for other in finished[1:]:
        name = _first_difference(finished[0], other)
        if name:
            one_value, other_value = ({**run.facts, **run.facts["settings"]}.get(name) for run in (finished[0], other))
            raise UserError(
                f"{finished[0].folder} ran with {name} = {one_value} and {other.folder} with {name} = {other_value}, "
                f"so a mean of both would mean nothing: move one of them away"
            )
    return runs


def _first_difference(one: Run, other: Run, among: Sequence[str] = ()) -> str | None:
    """The first setting (of `among`, if given) in which two runs differ so that their numbers may; seeds apart."""
    if one.facts.get("dataset_fingerprint") != other.facts.get("dataset_fingerprint"):
        return "dataset_fingerprint"
    old, new = one.facts["settings"], other.facts["settings"]
    names = sorted((old.keys() | new.keys()) - {*_DO_NOT_CHANGE_NUMBERS, "seed"})
    return next((name for name in names if old.get(name) != new.get(name) and name in (among or names)), None)


def _read_costs(room: Path) -> list[Costs]:
    costs = []
    for path in (path for mode in ("full", "quick") for path in sorted(room.glob(f"*/{mode}/costs.csv"))):
        with _reading(path):
            rows = [{name: float(text) if text else NAN for name, text in row.items()} for row in read_csv(path)]
            for row in rows:
                row["num_crops"] = row["num_crops"] if np.isnan(row["num_crops"]) else int(row["num_crops"])
                row["valid_accuracy_percent"] = 100 * row["valid_accuracy"]
            costs.append(Costs(path.parent.parent.name, path.parent.name, _read_facts(path.parent), rows))
    return costs


def _load_study(path: Path) -> optuna.Study:
    """The study in `path`, a file that is opened for reading only."""
    url = f"{path.resolve().as_uri()}?mode=ro"
    try:
        connection = {"creator": lambda: sqlite3.connect(url, uri=True)}
        storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs=connection)
        return optuna.load_study(study_name=path.parent.name, storage=storage)
    except (SQLAlchemyError, sqlite3.Error, KeyError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be read as the Optuna study {path.parent.name} ({str(error).splitlines()[0]}): "
            f"run its tuning command again, or move the file away"
        ) from None


# ------------------------------------------------------------------------------------------ results -> tables
def _test_metrics(runs: Mapping[str, list[Run]], expected: Sequence[int]) -> Table:
    rows, notes = [], ["F1, precision and recall are weighted by class size."]
    finished = {name: [run for run in found if run.test] for name, found in runs.items()}
    for name, done in finished.items():
        row: Row = {"model": name, "n": len(done), "seeds": " ".join(str(run.seed) for run in done)}
        for metric, heading in METRICS.items():
            values = _defined(100 * run.test[metric] for run in done)
            row[f"{metric}_percent_mean"] = float(np.mean(values)) if values else NAN if done else None
            row[f"{metric}_percent_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else NAN if done else None
            undefined = ", ".join(str(run.seed) for run in done if np.isnan(run.test[metric]))
            if undefined:
                notes.append(f"{name}: {heading} is not defined for seed {undefined} and left out of its mean.")
        unfinished = ", ".join(str(run.seed) for run in runs[name] if not run.test)
        absent = ", ".join(str(seed) for seed in expected if seed not in {run.seed for run in runs[name]})
        lacks = {"not finished": unfinished, "not run": absent}
        rows.append(row | {"missing": "; ".join(f"seed {seeds} {what}" for what, seeds in lacks.items() if seeds)})
    for label, fact in {"Data set": "dataset_fingerprint", "Commit": "commit", "Hardware": "hardware"}.items():
        notes += _by_value(label, [(name, run.facts.get(fact)) for name, done in finished.items() for run in done])
    columns = {"Model": _value("model"), "n": _value("n")} | {METRICS[name]: _spread(name) for name in METRICS}
    title = "Test metrics in percent, mean ± sample standard deviation over n seeds"
    return Table("test_metrics", title, rows, columns, notes)


def _defined(values: Iterable[float]) -> list[float]:
    return [value for value in values if not np.isnan(value)]


def _differences(runs: Mapping[str, list[Run]]) -> Table:
    rows, notes = [], ["Over the seeds that both models have; Student's t interval of the paired differences."]
    for glass, standard in ((name, name.replace("glass_", "standard_", 1)) for name in runs):
        if glass == standard or standard not in runs:
            continue
        ones, others = ({run.seed: run for run in runs[name] if run.test} for name in (glass, standard))
        seeds = sorted(ones.keys() & others.keys())
        lacks = "" if len(seeds) > 1 else f"{'one seed' if seeds else 'no seed'} in common with {standard}"
        shared = [setting.name for kind in (Settings, Training) for setting in fields(kind)]
        differs = _first_difference(ones[seeds[0]], others[seeds[0]], shared) if seeds else None
        if differs == "dataset_fingerprint":
            seeds, lacks = [], f"{standard} was trained on other data"
        elif differs:
            notes.append(f"{glass} and {standard} ran with a different {differs}.")
        row: Row = {"model": glass, "standard": standard, "n": len(seeds)}
        for metric in COMPARED_METRICS:
            points = [100 * (ones[seed].test[metric] - others[seed].test[metric]) for seed in seeds]
            interval = _paired_interval(_defined(points)) if seeds else (None, None, None)
            row |= {f"{metric}_points{part}": v for part, v in zip(("", "_low", "_high"), interval, strict=True)}
        rows.append(row | {"missing": lacks})
    columns = {"Model": _value("model"), "minus": _value("standard"), "n": _value("n")}
    columns |= {METRICS[metric]: _interval(metric) for metric in COMPARED_METRICS}
    title = "GLASS minus standard in percentage points, with 95% intervals over n paired seeds"
    return Table("differences", title, rows, columns, notes)


def _paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the differences, and both ends of its 95% t interval."""
    mean, n = float(np.mean(differences)) if differences else NAN, len(differences)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / n**0.5) if n > 1 else NAN
    return mean, mean - half, mean + half


def _best_hyperparameters(preset: Preset, studies: Mapping[str, optuna.Study | None]) -> Table:
    names = [setting.name for kind in (StandardExperiment, GlassExperiment) for setting in fields(kind)[2:]]
    names = list(dict.fromkeys(names))  # all but name and backbone
    rows, code = [], []
    for name, study in studies.items():
        trials = study.get_trials(deepcopy=False) if study else []
        count = {state: sum(t.state.name == state for t in trials) for state in ("COMPLETE", "PRUNED", "FAIL")}
        finished, best = sum(count.values()), _best_trial(trials)
        expected = preset.tuning.standard_trials if name.startswith("standard_") else preset.tuning.glass_trials
        lacks = f"{expected - finished} of {expected} trials" if finished < expected else ""
        row: Row = {"model": name}
        row |= {f"trials_{state.lower()}": n if study else None for state, n in count.items()}
        row |= {"best_trial": best.number if best else None}
        row |= {"valid_accuracy_percent": 100 * best.value if best else None}
        row |= {key: best.params.get(key, NAN) if best else None for key in names}
        rows.append(row | {"missing": lacks if best else "no complete trial" if study else "no study"})
        if best:
            code.append(_config_line(preset, name, best.params))
    columns = {"Model": _value("model"), "Complete": _value("trials_complete"), "Pruned": _value("trials_pruned")}
    columns |= {"Failed": _value("trials_fail"), "Best trial": _value("best_trial")}
    columns |= {"Validation accuracy (%)": _value("valid_accuracy_percent", ".2f")}
    columns |= {key: _value(key, ".4g") for key in names}
    return Table(
        "best_hyperparameters",
        "Best hyperparameters of the studies, and their validation accuracy",
        rows,
        columns,
        code=code,
    )


def _best_trial(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The first of the best."""
    return max((trial for trial in trials if trial.state.name == "COMPLETE"), key=lambda t: t.value, default=None)


def _config_line(preset: Preset, name: str, params: Mapping[str, Any]) -> str:
    """The experiment with `params`, to paste into config.py; what was not searched is as in the study's run."""
    known = next((asdict(experiment) for experiment in preset.experiments if experiment.name == name), {})
    values = known | _read_facts(preset_folder(preset) / "tuning" / name)["settings"] | params | {"name": name}
    kind = StandardExperiment if "lr" in values else GlassExperiment
    given = (f"{setting.name}={values[setting.name]!r}" for setting in fields(kind) if setting.name in values)
    return f"{kind.__name__}({', '.join(given)}),".replace("'", '"')


def _cost_columns(studies: Sequence[Costs], whose: str = "", key: str = "") -> dict[str, Cell]:
    """Headings of the three costs; a kind of memory has a column of its own, so that no column mixes two."""

    def memory_of(kind: str) -> Cell:
        return lambda row: "" if row[f"{key}memory_kind"] not in (kind, None) else memory(row)

    memory = _value(f"{key}peak_memory_mb", ".1f")
    kinds = {study.facts.get("memory_kind"): _memory(study) for study in studies}
    columns = {f"{whose}{text} (MB)": memory_of(kind) for kind, text in kinds.items()} or {
        f"{whose}memory (MB)": memory
    }
    columns |= {f"{whose}epoch time (s)": _value(f"{key}epoch_seconds", ".2f")}
    columns |= {f"{whose}validation accuracy (%)": _value(f"{key}valid_accuracy_percent", ".2f")}
    return {heading[0].upper() + heading[1:]: cell for heading, cell in columns.items()}


def _memory(study: Costs) -> str:
    return MEMORY_KINDS.get(study.facts.get("memory_kind"), str(study.facts.get("memory_kind")))


def _epoch_time(study: Costs) -> str:
    if study.mode == "full":
        return "full: mean of whole epochs"
    return f"quick: epoch time extrapolated from {study.facts['settings'].get('measured_steps')} steps"


def _cost_notes(studies: Sequence[Costs]) -> list[str]:
    """How the numbers were measured, and so which of them can be compared."""
    names = [f"{study.experiment} {study.mode}" for study in studies]
    notes = _by_value("Memory", zip(names, map(_memory, studies), strict=True))
    if len({_memory(study) for study in studies}) > 1:
        notes.append("Memory of different kinds cannot be compared.")
    notes += _by_value("Time", zip(names, map(_epoch_time, studies), strict=True))
    for label, fact in {"Batch size": "batch_size", "Hardware": "hardware"}.items():
        values = [{**study.facts, **study.facts["settings"]}.get(fact) for study in studies]
        notes += _by_value(label, zip(names, values, strict=True))
    return notes


def _crop_costs(costs: Mapping[str, list[Costs]], expected: Sequence[int]) -> Table:
    rows = []
    for name, studies in costs.items():
        for study in studies:
            measured = {row["num_crops"]: row for row in study.rows}
            absent = ", ".join(str(crops) for crops in expected if crops not in measured)
            for crops in sorted(measured.keys() | set(expected)):
                lacks = "" if crops in measured else f"{study.mode}: K = {absent} not measured"
                rows.append(study.row(measured.get(crops)) | {"num_crops": crops, "missing": lacks})
        if not studies:
            rows.append(_absent(name).row(None) | {"missing": "not measured"})
    found = [study for studies in costs.values() for study in studies]
    columns = {"Model": _value("model"), "Mode": _value("mode"), "K": _value("num_crops"), **_cost_columns(found)}
    return Table("crop_costs", "Cost of GLASS against the number of crops K", rows, columns, _cost_notes(found))


def _absent(name: str) -> Costs:
    return Costs(name, None, {}, [])


def _crop_cost_lines(costs: Mapping[str, list[Costs]]) -> Table:
    rows = []
    for study in (study for name, studies in costs.items() for study in studies or [_absent(name)]):
        crops, n = [row["num_crops"] for row in study.rows], len(study.rows)
        row = {"model": study.experiment, "mode": study.mode, "memory_kind": study.facts.get("memory_kind"), "n": n}
        for what, unit, key in (("memory", "mb", "peak_memory_mb"), ("time", "seconds", "epoch_seconds")):
            line = fit_line(crops, [number[key] for number in study.rows]) if study.mode else (None, None, None)
            parts = (f"{what}_static_{unit}", f"{what}_per_crop_{unit}", f"{what}_r_squared")
            row |= dict(zip(parts, line, strict=True))
        lacks = "" if n > 1 else f"{study.mode}: a line needs two crop counts" if study.mode else "not measured"
        rows.append(row | {"missing": lacks})
    columns = {"Model": _value("model"), "Mode": _value("mode"), "n": _value("n")}
    columns |= {"Memory is": lambda row: _show(row["memory_kind"] and MEMORY_KINDS.get(row["memory_kind"], "?"))}
    columns |= {"Memory: static (MB)": _value("memory_static_mb", ".1f")}
    columns |= {"per crop (MB)": _value("memory_per_crop_mb", ".1f"), "R² (memory)": _value("memory_r_squared", ".4f")}
    columns |= {"Epoch time: static (s)": _value("time_static_seconds", ".2f")}
    columns |= {"per crop (s)": _value("time_per_crop_seconds", ".2f"), "R² (time)": _value("time_r_squared", ".4f")}
    notes = _cost_notes([study for studies in costs.values() for study in studies])
    title = "Cost = static + per crop times K: least-squares lines over n crop counts"
    return Table("crop_cost_lines", title, rows, columns, notes)


def _standard_costs(preset: Preset, standard: Mapping[str, list[Costs]], crops: Mapping[str, list[Costs]]) -> Table:
    tuned = {known.name: known.num_crops for known in preset.experiments if isinstance(known, GlassExperiment)}
    rows, used = [], []
    for study in (study for name, studies in standard.items() for study in studies or [_absent(name)]):
        glass = study.experiment.replace("standard_", "glass_", 1)
        beside = next((other for other in crops.get(glass, []) if other.mode == study.mode), _absent(glass))
        at_tuned = next((row for row in beside.rows if row["num_crops"] == tuned.get(glass)), None)
        lacks = [] if study.rows else ["not measured"]
        lacks += [] if at_tuned else [f"{glass} at its tuned K = {tuned.get(glass)} not measured in this mode"]
        row = study.row(study.rows[0] if study.rows else None) | {"num_crops": NAN}
        row |= {f"glass_{key}": value for key, value in beside.row(at_tuned).items()}
        rows.append(row | {"glass_num_crops": tuned.get(glass), "missing": "; ".join(lacks)})
        used += [one for one, numbers in ((study, study.rows), (beside, at_tuned)) if numbers]
    columns = {"Model": _value("model"), "Mode": _value("mode"), **_cost_columns(used)}
    columns |= {"K of GLASS": _value("glass_num_crops"), **_cost_columns(used, "GLASS: ", "glass_")}
    title = "Cost of the standard models, and of GLASS at its tuned K"
    return Table("standard_costs", title, rows, columns, _cost_notes(used))


# ----------------------------------------------------------------------------------------- results -> figures
Figure = Callable[[Path], None] | str  # draws to a path; or says why there is nothing to draw


def _metrics_figure(runs: Mapping[str, Sequence[Run]]) -> Figure:
    scores = {
        name: {
            f"test {heading} (%)": _defined(100 * run.test[metric] for run in found if run.test)
            for metric, heading in (("accuracy", "accuracy"), ("auc_score", "AUC"))
        }
        for name, found in runs.items()
    }
    if not any(run.test for found in runs.values() for run in found):
        return "no finished run"
    return partial(figures.plot_test_metrics, title="Mean ± standard deviation over n seeds", scores=scores)


def _training_figure(name: str, runs: Sequence[Run]) -> Figure:
    histories = {f"seed {r.seed}{'' if r.test else ' (not finished)'}": r.history for r in runs if r.history}
    if not histories:
        return "no run"
    return partial(figures.plot_training_curve, title=f"{name}: training", histories=histories)


def _crop_cost_figure(studies: Sequence[Costs]) -> Figure:
    if not studies or not studies[0].rows:
        return "not measured"
    study = studies[0]  # full comes before quick
    labels = {
        "peak_memory_mb": f"{_memory(study)} (MB)".replace(" for", "\nfor"),
        "epoch_seconds": "epoch time (s)",
        "valid_accuracy_percent": "best validation accuracy (%)",
    }
    title = f"{study.experiment}\n{_epoch_time(study)}"
    return partial(figures.plot_crop_costs, title=title, rows=study.rows, labels=labels)


def _history_figure(name: str, study: optuna.Study | None) -> Figure:
    trials = study.get_trials(deepcopy=False) if study else []
    if not _best_trial(trials):
        return "no complete trial" if study else "no study"
    complete = {t.number: 100 * t.value for t in trials if t.state.name == "COMPLETE"}
    pruned = [t for t in trials if t.state.name == "PRUNED" and t.intermediate_values]
    last = {t.number: 100 * t.intermediate_values[t.last_step] for t in pruned}
    return partial(figures.plot_tuning_history, title=f"{name}: tuning", complete=complete, pruned=last)


def _importance_figure(name: str, study: optuna.Study | None) -> Figure:
    if not study:
        return "no study"
    values = [trial.value for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(set(values)) < 2:
        return f"needs two complete trials of different accuracy, {len(values)} complete"
    try:
        importances = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    except (ValueError, RuntimeError) as error:
        return f"Optuna computes no importance: {error}"
    title = f"{name}: tuning\nimportance by fANOVA, {len(values)} complete trials"
    return partial(figures.plot_tuning_importance, title=title, importances=importances)


# ---------------------------------------------------------------------------------------------- all together
def write_tables(preset: Preset) -> None:
    """Write every table and figure to results/<preset>/tables/, print the test metrics, name what is missing.

    Raises:
        UserError: no results at all, results that must not be averaged, or an unreadable file.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results, known = preset_folder(preset), [experiment.name for experiment in preset.experiments]

    def names(found: Iterable[str], family: str = "") -> list[str]:
        """Experiments of the preset's family and those on disk: standard ones, then GLASS, then others."""
        both = dict.fromkeys([*(name for name in known if name.startswith(family)), *sorted(found)])
        return sorted(both, key=lambda name: (not name.startswith("standard_"), not name.startswith("glass_")))

    def by_name(costs: Sequence[Costs], family: str) -> dict[str, list[Costs]]:
        of_family = names({study.experiment for study in costs}, family)
        return {name: [study for study in costs if study.experiment == name] for name in of_family}

    folders = {path.parent.name for path in results.glob("*/seed_*")}
    found = {path.parent.name: _load_study(path) for path in results.glob("tuning/*/study.db")}
    crops, standard = _read_costs(results / "num_crops"), _read_costs(results / "standard_memory")
    if not (folders or found or crops or standard):
        raise UserError(
            f"{results} holds no results yet: run python -m model_training.reproduce --preset {preset.name} first, "
            f"or one experiment, such as python -m model_training.{known[0]}_training --preset {preset.name}"
        )
    runs = {name: _read_runs(results / name) for name in names(folders)}
    studies = {name: found.get(name) for name in names(found)}
    crop_costs, standard_costs = by_name(crops, "glass_"), by_name(standard, "standard_")

    tables = [
        _test_metrics(runs, preset.training.seeds),
        _differences(runs),
        _best_hyperparameters(preset, studies),
        _crop_costs(crop_costs, preset.num_crops.crop_counts),
        _crop_cost_lines(crop_costs),
        _standard_costs(preset, standard_costs, crop_costs),
    ]
    plots = {"test_metrics": _metrics_figure(runs)}
    plots |= {f"training_curves_{name}": _training_figure(name, of_name) for name, of_name in runs.items()}
    plots |= {f"tuning_history_{name}": _history_figure(name, study) for name, study in studies.items()}
    plots |= {f"tuning_importance_{name}": _importance_figure(name, study) for name, study in studies.items()}
    plots |= {f"crop_costs_{name}": _crop_cost_figure(of_name) for name, of_name in crop_costs.items()}

    folder = results / "tables"
    for table in tables:
        table.write(folder)
    for name, plot in plots.items():
        if isinstance(plot, str):
            (folder / f"{name}.png").unlink(missing_ok=True)  # drawn from results that are gone
        else:
            plot(folder / f"{name}.png")
    _report(folder, tables, plots)


def _report(folder: Path, tables: Sequence[Table], plots: Mapping[str, Figure]) -> None:
    for table in tables[:2]:
        print(table.markdown())
    for table in tables[2:]:
        models, incomplete = (
            {row["model"] for row in table.rows if row["missing"] or every} for every in (True, False)
        )
        print(f"{table.title}: {len(models) - len(incomplete)} of {len(models)} models complete")
    written = [f"{table.name}.csv .md .tex" for table in tables]
    written += [f"{name}.png" for name, plot in plots.items() if not isinstance(plot, str)]
    missing = [f"{table.name}: {text}" for table in tables for text in table.missing]
    missing += [f"{name}.png: {plot}" for name, plot in plots.items() if isinstance(plot, str)]
    print(f"\nWritten to {folder}:", *written, sep="\n  ")
    if missing:
        print("\nMissing:", *missing, sep="\n  ")


if __name__ == "__main__":
    run_door(__doc__, write_tables, groups=("tuning", "training", "num_crops"))
