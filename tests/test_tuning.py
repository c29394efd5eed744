"""A study suggests and prunes as the author's does, and an interrupted one as an uninterrupted one does."""

import contextlib
import random
import resource
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from config import Experiment, Preset, Tuning
from hyperparameter_tuning.study import tune
from hyperparameter_tuning.trials import OnEpoch
from model_training.results_tables import write_tables
from tests.conftest import REPOSITORY, TOY_SETTINGS, MakePreset, copy_index, refused, start_module, succeed, wait_until
from tests.reference_studies import STUDIES, as_recorded, given, toy_paper
from training.checkpoints import Checkpoint
from training.loop import fit
from training.progress import EpochRecord
from training.runs import build_job, open_session
from utils import UserError, find_experiment, read_json

NAME = "standard_vit"
VALID = 18  # images; with the toy preset's six, accuracies hardly differ


def load(results: Path, name: str = NAME) -> optuna.Study:
    path = results / "demo" / "tuning" / name / "study.db"
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}")


def trials_of(results: Path) -> list[FrozenTrial]:
    """The trials of a study that another process may be writing."""
    with contextlib.suppress(optuna.exceptions.StorageInternalError):
        if (results / "demo" / "tuning" / NAME / "study.db").exists():
            return load(results).trials
    return []


def outcomes(results: Path) -> list[tuple]:
    return [(t.number, t.state, t.params, t.value, t.intermediate_values) for t in load(results).trials]


def toy(toy_preset: MakePreset, results: Path, trials: int) -> Preset:
    tuning = Tuning(epochs=3, trials=trials, min_resource=1, max_resource=3, reduction_factor=2)
    return replace(toy_preset(results_root=results, valid_size=VALID), tuning=tuning)


def tune_toy(toy_preset: MakePreset, results: Path, trials: int) -> None:
    preset = toy(toy_preset, results, trials)
    tune(preset, find_experiment(preset, NAME))


