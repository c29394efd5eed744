"""Cost studies -> the tables of memory, epoch time and accuracy."""

from collections.abc import Sequence

from config import GlassExperiment, Preset
from model_training.tables.read_results import MEMORY_KINDS, CostStudy, provenance_of
from model_training.tables.table import Cell, Row, Table, listed, notes_of, show, value_of
from training.cost import Cost
from training.metrics import NAN, fit_line

WARM_UP = (
    "Memory is the peak after compilation; warming up, the peak of the steps before, with compilation. The paper "
    "reports the larger of the two: the maximum over all epochs, including the first, which compiles."
)


def table_of_crop_costs(studies: Sequence[CostStudy], expected_crops: Sequence[int]) -> Table:
    """A row for each crop count of each study."""
    rows = []
    for study in studies:
        if not study.mode:
            rows.append(_row(study) | {"num_crops": None} | _costs(None) | {"missing": "not measured"})
            continue
        absent = [crops for crops in expected_crops if crops not in study.costs]
        for crops in sorted({*study.costs, *expected_crops}):
            missing = f"{study.mode}: K = {listed(absent)} not measured" if crops in absent else ""
            rows.append(_row(study) | {"num_crops": crops} | _costs(study.costs.get(crops)) | {"missing": missing})
    columns = {"Model": value_of("model"), "Mode": value_of("mode"), "K": value_of("num_crops")}
    columns |= _cost_columns(studies)
    title = "Cost of GLASS against the number of crops K"
    return Table("crop_costs", title, rows, columns, _cost_notes(studies))


def table_of_crop_cost_lines(studies: Sequence[CostStudy]) -> Table:
    """A row a study: least-squares lines of memory and of time against the number of crops."""
    rows = []
    for study in studies:
        row = _row(study) | {"n": len(study.costs)}
        for line, unit, cost in (("memory", "mb", "peak_memory_mb"), ("time", "seconds", "epoch_seconds")):
            values = [getattr(measured, cost) for measured in study.costs.values()]
            fitted = fit_line(list(study.costs), values) if study.mode else (None, None, None)
            keys = (f"{line}_static_{unit}", f"{line}_per_crop_{unit}", f"{line}_r_squared")
            row |= dict(zip(keys, fitted, strict=True))
        missing = f"{study.mode}: a line needs two crop counts" if len(study.costs) < 2 else ""
        rows.append(row | {"missing": missing if study.mode else "not measured"})
    columns = {
        **{"Model": value_of("model"), "Mode": value_of("mode"), "n": value_of("n")},
        "Memory is": lambda row: show(MEMORY_KINDS.get(row["memory_kind"], row["memory_kind"])),
        "Memory: static (MB)": value_of("memory_static_mb", ".1f"),
        "per crop (MB)": value_of("memory_per_crop_mb", ".1f"),
        "R² (memory)": value_of("memory_r_squared", ".4f"),
        "Epoch time: static (s)": value_of("time_static_seconds", ".2f"),
        "per crop (s)": value_of("time_per_crop_seconds", ".2f"),
        "R² (time)": value_of("time_r_squared", ".4f"),
    }
    title = "Cost = static + per crop times K: least-squares lines over n crop counts"
    return Table("crop_cost_lines", title, rows, columns, _cost_notes(studies))


