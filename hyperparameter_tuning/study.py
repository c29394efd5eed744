"""One Optuna study: `tune(preset, experiment)`. SPEC, Experiments 1.

Two studies hold the same trials. The *record* is an SQLite file that lasts. The *judge* lives in memory and decides:
it suggests values and prunes. A restart rebuilds the judge by going through the recorded trials again, so its sampler
and its pruner arrive in the very state that they had, and the study goes on as if it had never stopped.
"""

import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from config import Experiment, GlassExperiment, Preset
from data.datasets import Splits, load_splits
from data.index import Index
from data.loaders import build_loader
from hyperparameter_tuning.search_spaces import suggest_experiment
from models.build import build_model
from training.checkpoints import Checkpoint
from training.evaluation import NonFiniteLoss
from training.loop import build_trainer, fit
from training.progress import EpochRecord
from training.runtime import OutOfMemory, build_runtime
from utils import (
    StopRequest,
    UserError,
    add_restart,
    check_same_ground,
    first_line,
    preset_folder,
    replacing,
    resolved,
    run_door,
    run_facts,
    seed_everything,
    set_aside,
    sole_process,
    stop_signals,
    write_json,
)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def main(name: str, doc: str) -> None:
    """The door of the study of experiment `name`; its hyperparameters come from trials, not from the command line."""
    hyperparameters = ("batch_size", "dropout_rate", "num_crops", "lr", "weight_decay")
    rates = ("lr_global", "lr_local", "lr_atten_class", "wd_global", "wd_local")
    run_door(doc, tune, groups=("tuning",), experiments=(name,), without=hyperparameters + rates, arguments=add_restart)


def tune(preset: Preset, experiment: Experiment, restart: bool = False) -> None:
    """Search the experiment's hyperparameters for the best validation accuracy, and print them.

    Writes results/<preset>/tuning/<experiment>/study.db (SQLite, opens in optuna-dashboard) and run.json.
    Killed and started again, it goes on with the trial that was in progress, from its last finished epoch.

    Args:
        restart: move what was begun aside, and begin anew.

    Raises:
        UserError: no index, no weights, a study that was started under other settings, or one that is in use.
        Stopped: a signal asked for it.
    """
    index, splits = load_splits(preset)
    folder = preset_folder(preset) / "tuning" / experiment.name
    glass = isinstance(experiment, GlassExperiment)
    space = preset.glass_space if glass else preset.standard_space
    facts = run_facts(
        resolved(preset.settings, preset.tuning)
        | {"name": experiment.name, "backbone": experiment.backbone}
        | {"search_space": [f"{name}: {choices}" for name, choices in space.items()]}
        | build_runtime(preset.settings).facts(),
        index.fingerprint,
    )
    if restart:
        set_aside(preset, folder)
    with stop_signals() as stop, sole_process(folder), _study_file(folder / "study.db"):
        _go_on(preset, experiment, folder, facts, index, splits, stop)


def _go_on(
    preset: Preset,
    experiment: Experiment,
    folder: Path,
    facts: dict[str, Any],
    index: Index,
    splits: Splits,
    stop: StopRequest,
) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    record = _open_record(folder / "study.db", experiment.name)
    glass = isinstance(experiment, GlassExperiment)
    wanted = preset.tuning.glass_trials if glass else preset.tuning.standard_trials
    finished = [trial for trial in record.trials if trial.state in FINISHED]
    for trial in finished:
        _checkpoint(preset, folder, trial.number).remove()  # a kill may have come between the two
    if record.trials:  # even one that has reported nothing: its values are recorded already
        check_same_ground(folder, facts, results="study.db", unfinished=len(finished) < wanted)
    write_json(folder / "run.json", facts)
    judge = _build_judge(preset, experiment)
    for past in finished:
        _replay(judge, past, preset, experiment)
    print(f"{experiment.name}: {len(finished)} of {wanted} trials are finished")
    for number in range(len(finished), wanted):
        stop.leave_if_asked(f"before trial {number} of {experiment.name}")
        _run_trial(judge, record, preset, experiment, index, splits, folder, stop)
    _report(record, experiment)


@contextmanager
def _study_file(path: Path, *damages: type[Exception]) -> Iterator[None]:
    """What SQLite and Optuna say of a file that is damaged or cannot be written, and `damages`, become a sentence."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, *damages) as error:
        raise UserError(
            f"{path} cannot be gone on with ({first_line(error.__cause__ or error)}): make room and let it be written, "
            f"or, if it is damaged, pass --restart to move it aside and begin anew"
        ) from None


def _open_record(path: Path, name: str) -> optuna.Study:
    """The study in the SQLite file `path`, which is made, whole or not at all, if there is none."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path} has a name that is not UTF-8, as SQLite needs: set another --results-root") from None

    def storage(file: Path) -> optuna.storages.RDBStorage:
        return optuna.storages.RDBStorage(str(URL.create("sqlite", database=str(file))))

    if not path.exists():
        with replacing(path) as temporary:
            made = storage(temporary)
            optuna.create_study(study_name=name, storage=made, direction="maximize")
            made.engine.dispose()
    with _study_file(path, KeyError, RuntimeError, TypeError, ValueError):  # of another study, version or content
        record = optuna.load_study(study_name=name, storage=storage(path))
        record.get_trials(deepcopy=False)
    return record


def _build_judge(preset: Preset, experiment: Experiment) -> optuna.Study:
    tuning = preset.tuning
    return optuna.create_study(
        study_name=experiment.name,  # Hyperband's brackets depend on it
        direction="maximize",
        # The defaults that the paper's Optuna had: version 5 changed both.
        sampler=optuna.samplers.TPESampler(seed=preset.settings.main_seed, multivariate=False, constant_liar=False),
        pruner=optuna.pruners.HyperbandPruner(
            min_resource=tuning.min_resource,
            max_resource=tuning.max_resource,
            reduction_factor=tuning.reduction_factor,
        ),
    )


