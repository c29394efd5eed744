"""The progress of a training: its finished epochs, and the one in progress."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EpochRecord:
    """One line of a training history. Epochs count from 1.

    epoch_seconds covers training and validation; images_per_second and data_wait_share (the share of the time in which
    the loop waited for the next batch) cover training only. skipped_steps had gradients that were infinite or not a
    number, and did not change the weights; such losses are left out of train_loss.
    """

    epoch: int
    train_loss: float
    valid_loss: float
    valid_accuracy: float
    epoch_seconds: float
    peak_memory_mb: float
    images_per_second: float = float("nan")
    data_wait_share: float = float("nan")
    skipped_steps: int = 0


@dataclass
class Progress:
    """The finished epochs of a training, and the sums and counts of the one in progress."""

    history: list[EpochRecord] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    loss_sum: float = 0.0  # over the images with a finite loss
    loss_images: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0  # up to now, across epochs
    train_seconds: float = 0.0
    wait_seconds: float = 0.0  # part of train_seconds
    valid_seconds: float = 0.0
    peak_memory_mb: float = 0.0

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 0."""
        return len(self.history)

    def after_epoch(self, valid_loss: float, valid_accuracy: float) -> "Progress":
        """The progress at the beginning of the next epoch; the training loss is the mean over images."""
        record = EpochRecord(
            epoch=self.epoch + 1,
            train_loss=self.loss_sum / self.loss_images if self.loss_images else float("nan"),
            valid_loss=valid_loss,
            valid_accuracy=valid_accuracy,
            epoch_seconds=self.train_seconds + self.valid_seconds,
            peak_memory_mb=self.peak_memory_mb,
            images_per_second=self.images / self.train_seconds,
            data_wait_share=self.wait_seconds / self.train_seconds,
            skipped_steps=self.skipped_steps,
        )
        return Progress([*self.history, record], skipped_in_a_row=self.skipped_in_a_row)


def best_epoch(history: list[EpochRecord]) -> EpochRecord:
    """The first of the epochs with the highest validation accuracy. docs/method.md, Training."""
    return max(history, key=lambda record: record.valid_accuracy)


def duration(seconds: float) -> str:
    """Seconds in words, such as "12 min"."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours > 1.5 else f"{minutes:.0f} min" if minutes > 1.5 else f"{seconds:.0f} s"
