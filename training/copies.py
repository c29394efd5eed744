"""Copying batches to the device. docs/method.md, Training."""

from collections.abc import Sequence

import torch


class Copies:
    """Copies batches to a device; a GPU receives the next one while it still computes on the one before.

    That needs pinned memory and a host that runs ahead, as training does. At most three batches are on the GPU at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        self.held: list[list[torch.Tensor]] = []  # keeps the memory of a batch from being reused while it is read
        self.steps: list[torch.cuda.Event] = []  # what the device had been given to do at the last two calls

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors on the device; what it is given to do next waits for them."""
        if self.stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        computing = torch.cuda.current_stream(self.device)
        self.steps = [*self.steps[-1:], computing.record_event()]
        self.stream.wait_event(self.steps[0])  # the batch before last, whose memory this one gets, is no longer used
        self.held = self.held[-1:]
        with torch.cuda.stream(self.stream):
            copied = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        computing.wait_stream(self.stream)
        self.held.append(copied)
        return copied
