"""Detector and model_training.predict, by the command at toy size."""

import re
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from data.images import read_image
from data.lists import read_csv
from data.perturbations import perturbation
from data.pictures import Picture, find_images, read_pictures
from model_training.inference.detector import load_detector
from model_training.predict import predict
from tests.conftest import (
    TOY_FLAGS,
    copy_index,
    run_module,
    start_module,
    succeed,
    untrained_weights,
    wait_until,
)
from tests.trained import SAME, detector_of, predict_flags, predictions_of, weights
from training.checkpoints import save_model
from utils import UserError, load_preset, read_json


def test_scores_do_not_depend_on_batches_chunks_and_threads(trained: Path, toy_data: Path) -> None:
    files = find_images([str(toy_data)])[0][10:29]
    found = []
    for batch_size, chunk_size, workers in ((1, 64, 0), (8, 64, 0), (8, 1, 2), (3, 10**6, 2)):
        detector = detector_of(trained, draws=2, batch_size=batch_size, chunk_size=chunk_size)
        predictions = detector.predict_all(files, workers)
        found.append(np.stack([prediction.scores.values for prediction in predictions]))
    assert found[0].shape == (19, 2) and found[0].std() > 100 * SAME
    for other in found[1:]:
        assert np.abs(other - found[0]).max() < SAME


def test_draws_differ_and_are_averaged(trained: Path, toy_data: Path) -> None:
    one, six = (detector_of(trained, draws=draws) for draws in (1, 6))
    found = six.predict(toy_data / "fake" / "0000.png")
    fake = six.calibration.probabilities(found.scores.values)
    assert len(set(fake)) > 1 and found.scores.boxes.shape == (6, 4, 4)
    assert found.probability_fake == fake.mean() and found.standard_deviation == fake.std(ddof=1)
    assert found.flips == np.mean([six.calibration.verdict(p) != six.calibration.verdict(fake.mean()) for p in fake])
    assert (one.predict(toy_data / "fake" / "0000.png").scores.boxes == found.scores.boxes[:1]).all()


def test_effects_are_what_the_score_loses_without_the_crop(trained: Path, toy_data: Path) -> None:
    detector = detector_of(trained, draws=2)
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


