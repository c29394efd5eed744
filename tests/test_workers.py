"""Workers on many machines share one study in PostgreSQL: no trial is lost or doubled if one dies or is suspended."""

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

import config
from hyperparameter_tuning.study import build_live_study, tune
from hyperparameter_tuning.trials import SlotPruner, author_study_name
from hyperparameter_tuning.workers import reconcile
from tests.command_server import Process
from tests.conftest import TOY_FLAGS, MakePreset, copy_index, refused, start_module, succeed, wait_until
from tests.postgres import MISSING, Postgres
from tests.toy_workers import NAME, shake, start, trials_of, workers_preset
from training.checkpoints import Checkpoint
from utils import UserError, find_experiment, read_json

needs_server = pytest.mark.skipif(bool(MISSING), reason=f"there is no {MISSING}")
COMMAND = f"hyperparameter_tuning.{NAME}_tuning"
FLAGS = (*TOY_FLAGS, "--epochs", "3", "--min-resource", "1", "--max-resource", "3", "--reduction-factor", "2")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def url(server: Postgres) -> str:
    """The URL of a new database."""
    name = f"d{random.getrandbits(32)}"
    server.execute(f"CREATE DATABASE {name}")
    return f"{server.url.removesuffix('/postgres')}/{name}"


def shared(url: str) -> list[FrozenTrial]:
    """The trials in the database; none before workers have created its tables."""
    try:
        storage = RDBStorage(url, {"poolclass": sqlalchemy.NullPool}, True, skip_table_creation=True)
        return optuna.load_study(study_name=f"demo/{NAME}", storage=storage).trials
    except (KeyError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
        return []


def ended(process: Process) -> tuple[int, str]:
    out, errors = process.communicate(timeout=120)
    return process.returncode, out + errors


@pytest.mark.slow
@needs_server
def test_kills_and_a_restart_of_the_server_lose_and_double_no_trial(toy_data: Path, results: Path) -> None:
    with Postgres() as server:
        assert not shake(server, toy_data, results, trials=12, kills=4, restarts=1, seed=1)


@pytest.mark.slow
@needs_server
def test_a_worker_that_was_suspended_gives_up_its_trial_and_continues(url: str, toy_data: Path, results: Path) -> None:
    preset = workers_preset(toy_data, results, url, trials=3)
    sleeper = start(preset, 0.3, "sleeper")
    wait_until(lambda: any(trial.intermediate_values for trial in shared(url)))
    os.kill(sleeper.pid, signal.SIGSTOP)
    slept = next(trial for trial in shared(url) if trial.state == TrialState.RUNNING)
    other = start(preset, 0.3, "other")
    wait_until(lambda: [t.user_attrs.get("repeats") for t in shared(url) if t.state.is_finished()].count(slept.number))
    os.kill(sleeper.pid, signal.SIGCONT)
    for worker in (sleeper, other):
        worker.join(60)
        assert worker.exitcode == 0
    assert f"trial {slept.user_attrs['slot']} was given to another worker" in (results / "sleeper").read_text()
    assert [trial.user_attrs["slot"] for trial in trials_of(results)] == [0, 1, 2]
    states = [trial.state for trial in shared(url)]
    assert states.count(TrialState.FAIL) == 1 and len(states) == 4


@needs_server
def test_what_a_kill_leaves_unfinished_is_completed(url: str, server: Postgres) -> None:
    storage = RDBStorage(url, heartbeat_interval=1, grace_period=600)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    assert [*reconcile(study, storage, 3)] == [0, 1, 2]
    first, second, third = study.get_trials(deepcopy=False)
    storage.record_heartbeat(first._trial_id)  # killed right after
    storage.set_trial_state_values(first._trial_id, TrialState.RUNNING)
    storage.set_trial_state_values(second._trial_id, TrialState.RUNNING)
    storage.set_trial_param(second._trial_id, "x", 0.25, optuna.distributions.FloatDistribution(0, 1))
    storage.set_trial_state_values(second._trial_id, TrialState.FAIL)  # killed before it was enqueued again
    storage.set_trial_user_attr(third._trial_id, "failure", "no memory")
    storage.set_trial_state_values(third._trial_id, TrialState.FAIL)
    study.enqueue_trial({}, {"slot": 0})  # by a worker that had lost the lock
    study.enqueue_trial({})  # by hand: it has no slot

    slots = reconcile(study, storage, 3)
    assert {slot: trial.number for slot, trial in slots.items()} == {0: 0, 1: 5, 2: 2}
    assert (slots[1].system_attrs["fixed_params"], slots[1].user_attrs["repeats"]) == ({"x": 0.25}, 1)
    assert study.trials[3].state == TrialState.FAIL
    assert reconcile(study, storage, 3).keys() == slots.keys() and len(study.trials) == 6
    storage.grace_period = 1
    time.sleep(2.5)  # the first is stale now
    slots = reconcile(study, storage, 4)
    assert {slot: trial.number for slot, trial in slots.items()} == {0: 6, 1: 5, 2: 2, 3: 7}
    assert slots[0].user_attrs == {"slot": 0, "repeats": 3}
    assert len(reconcile(study, storage, 2)) == 4

    for death in range(4):  # a trial that kills its worker is repeated three times; giving it back does not count
        for kind in ("given_back", "killed"):
            trial = reconcile(study, storage, 4)[3]
            assert trial.state == TrialState.WAITING, (death, kind)
            storage.set_trial_user_attr(trial._trial_id, kind, True)
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    last = reconcile(study, storage, 4)[3]
    assert (last.state, last.user_attrs["repeats"]) == (TrialState.FAIL, trial.number)
    assert last.user_attrs["failure"].startswith("its worker died 4 times: see the machines' logs")
    assert reconcile(study, storage, 4)[3].number == last.number


def test_slots_have_the_brackets_of_the_authors_trials() -> None:
    name, tuning = author_study_name(find_experiment(config.PAPER, "glass_vit")), config.PAPER.tuning
    author = build_live_study(name, 606, tuning)
    ours = optuna.create_study(study_name="paper/glass_vit", pruner=SlotPruner(name, tuning))
    brackets = set()
    for slot in range(100):
        trial = author.ask()
        author.tell(trial, trial.should_prune())
        own = optuna.trial.create_trial(state=TrialState.WAITING, user_attrs={"slot": slot})
        bracket = author.pruner._get_bracket_id(author, author.trials[slot])
        assert ours.pruner._get_bracket_id(ours, own) == bracket
        brackets.add(bracket)
    assert brackets == {0, 1}


@needs_server
def test_two_commands_share_a_study_that_the_tables_read(
    url: str, toy_data: Path, results: Path, indexed: Path, tmp_path: Path
) -> None:
    roots = [results, copy_index(indexed, tmp_path / "elsewhere")]
    secret = url.replace("postgres@", "postgres:secret@")
    flags = [COMMAND, *FLAGS, "--trials", "4", "--data-root", toy_data, "--study-storage", secret]
    workers = [start_module(*flags, "--results-root", root) for root in roots]
    ends = [ended(worker) for worker in workers]
    assert [code for code, _ in ends] == [0, 0], ends
    best = [text[text.index(f"best of {NAME}") :] for _, text in ends]
    assert best[0] == best[1]
    assert sorted(line.split(":")[0] for _, text in ends for line in text.splitlines() if "after" in line) == [
        f"trial {slot}" for slot in range(4)
    ]
    succeed("model_training.results_tables", "--preset", "demo", "--results-root", results)
    for root in roots:
        folder = root / "demo" / "tuning" / NAME
        assert [trial.user_attrs["slot"] for trial in trials_of(root)] == [0, 1, 2, 3]
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json", "study.db"]
        assert "secret" not in (folder / "run.json").read_text()

    more = ["5" if flag == "4" else flag for flag in flags]
    for root in roots:
        succeed(*more, "--results-root", root)
        assert len(trials_of(root)) == len(shared(url)) == 5

    at = ("--results-root", results)
    assert "demo/standard_vit was started with main_seed = 606, now 7: choose" in refused(
        *flags, "--main-seed", "7", "--results-root", copy_index(indexed, tmp_path / "third")
    )
    assert "heartbeat = 60, now 9" in refused(*flags, *at, "--heartbeat-seconds", "9")
    assert "delete the study" in refused(*flags, *at, "--restart")
    assert "database_study = 2" in refused(*flags[:-2], *at)  # without the storage
    shutil.rmtree(results / "demo" / "tuning")
    succeed(*flags[:-2], *at)
    assert "database_study = None, now 2" in refused(*flags, *at)


@needs_server
def test_a_stopped_worker_gives_its_trial_back_and_the_next_one_resumes_it(
    url: str, toy_data: Path, results: Path
) -> None:
    roots = ("--data-root", toy_data, "--results-root", results, "--study-storage", url)
    flags = [COMMAND, *FLAGS, "--epochs", "40", "--max-resource", "40", "--min-resource", "40", "--trials", "1", *roots]
    stopped = start_module(*flags)
    wait_until(lambda: [*results.glob(f"demo/tuning/{NAME}/checkpoints/*/trial_0.pt")])
    stopped.send_signal(signal.SIGTERM)
    code, text = ended(stopped)
    assert code == 75 and "stopped: saved" in text
    assert [trial.state for trial in shared(url)] == [TrialState.FAIL]
    (path,) = results.glob(f"demo/tuning/{NAME}/checkpoints/*/trial_0.pt")
    epochs = len(Checkpoint(path).history())
    told = succeed(*flags)
    assert f"resumed at epoch {epochs + 1}, " in told
    first, second = shared(url)
    assert (second.params, second.user_attrs["repeats"]) == (first.params, 0) and len(second.intermediate_values) == 40
    assert first.intermediate_values.items() <= second.intermediate_values.items()
    assert read_json(results / "demo" / "tuning" / NAME / "run.json")["settings"]["study_storage"] == url


@needs_server
def test_a_trial_that_fails_for_a_reason_is_not_repeated(url: str, toy_data: Path, results: Path) -> None:
    worker = start(workers_preset(toy_data, results, url, trials=2), 0, fails=0)
    worker.join(90)
    assert worker.exitcode == 0
    assert "trial 0: validation accuracy none after 0 epochs, fail, 0 s" in (results / "log").read_text()
    for trials in (shared(url), trials_of(results)):
        assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE]
        assert trials[0].user_attrs["failure"] == "not a number"


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        ("sqlite:///study.db", r"study_storage is sqlite:///study.db: it must be postgresql\+psycopg://USER"),
        ("mysql://me:secret@host/db", r"study_storage is mysql://me:\*\*\*@host/db: it must be postgresql"),
        ("nothing", "study_storage is not the URL of a database"),
        pytest.param(
            "postgresql+psycopg://me@127.0.0.1:1/db",
            r"127.0.0.1:1/db is away \(.*refused.*\), for more than 15 s: start the server, or correct --study-storage",
            marks=[needs_server, pytest.mark.slow],
        ),
    ],
)
def test_a_storage_that_cannot_be_used_is_a_sentence(
    storage: str, sentence: str, toy_data: Path, results: Path
) -> None:
    at = ("--data-root", toy_data, "--results-root", results, "--heartbeat-seconds", "1")
    assert re.search(sentence, refused(COMMAND, *FLAGS, *at, "--study-storage", storage))


def test_without_psycopg_its_requirements_are_named(toy_preset: MakePreset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    preset = toy_preset()
    tuning = replace(preset.tuning, study_storage="postgresql+psycopg://me@127.0.0.1:1/db")
    with pytest.raises(UserError, match="needs psycopg: pip install -r requirements-distributed"):
        tune(replace(preset, tuning=tuning), find_experiment(preset, NAME))
