"""The files of --tensorboard, read back."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.lists import read_csv
from tests.conftest import TOY_FLAGS, start_module, succeed

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_scalars_are_those_of_the_history_and_pictures_can_be_opened(
    toy_data: Path, results: Path, tmp_path: Path
) -> None:
    roots, flags = ("--data-root", toy_data, "--results-root", results), ("--epochs", "3", "--seeds", "1")
    command = ("model_training.glass_resnet_training", *TOY_FLAGS, *roots, *flags, "--tensorboard")
    process = start_module(*command)
    for line in process.stdout:
        if "epoch 1/3" in line:
            process.terminate()
    assert process.wait(60) == 75
    succeed(*command)

    run = results / "demo" / "glass_resnet" / "seed_1"
    events = event_accumulator.EventAccumulator(str(run / "tensorboard" / "glass_resnet_seed_1"))
    events.Reload()
    history = read_csv(run / "history.csv")
    assert len(history) == 3
    for name in (name for name in history[0] if name != "epoch"):
        seen = {event.step: event.tensor_proto.double_val[0] for event in events.Tensors(name)}
        assert seen == {int(row["epoch"]): float(row[name]) for row in history if not math.isnan(float(row[name]))}
    rates = [event.tensor_proto.double_val[0] for event in events.Tensors("learning_rate/0")]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1e-3
    for name in ("reliability", "evidence"):
        (picture,) = events.Images(name)
        (tmp_path / f"{name}.png").write_bytes(picture.encoded_image_string)
        assert picture.step == 3 and np.ptp(np.asarray(Image.open(tmp_path / f"{name}.png"))) > 100
