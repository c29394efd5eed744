"""Batches on their way to the device. docs/method.md, Training."""

from collections.abc import Sequence

import torch


class Copies:
    """Copies batches to a device; a GPU gets the next one while it computes on the one before.

    That needs pinned memory and a host that runs ahead, as training does. No more than three batches are there at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        self.held: list[list[torch.Tensor]] = []  # so that the memory of a batch is not given away while it is read
        self.steps: list[torch.cuda.Event] = []  # all that was asked of the device, at the last two calls

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors on the device; what is asked of it next waits for them."""
        if self.stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        computing = torch.cuda.current_stream(self.device)
        self.steps = [*self.steps[-1:], computing.record_event()]
        self.stream.wait_event(self.steps[0])  # the batch before last, whose memory this one gets, is done with
        self.held = self.held[-1:]
        with torch.cuda.stream(self.stream):
            copied = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        computing.wait_stream(self.stream)
        self.held.append(copied)
        return copied
