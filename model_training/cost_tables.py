"""Cost studies -> the tables of memory, epoch time and accuracy."""

from collections.abc import Mapping, Sequence

from config import GlassExperiment, Preset
from model_training.read_results import MEMORY_KINDS, CostStudy
from model_training.tables import Cell, Row, Table, listed, note_of_values, show, value_of
from training.metrics import fit_line


def table_of_crop_costs(studies: Sequence[CostStudy], expected_crops: Sequence[int]) -> Table:
    """A row for each crop count of each study."""
    rows = []
    for study in studies:
        about = {"model": study.experiment, "mode": study.mode, "memory_kind": study.memory_kind}
        if not study.mode:
            rows.append({**about, "num_crops": None, **_costs(None), "missing": "not measured"})
            continue
        measured = [row["num_crops"] for row in study.rows]
        absent = [crops for crops in expected_crops if crops not in measured]
        for crops in sorted({*measured, *expected_crops}):
            missing = f"{study.mode}: K = {listed(absent)} not measured" if crops in absent else ""
            rows.append({**about, "num_crops": crops, **_costs(study.row_at(crops)), "missing": missing})
    measured_studies = [study for study in studies if study.mode]
    columns = {"Model": value_of("model"), "Mode": value_of("mode"), "K": value_of("num_crops")}
    columns |= _cost_columns(measured_studies)
    title = "Cost of GLASS against the number of crops K"
    return Table("crop_costs", title, rows, columns, _cost_notes(measured_studies))


def table_of_crop_cost_lines(studies: Sequence[CostStudy]) -> Table:
    """A row a study: the least-squares lines of memory and of time against the number of crops."""
    rows = []
    for study in studies:
        memory_line = time_line = (None, None, None)
        missing = "not measured"
        if study.mode:
            crops = [row["num_crops"] for row in study.rows]
            memory_line = fit_line(crops, [row["peak_memory_mb"] for row in study.rows])
            time_line = fit_line(crops, [row["epoch_seconds"] for row in study.rows])
            missing = f"{study.mode}: a line needs two crop counts" if len(crops) < 2 else ""
        row: Row = {"model": study.experiment, "mode": study.mode, "memory_kind": study.memory_kind}
        row["n"] = len(study.rows)
        row["memory_static_mb"], row["memory_per_crop_mb"], row["memory_r_squared"] = memory_line
        row["time_static_seconds"], row["time_per_crop_seconds"], row["time_r_squared"] = time_line
        row["missing"] = missing
        rows.append(row)

    def memory_kind(row: Row) -> str:
        kind = row["memory_kind"]
        return show(MEMORY_KINDS.get(kind, kind))

    columns = {
        "Model": value_of("model"),
        "Mode": value_of("mode"),
        "n": value_of("n"),
        "Memory is": memory_kind,
        "Memory: static (MB)": value_of("memory_static_mb", ".1f"),
        "per crop (MB)": value_of("memory_per_crop_mb", ".1f"),
        "R² (memory)": value_of("memory_r_squared", ".4f"),
        "Epoch time: static (s)": value_of("time_static_seconds", ".2f"),
        "per crop (s)": value_of("time_per_crop_seconds", ".2f"),
        "R² (time)": value_of("time_r_squared", ".4f"),
    }
    title = "Cost = static + per crop times K: least-squares lines over n crop counts"
    return Table("crop_cost_lines", title, rows, columns, _cost_notes([study for study in studies if study.mode]))


def table_of_standard_costs(preset: Preset, studies: Sequence[CostStudy], crop_studies: Sequence[CostStudy]) -> Table:
    """A row a study of a standard model; beside it GLASS in the same mode, at the K that config.py has."""
    tuned_crops = {known.name: known.num_crops for known in preset.experiments if isinstance(known, GlassExperiment)}
    rows, used = [], []
    for study in studies:
        measured = study.rows[0] if study.rows else None
        glass_name = study.experiment.replace("standard_", "glass_", 1)
        glass_crops = tuned_crops.get(glass_name)
        glass = CostStudy(glass_name)
        for other in crop_studies:
            if (other.experiment, other.mode) == (glass_name, study.mode):
                glass = other
        glass_measured = glass.row_at(glass_crops)

        missing = []
        if measured:
            used.append(study)
        else:
            missing.append("not measured")
        if glass_measured:
            used.append(glass)
        elif glass_crops is None:
            missing.append(f"{glass_name} is not in config.py, so its tuned K is not known")
        else:
            missing.append(f"{glass_name} at its tuned K = {glass_crops} not measured in this mode")
        row: Row = {"model": study.experiment, "mode": study.mode, "memory_kind": study.memory_kind}
        row |= _costs(measured)
        row |= {"glass_model": glass_name, "glass_memory_kind": glass.memory_kind, "glass_num_crops": glass_crops}
        row |= _costs(glass_measured, "glass_")
        row["missing"] = "; ".join(missing)
        rows.append(row)
    columns = {"Model": value_of("model"), "Mode": value_of("mode"), **_cost_columns(used)}
    columns |= {"K of GLASS": value_of("glass_num_crops"), **_cost_columns(used, "GLASS: ", "glass_")}
    title = "Cost of the standard models, and of GLASS at its tuned K"
    return Table("standard_costs", title, rows, columns, _cost_notes(used))


# ---------------------------------------------------------------------------------- what these tables share
def _costs(measured: Mapping[str, float] | None, prefix: str = "") -> Row:
    """The costs in one row of a study; None where it is not measured."""
    names = ("peak_memory_mb", "epoch_seconds", "valid_accuracy_percent")
    return {f"{prefix}{name}": measured[name] if measured else None for name in names}


def _cost_columns(studies: Sequence[CostStudy], heading: str = "", prefix: str = "") -> dict[str, Cell]:
    """Columns of the three costs; each kind of memory has one of its own, so that no column mixes two."""
    columns = {f"{heading}{study.memory_text} (MB)": _memory_cell(study.memory_kind, prefix) for study in studies}
    if not studies:
        columns[f"{heading}memory (MB)"] = value_of(f"{prefix}peak_memory_mb", ".1f")
    columns[f"{heading}epoch time (s)"] = value_of(f"{prefix}epoch_seconds", ".2f")
    columns[f"{heading}validation accuracy (%)"] = value_of(f"{prefix}valid_accuracy_percent", ".2f")
    return {heading[0].upper() + heading[1:]: cell for heading, cell in columns.items()}


def _memory_cell(kind: str | None, prefix: str) -> Cell:
    """The memory of rows of this kind and of rows that have none yet; nothing for rows of another kind."""

    def cell(row: Row) -> str:
        if row[f"{prefix}memory_kind"] not in (kind, None):
            return ""
        return show(row[f"{prefix}peak_memory_mb"], ".1f")

    return cell


def _cost_notes(studies: Sequence[CostStudy]) -> list[str]:
    """How the numbers were measured, and so which of them can be compared."""
    notes = note_of_values("Memory", [(study.name, study.memory_text) for study in studies])
    if len({study.memory_kind for study in studies}) > 1:
        notes.append("Memory of different kinds cannot be compared.")
    notes += note_of_values("Time", [(study.name, study.epoch_time_text) for study in studies])
    notes += note_of_values("Batch size", [(study.name, study.settings.get("batch_size")) for study in studies])
    notes += note_of_values("Hardware", [(study.name, study.facts.get("hardware")) for study in studies])
    return notes
