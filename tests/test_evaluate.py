"""Evaluation and robustness on labelled data sets, by their commands at toy size."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from data.lists import name_of_root, read_csv, write_csv
from data.pictures import find_images
from model_training.inference.detector import load_detector
from model_training.inference.scores import ScoringOptions, score_data
from tests.conftest import (
    ENVIRONMENT,
    REPOSITORY,
)
from tests.trained import SAME, detector_of, predictions_of, run_on, weights
from training.detection_metrics import bootstrap_intervals, paired_differences
from utils import UserError, load_preset


@pytest.fixture(scope="module")
def by_generator(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set with two generators; one of them has real images of its source."""
    root = tmp_path_factory.mktemp("by generator")
    for number, file in enumerate(sorted((toy_data / "fake").iterdir())):
        target = root / "fake" / ("gan" if number % 3 else "diffusion") / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    shutil.copytree(toy_data / "real", root / "real" / "coco")
    (root / "real" / "gan").mkdir()
    for number in range(6):
        shutil.move(root / "real" / "coco" / f"{2 * number:04d}.png", root / "real" / "gan")
    (root / "real" / "broken.png").write_bytes(b"broken")
    return root


def test_evaluate_has_a_row_for_all_images_and_one_for_each_generator(trained: Path, by_generator: Path) -> None:
    both = (weights(trained), weights(trained, seed=2))
    printed = run_on(
        "evaluate", trained, by_generator, "--weights", *both, "--name", "g", "--format-matched", "60", "--all-images"
    )
    assert "left out, cannot be decoded: real/broken.png" in printed
    folder = trained / "demo" / "evaluation" / "g"
    rows = {row["images"]: row for row in read_csv(folder / "evaluation_raw.csv")}
    counts = {name: (int(row["fake"]), int(row["real"])) for name, row in rows.items()}
    assert counts == {"all": (20, 20), "diffusion": (7, 20), "gan": (13, 20), "gan, same source": (13, 6)}
    paths = [Path(path) for path in find_images([str(by_generator)])[0]]
    chosen = [path for path in paths if path.parent.name == "gan"]
    positive, aucs, precisions = ["fake" in path.parts for path in chosen], [], []
    for seed in (1, 2):
        detector = detector_of(trained, seed=seed)
        fake = [prediction.raw_probability_fake for prediction in detector.predict_all(chosen)]
        aucs.append(roc_auc_score(positive, fake))
        precisions.append(average_precision_score(positive, fake))
    row = rows["gan, same source"]
    assert float(row["auc_mean"]) == pytest.approx(np.mean(aucs))
    assert float(row["auc_std"]) == pytest.approx(np.std(aucs, ddof=1))
    assert float(row["average_precision_mean"]) == pytest.approx(np.mean(precisions))
    assert float(row["auc_low"]) <= float(row["auc_mean"]) <= float(row["auc_high"])
    formats = (folder / "formats.md").read_text()
    assert "AUC, native | AUC, jpeg 60 | balanced accuracy, native | balanced accuracy, jpeg 60" in formats
    for name in ("auc.png", "roc.png", "calibration.png", "scores.png", "evaluation.tex", "evaluation.md"):
        assert (folder / name).stat().st_size > 500


