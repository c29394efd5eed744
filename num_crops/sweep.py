"""Cost and accuracy of GLASS against the number of crops K, for one backbone. docs/method.md, Experiments 3."""

from config import GlassExperiment, Preset
from training.cost import run_cost_study
from training.metrics import fit_line
from training.runs import SETTINGS, RestartOption
from utils import UserError, run_command


def main(name: str, doc: str) -> None:
    """The command of experiment `name`; K comes from `crop_counts`."""
    flags = {"groups": ("num_crops",), "experiments": (name,), "without": ("num_crops", "batch_size")}
    run_command(doc, sweep, settings=SETTINGS, options=RestartOption, **flags)


def sweep(preset: Preset, experiment: GlassExperiment, restart: bool = False) -> None:
    """`run_cost_study` with each K; prints the least-squares lines of memory and of time against K.

    Raises:
        UserError: as `run_cost_study` does, and for a model without crops.
    """
    if not experiment.crops_per_image:
        raise UserError(
            f"{experiment.name} has branches = global, and so no crops to be counted: choose other branches"
        )
    costs = run_cost_study(preset, experiment, "num_crops", restart)
    lines = (("peak_memory_mb", "MB"), ("epoch_seconds", "s"))
    for quantity, unit in lines if len(costs) > 1 else ():
        points = [getattr(costs[k], quantity) for k in sorted(costs)]
        intercept, slope, r_squared = fit_line(sorted(costs), points)
        print(f"{quantity} = {intercept:.2f} {unit} + {slope:.2f} {unit} per crop, R squared {r_squared:.5f}")
