"""Cost and accuracy of GLASS against the number of crops K, for one backbone. SPEC, Experiments 3."""

from dataclasses import astuple, replace
from pathlib import Path

from config import GlassExperiment, Preset
from data.datasets import Splits, load_splits
from data.index import Index
from data.loaders import build_loader
from models.build import build_model
from training.checkpoints import Checkpoint
from training.cost import Cost, cost_settings, measure_cost, read_costs
from training.loop import build_trainer
from training.metrics import fit_line
from training.runtime import build_runtime
from utils import (
    StopRequest,
    add_restart,
    check_same_ground,
    preset_folder,
    run_door,
    run_facts,
    seed_everything,
    set_aside,
    sole_process,
    stop_signals,
    write_csv,
    write_json,
)

COLUMNS = ("num_crops", "peak_memory_mb", "epoch_seconds", "valid_accuracy")


def main(name: str, doc: str) -> None:
    """The door of experiment `name`; K comes from `crop_counts`."""
    run_door(doc, sweep, groups=("num_crops",), experiments=(name,), without=("num_crops",), arguments=add_restart)


def sweep(preset: Preset, experiment: GlassExperiment, restart: bool = False) -> None:
    """Train with each K, writing a line of costs.csv after each; a K that is there already is not run again.

    Writes results/<preset>/num_crops/<experiment>/<full or quick>/costs.csv and run.json, and prints the
    least-squares lines of memory and of time against K.

    Args:
        restart: move what was begun aside, and begin anew.

    Raises:
        UserError: no index, no weights, a folder that was started under other settings, or one that is in use.
        Stopped: a signal asked for it.
    """
    study, settings = preset.num_crops, preset.settings
    index, splits = load_splits(preset)
    folder = preset_folder(preset) / "num_crops" / experiment.name / ("quick" if study.quick else "full")
    experiment = replace(experiment, batch_size=study.batch_size)
    runtime = build_runtime(settings)
    values = cost_settings(settings, study, experiment, runtime, index.cached)
    del values["num_crops"]  # each K in turn
    facts = run_facts(values, index.fingerprint) | {"memory_kind": runtime.memory_kind}
    if restart:
        set_aside(preset, folder)
    with stop_signals() as stop, sole_process(folder):
        costs = read_costs(folder / "costs.csv")
        to_do = [num_crops for num_crops in study.crop_counts if num_crops not in costs]
        for num_crops in costs:
            _checkpoint(preset, folder, num_crops).remove()  # a kill may have come between the two
        begun = bool(costs) or any(_checkpoint(preset, folder, num_crops).path.exists() for num_crops in to_do)
        check_same_ground(folder, facts, results="costs.csv", unfinished=bool(to_do) and begun)
        write_json(folder / "run.json", facts)
        for num_crops in study.crop_counts:
            if num_crops in to_do:
                stop.leave_if_asked(f"before {experiment.name} with K = {num_crops}")
                checkpoint = _checkpoint(preset, folder, num_crops)
                with_k = replace(experiment, num_crops=num_crops)
                costs[num_crops] = _measure(preset, with_k, index, splits, checkpoint, stop)
                rows = [(k, *astuple(cost)) for k, cost in sorted(costs.items())]
                write_csv(folder / "costs.csv", COLUMNS, rows)
                checkpoint.remove()
            cost = costs[num_crops]
            accuracy = "" if cost.valid_accuracy is None else f", best validation accuracy {cost.valid_accuracy:.2%}"
            print(
                f"{experiment.name} K = {num_crops}: {cost.peak_memory_mb:.1f} MB ({facts['memory_kind']}), "
                f"{cost.epoch_seconds:.2f} s an epoch{' (extrapolated)' if study.quick else ''}{accuracy}",
                flush=True,
            )
    for quantity, unit in (("peak_memory_mb", "MB"), ("epoch_seconds", "s")):
        points = [getattr(costs[k], quantity) for k in sorted(costs)]
        intercept, slope, r_squared = fit_line(sorted(costs), points)
        print(f"{quantity} = {intercept:.2f} {unit} + {slope:.2f} {unit} per crop, R squared {r_squared:.5f}")


def _checkpoint(preset: Preset, folder: Path, num_crops: int) -> Checkpoint:
    return Checkpoint(folder / f"checkpoint_{num_crops}.pt", preset.settings.checkpoint_every)


def _measure(
    preset: Preset,
    experiment: GlassExperiment,
    index: Index,
    splits: Splits,
    checkpoint: Checkpoint,
    stop: StopRequest,
) -> Cost:
    settings, seed = preset.settings, preset.settings.main_seed
    seed_everything(seed)
    model = build_model(experiment, settings)
    trainer = build_trainer(model, experiment, settings, preset.num_crops.epochs)
    train_loader = build_loader(preset, experiment, index, splits.train, training_seed=seed)
    valid_loader = build_loader(preset, experiment, index, splits.valid)
    return measure_cost(trainer, train_loader, valid_loader, preset.num_crops, checkpoint, stop)
