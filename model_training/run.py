"""Final training and evaluation of one experiment over its seeds. SPEC, Experiments 2."""

from dataclasses import asdict, astuple, fields

from config import Experiment, Preset
from data.datasets import Splits, load_splits
from data.index import Index
from data.loaders import build_loader
from model_training.figures import plot_reliability, plot_training_curve
from models.build import build_model
from training.calibration import calibrate
from training.checkpoints import Checkpoint, load_model, save_model
from training.evaluation import Predictions, evaluate
from training.loop import build_trainer, fit
from training.metrics import compute_metrics
from training.progress import EpochRecord, best_epoch
from training.runtime import build_runtime
from utils import (
    StopRequest,
    add_restart,
    as_share,
    check_same_ground,
    read_json,
    reading,
    resolved,
    run_door,
    run_facts,
    run_folder,
    seed_everything,
    set_aside,
    sole_process,
    stop_signals,
    write_csv,
    write_json,
)


def main(name: str, doc: str) -> None:
    """The door of experiment `name`."""
    run_door(doc, train_and_evaluate, groups=("training",), experiments=(name,), arguments=add_restart)


def train_and_evaluate(preset: Preset, experiment: Experiment, restart: bool = False) -> None:
    """Train every seed of the preset and evaluate its best checkpoint on the test split; finished seeds are skipped.

    Writes one run folder a seed: run.json, history.csv, model.safetensors (calibrated on the validation images),
    predictions.csv, training_curve.png, reliability.png and, last, metrics.json, whose presence says that the seed is
    finished. Until then checkpoint.pt is what it goes on from.

    Args:
        restart: move what was begun aside, and begin anew.

    Raises:
        UserError: no index, no weights, a folder that was started under other settings, or one that is in use.
        Stopped: a signal asked for it.
    """
    index, splits = load_splits(preset)
    runtime = build_runtime(preset.settings)
    print(
        f"{experiment.name}: {len(splits.final_train)} images to train, {len(splits.final_valid)} to choose the "
        f"checkpoint, {len(splits.test)} to test"
    )
    with stop_signals() as stop:
        if restart:  # all, before the first is begun: what is stopped goes on without it
            for seed in preset.training.seeds:
                set_aside(preset, run_folder(preset, experiment.name, seed))
        for seed in preset.training.seeds:
            folder = run_folder(preset, experiment.name, seed)
            values = resolved(preset.settings, preset.training, experiment) | {"seed": seed} | runtime.facts()
            facts = run_facts(values, index.fingerprint)
            checkpoint = Checkpoint(folder / "checkpoint.pt", preset.settings.checkpoint_every)
            with sole_process(folder):
                finished = (folder / "metrics.json").exists()
                if finished:
                    checkpoint.remove()  # a kill may have come between the two
                check_same_ground(folder, facts, results="history.csv", unfinished=checkpoint.path.exists())
                if not finished:
                    stop.leave_if_asked(f"before {experiment.name} seed {seed}")
                    write_json(folder / "run.json", facts)
                    _train_seed(preset, experiment, seed, index, splits, checkpoint, stop)
            with reading(folder / "metrics.json"):
                metrics = read_json(folder / "metrics.json")
                accuracy, best = as_share(metrics["test"]["accuracy"]), int(metrics["best_epoch"])
            print(
                f"{experiment.name} seed {seed}: test accuracy {accuracy:.2%}, checkpoint of epoch {best} of "
                f"{preset.training.epochs}{' (finished before)' if finished else ''}"
            )


def _train_seed(
    preset: Preset,
    experiment: Experiment,
    seed: int,
    index: Index,
    splits: Splits,
    checkpoint: Checkpoint,
    stop: StopRequest,
) -> None:
    settings, folder = preset.settings, run_folder(preset, experiment.name, seed)
    seed_everything(seed)
    model = build_model(experiment, settings)
    trainer = build_trainer(model, experiment, settings, preset.training.epochs)
    train_loader = build_loader(preset, experiment, index, splits.final_train, training_seed=seed)
    valid_loader = build_loader(preset, experiment, index, splits.final_valid)
    test_loader = build_loader(preset, experiment, index, splits.test)

    about = {"experiment": asdict(experiment), "settings": resolved(settings), "seed": seed}

    def on_epoch(history: list[EpochRecord]) -> None:
        write_csv(folder / "history.csv", [field.name for field in fields(EpochRecord)], map(astuple, history))
        if best_epoch(history) is history[-1]:
            save_model(folder / "model.safetensors", model, about | {"epoch": history[-1].epoch})

    def after_batch() -> None:
        stop.leave_if_asked(f"{checkpoint.path} holds the finished training")

    history = fit(trainer, train_loader, valid_loader, preset.training.epochs, on_epoch, checkpoint, stop)
    best = best_epoch(history)
    load_model(folder / "model.safetensors", model)
    valid = evaluate(model, valid_loader, trainer.runtime, "calibrate", after_batch)
    calibration = calibrate(valid.scores, valid.labels, preset.training.band_error)
    about |= {"epoch": best.epoch, "calibration": calibration and calibration.as_json()}
    predictions = evaluate(model, test_loader, trainer.runtime, "test", after_batch)
    save_model(folder / "model.safetensors", model, about)

    title = f"{experiment.name}, seed {seed}"
    plot_training_curve(folder / "training_curve.png", title, {f"seed {seed}": history})
    _write_predictions(preset, experiment, seed, test_loader.dataset.names, predictions)
    metrics = {
        "experiment": experiment.name,
        "seed": seed,
        "best_epoch": best.epoch,
        "valid_accuracy": best.valid_accuracy,
        "test_images": len(predictions.labels),
        "test_loss": predictions.loss,
        "test": compute_metrics(predictions.probabilities, predictions.labels),
        "calibration": about["calibration"],
        "test_calibrated": calibration and calibration.metrics(predictions.scores, predictions.labels),
    }
    if calibration:
        fake = {
            "raw": predictions.probabilities[:, 0],
            f"calibrated, T = {calibration.temperature:.2f}": calibration.probabilities(predictions.scores),
        }
        plot_reliability(folder / "reliability.png", f"{title}: test split", fake, predictions.labels)
    write_json(folder / "metrics.json", metrics)
    checkpoint.remove()


def _write_predictions(
    preset: Preset, experiment: Experiment, seed: int, names: list[str], predictions: Predictions
) -> None:
    rows = zip(names, predictions.labels.tolist(), *predictions.probabilities.T.tolist(), strict=True)
    path = run_folder(preset, experiment.name, seed) / "predictions.csv"
    write_csv(path, ("path", "label", "probability_fake", "probability_real"), rows)
