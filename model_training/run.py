"""Final training and evaluation of one experiment over its seeds. docs/method.md, Experiments 2."""

from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

from config import Experiment, Preset, Training
from data.lists import write_csv
from model_training.inference.provenance import Provenance, Tested, TrainingData
from model_training.model_card import write_model_card
from model_training.tables.figures import plot_reliability, plot_training_curve
from model_training.tables.read_results import is_finished
from training import processes
from training.calibration import calibrate
from training.checkpoints import Checkpoint, copied, load_model, save_model
from training.evaluation import evaluate
from training.loop import Job, fit
from training.metrics import compute_metrics
from training.progress import EpochRecord, best_epoch
from training.runs import (
    SETTINGS,
    RestartOption,
    RunFolder,
    Session,
    archive,
    build_job,
    open_run,
    open_session,
    resolved,
    seed_folder,
)
from utils import UserError, read_json, reading, run_command, sha256_of, write_json


def main(name: str, doc: str) -> None:
    """The command of experiment `name`."""
    run_command(
        doc, train_and_evaluate, groups=("training",), experiments=(name,), settings=SETTINGS, options=RestartOption
    )


def train_and_evaluate(preset: Preset, experiment: Experiment, restart: bool = False) -> None:
    """Train every seed of the preset and evaluate its best checkpoint on the test split; finished seeds are skipped.

    Writes one run folder a seed, results/<preset>/<experiment>/seed_<seed>: run.json, history.csv, model.safetensors
    (calibrated on the validation images), predictions.csv, training_curve.png, reliability.png and, last,
    metrics.json, whose presence says that the seed is finished. Until then it is resumed from checkpoint.pt.

    Args:
        restart: archive the started runs, and start over.

    Raises:
        UserError: no index, no weights, a run folder that was started with other settings or is in use.
        Stopped: a signal asked for it.
    """
    training = preset.training
    folders = {seed: seed_folder(preset, experiment.name, seed) for seed in training.seeds}
    with open_session(preset) as session:
        splits = session.splits
        print(
            f"{experiment.name}: {len(splits.final_train)} images to train, {len(splits.final_valid)} to validate, "
            f"{len(splits.test)} to test"
        )
        start = hash_of_start(training)
        if restart:
            archive(preset, folders.values())
        for seed, folder in folders.items():
            train_seed(session, training, experiment, seed, folder, start)


def hash_of_start(training: Training) -> dict[str, str]:
    """The initial weights by content, for a run's settings; empty without any. Raises UserError for a missing file."""
    initial = training.initial_weights
    if initial and not Path(initial).is_file():
        raise UserError(f"the initial weights {initial} are not a file: correct --initial-weights")
    return {"initial_weights_sha256": processes.on_main(lambda: sha256_of(Path(initial)))} if initial else {}


def train_seed(
    session: Session, training: Training, experiment: Experiment, seed: int, folder: Path, start: dict[str, str]
) -> None:
    """Train and test one seed in `folder`, see `train_and_evaluate`, or report that it is finished.

    `start` comes from `hash_of_start`.
    """
    values = resolved(session.settings, training, experiment) | {"seed": seed} | start
    with open_run(session, folder, values, results=("history.csv", "checkpoint.pt")) as run:
        finished = processes.same(is_finished(folder))
        if not finished:
            session.stop.raise_if_requested(f"before {experiment.name} seed {seed}")
            _SeedRun(session, run, experiment, seed, training).train()
        run.checkpoint().remove()
        processes.on_main(lambda: _report(run, experiment, seed, " (finished before)" if finished else ""))


def _report(run: RunFolder, experiment: Experiment, seed: int, note: str) -> None:
    with reading(path := run.path / "metrics.json"):
        metrics = read_json(path)
        accuracy, best = float(metrics["test"]["accuracy"]), int(metrics["best_epoch"])
        if not metrics.get("calibration", True):
            note = f", not calibrated: all validation images are of one class{note}"
    print(f"{experiment.name} seed {seed}: test accuracy {accuracy:.2%}, checkpoint of epoch {best}{note}", flush=True)


