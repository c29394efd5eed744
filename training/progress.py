"""How far a training is."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EpochRecord:
    """One line of a training history. Epochs count from 1; seconds are of training and validation together."""

    epoch: int
    train_loss: float
    valid_loss: float
    valid_accuracy: float
    epoch_seconds: float
    peak_memory_mb: float


@dataclass
class Progress:
    """The finished epochs of a training, and the steps of the one in progress."""

    history: list[EpochRecord] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of each step so far
    sizes: list[int] = field(default_factory=list)  # images of each step
    seconds: float = 0.0  # that the epoch has taken so far
    peak_memory_mb: float = 0.0  # of the epoch so far

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 0."""
        return len(self.history)

    def finish_epoch(self, valid_loss: float, valid_accuracy: float) -> None:
        """Put the epoch in progress behind it; its training loss is the mean over images."""
        loss = sum(loss * size for loss, size in zip(self.losses, self.sizes, strict=True)) / sum(self.sizes)
        record = EpochRecord(self.epoch + 1, loss, valid_loss, valid_accuracy, self.seconds, self.peak_memory_mb)
        self.history.append(record)
        self.losses, self.sizes, self.seconds, self.peak_memory_mb = [], [], 0.0, 0.0


def best_epoch(history: list[EpochRecord]) -> EpochRecord:
    """The first of the epochs with the highest validation accuracy. SPEC, Training."""
    return max(history, key=lambda record: record.valid_accuracy)