def table_of_standard_costs(preset: Preset, studies: Sequence[CostStudy], crop_studies: Sequence[CostStudy]) -> Table:
    """A row for each study of a standard model, with GLASS in the same mode, at the K in config.py, beside it."""
    tuned_crops = {known.name: known.num_crops for known in preset.experiments if isinstance(known, GlassExperiment)}
    by_name = {(study.experiment, study.mode): study for study in crop_studies}
    rows, used = [], []
    for study in studies:
        glass_name = study.experiment.replace("standard_", "glass_", 1)
        glass_crops = tuned_crops.get(glass_name)
        glass = by_name.get((glass_name, study.mode), CostStudy(glass_name))
        measured, glass_measured = study.costs.get(None), glass.costs.get(glass_crops)
        used += [of for of, cost in ((study, measured), (glass, glass_measured)) if cost]
        missing = [] if measured else ["not measured"]
        if glass_crops is None:
            missing.append(f"{glass_name} is not in config.py, so its tuned K is not known")
        elif not glass_measured:
            missing.append(f"{glass_name} at its tuned K = {glass_crops} not measured in this mode")
        row = _row(study) | _costs(measured)
        row |= {"glass_model": glass_name, "glass_memory_kind": glass.memory_kind, "glass_num_crops": glass_crops}
        rows.append(row | _costs(glass_measured, "glass_") | {"missing": "; ".join(missing)})
    columns = {"Model": value_of("model"), "Mode": value_of("mode"), **_cost_columns(used)}
    columns |= {"K of GLASS": value_of("glass_num_crops"), **_cost_columns(used, "GLASS: ", "glass_")}
    title = "Cost of the standard models, and of GLASS at its tuned K"
    return Table("standard_costs", title, rows, columns, _cost_notes(used))


# ---------------------------------------------------------------------------------- what these tables share
def _row(study: CostStudy) -> Row:
    return {"model": study.experiment, "mode": study.mode, "memory_kind": study.memory_kind}


def _costs(cost: Cost | None, prefix: str = "") -> Row:
    """The costs; None where they are not measured, NaN for the accuracy of a quick measurement."""
    accuracy = NAN if cost and cost.valid_accuracy is None else cost and 100 * cost.valid_accuracy
    names = ("peak_memory_mb", "warm_up_memory_mb", "epoch_seconds")
    row = {f"{prefix}{name}": cost and getattr(cost, name) for name in names}
    return row | {f"{prefix}valid_accuracy_percent": accuracy}


def _cost_columns(studies: Sequence[CostStudy], heading: str = "", prefix: str = "") -> dict[str, Cell]:
    """Columns of the costs; each kind of memory has two columns of its own, so that no column mixes kinds."""
    measured = [study for study in studies if study.mode]
    columns = {}
    for study in measured:
        for key, when in (("peak_memory_mb", ""), ("warm_up_memory_mb", ", warming up")):
            cell = _memory_cell(study.memory_kind, prefix, key)
            columns[f"{heading}{study.memory_text}{when} (MB)"] = cell
    if not measured:
        columns[f"{heading}memory (MB)"] = value_of(f"{prefix}peak_memory_mb", ".1f")
    columns[f"{heading}epoch time (s)"] = value_of(f"{prefix}epoch_seconds", ".2f")
    columns[f"{heading}validation accuracy (%)"] = value_of(f"{prefix}valid_accuracy_percent", ".2f")
    return {heading[0].upper() + heading[1:]: cell for heading, cell in columns.items()}


def _memory_cell(kind: str | None, prefix: str, key: str) -> Cell:
    """The memory in rows of this kind and in rows that are not measured; empty in rows of another kind."""

    def cell(row: Row) -> str:
        other_kind = row[f"{prefix}memory_kind"] not in (kind, None)
        return "" if other_kind else show(row[f"{prefix}{key}"], ".1f")

    return cell


def _cost_notes(studies: Sequence[CostStudy]) -> list[str]:
    """Notes on how the numbers were measured, and so which of them can be compared."""
    measured = [study for study in studies if study.mode]
    notes = [WARM_UP] if measured else []
    if len({study.memory_kind for study in measured}) > 1:
        notes.append("Memory of different kinds cannot be compared.")
    about = []
    for study in measured:
        values = {"Memory": study.memory_text, "Time": study.epoch_time_text}
        settings = study.metadata["settings"]
        values |= {"Computed": "as the author's code" if settings.get("author_runtime") else "as config.py says"}
        values |= {"Batch size": settings.get("batch_size")} | provenance_of(study.metadata)
        about.append((f"{study.experiment} {study.mode}", values))
    return notes + notes_of(about)