@dataclass(frozen=True)
class _SeedRun:
    """One seed of one experiment."""

    session: Session
    run: RunFolder
    experiment: Experiment
    seed: int
    training: Training

    def train(self) -> None:
        """Train, choose the checkpoint by its validation accuracy, calibrate it, test it."""
        session, folder = self.session, self.run.path
        rows, initial = (session.splits.final_train, session.splits.final_valid), self.training.initial_weights
        if initial:  # instead of the backbones' own
            session = replace(session, settings=replace(session.settings, pretrained=False, weights_files=()))
        job = build_job(session, self.experiment, self.seed, self.training.epochs, rows, self.title)
        earlier = load_model(Path(initial), job.trainer.model) if initial else {}
        model, weights = job.trainer.model, folder / "model.safetensors"
        about = {"experiment": asdict(self.experiment), "settings": resolved(self.session.settings), "seed": self.seed}
        seen = [row for part in rows for row in part]
        own = {session.index.records[row].identity for row in seen}
        about["trained_on"] = sorted(own.union(earlier.get("trained_on") or ()))
        data = (*Provenance.read(earlier).data, TrainingData.of(session.index, seen))
        about["provenance"] = asdict(Provenance(data))

        def on_epoch(history: list[EpochRecord]) -> None:
            if processes.is_main():
                write_csv(folder / "history.csv", [field.name for field in fields(EpochRecord)], map(astuple, history))

        checkpoint = self.run.checkpoint(
            best_model=lambda state, epoch: save_model(weights, state, about | {"epoch": epoch})
        )
        history = fit(job, checkpoint, session.stop, lambda done: self.run.record(f"epoch {done.epoch + 1}"), on_epoch)
        if processes.is_main():
            load_model(weights, model)
            plot_training_curve(folder / "training_curve.png", self.title, {f"seed {self.seed}": history})
        processes.same_weights(model)
        self._calibrate_and_test(job, checkpoint, about | {"epoch": best_epoch(history).epoch}, best_epoch(history))

    @property
    def title(self) -> str:
        return f"{self.experiment.name} seed {self.seed}"

    def _calibrate_and_test(self, job: Job, checkpoint: Checkpoint, about: dict, best: EpochRecord) -> None:
        session, folder, trainer = self.session, self.run.path, job.trainer

        def after_batch() -> None:
            session.stop.raise_if_requested(f"{checkpoint.path} holds the finished training")

        valid = evaluate(trainer.model, job.valid_loader, trainer.runtime, f"{self.title}, calibration", after_batch)
        calibration = calibrate(valid.scores, valid.labels, self.training.band_error)
        about["calibration"] = calibration and asdict(calibration)
        test_loader = session.loader(self.experiment, session.splits.test)
        test = evaluate(trainer.model, test_loader, trainer.runtime, f"{self.title}, test", after_batch)
        if not processes.is_main():
            return
        tested = compute_metrics(test.probabilities, test.labels)
        about["provenance"]["test"] = asdict(Tested(len(test.labels), tested["accuracy"], tested["auc_score"]))
        save_model(folder / "model.safetensors", copied(trainer.model.state_dict()), about)
        write_csv(
            folder / "predictions.csv",
            ("path", "label", "probability_fake", "probability_real"),
            zip(test_loader.dataset.names, test.labels.tolist(), *test.probabilities.T.tolist(), strict=True),
        )
        if calibration:
            fake = {
                "raw": test.probabilities[:, 0],
                f"calibrated, T = {calibration.temperature:.2f}": calibration.probabilities(test.scores),
            }
            plot_reliability(folder / "reliability.png", f"{self.title}: test split", fake, test.labels)
        metrics = {
            "experiment": self.experiment.name,
            "seed": self.seed,
            "best_epoch": best.epoch,
            "valid_accuracy": best.valid_accuracy,
            "test_images": len(test.labels),
            "test_loss": test.loss,
            "test": tested,
            "calibration": about["calibration"],
            "test_calibrated": calibration and calibration.metrics(test.scores, test.labels),
        }
        groups = session.index.groups and [session.index.groups[row] for row in session.splits.test]
        write_model_card(folder, about, self.experiment, calibration, test, groups or None)
        write_json(folder / "metrics.json", metrics)
