"""State dicts: what keeps one from being loaded."""

from collections.abc import Mapping
from typing import Any


def state_dict_mismatch(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What keeps the tensors `state` from being loaded where `wanted` are expected, in words; None if nothing does."""
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
        if name.endswith("running_var") and (tensor < 0).any():  # of batch normalisation, which takes its root
            return f"{name} has variances below zero"
    return None
