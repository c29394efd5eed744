"""Demo data: images are drawn as before, and a local trace is where its mask says, and nowhere else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
from config import Preset
from data.data_download import write_demo
from data.demo_dataset import draw_scene, render, render_local
from data.lists import read_csv
from tests.conftest import TOY_SETTINGS, succeed
from utils import UserError

LOCAL_FLAGS = ("--preset", "demo_local", *TOY_SETTINGS[2:])  # the toy preset's other values


def files_of(root: Path) -> dict[Path, bytes]:
    """Every file below root but the marker, and its content."""
    return {path: path.read_bytes() for path in root.glob("[!.]*/**/*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("fake", 1, [50, 69, 48, 48, 40, 35, 41, 62, 80, 55, 98, 103, 103, 93, 124]),
        ("fake", 2, [111, 88, 83, 99, 83, 105, 87, 91, 65, 87, 88, 82, 77, 62, 105]),
        ("real", 1, [129, 85, 107, 109, 69, 102, 55, 72, 102, 57, 64, 58, 49, 132, 62]),
        ("real", 2, [98, 99, 130, 69, 153, 150, 158, 77, 78, 160, 78, 74, 165, 147, 107]),
    ],
)
def test_an_image_is_drawn_as_before(name: str, index: int, expected: list[int]) -> None:
    scene, rng = draw_scene(606, name, index)
    drawn = np.asarray(render(scene, name, rng))[99::200, 77::200, 1].ravel()  # with its noise
    assert drawn.tolist() == pytest.approx(expected, abs=1)  # another processor may round otherwise


@pytest.mark.parametrize("index", range(1, 5))
def test_a_local_trace_is_inside_its_region_and_nowhere_else(index: int) -> None:
    image, region = render_local(*draw_scene(606, "fake", index))
    scene, rng = draw_scene(606, "fake", index)
    differs = (np.asarray(image) != np.asarray(render(scene, "real", rng))).any(2)
    assert 0.1 < region.mean() <= 0.25
    assert not differs[~region].any() and differs[region].mean() > 0.99  # noise is equal by chance here and there
    assert not (region[[0, -1]].any() or region[:, [0, -1]].any())  # the region touches no edge


@pytest.mark.parametrize("preset", [config.DEMO, config.DEMO_LOCAL], ids=lambda preset: preset.name)
def test_demo_data_are_written_and_the_next_command_printed(
    preset: Preset, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root, preset = tmp_path / "demo images", replace(preset, reproduce=replace(preset.reproduce, demo_images=1))
    write_demo(root, preset)
    written = files_of(root)
    folders = ["fake", "fake", "real"] if preset.reproduce.demo_data == "local" else ["fake", "real"]
    assert sorted(path.parent.name for path in written) == folders
    printed = capsys.readouterr().out
    assert f"python -m data.data_preprocess --preset {preset.name} --data-root '{root}'" in printed
    next(iter(written)).unlink()  # as an interruption leaves it
    write_demo(root, preset)
    assert files_of(root) == written
    other = {"whole": "local", "local": "whole"}[preset.reproduce.demo_data]
    for folder, change in ((root, {"demo_images": 2}), (root, {"demo_data": other}), (tmp_path, {})):
        with pytest.raises(UserError, match="choose another folder"):
            write_demo(folder, replace(preset, reproduce=replace(preset.reproduce, **change)))


@pytest.mark.slow
def test_local_traces_are_reproduced_and_their_masks_are_no_images(tmp_path: Path) -> None:
    root, results, predictions = (tmp_path / name for name in ("images/data", "results", "predictions.csv"))
    few = ("--demo-images", "10", "--epochs", "1", "--seeds", "3", "--experiments", "glass_resnet")
    command = ("model_training.reproduce", *LOCAL_FLAGS, *few, "--data-root", root, "--results-root", results)
    succeed(*command)
    written = files_of(root)
    for mask in (root / "masks" / "fake").iterdir():
        (fake,) = (root / "fake").glob(f"{mask.stem}.*")
        with Image.open(mask) as image, Image.open(fake) as picture:
            assert (image.mode, image.size, image.format) == ("L", picture.size, "PNG")
            counts = np.bincount(np.asarray(image).ravel(), minlength=256)
            assert counts[0] + counts[255] == counts.sum() and 0 < counts[255] <= counts.sum() / 4
    assert len(written) == 30 and len(read_csv(results / "demo_local" / "dataset" / "index.csv")) == 20
    weights = results / "demo_local" / "glass_resnet" / "seed_3" / "model.safetensors"
    for folder in (root, root.parent):
        succeed("model_training.predict", "--weights", weights, folder, "--output", predictions, "--device", "cpu")
        assert len(rows := read_csv(predictions)) == 20 and not any("masks" in row["path"] for row in rows)
        predictions.unlink()

    mask, fake = root / "masks" / "fake" / "0003.png", next((root / "fake").glob("0004.*"))
    mask.unlink()  # as kills leave them
    fake.unlink()
    succeed(*command)
    assert files_of(root) == written
