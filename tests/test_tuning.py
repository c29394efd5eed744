"""A study suggests what plain Optuna suggests, and an interrupted one what an uninterrupted one does."""

import contextlib
import resource
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

import config
from config import GlassExperiment, Preset, Tuning
from data.datasets import load_splits
from data.loaders import build_loader
from hyperparameter_tuning.search_spaces import suggest_experiment
from hyperparameter_tuning.study import tune
from models.build import build_model
from tests.conftest import TOY_FLAGS, copy_index, run_module, start_module, succeed
from training.loop import build_trainer, fit
from utils import UserError, find_experiment, seed_everything

NAME = "standard_vit"


def load(results: Path, name: str = NAME) -> optuna.Study:
    path = results / "demo" / "tuning" / name / "study.db"
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}")


def trials_of(results: Path) -> list[FrozenTrial]:
    """Of a study that another process may be making."""
    if not (results / "demo" / "tuning" / NAME / "study.db").exists():
        return []
    try:
        return load(results).trials
    except optuna.exceptions.StorageInternalError:  # the other writes just now
        return []


def essence(trial: FrozenTrial) -> tuple:
    return trial.number, trial.state, trial.params, trial.value, trial.intermediate_values


def toy(preset: Preset, results: Path, trials: int, **settings: int) -> Preset:
    tuning = Tuning(
        epochs=3, glass_trials=trials, standard_trials=trials, min_resource=1, max_resource=3, reduction_factor=2
    )
    return replace(preset, settings=replace(preset.settings, results_root=results, **settings), tuning=tuning)


@pytest.fixture(scope="module")
def uninterrupted(module_preset: Preset, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results root with a study of 14 trials, more than the sampler's ten random ones, run in one go."""
    results = copy_index(indexed, tmp_path_factory.mktemp("uninterrupted"))
    preset = toy(module_preset, results, 14)
    tune(preset, find_experiment(preset, NAME))
    return results


def test_an_uninterrupted_study_suggests_and_prunes_as_plain_optuna(uninterrupted: Path, module_preset: Preset) -> None:
    study, preset = load(uninterrupted), toy(module_preset, uninterrupted, 14)
    assert [trial.state for trial in study.trials].count(TrialState.PRUNED) > 0, (
        "a study that prunes nothing shows less"
    )

    def replayed(trial: optuna.Trial) -> float:
        suggest_experiment(trial, preset, find_experiment(preset, NAME))
        for step, accuracy in sorted(study.trials[trial.number].intermediate_values.items()):
            trial.report(accuracy, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return max(study.trials[trial.number].intermediate_values.values())

    plain = optuna.create_study(
        study_name=NAME,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=606, multivariate=False, constant_liar=False),
        pruner=optuna.pruners.HyperbandPruner(min_resource=1, max_resource=3, reduction_factor=2),
    )
    plain.optimize(replayed, n_trials=14)
    assert [essence(trial) for trial in study.trials] == [essence(trial) for trial in plain.trials]


@pytest.mark.parametrize("stops", [(1, 2), (11, 13)], ids=str)
def test_a_study_that_was_stopped_goes_on_as_if_it_had_not_been(
    stops: tuple[int, ...], uninterrupted: Path, module_preset: Preset, indexed: Path, tmp_path: Path
) -> None:
    results = copy_index(indexed, tmp_path)
    for trials in (*stops, 14):
        preset = toy(module_preset, results, trials)
        tune(preset, find_experiment(preset, NAME))
        assert len(load(results).trials) == trials
    assert list(map(essence, load(results).trials)) == list(map(essence, load(uninterrupted).trials))


def test_a_killed_trial_is_run_again_with_the_same_values(
    uninterrupted: Path, indexed: Path, tmp_path: Path, toy_data: Path
) -> None:
    results = copy_index(indexed, tmp_path)
    command = [
        *(f"hyperparameter_tuning.{NAME}_tuning", *TOY_FLAGS, "--epochs", "3"),
        *("--standard-trials", "4", "--min-resource", "1", "--max-resource", "3", "--reduction-factor", "2"),
        *("--data-root", str(toy_data), "--results-root", str(results)),
    ]

    def kill_when(begun: Callable[[list[FrozenTrial]], bool]) -> None:
        process = start_module(*command)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not ((trials := trials_of(results)) and begun(trials)):
            time.sleep(0.02)
        process.kill()
        process.communicate()
        assert load(results).trials[-1].state == TrialState.RUNNING

    kill_when(lambda trials: True)  # before it has reported anything, and yet with values that are recorded
    done = run_module(*command, "--main-seed", "7")
    assert done.returncode == 2 and "main_seed = 606, now 7: pass --restart" in done.stderr
    kill_when(lambda trials: len(trials) == 2 and bool(trials[1].intermediate_values))
    succeed(*command)
    assert list(map(essence, load(results).trials)) == list(map(essence, load(uninterrupted).trials[:4]))


def test_a_study_of_another_search_space_is_refused(
    uninterrupted: Path, module_preset: Preset, indexed: Path, tmp_path: Path
) -> None:
    results = copy_index(indexed, tmp_path)
    preset = toy(module_preset, results, 1)
    tune(preset, find_experiment(preset, NAME))
    narrower = replace(preset, standard_space=preset.standard_space | {"batch_size": (8,)})
    with pytest.raises(UserError, match=r"search_space = "):
        tune(narrower, find_experiment(preset, NAME))
    with pytest.raises(UserError, match="main_seed = 606, now 607"):
        tune(toy(module_preset, results, 1, main_seed=607), find_experiment(preset, NAME))


def copied_study(uninterrupted: Path, results: Path) -> Path:
    """The study's database, copied with all that it needs to go on."""
    shutil.copytree(uninterrupted, results)
    return results / "demo" / "tuning" / NAME / "study.db"


def execute(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_bytes(b"no database"),
    "pages overwritten": lambda path: path.write_bytes(path.read_bytes()[:4096] + b"?" * (path.stat().st_size - 4096)),
    "of another study": lambda path: execute(path, "UPDATE studies SET study_name = 'other'"),
    "a table is gone": lambda path: execute(path, "DROP TABLE trial_values"),
    "a value is no number": lambda path: execute(path, "UPDATE trial_values SET value = 'x'"),
    "a distribution is none": lambda path: execute(path, "UPDATE trial_params SET distribution_json = '{'"),
    "a value that no epoch had": lambda path: execute(path, "UPDATE trial_values SET value = 0.99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_study_is_one_sentence(
    damage: str, uninterrupted: Path, module_preset: Preset, tmp_path: Path
) -> None:
    path = copied_study(uninterrupted, tmp_path / "results")
    DAMAGES[damage](path)
    preset = toy(module_preset, tmp_path / "results", 14)
    with pytest.raises(UserError, match=r"(study\.db cannot be gone on with|the study was edited).*--restart") as said:
        tune(preset, find_experiment(preset, NAME))
    assert "\n" not in str(said.value)


def test_a_study_that_cannot_be_written_is_one_sentence(
    uninterrupted: Path, module_preset: Preset, tmp_path: Path
) -> None:
    path = copied_study(uninterrupted, tmp_path / "results")
    preset = toy(module_preset, tmp_path / "results", 15)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))  # as on a disk that is full
    try:
        with pytest.raises(UserError, match=r"study\.db cannot be gone on with \(.*sqlite3.*\): make room"):
            tune(preset, find_experiment(preset, NAME))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_sqlite_cannot_name_is_one_sentence(indexed: Path, module_preset: Preset, tmp_path: Path) -> None:
    results = copy_index(indexed, tmp_path / "\udcff")
    preset = toy(module_preset, results, 1)
    with pytest.raises(UserError, match=r"is not UTF-8, as SQLite needs: set another --results-root"):
        tune(preset, find_experiment(preset, NAME))


