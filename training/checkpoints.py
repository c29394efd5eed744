"""Model weights, and the state from which a training is resumed; nothing is ever unpickled."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from models.weights import read_state_dict, state_dict_mismatch, written_by_torch
from training.progress import EpochRecord, Progress
from training.trainer import Trainer
from utils import UserError, first_line, replacing


# ---------------------------------------------------------------------------------------------------- weights
def save_model(path: Path, model: nn.Module, about: Mapping[str, Any]) -> None:
    """Write the model's weights as safetensors, with `about` (JSON-ready: all that rebuilds the model) as metadata."""
    state: dict[str, torch.Tensor] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if place in stored else tensor  # of layers that share weights, each its own
        stored.add(place)
    try:
        with replacing(path) as temporary:
            save_file(state, temporary, metadata={"about": json.dumps(about)})
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def load_model(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load weights that `save_model` wrote, or a state dict of torch.save as of the author's code, into `model`.

    Returns what was told about it; nothing of a state dict.

    Raises:
        UserError: not such a file, of another model, or with weights that are not finite numbers; `model` is then
            as it was.
    """
    if written_by_torch(path):
        state, about = read_state_dict(path), {}
    else:
        with _opened(path) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            about = _about(file)
    problem = state_dict_mismatch(state, model.state_dict())
    if problem:
        raise UserError(f"{path} does not fit this model: {problem}")
    model.load_state_dict(state)
    return about


def read_about(path: Path) -> dict[str, Any]:
    """What `save_model` was told about the model; no weights are read.

    Raises:
        UserError: not such a file.
    """
    with _opened(path) as file:
        return _about(file)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or first_line(error)}): name a weights file") from None
    except (SafetensorError, ValueError) as error:
        with open(path, "rb") as other:
            head = other.read(16)
        raise UserError(
            f"{path} is not a weights file of this project, nor a checkpoint of the author's code: it begins with "
            f"{head!r} ({first_line(error)})"
        ) from None


def _about(file: safe_open) -> dict[str, Any]:
    about = json.loads((file.metadata() or {}).get("about", "null"))
    if not isinstance(about, dict):
        raise ValueError("its metadata says nothing of the model")
    return about


# ----------------------------------------------------------------------------------------- training in progress
class Checkpoint:
    """The file from which a training that was stopped or killed is resumed, bit for bit on the same machine.

    It ends with a digest of itself: most damaged states would load and train, to other numbers.

    Args:
        path: of the file; it holds the last state, never two.
        every_steps: save within an epoch too, after so many steps; 0: only between epochs.
    """

    def __init__(self, path: Path, every_steps: int = 0) -> None:
        self.path, self.every_steps = path, every_steps

    def save(self, trainer: Trainer, progress: Progress) -> None:
        """Write the state after the last step, whole or not at all."""
        state = {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "random": _random_states(),
            "progress": asdict(progress),
        }
        with replacing(self.path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError:  # torch's way to say that the disk is full
                free = shutil.disk_usage(self.path.parent).free
                raise UserError(
                    f"{self.path} cannot be written, {free / 1e6:,.0f} MB are free there: make room, and run the same "
                    f"command again to resume from what was saved before"
                ) from None
            with open(temporary, "r+b") as file:
                file.write(_digest(file, temporary.stat().st_size))

    def load(self, trainer: Trainer) -> Progress:
        """Put `trainer` and all random generators into the saved state, if there is one; returns how far it is.

        Raises:
            UserError: the file is not what was saved there, or is of another model.
        """
        with self._usable():
            state = self._read()
            if state is None:
                return Progress()
            trainer.model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.scheduler.load_state_dict(state["scheduler"])
            trainer.scaler.load_state_dict(state["scaler"])
            _set_random_states(state["random"])
            return _progress(state)

    def history(self) -> list[EpochRecord]:
        """The finished epochs of the saved state; none without one.

        Raises:
            UserError: the file is not what was saved there.
        """
        with self._usable():
            state = self._read()
            return _progress(state).history if state else []

    def remove(self) -> None:
        """Delete the file: the training is finished."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what another file holds can go wrong in nearly any way
            raise UserError(
                f"cannot resume from {self.path} ({first_line(error)}): delete it to repeat that seed, trial or crop "
                f"count, or pass --restart to start over"
            ) from None

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        with open(self.path, "rb") as file:
            size = max(0, os.fstat(file.fileno()).st_size - hashlib.sha256().digest_size)
            if _digest(file, size) != file.read():
                raise ValueError("it is damaged, edited, or of an earlier version")
        return torch.load(self.path, map_location="cpu", weights_only=True)  # which ignores the digest


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the first `size` bytes of a file; leaves it there."""
    digest = hashlib.sha256()
    while chunk := file.read(min(size, 2**22)):
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()


def _progress(state: Mapping[str, Any]) -> Progress:
    values = dict(state["progress"])
    history = [EpochRecord(**record) for record in values.pop("history")]
    return Progress(history=history, **values)


def _random_states() -> dict[str, Any]:
    """Of Python, NumPy, torch and all CUDA devices."""
    version, numbers, spare = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), spare],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    version, numbers, spare = states["python"]
    random.setstate((version, tuple(numbers.tolist()), spare))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