def test_weights_metrics_and_table_have_the_same_calibration(trained: Path) -> None:
    metrics, detector = read_json(weights(trained).with_name("metrics.json")), detector_of(trained)
    assert detector.about["calibration"] == metrics["calibration"]
    rows = predictions_of(trained, "glass_resnet")
    scores = np.array([np.log(float(row["probability_fake"]) / float(row["probability_real"])) for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    fake = detector.calibration.probabilities(scores)
    expected = {"auc": roc_auc_score(labels == 0, scores), "nll": -np.log(np.where(labels == 0, fake, 1 - fake)).mean()}
    assert {name: metrics["test_calibrated"][name] for name in expected} == pytest.approx(expected)
    assert weights(trained).with_name("reliability.png").exists()
    succeed("model_training.results_tables", "--preset", "demo", "--results-root", trained, "--seeds", "1", "2")
    table = {row["model"]: row for row in read_csv(trained / "demo" / "tables_seeds_1_2" / "calibrated_metrics.csv")}
    of_seeds = [read_json(weights(trained, seed=seed).with_name("metrics.json"))["test_calibrated"] for seed in (1, 2)]
    row = table["glass_resnet"]
    assert (row["n"], table["standard_resnet"]["n"]) == ("2", "1")
    assert float(row["nll_mean"]) == pytest.approx(np.mean([of_seed["nll"] for of_seed in of_seeds]))
    assert float(row["auc_std"]) == pytest.approx(100 * np.std([of_seed["auc"] for of_seed in of_seeds], ddof=1))


def test_weights_that_do_not_describe_their_model_are_refused(trained: Path, tmp_path: Path) -> None:
    detector, path = detector_of(trained), tmp_path / "w.safetensors"
    about, message = detector.about, "does not describe a model of this version"
    for broken, expected in (
        ({}, message),
        (about | {"experiment": about["experiment"] | {"x": 1}}, message),
        (about | {"settings": about["settings"] | {"patch_size": "32"}}, message),
        (about | {"calibration": about["calibration"] | {"temperature": float("nan")}}, message),
        (about | {"experiment": about["experiment"] | {"backbone": "timm:resnet18"}}, "does not fit this model: "),
        (about | {"provenance": "they look fine"}, rf"{message} \(provenance: "),
        (about | {"provenance": {"data": [], "test": {"images": "many", "accuracy": None, "auc": 1}}}, message),
    ):
        save_model(path, detector.model.state_dict(), broken)
        with pytest.raises(UserError, match=rf"w\.safetensors {expected}"):
            load_detector(path, device="cpu")
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"w\.safetensors is not a weights file of this project"):
        load_detector(path, device="cpu")


def test_outputs_that_are_not_finite_are_refused(trained: Path, toy_data: Path, tmp_path: Path) -> None:
    detector = detector_of(trained, "standard_resnet")
    for name, tensor in detector.model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.fill_(-3e38)
    save_model(tmp_path / "w.safetensors", detector.model.state_dict(), detector.about)
    done = run_module("model_training.predict", *predict_flags(tmp_path / "w.safetensors", tmp_path), toy_data)
    assert done.returncode == 2 and not (tmp_path / "p.csv").exists()
    assert "error: standard_resnet gives outputs that are infinite or not a number" in done.stderr


def test_predict_accepts_files_folders_patterns_and_lists(trained: Path, toy_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    (folder / "below").mkdir(parents=True)
    for number, target in enumerate(("below/é 1.png", "b.png", "c.txt", "d.png")):
        shutil.copy(toy_data / "fake" / f"{2 * number:04d}.png", folder / target)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (tmp_path / "list.csv").write_text("image\nmy photos/d.png\n")
    flags = predict_flags(weights(trained), tmp_path)
    paths = (folder, f"{folder}/*.txt", f"{tmp_path}/list.csv:image", weights(trained))
    done = run_module("model_training.predict", *flags, *paths)
    assert done.returncode == 1, done.stderr
    assert "2 of 6 files are left out" in done.stderr and "broken.jpg: " in done.stderr
    assert f"{weights(trained)}: the weights of a model, which go after --weights" in done.stderr
    assert re.search(r"calibrated on \d+ fake and \d+ real validation images, which are few", done.stderr)
    assert "Ignored, in folders: 1 files of other kinds (.txt)" in done.stdout
    rows = {Path(row["path"]).name: row for row in read_csv(tmp_path / "p.csv")}
    assert list(rows) == ["b.png", "broken.jpg", "d.png", "é 1.png", "c.txt", "model.safetensors"]
    detector = detector_of(trained)
    assert rows.pop("model.safetensors")["problem"]
    assert rows["broken.jpg"]["problem"] and not rows.pop("broken.jpg")["verdict"]
    for row in rows.values():
        expected = detector.predict(row["path"])
        assert float(row["probability_fake"]) == pytest.approx(expected.probability_fake, abs=SAME)
        assert (row["verdict"], row["standard_deviation"]) == (expected.verdict, "")
        assert f"{expected.probability_fake:.3f}" in done.stdout


def test_a_verdict_needs_the_mean_and_most_of_the_draws(trained: Path, toy_data: Path, tmp_path: Path) -> None:
    """With a threshold between mean and median, two of three draws have another verdict than the mean."""
    image = toy_data / "fake" / "0000.png"
    detector = detector_of(trained, draws=3)
    fake = detector.calibration.probabilities(detector.predict(image).scores.values)
    band = ("--band", *2 * (str((fake.mean() + np.median(fake)) / 2),))
    for number, side in enumerate((20, 32)):  # no larger than a crop
        Image.open(image).crop((0, 0, side, side)).save(tmp_path / f"{number}.png")
    files, flags = (image, tmp_path / "0.png", tmp_path / "1.png"), predict_flags(weights(trained), tmp_path)
    printed = succeed("model_training.predict", *flags, "--draws", "3", *band, *files)
    rows = read_csv(tmp_path / "p.csv")
    assert rows[0]["verdict"] == "inconclusive" and float(rows[0]["flips"]) == 2 / 3 and "67%" in printed
    assert float(rows[0]["standard_deviation"]) == pytest.approx(fake.std(ddof=1)) and "1 inconclusive" in printed
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


def test_an_interrupted_predict_resumes_from_its_rows(
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
    wait_until(output.exists, process)
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


def test_global_settings_of_pillow_are_not_changed(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_predict_refuses_invalid_arguments_in_one_sentence(trained: Path, tmp_path: Path) -> None:
    preset, path = load_preset("demo"), weights(trained)
    for paths, options, sentence in (
        (["nothing.jpg"], {}, "nothing.jpg does not exist"),
        (["*.nothing"], {}, "*.nothing holds no image file"),
        (["README.md"], {"draws": 0}, "draws is 0: input should be greater than or equal to 1"),
        (["README.md"], {"band": (0.9, 0.1)}, "band is (0.9, 0.1): it must be two probabilities, the smaller first"),
        (["README.md"], {"output": Path("README.md")}, "README.md exists, and is not a table that this"),
        (["a.csv"], {}, "a.csv is a list: name its column of paths too, as a.csv:COLUMN"),
        (["README.md"], {"weights": path.parent}, f"is a folder: name a weights file in it, such as {path}"),
        (["README.md"], {"weights": Path("tests")}, "tests is a folder: name a weights file"),
        (["README.md"], {"weights": Path("docs/evidence.jpg")}, "docs/evidence.jpg is an image: name a weights file"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            predict(preset, paths=paths, **({"output": tmp_path / "p.csv", "weights": path} | options))
