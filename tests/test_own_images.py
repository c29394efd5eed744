"""Images of your own: detector, predict, evaluate and robustness, by their commands at toy size."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from data.images import pixel_key, read_image
from data.lists import name_of_root, read_csv, write_csv
from data.perturbations import perturbation
from data.pictures import Picture, find_images, read_pictures
from model_training.inference.detector import Detector, PredictionOptions, load_detector
from model_training.inference.scores import ScoringOptions, score_data
from model_training.predict import predict
from tests.conftest import (
    ENVIRONMENT,
    REPOSITORY,
    TOY_FLAGS,
    copy_index,
    run_module,
    start_module,
    succeed,
    untrained_weights,
)
from training.checkpoints import save_model
from training.detection_metrics import bootstrap_intervals, paired_differences
from utils import UserError, load_preset, read_json

SAME = 1e-5  # logits; what the order of sums may change


@pytest.fixture(scope="module")
def results(toy_data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results root with a GLASS model of two seeds and a standard model of one, a batch of training each."""
    root = copy_index(indexed, tmp_path_factory.mktemp("own") / "results")
    flags = (*TOY_FLAGS, "--data-root", toy_data, "--results-root", root, "--epochs", "1")
    flags += ("--final-valid-fraction", "0.4")  # enough of both classes to calibrate by
    succeed("model_training.glass_resnet_training", *flags, "--seeds", "1", "2")
    succeed("model_training.standard_resnet_training", *flags, "--seeds", "1")
    return root


def weights(results: Path, name: str = "glass_resnet", seed: int = 1) -> Path:
    return results / "demo" / name / f"seed_{seed}" / "model.safetensors"


def predictions_of(results: Path, name: str) -> list[dict[str, str]]:
    return read_csv(weights(results, name).with_name("predictions.csv"))


def predict_flags(path: Path, folder: Path) -> tuple[str | Path, ...]:
    """Of the command that predicts with the weights in `path`, and writes p.csv."""
    return "--weights", path, "--device", "cpu", "--output", folder / "p.csv"


def detector_of(results: Path, name: str = "glass_resnet", seed: int = 1, **options: object) -> Detector:
    return load_detector(weights(results, name, seed), "cpu", options=PredictionOptions(**options))


@pytest.mark.parametrize("name", ["glass_resnet", "standard_resnet"])
def test_a_weights_file_alone_reproduces_the_predictions_of_the_test(results: Path, toy_data: Path, name: str) -> None:
    detector = detector_of(results, name, precision="trained")
    for row in predictions_of(results, name):
        image = read_image(toy_data / row["path"], 10**9)
        (scores,) = detector.score([Picture(image, pixel_key(image))])
        expected = np.log(float(row["probability_fake"])) - np.log(float(row["probability_real"]))
        assert scores.values == pytest.approx([expected], abs=SAME)


def test_scores_do_not_depend_on_batches_chunks_and_threads(results: Path, toy_data: Path) -> None:
    files = find_images([str(toy_data)])[0][10:29]
    found = []
    for batch_size, chunk_size, workers in ((1, 64, 0), (8, 64, 0), (8, 1, 2), (3, 10**6, 2)):
        detector = detector_of(results, draws=2, batch_size=batch_size, chunk_size=chunk_size)
        predictions = detector.predict_all(files, workers)
        found.append(np.stack([prediction.scores.values for prediction in predictions]))
    assert found[0].shape == (19, 2) and found[0].std() > 100 * SAME
    for other in found[1:]:
        assert np.abs(other - found[0]).max() < SAME


def test_draws_differ_and_are_averaged(results: Path, toy_data: Path) -> None:
    one, six = (detector_of(results, draws=draws) for draws in (1, 6))
    found = six.predict(toy_data / "fake" / "0000.png")
    fake = six.calibration.probabilities(found.scores.values)
    assert len(set(fake)) > 1 and found.scores.boxes.shape == (6, 4, 4)
    assert found.probability_fake == fake.mean() and found.standard_deviation == fake.std(ddof=1)
    assert found.flips == np.mean([six.calibration.verdict(p) != six.calibration.verdict(fake.mean()) for p in fake])
    assert (one.predict(toy_data / "fake" / "0000.png").scores.boxes == found.scores.boxes[:1]).all()


