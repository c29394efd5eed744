"""A checkpoint that is damaged, of another model or made to harm is refused in one sentence."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Bomb, MakePreset, toy_job
from training.checkpoints import Checkpoint
from training.loop import fit
from training.progress import Progress, best_epoch
from training.trainer import Trainer
from utils import UserError


def change_learning_rate(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"][0].update(lr=0.7)
    torch.save(state, path)


DAMAGES = {  # the digest detects all of them
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 100),
    "another last byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "another learning rate": change_learning_rate,
}


@pytest.fixture(scope="module")
def saved_state(toy_preset: MakePreset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A training, and its checkpoint after an epoch."""
    folder = tmp_path_factory.mktemp("checkpoint") / "standard_resnet" / "seed_1"
    job = toy_job(toy_preset(), "standard_resnet", 1, backbone="timm:test_convnext")
    fit(job, Checkpoint(folder / "checkpoint.pt"))
    return job.trainer, folder / "checkpoint.pt"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage: str, saved_state: tuple[Trainer, Path], tmp_path: Path) -> None:
    trainer, sound = saved_state
    path = shutil.copytree(sound.parents[1], tmp_path / "standard_resnet") / "seed_1" / "checkpoint.pt"
    assert len(Checkpoint(path).history()) == Checkpoint(path).load(trainer).epoch == 1
    DAMAGES[damage](path)
    for read in (lambda checkpoint: checkpoint.load(trainer), Checkpoint.history):
        with pytest.raises(UserError, match=r"cannot resume from .*checkpoint\.pt \(it is damaged"):
            read(Checkpoint(path))


def test_a_checkpoint_of_another_model_is_refused(saved_state: tuple[Trainer, Path]) -> None:
    trainer, sound = saved_state
    with pytest.raises(UserError, match=r"cannot resume from .*state_dict"):
        Checkpoint(sound).load(replace(trainer, model=nn.Linear(2, 2)))


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(
    saved_state: tuple[Trainer, Path], tmp_path: Path
) -> None:
    path, target = tmp_path / "standard_resnet" / "seed_1" / "checkpoint.pt", tmp_path / "the code ran"
    path.parent.mkdir(parents=True)
    torch.save({"model": Bomb(target)}, path)
    path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())  # with the right digest
    with pytest.raises(UserError, match=r"cannot resume from .* \(it holds something else than tensors"):
        Checkpoint(path).load(saved_state[0])
    assert not target.exists()
    torch.load(path, weights_only=False)  # it would run
    assert target.exists()


def test_the_best_model_is_always_that_of_an_epoch_in_the_checkpoint_also_after_a_kill(
    toy_preset: MakePreset, tmp_path: Path
) -> None:
    job, path, seen = toy_job(toy_preset()), tmp_path / "checkpoint.pt", []

    def killed(state: Mapping[str, torch.Tensor], epoch: int) -> None:
        seen.append((epoch, len(Checkpoint(path).history())))
        raise UserError("killed")

    with pytest.raises(UserError, match="killed"):
        fit(job, Checkpoint(path, best_model=killed))
    assert seen == [(1, 1)]

    def checked(state: Mapping[str, torch.Tensor], epoch: int) -> None:
        saved = torch.load(path, weights_only=True)
        seen.append((epoch, len(saved["progress"]["history"])))
        assert all(torch.equal(state[name], value) for name, value in saved["model"].items())

    resumed = toy_job(toy_preset(), epochs=4)
    history = fit(resumed, Checkpoint(path, best_model=checked))
    best = [n for n in range(1, 5) if best_epoch(history[:n]).epoch == n]
    assert seen[1:] == [(1, 1), *((n, n) for n in best if n > 1)]


def test_optional_saves_are_skipped_soon_after_another(saved_state: tuple[Trainer, Path], tmp_path: Path) -> None:
    trainer, checkpoint = saved_state[0], Checkpoint(tmp_path / "checkpoint.pt")
    written = []
    for steps, must in enumerate((False, False, True)):
        checkpoint.save(trainer, Progress(steps=steps), must)
        checkpoint.wait()
        written.append(Checkpoint(checkpoint.path).load(trainer).steps)
    assert written == [0, 0, 2]
