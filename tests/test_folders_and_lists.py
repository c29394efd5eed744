"""Folders and lists as people have them: names that are in use or spelt differently, and images of one class only."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest

import config
from data.layouts import read_data_set
from data.lists import read_csv
from data.pictures import find_images
from model_training.inference.detector import load_detector
from models.build import build_model
from tests.conftest import succeed, write_toy_images
from training.calibration import Calibration
from training.checkpoints import save_model
from utils import find_experiment


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a standard model that was not trained, with thresholds between which its probabilities lie."""
    path, settings = tmp_path_factory.mktemp("weights") / "w.safetensors", replace(config.DEMO.settings, patch_size=32)
    experiment = find_experiment(config.DEMO, "standard_resnet")
    calibration = asdict(Calibration(1.0, 0.5, 0.502, 0.51, 0.49, 0.51, 0.05, 9, 9))
    about = {"experiment": asdict(experiment), "settings": {"patch_size": 32}, "seed": 1, "calibration": calibration}
    save_model(path, build_model(experiment, settings).state_dict(), about)
    return path


@pytest.fixture
def evaluate(weights: Path, tmp_path: Path) -> Callable[..., list[str | Path]]:
    """The command line that evaluates a data root."""

    def command(root: Path, *flags: str) -> list[str | Path]:
        roots = ("--data-root", root, "--results-root", tmp_path / "results", "--preset", "demo")
        here = ("--device", "cpu", "--num-workers", "0")
        return ["model_training.evaluate", "--weights", weights, *roots, *here, *flags]

    return command


def counts_in(folder: Path) -> dict[str, tuple[int, int]]:
    rows = read_csv(folder / "evaluation.csv")
    return {row["images"]: (int(row["fake"]), int(row["real"])) for row in rows}


def test_a_generator_called_all_and_another_root_of_the_same_name_replace_nothing(
    evaluate: Callable[..., list[str | Path]], tmp_path: Path
) -> None:
    write_toy_images(tmp_path / "A" / "test", 3)
    write_toy_images(tmp_path / "B" / "test", 2)
    for number, generator in enumerate(("all", "sdxl", "all, same source")):
        file = next((tmp_path / "A" / "test" / "fake").glob(f"000{number}.*"))
        (file.parent / generator).mkdir()
        file.rename(file.parent / generator / file.name)
    for root in "AB":
        said = succeed(*evaluate(tmp_path / root / "test"))
        assert f"images of {tmp_path / root / 'test'}, " in said
    a, b = sorted((tmp_path / "results" / "demo" / "evaluation").iterdir(), key=lambda path: -len(counts_in(path)))
    assert a.name.startswith("test-") and b.name.startswith("test-")
    assert counts_in(a) == {"all": (3, 3), "all (group)": (1, 3), "all, same source": (1, 3), "sdxl": (1, 3)}
    assert counts_in(b) == {"all": (2, 2)}
    assert f"of {tmp_path / 'B' / 'test'}, 2 of them fake" in (b / "evaluation.md").read_text()


def test_names_are_compared_after_unicode_normalisation(
    evaluate: Callable[..., list[str | Path]], tmp_path: Path
) -> None:
    root, named = tmp_path / "root", "Caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    write_toy_images(root, 3)
    for file in [*root.glob("*/*")]:  # as on a disk that macOS wrote
        file.rename(file.with_name(normalize("NFD", f"{named} {file.name}")))
    images = [normalize("NFC", image.path) for image in read_data_set(root).images][:5]
    lines = [f"{'./' * (number % 2)}{path},{normalize('NFC', named)}\n" for number, path in enumerate(images)]
    (root / "list.csv").write_text("path,source\n" + "".join(lines), encoding="utf-8")
    succeed(*evaluate(root, "--data-list", root / "list.csv", "--group-by", f"{root / 'list.csv'}:source"))
    (folder,) = (tmp_path / "results" / "demo" / "evaluation").iterdir()
    assert counts_in(folder) == {"all": (3, 2), named: (3, 2), f"{named}, same source": (3, 2)}
    assert all(Path(path).exists() for path in find_images([f"{root / 'list.csv'}:path"])[0])


@pytest.mark.parametrize("only", ["fake", "real"])
def test_one_class_alone_gives_the_share_called_fake_at_each_threshold(
    only: str, evaluate: Callable[..., list[str | Path]], weights: Path, toy_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy_data / only, tmp_path / "root" / only)
    said = succeed(*evaluate(tmp_path / "root", "--name", "one"))
    row = read_csv(tmp_path / "results" / "demo" / "evaluation" / "one" / "evaluation.csv")[0]
    assert (row["fake"], row["real"]) == (("20", "0") if only == "fake" else ("0", "20"))
    detector = load_detector(weights, "cpu")
    found = detector.predict_all(find_images([str(tmp_path / "root")])[0], workers=0)
    fake = np.array([prediction.probability_fake for prediction in found])
    for name in ("balanced", "fpr_1", "fpr_5", "real_below", "fake_from"):
        assert float(row[f"{name}_mean"]) == np.mean(fake >= getattr(detector.calibration, name))
    assert "balanced accuracy, AUC, average precision, F1, TPR at 1% FPR" in said