def test_effects_are_what_the_score_loses_without_the_crop(results: Path, toy_data: Path) -> None:
    detector = detector_of(results, draws=2)
    picture = Picture(read_image(toy_data / "fake" / "0000.png", 10**9), "")
    (scores,) = detector.score([picture])
    assert scores.attention.sum(axis=1) == pytest.approx([1, 1]) and np.abs(scores.effects).max() > 100 * SAME
    for draw in range(2):
        for crop in range(4):
            rest = np.delete(scores.boxes[draw], crop, axis=0)
            (without,) = detector.score([picture], boxes=rest[None])
            assert scores.effects[draw, crop] == pytest.approx(scores.values[draw] - without.values[0], abs=SAME)
    (alone,) = detector.score([picture], boxes=scores.boxes[:1, :1])
    assert alone.attention.tolist() == [[1.0]] and np.isnan(alone.effects).all()


def test_the_calibration_is_that_of_the_weights_the_metrics_and_the_table_of_all_seeds(results: Path) -> None:
    metrics, detector = read_json(weights(results).with_name("metrics.json")), detector_of(results)
    assert detector.about["calibration"] == metrics["calibration"]
    rows = predictions_of(results, "glass_resnet")
    scores = np.array([np.log(float(row["probability_fake"]) / float(row["probability_real"])) for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    fake = detector.calibration.probabilities(scores)
    expected = {"auc": roc_auc_score(labels == 0, scores), "nll": -np.log(np.where(labels == 0, fake, 1 - fake)).mean()}
    assert {name: metrics["test_calibrated"][name] for name in expected} == pytest.approx(expected)
    assert weights(results).with_name("reliability.png").exists()
    succeed("model_training.results_tables", "--preset", "demo", "--results-root", results, "--seeds", "1", "2")
    table = {row["model"]: row for row in read_csv(results / "demo" / "tables_seeds_1_2" / "calibrated_metrics.csv")}
    of_seeds = [read_json(weights(results, seed=seed).with_name("metrics.json"))["test_calibrated"] for seed in (1, 2)]
    row = table["glass_resnet"]
    assert (row["n"], table["standard_resnet"]["n"]) == ("2", "1")
    assert float(row["nll_mean"]) == pytest.approx(np.mean([of_seed["nll"] for of_seed in of_seeds]))
    assert float(row["auc_std"]) == pytest.approx(100 * np.std([of_seed["auc"] for of_seed in of_seeds], ddof=1))


def test_weights_that_do_not_describe_their_model_are_refused(results: Path, tmp_path: Path) -> None:
    detector, path = detector_of(results), tmp_path / "w.safetensors"
    about, message = detector.about, "does not describe a model of this version"
    for broken, expected in (
        ({}, message),
        (about | {"experiment": about["experiment"] | {"x": 1}}, message),
        (about | {"settings": about["settings"] | {"patch_size": "32"}}, message),
        (about | {"calibration": about["calibration"] | {"temperature": float("nan")}}, message),
        (about | {"experiment": about["experiment"] | {"backbone": "timm:resnet18"}}, "does not fit this model: "),
    ):
        save_model(path, detector.model.state_dict(), broken)
        with pytest.raises(UserError, match=rf"w\.safetensors {expected}"):
            load_detector(path, device="cpu")
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"w\.safetensors is not a weights file of this project"):
        load_detector(path, device="cpu")


def test_outputs_that_are_not_finite_are_refused(results: Path, toy_data: Path, tmp_path: Path) -> None:
    detector = detector_of(results, "standard_resnet")
    for name, tensor in detector.model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.fill_(-3e38)
    save_model(tmp_path / "w.safetensors", detector.model.state_dict(), detector.about)
    done = run_module("model_training.predict", *predict_flags(tmp_path / "w.safetensors", tmp_path), toy_data)
    assert done.returncode == 2 and not (tmp_path / "p.csv").exists()
    assert "error: standard_resnet gives outputs that are infinite or not a number" in done.stderr


def test_predict_accepts_files_folders_patterns_and_lists(results: Path, toy_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    (folder / "below").mkdir(parents=True)
    for number, target in enumerate(("below/é 1.png", "b.png", "c.txt", "d.png")):
        shutil.copy(toy_data / "fake" / f"{2 * number:04d}.png", folder / target)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (tmp_path / "list.csv").write_text("image\nmy photos/d.png\n")
    flags = predict_flags(weights(results), tmp_path)
    paths = (folder, f"{folder}/*.txt", f"{tmp_path}/list.csv:image", weights(results))
    done = run_module("model_training.predict", *flags, *paths)
    assert done.returncode == 1, done.stderr
    assert "2 of 6 files are left out" in done.stderr and "broken.jpg: " in done.stderr
    assert f"{weights(results)}: the weights of a model, which go after --weights" in done.stderr
    assert re.search(r"calibrated on \d+ fake and \d+ real validation images, which are few", done.stderr)
    assert "Ignored, in folders: 1 files of other kinds (.txt)" in done.stdout
    rows = {Path(row["path"]).name: row for row in read_csv(tmp_path / "p.csv")}
    assert list(rows) == ["b.png", "broken.jpg", "d.png", "é 1.png", "c.txt", "model.safetensors"]
    detector = detector_of(results)
    assert rows.pop("model.safetensors")["problem"]
    assert rows["broken.jpg"]["problem"] and not rows.pop("broken.jpg")["verdict"]
    for row in rows.values():
        expected = detector.predict(row["path"])
        assert float(row["probability_fake"]) == pytest.approx(expected.probability_fake, abs=SAME)
        assert (row["verdict"], row["standard_deviation"]) == (expected.verdict, "")
        assert f"{expected.probability_fake:.3f}" in done.stdout


def test_predict_repeats_draws_and_takes_a_band(results: Path, toy_data: Path, tmp_path: Path) -> None:
    flags = ("--draws", "3", "--band", "0", "1")
    done = succeed("model_training.predict", *predict_flags(weights(results), tmp_path), toy_data / "fake", *flags)
    rows = read_csv(tmp_path / "p.csv")
    assert len(rows) == 20 and {row["verdict"] for row in rows} == {"inconclusive"} and "20 inconclusive" in done
    assert all(float(row["standard_deviation"]) > 0 and float(row["flips"]) == 0 for row in rows)


def test_a_verdict_needs_the_mean_and_most_of_the_draws(results: Path, toy_data: Path, tmp_path: Path) -> None:
    """With a threshold between mean and median, two of three draws have another verdict than the mean."""
    image = toy_data / "fake" / "0000.png"
    detector = detector_of(results, draws=3)
    fake = detector.calibration.probabilities(detector.predict(image).scores.values)
    band = ("--band", *2 * (str((fake.mean() + np.median(fake)) / 2),))
    for number, side in enumerate((20, 32)):  # no larger than a crop
        Image.open(image).crop((0, 0, side, side)).save(tmp_path / f"{number}.png")
    files, flags = (image, tmp_path / "0.png", tmp_path / "1.png"), predict_flags(weights(results), tmp_path)
    printed = succeed("model_training.predict", *flags, *files, "--draws", "3", *band)
    rows = read_csv(tmp_path / "p.csv")
    assert rows[0]["verdict"] == "inconclusive" and float(rows[0]["flips"]) == 2 / 3 and "67%" in printed
    assert [(row["standard_deviation"], row["flips"]) for row in rows[1:]] == [("", "")] * 2
    assert "0.000" not in printed and "1 with a side smaller than a crop" in printed


def test_validation_images_of_one_class_calibrate_nothing(indexed: Path, toy_data: Path, tmp_path: Path) -> None:
    root = copy_index(indexed, tmp_path / "results")
    flags = (*TOY_FLAGS, "--data-root", toy_data, "--results-root", root, "--epochs", "1", "--seeds", "1")
    flags += ("--final-valid-fraction", "0.03", "--batch-size", "11")
    printed = succeed("model_training.standard_resnet_training", *flags)
    assert "1 to validate" in printed and "not calibrated: all validation images are of one class" in printed
    metrics = read_json(weights(root, "standard_resnet").with_name("metrics.json"))
    assert metrics["calibration"] is None and metrics["test_calibrated"] is None
    done = run_module("model_training.predict", *predict_flags(weights(root, "standard_resnet"), tmp_path), toy_data)
    assert done.returncode == 0 and "probabilities are raw, and the threshold is 0.5\n" in done.stderr
    for row in read_csv(tmp_path / "p.csv"):
        assert row["probability_fake"] == row["raw_probability_fake"]
        assert row["verdict"] == ("fake" if float(row["probability_fake"]) >= 0.5 else "real")


def test_an_interrupted_predict_keeps_its_rows_and_goes_on_from_them(
    tmp_path: Path, toy_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, links = tmp_path / "images", []
    images.mkdir()
    for number in range(1500):
        links.append(images / f"{number:04d}.png")
        links[-1].symlink_to(toy_data / "fake" / f"{2 * number % 20:04d}.png")
    flags = predict_flags(untrained_weights(tmp_path / "w.safetensors", "glass_resnet"), tmp_path)
    output, command = tmp_path / "p.csv", ("model_training.predict", *flags, images)
    process = start_module(*command)
    while not output.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors, first = process.communicate(timeout=60)[1], read_csv(output)
    assert process.returncode == 130 and 0 < len(first) < 1500
    assert errors.endswith(
        f"{len(first):,} of 1,500 predictions are in {output}\n"
        "interrupted: run the same command again; what is finished is kept\n"
    )
    for link in links[len(first) + 5 :]:
        link.unlink()
    links[0].unlink()
    shutil.copy(toy_data / "fake" / "0000.png", links[0])  # another time
    assert f"{len(first) - 1:,} of the predictions are in {output} and are kept" in succeed(*command)
    again = read_csv(output)
    assert [row["path"] for row in again] == [str(link) for link in links[: len(first) + 5]]
    assert again[1 : len(first)] == first[1:] and again[0]["key"] != first[0]["key"]
    preset, other = load_preset("demo"), untrained_weights(tmp_path / "o.safetensors", "standard_resnet")
    preset = replace(preset, settings=replace(preset.settings, device="cpu"))
    for path, options in ((flags[1], {}), (flags[1], {"draws": 2}), (other, {})):  # the same, another option and model
        predict(preset, path, [str(links[1])], output=output, **options)
        assert ("are kept" in capsys.readouterr().out) == (path == flags[1] and not options)


def test_pillow_is_left_as_it_was(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Image.MAX_IMAGE_PIXELS, "an import changed it"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the toy images are larger than twice that
    files, filters = 3 * find_images([str(toy_data)])[0], list(warnings.filters)
    found = list(read_pictures(files, 10**9, 8, ["native", "crop_0.75"]))
    assert len(found) == 240 and all(isinstance(one, Picture) for one in found)
    assert Image.MAX_IMAGE_PIXELS == 100 and warnings.filters == filters


def test_each_image_has_noise_of_its_own_and_the_same_each_time() -> None:
    def noise_of(grey: int) -> np.ndarray:
        return np.asarray(perturbation("noise_10")(Image.new("RGB", (64, 64), (grey,) * 3)), float) - grey

    assert (noise_of(128) == noise_of(128)).all() and noise_of(128).std() == pytest.approx(10, abs=0.3)
    assert abs(np.corrcoef(noise_of(128).ravel(), noise_of(129).ravel())[0, 1]) < 0.05


def test_predict_refuses_invalid_arguments_in_one_sentence(results: Path, tmp_path: Path) -> None:
    preset, path = load_preset("demo"), weights(results)
    for paths, options, sentence in (
        (["nothing.jpg"], {}, "nothing.jpg does not exist"),
        (["*.nothing"], {}, "*.nothing holds no image file"),
        (["README.md"], {"draws": 0}, "draws is 0: input should be greater than or equal to 1"),
        (["README.md"], {"band": (0.9, 0.1)}, "--band 0.9 0.1: expected two probabilities, the smaller first"),
        (["README.md"], {"output": Path("README.md")}, "README.md exists, and is not a table that this"),
        (["a.csv"], {}, "a.csv is a list: name its column of paths too, as a.csv:COLUMN"),
        (["README.md"], {"weights": path.parent}, f"is a folder: name a weights file in it, such as {path}"),
        (["README.md"], {"weights": Path("tests")}, "tests is a folder: name a weights file"),
        (["README.md"], {"weights": Path("docs/evidence.jpg")}, "docs/evidence.jpg is an image: name a weights file"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            predict(preset, paths=paths, **({"output": tmp_path / "p.csv", "weights": path} | options))


def run_on(command: str, results: Path, data: Path, *flags: str | Path) -> str:
    roots = ("--preset", "demo", "--data-root", data, "--results-root", results, "--device", "cpu")
    return succeed(f"model_training.{command}", *roots, *flags)


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


def test_evaluate_has_a_row_for_all_and_for_each_generator(results: Path, by_generator: Path) -> None:
    both = (weights(results), weights(results, seed=2))
    printed = run_on(
        "evaluate", results, by_generator, "--weights", *both, "--name", "g", "--format-matched", "60", "--all-images"
    )
    assert "left out, cannot be decoded: real/broken.png" in printed
    folder = results / "demo" / "evaluation" / "g"
    rows = {row["images"]: row for row in read_csv(folder / "evaluation_raw.csv")}
    counts = {name: (int(row["fake"]), int(row["real"])) for name, row in rows.items()}
    assert counts == {"all": (20, 20), "diffusion": (7, 20), "gan": (13, 20), "gan, same source": (13, 6)}
    paths = [Path(path) for path in find_images([str(by_generator)])[0]]
    chosen = [path for path in paths if path.parent.name == "gan"]
    positive, aucs, precisions = ["fake" in path.parts for path in chosen], [], []
    for seed in (1, 2):
        detector = detector_of(results, seed=seed)
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
    name: str, results: Path, toy_data: Path, tmp_path: Path
) -> None:
    expected = {row["path"]: float(row["probability_fake"]) for row in predictions_of(results, name)}
    test_list = shutil.copy(weights(results, name).with_name("predictions.csv"), tmp_path / "test.csv")
    written = set((results / "demo" / "scores").glob("*.csv"))
    run_on("evaluate", results, toy_data, "--weights", weights(results, name), "--data-list", test_list)
    (scores,) = set((results / "demo" / "scores").glob("*.csv")) - written
    evaluated = {row["path"]: float(row["raw_probability_fake"]) for row in read_csv(scores)}
    assert len(expected) == 6 and evaluated == pytest.approx(expected, rel=0, abs=1e-5)


def test_an_evaluation_that_was_killed_resumes(results: Path, by_generator: Path) -> None:
    flags = ("--weights", weights(results), "--name", "again", "--all-images")
    run_on("evaluate", results, by_generator, *flags)
    file = max((results / "demo" / "scores").glob("*.csv"), key=lambda path: path.stat().st_mtime_ns)
    lines = file.read_text().splitlines(keepends=True)
    native = {row["path"]: row for row in read_csv(file) if row["perturbation"] == "native"}
    file.write_text("".join(lines[:20]) + lines[20][:25])  # cut within a row
    assert f"19 scores are in {file}" in run_on("evaluate", results, by_generator, *flags)
    again = {row["path"]: row for row in read_csv(file) if row["perturbation"] == "native"}
    assert len(native) == 41 and again.keys() == native.keys()
    kept = [line.split(",")[0] for line in lines[1:20] if ",native," in line]
    assert kept and all(again[path] == native[path] for path in kept)
    for path, row in native.items():  # the others were in other batches
        scores = [float(of["probability_fake"]) for of in (row, again[path])]
        assert scores[0] == pytest.approx(scores[1], abs=SAME, nan_ok=True)


def test_scores_of_another_data_set_are_not_reused(results: Path, toy_data: Path, tmp_path: Path) -> None:
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
        run_on("evaluate", results, root, "--weights", weights(results), "--name", str(turned))
        table = results / "demo" / "evaluation" / str(turned) / "evaluation.csv"
        aucs.append(float(read_csv(table)[0]["auc_mean"]))
    assert aucs[0] == pytest.approx(1 - aucs[1], abs=1e-6) and aucs[0] != aucs[1]


def test_one_model_and_seed_named_twice_is_refused(results: Path, toy_data: Path, tmp_path: Path) -> None:
    shutil.copy(weights(results), tmp_path / "copy.safetensors")
    preset = load_preset("demo")
    preset = replace(preset, settings=replace(preset.settings, data_root=toy_data, results_root=results))
    with pytest.raises(UserError, match="are the same model and seed: name each once"):
        score_data(preset, ScoringOptions(weights=(weights(results), tmp_path / "copy.safetensors")), ["native"])


def test_images_that_a_model_was_trained_on_are_left_out_or_named(
    results: Path, toy_data: Path, tmp_path: Path
) -> None:
    for path in toy_data.glob("*/*.*"):  # known by their content, wherever they lie
        (tmp_path / "data" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data" / path.parent.name / f"copy of {path.name}")
    both = ("--weights", weights(results), weights(results, seed=2))
    left_out = "Left out, since a model was trained or validated on them (--all-images keeps them): 34."
    for root in (toy_data, tmp_path / "data"):
        printed = run_on("evaluate", results, root, *both)
        assert left_out in printed and "| glass_resnet | all | 3 | 3 |" in printed
    rows = [[row["path"]] for row in predictions_of(results, "glass_resnet")]
    trained = next(path for path in toy_data.glob("fake/*") if [f"fake/{path.name}"] not in rows)
    write_csv(tmp_path / "list.csv", ("path",), [*rows, [f"fake/{trained.name}"]])
    printed = run_on("evaluate", results, toy_data, *both, "--data-list", tmp_path / "list.csv")
    assert "was trained or validated on 1 of these images: nothing follows for others." in printed
    folders = (results / "demo" / "evaluation").glob(f"{toy_data.name}-*")
    assert {read_csv(folder / "evaluation.csv")[0]["fake"] for folder in folders} == {"3", "4"}


@pytest.mark.parametrize(
    ("kind", "group_of", "said"),
    [
        ("pairs", lambda path: path.stem, "20 pairs"),
        ("cameras", lambda path: str(int(path.stem) % 3), "3 groups ("),
        ("classes", lambda path: path.parent.name, "2 groups ("),  # one each, whose images are then resampled
    ],
)
def test_intervals_are_over_pairs_and_groups(
    kind: str, group_of: Callable[[Path], str], said: str, results: Path, toy_data: Path, tmp_path: Path
) -> None:
    paths = [Path(path) for path in find_images([str(toy_data)])[0]]
    rows = [(path.relative_to(toy_data), group_of(path)) for path in paths]
    write_csv(tmp_path / "groups.csv", ("path", "group"), rows)
    flags = () if kind == "pairs" else ("--group-by", f"{tmp_path}/groups.csv:group")
    flags += ("--weights", weights(results), "--all-images", "--name", kind)
    assert f"95% bootstrap interval over {said}" in run_on("evaluate", results, toy_data, *flags)
    row = read_csv(results / "demo" / "evaluation" / kind / "evaluation_raw.csv")[0]
    found = [float(row[f"balanced_accuracy_{end}"]) for end in ("low", "high")]
    fake = np.array([one.raw_probability_fake for one in detector_of(results).predict_all(paths)])
    labels = np.array([int(path.parent.name == "real") for path in paths])
    groups = range(40) if kind == "classes" else [group_of(path) for path in paths]
    assert found == pytest.approx(bootstrap_intervals([fake], labels, [0.5], groups)["balanced_accuracy"], abs=1e-6)


def test_evaluate_has_the_paired_differences_from_the_first_model(results: Path, by_generator: Path) -> None:
    files = weights(results, "standard_resnet"), weights(results), weights(results, seed=2)
    flags = ("--all-images", "--name", "d", "--group-by", "stem", "--weights", *files, "--format-matched", "60")
    printed, folder = run_on("evaluate", results, by_generator, *flags), results / "demo" / "evaluation" / "d"
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
    run_on("evaluate", results, by_generator, *flags[:6], *files[1:])  # of one model: nothing of before is left
    assert not list(folder.glob("differences.*")) and not list(folder.glob("formats.*"))


@pytest.mark.parametrize(("apart", "only_real"), [(True, False), (False, False), (True, True)])
def test_evaluate_has_a_control_that_tells_real_sources_apart(
    apart: bool, only_real: bool, results: Path, toy_data: Path, tmp_path: Path
) -> None:
    """Three sources by the score, or each third image; and one of too few images."""
    shutil.copytree(toy_data, root := tmp_path / "data", ignore=shutil.ignore_patterns("fake" if only_real else ""))
    paths = [path for path in map(Path, find_images([str(root)])[0]) if path.parent.name == "real"]
    files = weights(results), weights(results, seed=2)
    detectors = [load_detector(file, "cpu") for file in files]
    fakes = [np.array([one.probability_fake for one in detector.predict_all(paths)]) for detector in detectors]
    rank = fakes[0].argsort().argsort()
    names = np.where(rank < 16, np.array(["a", "b", "c"])[np.where(apart, (rank // 5).clip(max=2), rank % 3)], "few")
    rows = [(path.relative_to(root), name) for path, name in zip(paths, names, strict=True)]
    rows += [(path.relative_to(root), "gan") for path in root.glob("fake/*")]
    write_csv(tmp_path / "sources.csv", ("path", "source"), rows)
    flags = ("--group-by", f"{tmp_path}/sources.csv:source", "--all-images", "--name", tmp_path.name)
    printed = run_on("evaluate", results, root, "--weights", *files, *flags)

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
    table = {row["images"]: row for row in read_csv(results / "demo" / "evaluation" / tmp_path.name / "evaluation.csv")}
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


def test_evaluate_has_no_control_without_sources(results: Path, toy_data: Path) -> None:
    printed = run_on("evaluate", results, toy_data, "--weights", weights(results), "--all-images", "--name", "none")
    assert "AUC" in printed and "control" not in printed.lower()


def test_robustness_has_a_row_for_each_perturbation(results: Path, toy_data: Path) -> None:
    both = ("--weights", weights(results), weights(results, "standard_resnet"))
    test_split = ("--data-list", weights(results).with_name("predictions.csv"))
    grid = ("--perturbations", "jpeg_30", "rescale_0.25", "social")
    printed = run_on("robustness", results, toy_data, *both, *test_split, *grid)
    assert "6 images of" in printed and "interval over 5 pairs and single images]" in printed
    assert "trained" not in printed
    (folder,) = (results / "demo" / "robustness").iterdir()
    rows = {row["model"]: row for row in read_csv(folder / "robustness.csv")}
    assert list(rows) == ["native", "jpeg_30", "rescale_0.25", "social"]
    of_test = predictions_of(results, "standard_resnet")
    fake = [float(row["probability_fake"]) for row in of_test]
    expected = roc_auc_score([row["label"] == "0" for row in of_test], fake)
    assert float(rows["native"]["standard_resnet auc_mean"]) == pytest.approx(expected)
    assert (folder / "robustness.png").stat().st_size > 500


@pytest.mark.slow
def test_the_commands_for_own_images_do_what_their_document_says(results: Path, toy_data: Path, tmp_path: Path) -> None:
    """All before its section on training, as it stands there, in a folder that looks like the one after `make demo`.

    Blocks marked sh need a network or a browser, and have tests of their own."""
    section = (REPOSITORY / "docs" / "own_images.md").read_text().partition("\n## Train ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    commands, programs = ([text for kind, text in blocks if kind == wanted] for wanted in ("", "python"))
    assert len(commands) == 5 and len(programs) == 1
    shutil.copytree(toy_data, tmp_path / "datasets" / "demo")
    shutil.copy(toy_data / "fake" / "0001.jpg", tmp_path / "datasets" / "demo" / "fake" / "0004.jpg")
    for name in ("glass_resnet", "standard_resnet"):
        shutil.copytree(weights(results, name).parent, tmp_path / "results" / "demo" / name / "seed_100")
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
