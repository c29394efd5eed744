"""State dicts: reading them from files, and checking whether they fit a model."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file

from utils import UserError, first_line

HUB = "hf:"  # prefix of a repository's name


def weights_file(name: Path) -> Path:
    """The path of a weights file, which "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION" names on the Hugging Face hub.

    The revision is printed; with it the same file can be named again, and used without a network once it was fetched.
    HF_ENDPOINT names another server.

    Raises:
        UserError: the hub, the repository or the file in it is unavailable.
    """
    if not str(name).startswith(HUB):
        return name
    repository, _, revision = str(name).removeprefix(HUB).partition("@")
    try:
        file = Path(huggingface_hub.hf_hub_download(repository, "model.safetensors", revision=revision or None))
    except Exception as error:  # the hub's client and its libraries raise many types
        raise UserError(
            f"model.safetensors of {repository} cannot be fetched from the hub ({first_line(error)}): check the name, "
            f"or fetch it elsewhere and name the file"
        ) from None
    print(f"weights: {HUB}{repository}@{file.parent.name}", file=sys.stderr)
    return file


def written_by_torch(file: Path) -> bool:
    """Whether a file begins as torch.save's files do, with a zip archive or a pickle, and not as safetensors.

    Raises UserError for a folder.
    """
    _refuse_folder(file)
    if not file.is_file():
        return False
    with open(file, "rb") as opened:
        head = opened.read(9)
    return head.startswith((b"PK", b"\x80")) and head[8:] != b"{"  # in safetensors, "{" follows 8 bytes of length


def _refuse_folder(file: Path) -> None:
    if file.is_dir():
        found = sorted([*file.glob("*.safetensors"), *file.glob("*/*.safetensors")])
        inside = f"name a weights file in it, such as {found[0]}" if found else "name a weights file (*.safetensors)"
        raise UserError(f"{file} is a folder: {inside}")


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file of safetensors or of torch.save; nothing in it is executed.

    A state dict under "model_state_dict" is unwrapped, and torch.compile's prefix is removed from names.

    Raises:
        UserError: with what the file holds instead.
    """
    _refuse_folder(file)
    try:
        is_safetensors = file.suffix == ".safetensors"
        state = load_file(file) if is_safetensors else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on other files the readers raise nearly anything
        reason = first_line(error)
        raise UserError(f"{file} is not a weights file that can be loaded safely ({reason}): fetch it again") from None
    if isinstance(state, dict):
        state = state.get("model_state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(key, str) and _is_dense(state[key]) for key in state):
        names = f" of {', '.join(map(str, list(state)[:3]))}" if isinstance(state, dict) else ""
        raise UserError(
            f"{file} holds something else than a state dict (name -> tensor), a {type(state).__name__}{names}: save "
            f"model.state_dict()"
        )
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


def _is_dense(value: object) -> bool:
    """Whether it is a tensor with all its values in main memory."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def state_dict_mismatch(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Why the tensors `state` cannot be loaded where `wanted` are expected, in words; None if they can."""
    lacking = {name for name in wanted.keys() - state.keys() if not name.endswith("num_batches_tracked")}  # old files
    for names, what in ((lacking, "lacks"), (state.keys() - wanted.keys(), "has, besides the model's,")):
        if names:
            first = ", ".join(sorted(names)[:3])
            return f"it {what} {len(names)} tensors ({first}{', ...' if len(names) > 3 else ''})"
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            return f"{name} is {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}"
        if tensor.dtype != wanted[name].dtype:
            return f"{name} is {tensor.dtype}, expected {wanted[name].dtype}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} has values that are infinite or not a number"
        if name.endswith("running_var") and (tensor < 0).any():  # batch normalisation takes the square root
            return f"{name} has variances below zero"
    return None