@pytest.mark.parametrize("name", ["glass_resnet", "standard_resnet"])
def test_evaluate_over_the_test_list_reproduces_the_predictions_of_the_training(
    name: str, trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    expected = {row["path"]: float(row["probability_fake"]) for row in predictions_of(trained, name)}
    test_list = shutil.copy(weights(trained, name).with_name("predictions.csv"), tmp_path / "test.csv")
    written = set((trained / "demo" / "scores").glob("*.csv"))
    run_on("evaluate", trained, toy_data, "--weights", weights(trained, name), "--data-list", test_list)
    (scores,) = set((trained / "demo" / "scores").glob("*.csv")) - written
    evaluated = {row["path"]: float(row["raw_probability_fake"]) for row in read_csv(scores)}
    assert len(expected) == 6 and evaluated == pytest.approx(expected, rel=0, abs=1e-5)


def test_an_evaluation_that_was_killed_resumes(trained: Path, by_generator: Path) -> None:
    flags = ("--weights", weights(trained), "--name", "again", "--all-images")
    run_on("evaluate", trained, by_generator, *flags)
    file = max((trained / "demo" / "scores").glob("*.csv"), key=lambda path: path.stat().st_mtime_ns)
    lines = file.read_text().splitlines(keepends=True)
    native = {row["path"]: row for row in read_csv(file) if row["perturbation"] == "native"}
    file.write_text("".join(lines[:20]) + lines[20][:25])  # cut within a row
    assert f"19 scores are in {file}" in run_on("evaluate", trained, by_generator, *flags)
    again = {row["path"]: row for row in read_csv(file) if row["perturbation"] == "native"}
    assert len(native) == 41 and again.keys() == native.keys()
    kept = [line.split(",")[0] for line in lines[1:20] if ",native," in line]
    assert kept and all(again[path] == native[path] for path in kept)
    for path, row in native.items():  # the others were in other batches
        scores = [float(of["probability_fake"]) for of in (row, again[path])]
        assert scores[0] == pytest.approx(scores[1], abs=SAME, nan_ok=True)


def test_scores_of_another_data_set_are_not_reused(trained: Path, toy_data: Path, tmp_path: Path) -> None:
    aucs = []
    for turned in (False, True):  # the same names, sizes and times of modification
        root = tmp_path / str(turned)
        for name, other in (("fake", "real"), ("real", "fake")):
            (root / name).mkdir(parents=True)
            for number in range(8):
                source = toy_data / (other if turned else name) / f"{2 * number:04d}.png"
                path = root / name / f"{number}.bmp"
                Image.open(source).resize((48, 48)).save(path)
                os.utime(path, (1.6e9, 1.6e9))
        run_on("evaluate", trained, root, "--weights", weights(trained), "--name", str(turned))
        table = trained / "demo" / "evaluation" / str(turned) / "evaluation.csv"
        aucs.append(float(read_csv(table)[0]["auc_mean"]))
    assert aucs[0] == pytest.approx(1 - aucs[1], abs=1e-6) and aucs[0] != aucs[1]


def test_one_model_and_seed_named_twice_is_refused(trained: Path, toy_data: Path, tmp_path: Path) -> None:
    shutil.copy(weights(trained), tmp_path / "copy.safetensors")
    preset = load_preset("demo")
    preset = replace(preset, settings=replace(preset.settings, data_root=toy_data, results_root=trained))
    with pytest.raises(UserError, match="are the same model and seed: name each once"):
        score_data(preset, ScoringOptions(weights=(weights(trained), tmp_path / "copy.safetensors")), ["native"])


def test_images_that_a_model_was_trained_on_are_left_out_or_named(
    trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    for path in toy_data.glob("*/*.*"):  # known by their content, wherever they lie
        (tmp_path / "data" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data" / path.parent.name / f"copy of {path.name}")
    both = ("--weights", weights(trained), weights(trained, seed=2))
    left_out = "Left out, since a model was trained or validated on them (--all-images keeps them): 34."
    for root in (toy_data, tmp_path / "data"):
        printed = run_on("evaluate", trained, root, *both)
        assert left_out in printed and "| glass_resnet | all | 3 | 3 |" in printed
        assert "control" not in printed.lower()  # there are no sources
    rows = [[row["path"]] for row in predictions_of(trained, "glass_resnet")]
    seen = next(path for path in toy_data.glob("fake/*") if [f"fake/{path.name}"] not in rows)
    write_csv(tmp_path / "list.csv", ("path",), [*rows, [f"fake/{seen.name}"]])
    printed = run_on("evaluate", trained, toy_data, *both, "--data-list", tmp_path / "list.csv")
    assert "was trained or validated on 1 of these images: nothing follows for others." in printed
    folders = (trained / "demo" / "evaluation").glob(f"{toy_data.name}-*")
    assert {read_csv(folder / "evaluation.csv")[0]["fake"] for folder in folders} == {"3", "4"}


@pytest.mark.parametrize(
    ("kind", "group_of", "message"),
    [
        ("pairs", lambda path: path.stem, "20 pairs"),
        ("cameras", lambda path: str(int(path.stem) % 3), "3 groups ("),
        ("classes", lambda path: path.parent.name, "2 groups ("),  # one each, whose images are then resampled
    ],
)
def test_intervals_are_over_pairs_and_groups(
    kind: str, group_of: Callable[[Path], str], message: str, trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    paths = [Path(path) for path in find_images([str(toy_data)])[0]]
    rows = [(path.relative_to(toy_data), group_of(path)) for path in paths]
    write_csv(tmp_path / "groups.csv", ("path", "group"), rows)
    flags = () if kind == "pairs" else ("--group-by", f"{tmp_path}/groups.csv:group")
    flags += ("--weights", weights(trained), "--all-images", "--name", kind)
    assert f"95% bootstrap interval over {message}" in run_on("evaluate", trained, toy_data, *flags)
    row = read_csv(trained / "demo" / "evaluation" / kind / "evaluation_raw.csv")[0]
    found = [float(row[f"balanced_accuracy_{end}"]) for end in ("low", "high")]
    fake = np.array([one.raw_probability_fake for one in detector_of(trained).predict_all(paths)])
    labels = np.array([int(path.parent.name == "real") for path in paths])
    groups = range(40) if kind == "classes" else [group_of(path) for path in paths]
    assert found == pytest.approx(bootstrap_intervals([fake], labels, [0.5], groups)["balanced_accuracy"], abs=1e-6)


def test_evaluate_has_the_paired_differences_from_the_first_model(trained: Path, by_generator: Path) -> None:
    files = weights(trained, "standard_resnet"), weights(trained), weights(trained, seed=2)
    flags = ("--all-images", "--name", "d", "--group-by", "stem", "--weights", *files, "--format-matched", "60")
    printed, folder = run_on("evaluate", trained, by_generator, *flags), trained / "demo" / "evaluation" / "d"
    rows = {(row["images"], row["format"]): row for row in read_csv(folder / "differences.csv")}
    assert len(rows) == 8 and {row["model"] for row in rows.values()} == {"glass_resnet"}
    paths = [path for path in map(Path, find_images([str(by_generator)])[0]) if path.stem != "broken"]
    labels = np.array([int("real" in path.parts) for path in paths])
    detectors = [load_detector(file, "cpu") for file in files]
    fakes = [np.array([one.probability_fake for one in detector.predict_all(paths)]) for detector in detectors]
    at = [detector.calibration.balanced for detector in detectors]
    groups = [path.stem for path in paths]
    found = paired_differences(fakes[:1], fakes[1:], labels, (at[:1], at[1:]), groups)
    for name in ("auc", "balanced_accuracy"):
        row = [float(rows["all", "native"][f"{name}{end}"]) for end in ("", "_low", "_high")]
        assert row == pytest.approx(found[name], abs=1e-6)
    low, middle, high = sorted(100 * value for value in found["auc"])
    assert f"| glass_resnet minus standard_resnet | all | native | {middle:+.1f} [{low:+.1f}, {high:+.1f}] |" in printed
    run_on("evaluate", trained, by_generator, *flags[:6], *files[1:])  # of one model: nothing of before is left
    assert not list(folder.glob("differences.*")) and not list(folder.glob("formats.*"))


@pytest.mark.parametrize(("apart", "only_real"), [(True, False), (False, False), (True, True)])
def test_evaluate_has_a_control_that_separates_real_sources(
    apart: bool, only_real: bool, trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    """Three sources by the score, or each third image; and one of too few images."""
    shutil.copytree(toy_data, root := tmp_path / "data", ignore=shutil.ignore_patterns("fake" if only_real else ""))
    paths = [path for path in map(Path, find_images([str(root)])[0]) if path.parent.name == "real"]
    files = weights(trained), weights(trained, seed=2)
    detectors = [load_detector(file, "cpu") for file in files]
    fakes = [np.array([one.probability_fake for one in detector.predict_all(paths)]) for detector in detectors]
    rank = fakes[0].argsort().argsort()
    names = np.where(rank < 16, np.array(["a", "b", "c"])[np.where(apart, (rank // 5).clip(max=2), rank % 3)], "few")
    rows = [(path.relative_to(root), name) for path, name in zip(paths, names, strict=True)]
    rows += [(path.relative_to(root), "gan") for path in root.glob("fake/*")]
    write_csv(tmp_path / "sources.csv", ("path", "source"), rows)
    flags = ("--group-by", f"{tmp_path}/sources.csv:source", "--all-images", "--name", tmp_path.name)
    printed = run_on("evaluate", trained, root, "--weights", *files, *flags)

    def plain(names: np.ndarray) -> np.ndarray:
        """For each model and pair of sources: how often an image of one has the higher score, or the lower."""
        aucs = []
        for fake, (one, other) in product(fakes, combinations("abc", 2)):
            margins = fake[names == one][:, None] - fake[names == other]
            aucs.append(np.mean((margins > 0) + (margins == 0) / 2))
        return np.maximum(aucs, 1 - np.array(aucs)).reshape(2, 3)

    of_models, shuffled, random, by_chance = plain(names), names.copy(), np.random.default_rng(0), []
    for _ in range(1000):
        shuffled[rank < 16] = random.permutation(names[rank < 16])
        by_chance.append(plain(shuffled).mean())
    table = {row["images"]: row for row in read_csv(trained / "demo" / "evaluation" / tmp_path.name / "evaluation.csv")}
    row = table["control: 3 real sources apart"]
    found = [float(row[f"auc_{part}"]) for part in ("mean", "std", "chance")]
    expected = [of_models.mean(), np.std(of_models.mean(axis=1), ddof=1), np.quantile(by_chance, 0.95)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert row["real"] == "16" and row.get("balanced_accuracy_mean", "") == ""
    assert (found[0] > found[2]) == apart
    auc, _, chance = (f"{100 * value:.1f}" for value in found)
    assert f"{auc}, {'more' if apart else 'no more'} than chance gives (at most {chance} in 95%" in printed
    assert ("The score depends on what sets real images of these sources apart" in printed) == apart
    most = of_models.mean(axis=0)
    pair = " and ".join(list(combinations("abc", 2))[most.argmax()])
    assert f"Most apart are {pair} ({100 * most.max():.1f})." in printed
    assert re.search(rf"\| control: 3 real .* \| {auc} ± [\d.]+ \(chance: up to {chance}\) \|", printed)


def test_robustness_has_a_row_for_each_perturbation(trained: Path, toy_data: Path) -> None:
    both = ("--weights", weights(trained), weights(trained, "standard_resnet"))
    test_split = ("--data-list", weights(trained).with_name("predictions.csv"))
    grid = ("--perturbations", "jpeg_30", "rescale_0.25", "social")
    printed = run_on("robustness", trained, toy_data, *both, *test_split, *grid)
    assert "6 images of" in printed and "interval over 5 pairs and single images]" in printed
    assert "trained" not in printed
    (folder,) = (trained / "demo" / "robustness").iterdir()
    rows = {row["model"]: row for row in read_csv(folder / "robustness.csv")}
    assert list(rows) == ["native", "jpeg_30", "rescale_0.25", "social"]
    of_test = predictions_of(trained, "standard_resnet")
    fake = [float(row["probability_fake"]) for row in of_test]
    expected = roc_auc_score([row["label"] == "0" for row in of_test], fake)
    assert float(rows["native"]["standard_resnet auc_mean"]) == pytest.approx(expected)
    assert (folder / "robustness.png").stat().st_size > 500


@pytest.mark.slow
def test_the_commands_for_own_images_do_what_their_document_says(trained: Path, toy_data: Path, tmp_path: Path) -> None:
    """All before its section on training, as it stands there, in a folder that looks like the one after `make demo`.

    Blocks marked sh need a network or a browser, and have tests of their own."""
    section = (REPOSITORY / "docs" / "own_images.md").read_text().partition("\n## Train ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    commands, programs = ([text for kind, text in blocks if kind == wanted] for wanted in ("", "python"))
    assert len(commands) == 5 and len(programs) == 1
    shutil.copytree(toy_data, tmp_path / "datasets" / "demo")
    shutil.copy(toy_data / "fake" / "0001.jpg", tmp_path / "datasets" / "demo" / "fake" / "0004.jpg")
    for name in ("glass_resnet", "standard_resnet"):
        shutil.copytree(weights(trained, name).parent, tmp_path / "results" / "demo" / name / "seed_100")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def printed(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed("bash", "-e", "-c", "\n".join(commands))
    assert len(read_csv(tmp_path / "predictions.csv")) == 2  # of the last predict: a pattern of two files
    demo = tmp_path / "results" / "demo"
    name = name_of_root(tmp_path / "datasets" / "demo")
    for written in ("evaluation/demo-*/evaluation.md", "evaluation/demo-*/formats.tex", "robustness/demo-*/*.png"):
        assert [path.stat().st_size > 100 for path in demo.glob(written)] == [True]
    assert (demo / "dataset" / "audit" / name / "audit.json").stat().st_size > 100
    assert "0004.png" in (tmp_path / "evidence" / "index.html").read_text()
    shutil.copy(toy_data / "fake" / "0000.png", tmp_path / "photo.jpg")
    assert 0 <= float(printed(sys.executable, "-c", programs[0])) <= 1
