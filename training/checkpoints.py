"""Weights files, and checkpoints from which a training is resumed; nothing is ever unpickled."""

import hashlib
import io
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data.images import UnreadableImage, open_image
from models.weights import read_state_dict, state_dict_mismatch, written_by_torch
from training import processes
from training.progress import EpochRecord, Progress, best_epoch
from training.trainer import Trainer
from utils import UserError, first_line, replacing


# ---------------------------------------------------------------------------------------------------- weights
def save_model(path: Path, state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write a model's state dict as safetensors, with `about` (JSON-ready: all that rebuilds the model) as metadata.

    Each tensor must have memory of its own: layers that share weights need `copied`.
    """
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        with replacing(path) as temporary:
            save_file(state, temporary, metadata={"about": json.dumps(about)})
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def load_model(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load weights that `save_model` wrote, or a state dict of torch.save as of the author's code, into `model`.

    Returns the metadata that `save_model` was given; a state dict has none.

    Raises:
        UserError: the file is of another kind or holds another model, or weights are not finite; `model` is then
            unchanged.
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
    first_names: dict[int, str] = {}  # a tensor's memory -> its first name
    for name, tensor in model.state_dict().items():
        first = first_names.setdefault(tensor.data_ptr(), name)
        if first != name and tensor.numel() and not torch.equal(state[first], state[name]):
            raise UserError(f"{path} holds two networks where this model has one for both views: {first} is not {name}")
    model.load_state_dict(state)
    return about


def read_about(path: Path) -> dict[str, Any]:
    """The metadata that `save_model` was given; no weights are read.

    Raises:
        UserError: `save_model` did not write this file.
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
        with suppress(UnreadableImage), open_image(path, sys.maxsize):
            raise UserError(f"{path} is an image: name a weights file (model.safetensors of a run)") from None
        with open(path, "rb") as other:
            head = other.read(16)
        raise UserError(
            f"{path} is not a weights file of this project, nor a checkpoint of the author's code: it begins with "
            f"{head!r} ({first_line(error)})"
        ) from None


def _about(file: safe_open) -> dict[str, Any]:
    about = json.loads((file.metadata() or {}).get("about", "null"))
    if not isinstance(about, dict):
        raise ValueError("its metadata does not describe a model")
    return about


# ----------------------------------------------------------------------------------------- training in progress
SHARE_OF_SAVING = 0.05  # of the time, at most, that optional saves take


class Checkpoint:
    """The file from which a training that was stopped or killed is resumed, bit for bit on the same machine.

    A thread of the main process writes it from a copy of the state while training continues. It ends with a digest of
    itself: most damaged states would load and train, to other numbers.

    Args:
        path: of the file, which holds the last state only.
        every_steps: also save within an epoch, each time after this many steps; 0: only between epochs.
        best_model: called with the model's state dict and the epoch after each epoch that is the best so far, once the
            file holds that epoch, and again when training resumes there: the file always holds the epoch it writes.
        background: False: `save` returns when the file is written, so that it does not slow what is measured next.
    """

    def __init__(
        self,
        path: Path,
        every_steps: int = 0,
        best_model: Callable[[Mapping[str, torch.Tensor], int], None] | None = None,
        background: bool = True,
    ) -> None:
        self.path, self.every_steps, self.best_model, self.background = path, every_steps, best_model, background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._next_optional_save = 0.0  # on the monotonic clock

    def save(self, trainer: Trainer, progress: Progress, must: bool = True) -> None:
        """Write the state after the last step; a reader sees the old file or the new one, never a part.

        Args:
            must: False: skip it if this epoch is not the best and the last save was a short time ago.

        Raises:
            UserError: this state, or the one before, cannot be written.
        """
        idle = not (self._thread and self._thread.is_alive())
        due = idle and time.monotonic() >= self._next_optional_save
        if not (must or self._is_best(progress) or processes.same(due)):
            return
        main, *others = processes.gathered(_random_states(trainer.runtime.device))
        if not processes.is_main():
            return
        self.wait()
        state = {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "random": main,
            "random_of_others": others,
            "progress": asdict(progress),
        }
        self._thread = threading.Thread(target=self._write, args=(copied(state), self._is_best(progress)))
        self._thread.start()
        if not self.background:
            self.wait()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self) -> None:
        """Return when the last state is written; raise the UserError that kept it from being written."""
        if self._thread:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error:
            raise error

    def load(self, trainer: Trainer) -> Progress:
        """Restore the saved state of `trainer` and of all random generators, if there is one; returns the progress.

        Raises:
            UserError: the file is damaged, or holds another model.
        """
        state = self._read()
        if state is None:
            return Progress()
        with self._refusing_unusable_state():
            trainer.model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.scheduler.load_state_dict(state["scheduler"])
            trainer.scaler.load_state_dict(state["scaler"])
            random_states = [state["random"], *state.get("random_of_others", ())]
            if processes.rank() < len(random_states):  # it may have been saved by fewer processes
                _set_random_states(random_states[processes.rank()], trainer.runtime.device)
            progress = _progress_of(state)
        if self._is_best(progress) and processes.is_main():
            self.best_model(state["model"], progress.epoch)
        return progress

    def history(self) -> list[EpochRecord]:
        """The finished epochs of the saved state; empty if there is no file.

        Raises:
            UserError: the file is damaged.
        """
        state = self._read()
        with self._refusing_unusable_state():
            return _progress_of(state).history if state else []

    def remove(self) -> None:
        """Delete the file, when the training is finished."""
        if processes.is_main():
            self.path.unlink(missing_ok=True)

    def _is_best(self, progress: Progress) -> bool:
        """Whether `best_model` is to be called: the epoch that has just ended is the best."""
        after_epoch = progress.history and not progress.steps
        return bool(self.best_model and after_epoch and best_epoch(progress.history) is progress.history[-1])

    def _write(self, state: dict[str, Any], best: bool) -> None:
        start = time.monotonic()
        try:
            with replacing(self.path) as temporary, open(temporary, "w+b") as file:
                torch.save(state, file)
                file.seek(0)
                file.write(hashlib.file_digest(file, "sha256").digest())
            if best:
                self.best_model(state["model"], len(state["progress"]["history"]))
        except (OSError, RuntimeError):  # torch raises these where the disk is full
            free = shutil.disk_usage(self.path.parent).free if self.path.parent.exists() else 0
            self._error = UserError(
                f"{self.path} cannot be written, {free / 1e6:,.0f} MB are free there, too few: make room, and run "
                f"the same command again to resume from what was saved before"
            )
        except Exception as error:  # `wait` raises it
            self._error = error
        self._next_optional_save = time.monotonic() + (time.monotonic() - start) / SHARE_OF_SAVING

    @contextmanager
    def _refusing_unusable_state(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the content of another file can raise nearly anything
            raise UserError(
                f"cannot resume from {self.path} ({first_line(error)}): delete it to repeat that seed, trial or crop "
                f"count, or pass --restart to start over"
            ) from None

    def _read(self) -> dict[str, Any] | None:
        data = processes.on_main(self._read_bytes)
        with self._refusing_unusable_state():
            return data and torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # ignores the digest

    def _read_bytes(self) -> bytes | None:
        if not self.path.exists():
            return None
        with self._refusing_unusable_state():
            data = self.path.read_bytes()
            size = max(0, len(data) - hashlib.sha256().digest_size)
            if hashlib.sha256(memoryview(data)[:size]).digest() != data[size:]:
                raise ValueError("it is damaged, edited, or of an earlier version")
            return data


def copied(value: Any) -> Any:
    """`value` with each tensor in it copied to main memory, so that further training does not change it."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def _progress_of(state: Mapping[str, Any]) -> Progress:
    values = dict(state["progress"])
    history = [EpochRecord(**record) for record in values.pop("history")]
    return Progress(history=history, **values)


def _random_states(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, on the CPU and on `device`."""
    version, numbers, spare = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), spare],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    version, numbers, spare = states["python"]
    random.setstate((version, tuple(numbers.tolist()), spare))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
