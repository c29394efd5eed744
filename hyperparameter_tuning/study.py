"""One Optuna study: `tune(preset, experiment)`. docs/method.md, Experiments 1.

Two Optuna studies hold the same trials. `stored` is in an SQLite file. `live` is in memory; it suggests values and
prunes. A restart rebuilds it by replaying the stored trials, which restores the state of its sampler and its pruner,
so that the study continues as if it had never stopped.
"""

import warnings
from dataclasses import MISSING, dataclass, fields
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from config import Experiment, GlassExperiment, Preset, StandardExperiment, Tuning
from hyperparameter_tuning.trials import (
    Search,
    Train,
    author_study_name,
    fit_trial,
    open_study,
    print_best,
    resources,
    study_file,
    suggest_experiment,
)
from hyperparameter_tuning.workers import Worker
from training import processes
from training.runs import RESTART, SETTINGS, RestartOption, RunFolder, archive, open_run, open_session, resolved
from utils import UserError, preset_folder, run_command

PAPER_OPTUNA = "4.6.0"
HYPERPARAMETERS = {  # set by trials, not on the command line
    field.name for kind in (GlassExperiment, StandardExperiment) for field in fields(kind) if field.default is MISSING
} - {"name", "backbone"}


def main(name: str, doc: str) -> None:
    """The command that tunes the experiment `name`."""
    run_command(
        doc,
        tune,
        groups=("tuning",),
        experiments=(name,),
        settings=SETTINGS,
        without=HYPERPARAMETERS,
        options=RestartOption,
    )


def tune(preset: Preset, experiment: Experiment, restart: bool = False, train: Train = fit_trial) -> None:
    """Search the experiment's hyperparameters for the best validation accuracy, and print them.

    Writes results/<preset>/tuning/<experiment>/study.db (SQLite, opens in optuna-dashboard) and run.json.
    Killed and started again, it resumes the trial that was in progress, from its last finished epoch.

    Args:
        restart: archive what was started, and start over.
        train: trains a trial.

    Raises:
        UserError: no index, no weights, a study that was started with other settings, or one that is in use.
        Stopped: a signal asked to stop.
    """
    tuning, folder = preset.tuning, preset_folder(preset) / "tuning" / experiment.name
    if restart and tuning.study_storage:
        raise UserError(
            "--restart cannot be combined with --study-storage, where other workers may be running: choose another "
            "--name, or delete the study from the database (optuna delete-study) and move its results folder away"
        )
    if tuning.max_resource < tuning.min_resource:
        raise UserError(
            f"max_resource is {tuning.max_resource}: it must be at least min_resource = {tuning.min_resource}"
        )
    space = preset.glass_space if isinstance(experiment, GlassExperiment) else preset.standard_space
    fixed = {name: value for name, value in resolved(experiment).items() if name not in space}
    values = resolved(preset.settings, tuning) | fixed
    values["search_space"] = [f"{name}: {choices}" for name, choices in space.items()]
    values["study_name"] = author_study_name(experiment)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    with open_session(preset) as session:
        if tuning.study_storage:
            if processes.size() > 1:
                raise UserError("a worker on --study-storage is one process: start more workers, without torchrun")
            name = f"{preset.name}/{experiment.name}"
            Worker(session, experiment, space, tuning, train, folder, values, name).run()
            return
        if restart:
            archive(preset, [folder])
        with open_run(session, folder, values, results=("study.db",)) as run, study_file(folder / "study.db"):
            if optuna.__version__ != PAPER_OPTUNA:
                run.metadata["suggestions"] = (
                    f"Optuna {optuna.__version__}: they differ from those of the paper's {PAPER_OPTUNA} from about "
                    f"trial 10 on"
                )
                print(f"{experiment.name}: suggestions of {run.metadata['suggestions']}")
            study = _Study(session, experiment, space, tuning, train, run)
            study.run_trials(study.total)
            print_best(study.stored, experiment.name)


def build_live_study(name: str, seed: int, tuning: Tuning) -> optuna.Study:
    """An empty study in memory, with the paper's sampler and pruner."""
    return optuna.create_study(
        study_name=name,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.HyperbandPruner(**resources(tuning)),
    )