@pytest.fixture(scope="module")
def uninterrupted(toy_preset: MakePreset, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results root with a study of 14 trials, more than the sampler's ten random ones, run in one go."""
    results = copy_index(indexed, tmp_path_factory.mktemp("uninterrupted"))
    tune_toy(toy_preset, results, 14)
    assert TrialState.PRUNED in [trial.state for trial in load(results).trials]
    return results


class Killed(BaseException):
    """Raised instead of a kill."""


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_of_the_author_come_out_the_same_however_often_they_are_killed(
    name: str, toy_data: Path, results: Path
) -> None:
    preset, moments = toy_paper(toy_data, results), random.Random(name)
    deaths = Counter(moments.randrange(len(STUDIES[name]["trials"])) for _ in range(5))

    def train(search: object, number: int, experiment: Experiment, checkpoint: Checkpoint, on_epoch: OnEpoch) -> None:
        dies, epoch = deaths[number] > 0, moments.randint(0, 5)  # before the first pruning

        def die_or_report(history: list[EpochRecord]) -> None:
            if dies and len(history) > epoch:
                deaths[number] -= 1
                raise Killed
            on_epoch(history)

        given(search, number, experiment, checkpoint, die_or_report)

    for _ in range(deaths.total()):
        with pytest.raises(Killed):
            tune(preset, find_experiment(preset, name), train=train)
    tune(preset, find_experiment(preset, name), train=train)
    assert as_recorded(load(results, name).trials) == STUDIES[name]["trials"]
    metadata = read_json(results / "demo" / "tuning" / name / "run.json")
    assert metadata["settings"]["study_name"] == STUDIES[name]["study_name"]


def test_another_version_of_optuna_is_named_in_a_line_and_in_the_metadata(
    toy_preset: MakePreset, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"\noptuna=={optuna.__version__} " in (REPOSITORY / "requirements.txt").read_text()
    path = results / "demo" / "tuning" / NAME / "run.json"
    said = "they differ from those of the paper's 4.6.0 from about trial 10 on"
    for version, lines in (("4.6.0", 0), ("5.0.0", 1)):
        monkeypatch.setattr(optuna, "__version__", version)
        preset = toy(toy_preset, results, 1)
        tune(preset, find_experiment(preset, NAME), restart=path.exists())
        assert capsys.readouterr().out.count(said) == lines
        assert (said in read_json(path).get("suggestions", "")) == bool(lines)


@pytest.mark.parametrize("stops", [(1, 2), (11, 13)], ids=str)
def test_a_study_that_was_stopped_resumes_as_if_it_had_not_been(
    stops: tuple[int, ...], uninterrupted: Path, toy_preset: MakePreset, results: Path
) -> None:
    for trials in (*stops, 14):
        tune_toy(toy_preset, results, trials)
        assert len(load(results).trials) == trials
    assert outcomes(results) == outcomes(uninterrupted)


def test_a_killed_trial_is_run_again_with_the_same_values(uninterrupted: Path, results: Path, toy_data: Path) -> None:
    flags = f"--epochs 3 --trials 4 --valid-size {VALID} --min-resource 1 --max-resource 3 --reduction-factor 2"
    places = ("--data-root", str(toy_data), "--results-root", str(results), "--backbone", "timm:test_vit")
    command = [f"hyperparameter_tuning.{NAME}_tuning", *TOY_SETTINGS, *flags.split(), *places]

    def kill_when(there: Callable[[list[FrozenTrial]], bool]) -> None:
        before = shutil.copytree(results, results.with_name("before"))
        for _ in range(5):  # a trial of three short epochs may be over before it is killed
            process = start_module(*command)
            wait_until(lambda: (trials := trials_of(results)) and there(trials), process)
            process.kill()
            process.communicate()
            if load(results).trials[-1].state == TrialState.RUNNING:
                break
            shutil.rmtree(results)
            shutil.copytree(before, results)
        assert load(results).trials[-1].state == TrialState.RUNNING
        shutil.rmtree(before)

    kill_when(lambda trials: True)  # before it has reported anything, but with its values stored
    assert "main_seed = 606, now 7: pass --restart" in refused(*command, "--main-seed", "7")
    kill_when(lambda trials: len(trials) == 2 and bool(trials[1].intermediate_values))
    succeed(*command)
    assert outcomes(results) == outcomes(uninterrupted)[:4]


def test_a_study_of_another_search_space_is_refused(toy_preset: MakePreset, results: Path) -> None:
    preset = toy(toy_preset, results, 1)
    tune(preset, find_experiment(preset, NAME))
    narrower = replace(preset, standard_space=preset.standard_space | {"batch_size": (8,)})
    with pytest.raises(UserError, match=r"search_space = "):
        tune(narrower, find_experiment(preset, NAME))


def copied_study(uninterrupted: Path, results: Path) -> Path:
    """The database of a copy of the study, which can be resumed."""
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
    "a value is not a number": lambda path: execute(path, "UPDATE trial_values SET value = 'x'"),
    "a distribution is malformed": lambda path: execute(path, "UPDATE trial_params SET distribution_json = '{'"),
    "a value that no epoch had": lambda path: execute(path, "UPDATE trial_values SET value = 0.99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_study_is_one_sentence(
    damage: str, uninterrupted: Path, toy_preset: MakePreset, tmp_path: Path
) -> None:
    path = copied_study(uninterrupted, tmp_path / "results")
    DAMAGES[damage](path)
    with pytest.raises(UserError, match=r"(cannot resume from .*study\.db|the study was edited).*--restart") as said:
        tune_toy(toy_preset, tmp_path / "results", 14)
    assert "\n" not in str(said.value)


def test_a_study_that_cannot_be_written_is_one_sentence(
    uninterrupted: Path, toy_preset: MakePreset, tmp_path: Path
) -> None:
    path = copied_study(uninterrupted, tmp_path / "results")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))  # as on a disk that is full
    try:
        with pytest.raises(UserError, match=r"cannot resume from .*study\.db \(.*sqlite3.*\): make room"):
            tune_toy(toy_preset, tmp_path / "results", 15)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_study_that_another_program_holds_is_one_sentence(
    uninterrupted: Path, toy_preset: MakePreset, tmp_path: Path
) -> None:
    path = copied_study(uninterrupted, tmp_path / "results")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        for begin, action in (
            ("BEGIN IMMEDIATE", lambda: tune_toy(toy_preset, tmp_path / "results", 15)),  # may be read
            ("BEGIN EXCLUSIVE", lambda: write_tables(toy(toy_preset, tmp_path / "results", 15))),
        ):
            other.execute(begin)
            with pytest.raises(UserError, match=r"study\.db is in use by another program: wait, or close it"):
                action()
            other.execute("ROLLBACK")


def test_the_seed_of_a_trial_is_606_and_its_number(uninterrupted: Path, toy_preset: MakePreset) -> None:
    preset = toy(toy_preset, uninterrupted, 14)
    trial = next(trial for trial in load(uninterrupted).trials[3:] if len(set(trial.intermediate_values.values())) > 1)
    experiment = replace(find_experiment(preset, NAME), **trial.params)
    with open_session(preset) as session:
        rows = (session.splits.train, session.splits.valid)
        history = fit(build_job(session, experiment, 606 + trial.number, 3, rows, NAME))
    accuracies = [record.valid_accuracy for record in history]
    assert accuracies[: len(trial.intermediate_values)] == list(trial.intermediate_values.values())