def _replay(judge: optuna.Study, past: FrozenTrial, preset: Preset, experiment: Experiment) -> None:
    """Take the judge through a finished trial: the same draws, reports and pruning questions as when it ran."""
    if past.state == TrialState.COMPLETE and past.value != max(past.intermediate_values.values(), default=None):
        raise UserError(
            f"trial {past.number} of the study {experiment.name} has the value {past.value}, which is not the best of "
            f"its epochs: the study was edited; pass --restart to move it aside and begin anew"
        )
    trial = judge.ask()
    suggest_experiment(trial, preset, experiment)
    _check_values(trial, past, experiment)
    for epoch, accuracy in sorted(past.intermediate_values.items()):
        trial.report(accuracy, epoch)
        trial.should_prune()
    judge.tell(trial, past.value if past.state == TrialState.COMPLETE else None, state=past.state)


def _check_values(judged: optuna.Trial, recorded: optuna.Trial | FrozenTrial, experiment: Experiment) -> None:
    if judged.params != recorded.params:
        raise UserError(
            f"trial {recorded.number} of the study {experiment.name} has values that these search spaces, seed and "
            f"Optuna {optuna.__version__} do not suggest: restore them, or choose another --results-root or --name"
        )


def _checkpoint(preset: Preset, folder: Path, number: int) -> Checkpoint:
    return Checkpoint(folder / f"trial_{number}.pt", preset.settings.checkpoint_every)


def _run_trial(
    judge: optuna.Study,
    record: optuna.Study,
    preset: Preset,
    experiment: Experiment,
    index: Index,
    splits: Splits,
    folder: Path,
    stop: StopRequest,
) -> None:
    judged = judge.ask()
    suggested = suggest_experiment(judged, preset, experiment)
    recorded = _recorded_trial(record, judged.params)
    if recorded.number != judged.number:
        raise UserError(
            f"the study {experiment.name} holds trials that another process began: wait for it, or set another --name"
        )
    suggest_experiment(recorded, preset, experiment)
    _check_values(judged, recorded, experiment)
    reported = record.trials[recorded.number].intermediate_values  # by an earlier process that was killed
    checkpoint = _checkpoint(preset, folder, judged.number)
    start, accuracies = time.perf_counter(), []

    def on_epoch(history: list[EpochRecord]) -> None:
        step = history[-1].epoch - 1  # Hyperband counts from 0
        accuracy = reported.get(step, history[-1].valid_accuracy)  # what is recorded is what the judge was told
        accuracies.append(accuracy)
        judged.report(accuracy, step)
        if step not in reported:
            recorded.report(accuracy, step)
        if judged.should_prune():
            raise optuna.TrialPruned

    value, state, comment = None, TrialState.FAIL, ""
    try:
        past = checkpoint.history()  # of an earlier process
        for epochs in range(1, len(past) + 1):
            on_epoch(past[:epochs])
        seed = preset.settings.main_seed + judged.number
        _train(preset, suggested, seed, index, splits, on_epoch, checkpoint, stop)
        value, state = max(accuracies), TrialState.COMPLETE
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except (OutOfMemory, NonFiniteLoss) as error:  # these values do not work here; the study goes on without them
        if isinstance(error, OutOfMemory) and not any(t.state == TrialState.COMPLETE for t in record.trials):
            raise  # nothing has ever fitted: more likely the device is taken than the values are at fault
        comment = f": {error}"
    judge.tell(judged, value, state=state)
    record.tell(recorded, value, state=state)
    checkpoint.remove()
    best = f"{max(accuracies):.4f}" if accuracies else "none"
    print(
        f"trial {judged.number}: validation accuracy {best} after {len(accuracies)} epochs, {state.name.lower()}, "
        f"{time.perf_counter() - start:.0f} s, {judged.params}{comment}",
        flush=True,
    )


def _recorded_trial(record: optuna.Study, params: dict) -> optuna.Trial:
    """The record's trial for these values: the one that an earlier process began and did not finish, else a new one."""
    record.sampler = optuna.samplers.PartialFixedSampler(params, optuna.samplers.RandomSampler())
    begun = [trial for trial in record.trials if trial.state == TrialState.RUNNING]
    # Optuna has no public way to take up a trial of a process that is gone.
    return optuna.Trial(record, begun[0]._trial_id) if begun else record.ask()


def _train(
    preset: Preset,
    experiment: Experiment,
    seed: int,
    index: Index,
    splits: Splits,
    on_epoch: Callable[[list[EpochRecord]], None],
    checkpoint: Checkpoint,
    stop: StopRequest,
) -> None:
    seed_everything(seed)
    model = build_model(experiment, preset.settings)
    trainer = build_trainer(model, experiment, preset.settings, preset.tuning.epochs)
    train_loader = build_loader(preset, experiment, index, splits.train, training_seed=seed)
    valid_loader = build_loader(preset, experiment, index, splits.valid)
    fit(trainer, train_loader, valid_loader, preset.tuning.epochs, on_epoch, checkpoint, stop)


def _report(record: optuna.Study, experiment: Experiment) -> None:
    complete = [trial for trial in record.trials if trial.state == TrialState.COMPLETE]
    if not complete:
        raise UserError(
            f"no trial of the study {experiment.name} ran to its end: raise --glass-trials or --standard-trials"
        )
    best = record.best_trial
    print(f"best of {experiment.name}: trial {best.number}, validation accuracy {best.value:.4f}")
    for name, value in best.params.items():
        print(f"  {name} = {value!r}")