def test_the_seed_of_a_trial_is_606_and_its_number(uninterrupted: Path, module_preset: Preset) -> None:
    preset = toy(module_preset, uninterrupted, 14)
    trial = next(trial for trial in load(uninterrupted).trials[3:] if len(set(trial.intermediate_values.values())) > 1)
    experiment = replace(find_experiment(preset, NAME), **trial.params)
    index, splits = load_splits(preset)
    seed_everything(606 + trial.number)
    trainer = build_trainer(build_model(experiment, preset.settings), experiment, preset.settings, 3)
    train_loader = build_loader(preset, experiment, index, splits.train, training_seed=606 + trial.number)
    history = fit(trainer, train_loader, build_loader(preset, experiment, index, splits.valid), 3)
    accuracies = [record.valid_accuracy for record in history]
    assert accuracies[: len(trial.intermediate_values)] == list(trial.intermediate_values.values())


def test_search_spaces_are_suggested_in_the_order_of_the_specification() -> None:
    for name, order in (
        ("glass_vit", "batch_size dropout_rate lr_global lr_local lr_atten_class wd_global wd_local num_crops"),
        ("standard_vit", "lr weight_decay batch_size dropout_rate"),
    ):
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
        experiment = suggest_experiment(trial, config.PAPER, find_experiment(config.PAPER, name))
        assert list(trial.params) == order.split()
        assert {key: getattr(experiment, key) for key in trial.params} == trial.params
        assert isinstance(experiment, GlassExperiment) == name.startswith("glass") and experiment.backbone == "vit"
        for key, distribution in trial.distributions.items():
            if key.startswith(("lr", "wd", "weight")):
                assert distribution.log
