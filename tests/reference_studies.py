"""The author's studies through `tune`, with the function of fixtures/tuning.json instead of training.

    python -m tests.reference_studies STUDY --data-root DIR --results-root DIR

Needs an index of the data: data.data_preprocess with conftest's PREPROCESS_FLAGS. Prints how many trials equal the
author's; exit code 1 if one does not.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

import config
from config import Experiment, GlassExperiment, Preset
from hyperparameter_tuning.study import tune
from hyperparameter_tuning.trials import OnEpoch
from tests.conftest import FIXTURES
from training.checkpoints import Checkpoint
from training.progress import EpochRecord
from utils import find_experiment, preset_folder, read_json

STUDIES = read_json(FIXTURES / "tuning.json")["studies"]


def accuracies(experiment: Experiment) -> Iterator[float]:
    """The accuracy after each epoch: the fixture's function."""

    def bump(rate: float, exponent: float) -> float:
        return math.exp(-((math.log10(rate) + exponent) ** 2))

    if isinstance(experiment, GlassExperiment):
        rise = 0.1 * bump(experiment.lr_local, 4.3) + 0.05 * bump(experiment.lr_global, 5)
        rise += 0.03 * bump(experiment.lr_atten_class, 4) + 0.003 * experiment.num_crops
        decay, of_batch_size = experiment.wd_local, {16: 0.01, 32: 0.012, 64: 0.008}
    else:
        rise = 0.1 * bump(experiment.lr, 4.3)
        decay, of_batch_size = experiment.weight_decay, {32: 0.01, 64: 0.012, 128: 0.008}
    rise += -0.02 * experiment.dropout_rate + 0.002 * math.log10(decay) + of_batch_size[experiment.batch_size]
    for epoch in range(25):
        value = 0.7 + rise * (1 - math.exp(-(epoch + 1) / (3 + 40 * experiment.dropout_rate)))
        yield round(1800 * value) / 1800


def given(_search: object, _number: int, experiment: Experiment, _checkpoint: Checkpoint, on_epoch: OnEpoch) -> None:
    """A `Train` that does not train."""
    history: list[EpochRecord] = []
    for epoch, accuracy in enumerate(accuracies(experiment), 1):
        history.append(EpochRecord(epoch, 0.0, 0.0, accuracy, 0.0, 0.0))
        on_epoch(history)


def toy_paper(data: Path, results: Path) -> Preset:
    """The paper's studies on an index of toy images, which are not used."""
    toy = dict(data_root=data, results_root=results, patch_size=32, valid_size=6, test_size=6, device="cpu")
    return replace(config.PAPER, name="demo", settings=replace(config.PAPER.settings, **toy))


def as_recorded(trials: Iterable[FrozenTrial]) -> list[list]:
    """Number, parameters, epochs and state of each trial, as in the fixture."""
    return [[trial.number, trial.params, len(trial.intermediate_values), trial.state.name] for trial in trials]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--results-root", type=Path, required=True)
    arguments, _ = parser.parse_known_args()  # the campaign's commands have a --cache-root too
    preset = toy_paper(arguments.data_root, arguments.results_root)
    tune(preset, find_experiment(preset, arguments.study), train=given)
    path = preset_folder(preset) / "tuning" / arguments.study / "study.db"
    study = optuna.load_study(study_name=arguments.study, storage=f"sqlite:///{path}")
    wanted = STUDIES[arguments.study]["trials"]
    same = sum(ours == theirs for ours, theirs in zip(as_recorded(study.trials), wanted, strict=True))
    print(f"{same} of {len(wanted)} trials are the author's")
    sys.exit(same != len(wanted))
