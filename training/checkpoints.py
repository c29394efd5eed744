"""Model weights, and the state from which a training is resumed; nothing is ever unpickled."""

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
from typing import Any, BinaryIO

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

    Each tensor must have memory of its own, which layers that share weights have in `copied` only.
    """
    state = {name: tensor.contiguous() for name, tensor in state.items()}
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
    first: dict[int, str] = {}  # a tensor's memory -> its first name
    for name, tensor in model.state_dict().items():
        one = first.setdefault(tensor.data_ptr(), name)
        if one != name and tensor.numel() and not torch.equal(state[one], state[name]):
            raise UserError(f"{path} holds two networks where this model has one for both views: {one} is not {name}")
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
        raise ValueError("its metadata says nothing of the model")
    return about


# ----------------------------------------------------------------------------------------- training in progress
SHARE_OF_SAVING = 0.05  # of the time, at most, where a save may be left out


class Checkpoint:
    """The file from which a training that was stopped or killed is resumed, bit for bit on the same machine.

    It is written by a thread, from a copy of the state, while training goes on, and of several processes by main. It
    ends with a digest of itself: most damaged states would load and train, to other numbers.

    Args:
        path: of the file; it holds the last state, never two.
        every_steps: save within an epoch too, after so many steps; 0: only between epochs.
        best_model: told the model's state dict and the epoch after each epoch that is the best so far, once the file
            holds that epoch, and again when training resumes there: what it writes is always of an epoch in the file.
        background: False: `save` returns when all is written, for who measures the time of what follows.
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
        self._due = 0.0  # when a save may come that may be left out

    def save(self, trainer: Trainer, progress: Progress, must: bool = True) -> None:
        """Write the state after the last step, whole or not at all.

        Args:
            must: False: if this epoch is not the best, it may be left out, so that saving takes little of the time.

        Raises:
            UserError: this state, or the one before, cannot be written.
        """
        free = time.monotonic() >= self._due and not self._is_writing()
        if not (must or self._is_best(progress) or processes.same(free)):
            return
        own, *others = processes.gathered(_random_states(trainer.runtime.device))  # of main, and of the others
        if not processes.is_main():
            return
        self.wait()
        state = {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "random": own,
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
        """Until the last state is written.

        Raises:
            UserError: it could not be.
        """
        if self._thread:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error:
            raise error

    def load(self, trainer: Trainer) -> Progress:
        """Put `trainer` and all random generators into the saved state, if there is one; returns how far it is.

        Raises:
            UserError: the file is not what was saved there, or is of another model.
        """
        state = self._read()
        if state is None:
            return Progress()
        with self._usable():
            trainer.model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.scheduler.load_state_dict(state["scheduler"])
            trainer.scaler.load_state_dict(state["scaler"])
            random_states = [state["random"], *state.get("random_of_others", ())]
            if processes.rank() < len(random_states):  # another number of processes draws otherwise
                _set_random_states(random_states[processes.rank()], trainer.runtime.device)
            progress = _progress(state)
        if self._is_best(progress) and processes.is_main():
            self.best_model(state["model"], progress.epoch)
        return progress

    def history(self) -> list[EpochRecord]:
        """The finished epochs of the saved state; none without one.

        Raises:
            UserError: the file is not what was saved there.
        """
        state = self._read()
        with self._usable():
            return _progress(state).history if state else []

    def remove(self) -> None:
        """Delete the file: the training is finished."""
        if processes.is_main():
            self.path.unlink(missing_ok=True)

    def _is_best(self, progress: Progress) -> bool:
        """Whether the state is the one after the best epoch, and somebody wants it."""
        at_end_of_epoch = progress.history and not progress.steps
        return bool(self.best_model and at_end_of_epoch and best_epoch(progress.history) is progress.history[-1])

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, state: dict[str, Any], best: bool) -> None:
        start = time.monotonic()
        try:
            with replacing(self.path) as temporary, open(temporary, "wb") as file:
                digested = _Digested(file)
                torch.save(state, digested)
                file.write(digested.digest.digest())
            if best:
                self.best_model(state["model"], len(state["progress"]["history"]))
        except (OSError, RuntimeError):  # torch's ways to say that the disk is full
            free = shutil.disk_usage(self.path.parent).free if self.path.parent.exists() else 0
            self._error = UserError(
                f"{self.path} cannot be written, {free / 1e6:,.0f} MB are free there, too few: make room, and run "
                f"the same command again to resume from what was saved before"
            )
        except Exception as error:  # to be raised by who waits
            self._error = error
        self._due = time.monotonic() + (time.monotonic() - start) / SHARE_OF_SAVING

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
        data = processes.on_main(self._bytes)
        with self._usable():
            return data and torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # ignores the digest

    def _bytes(self) -> bytes | None:
        if not self.path.exists():
            return None
        with self._usable():
            data = self.path.read_bytes()
            size = max(0, len(data) - hashlib.sha256().digest_size)
            if hashlib.sha256(memoryview(data)[:size]).digest() != data[size:]:
                raise ValueError("it is damaged, edited, or of an earlier version")
            return data


class _Digested:
    """A file to write to that keeps the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def copied(value: Any) -> Any:
    """`value` with a copy in main memory of every tensor in it, which further training leaves as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def _progress(state: Mapping[str, Any]) -> Progress:
    values = dict(state["progress"])
    history = [EpochRecord(**record) for record in values.pop("history")]
    return Progress(history=history, **values)


def _random_states(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy, torch and the device, whatever other devices there are."""
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