@dataclass
class _Study(Search):
    """The study of one experiment in one process; the module's docstring explains `live` and `stored`."""

    run: RunFolder

    def __post_init__(self) -> None:
        path, name = self.run.path / "study.db", self.experiment.name
        # With several processes, main has the file, and the others a copy in memory that stays equal.
        self.stored = open_study(path, name) if processes.is_main() else optuna.create_study(direction="maximize")
        trials = processes.same(self.stored.trials)
        if not processes.is_main():
            self.stored.add_trials(trials)
        seed = self.session.settings.main_seed
        self.live = build_live_study(author_study_name(self.experiment), seed, self.tuning)

    def run_trials(self, total: int) -> None:
        """Replay the finished trials, then run the others up to `total`."""
        finished = [trial for trial in self.stored.trials if trial.state.is_finished()]
        for trial in finished:
            self.run.checkpoint(f"trial_{trial.number}").remove()  # a kill may have prevented that
            self._replay(trial)
        print(f"{self.experiment.name}: {len(finished)} of {total} trials are finished")
        if len(finished) < total:
            self.run.record(f"trial {len(finished)}")
        for number in range(len(finished), total):
            self.session.stop.raise_if_requested(f"before trial {number} of {self.experiment.name}")
            self._run_trial()

    def _replay(self, past: FrozenTrial) -> None:
        """Repeat a finished trial in `live`: the same draws, reports and pruning decisions as when it ran."""
        if past.state == TrialState.COMPLETE and past.value != max(past.intermediate_values.values(), default=None):
            raise UserError(
                f"trial {past.number} of the study {self.experiment.name} has the value {past.value}, which is not the "
                f"best of its epochs, so the study was edited: {RESTART}"
            )
        trial = self.live.ask()
        suggest_experiment(trial, self.space, self.experiment)
        self._check_values(trial, past)
        for epoch, accuracy in sorted(past.intermediate_values.items()):
            trial.report(accuracy, epoch)
            trial.should_prune()
        self.live.tell(trial, past.value if past.state == TrialState.COMPLETE else None, state=past.state)

    def _check_values(self, live: optuna.Trial, stored: optuna.Trial | FrozenTrial) -> None:
        if live.params != stored.params:
            raise UserError(
                f"trial {stored.number} of the study {self.experiment.name} has values that these search spaces, seed "
                f"and Optuna {optuna.__version__} do not suggest: restore them, or choose another --results-root or "
                f"--name"
            )

    def _run_trial(self) -> None:
        live = self.live.ask()
        suggested = suggest_experiment(live, self.space, self.experiment)
        stored = self._stored_trial(live.params)
        suggest_experiment(stored, self.space, self.experiment)
        self._check_values(live, stored)
        reported = self.stored.trials[stored.number].intermediate_values  # by an earlier process
        checkpoint = self.run.checkpoint(f"trial_{live.number}")

        def report(accuracy: float, step: int) -> tuple[float, bool]:
            accuracy = reported.get(step, accuracy)  # the stored value is what the earlier `live` was given
            live.report(accuracy, step)
            if step not in reported:
                stored.report(accuracy, step)
            return accuracy, live.should_prune()

        outcome = self.train_trial(live.number, suggested, checkpoint, report, self.stored)
        self.live.tell(live, outcome.value, state=outcome.state)
        self.stored.tell(stored, outcome.value, state=outcome.state)
        checkpoint.remove()
        outcome.print(live.number, live.params)

    def _stored_trial(self, params: dict[str, Any]) -> optuna.Trial:
        """The trial in `stored` for these values: the one that an earlier process did not finish, else a new one."""
        self.stored.sampler = optuna.samplers.PartialFixedSampler(params, optuna.samplers.RandomSampler())
        unfinished = [trial for trial in self.stored.trials if trial.state == TrialState.RUNNING]
        # Optuna has no public way to resume a trial of a process that has ended.
        return optuna.Trial(self.stored, unfinished[0]._trial_id) if unfinished else self.stored.ask()
