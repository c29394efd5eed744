"""Save and load model weights; nothing is ever unpickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from utils import UserError, replacing


def save_model(path: Path, model: nn.Module, about: Mapping[str, Any]) -> None:
    """Write the model's weights as safetensors, with `about` (JSON-ready: all that rebuilds the model) as metadata."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        with replacing(path) as temporary:
            save_file(state, temporary, metadata={"about": json.dumps(about)})
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def load_model(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load weights that `save_model` wrote into `model`; returns what was told about it.

    Raises:
        UserError: not such a file, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a weights file of this project: {error}") from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"{path} does not fit this model: {detail[:300]}") from None
    return about
