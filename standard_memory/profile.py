"""Cost and accuracy of a standard transfer-learning model. SPEC, Experiments 4."""

from dataclasses import astuple, fields, replace

from config import Preset, StandardExperiment
from data.datasets import load_splits
from data.loaders import build_loader
from models.build import build_model
from training.checkpoints import Checkpoint
from training.cost import Cost, cost_settings, measure_cost, read_costs
from training.loop import build_trainer
from training.runtime import build_runtime
from utils import (
    add_restart,
    check_same_ground,
    preset_folder,
    reading,
    run_door,
    run_facts,
    seed_everything,
    set_aside,
    sole_process,
    stop_signals,
    write_csv,
    write_json,
)


def main(name: str, doc: str) -> None:
    """The door of experiment `name`."""
    run_door(doc, profile, groups=("standard_memory",), experiments=(name,), arguments=add_restart)


def profile(preset: Preset, experiment: StandardExperiment, restart: bool = False) -> None:
    """Train once and write what it cost; a finished measurement is not repeated.

    Writes results/<preset>/standard_memory/<experiment>/<full or quick>/costs.csv and run.json.

    Args:
        restart: move what was begun aside, and begin anew.

    Raises:
        UserError: no index, no weights, a folder that was started under other settings, or one that is in use.
        Stopped: a signal asked for it.
    """
    study, settings, seed = preset.standard_memory, preset.settings, preset.settings.main_seed
    index, splits = load_splits(preset)
    folder = preset_folder(preset) / "standard_memory" / experiment.name / ("quick" if study.quick else "full")
    experiment = replace(experiment, batch_size=study.batch_size)
    runtime = build_runtime(settings)
    values = cost_settings(settings, study, experiment, runtime, index.cached)
    facts = run_facts(values, index.fingerprint) | {"memory_kind": runtime.memory_kind}
    if restart:
        set_aside(preset, folder)
    checkpoint = Checkpoint(folder / "checkpoint.pt", settings.checkpoint_every)
    with stop_signals() as stop, sole_process(folder):
        finished = (folder / "costs.csv").exists()
        if finished:
            checkpoint.remove()  # a kill may have come between the two
        check_same_ground(folder, facts, results="costs.csv", unfinished=checkpoint.path.exists())
        if not finished:
            seed_everything(seed)
            model = build_model(experiment, settings)
            trainer = build_trainer(model, experiment, settings, study.epochs)
            train_loader = build_loader(preset, experiment, index, splits.train, training_seed=seed)
            valid_loader = build_loader(preset, experiment, index, splits.valid)
            write_json(folder / "run.json", facts)
            cost = measure_cost(trainer, train_loader, valid_loader, study, checkpoint, stop)
            columns = ("num_crops", *(field.name for field in fields(Cost)))
            write_csv(folder / "costs.csv", columns, [("", *astuple(cost))])
            checkpoint.remove()
    with reading(folder / "costs.csv"):
        cost = read_costs(folder / "costs.csv")[None]
    accuracy = "" if cost.valid_accuracy is None else f", best validation accuracy {cost.valid_accuracy:.2%}"
    print(
        f"{experiment.name}: {cost.peak_memory_mb:.1f} MB, {cost.epoch_seconds:.2f} s an epoch"
        f"{' (extrapolated)' if study.quick else ''}{accuracy}"
    )
