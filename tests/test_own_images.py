"""One's own images: the detector, predict, evaluate and robustness, through the real doors at toy size."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score, roc_auc_score

from data.crops import crop_generator, sample_crop_boxes
from data.images import read_image
from data.perturbations import GRID, perturbation
from data.pictures import Picture, find_images, read_pictures
from model_training.detector import load_detector
from model_training.predict import predict
from model_training.scores import score_data
from tests.conftest import ENVIRONMENT, REPOSITORY, TOY_FLAGS, copy_index, run_module, succeed
from training.checkpoints import read_about, save_model
from utils import UserError, load_preset, read_csv, read_json

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


def rows_of_test(results: Path, name: str) -> list[dict[str, str]]:
    return read_csv(weights(results, name).with_name("predictions.csv"))


# -------------------------------------------------------------------------------------------------- detector
@pytest.mark.parametrize("name", ["glass_resnet", "standard_resnet"])
def test_the_weights_file_alone_gives_the_model_that_was_tested(results: Path, toy_data: Path, name: str) -> None:
    detector, rows = load_detector(weights(results, name), device="cpu"), rows_of_test(results, name)
    for row in rows:
        image = read_image(toy_data / row["path"], 10**9)
        boxes = None
        if detector.num_crops:  # those that the test of the training looked at
            generator = crop_generator(detector.settings.main_seed, row["path"])
            boxes = sample_crop_boxes(image.height, image.width, detector.num_crops, 32, generator)[None]
        (scores,) = detector.score([Picture(image, "")], boxes=boxes)
        expected = np.log(float(row["probability_fake"])) - np.log(float(row["probability_real"]))
        assert scores.values == pytest.approx([expected], abs=SAME)


def test_scores_do_not_depend_on_batches_chunks_and_threads(results: Path, toy_data: Path) -> None:
    files = find_images([str(toy_data)])[10:29]
    found = []
    for batch_size, chunk_size, workers in ((1, 64, 0), (8, 64, 0), (8, 1, 2), (3, 10**6, 2)):
        detector = load_detector(weights(results), "cpu", batch_size=batch_size, chunk_size=chunk_size)
        answers = detector.predict_all(files, draws=2, workers=workers)
        found.append(np.stack([answer.scores.values for answer in answers]))
    assert found[0].shape == (19, 2) and found[0].std() > 100 * SAME
    for other in found[1:]:
        assert np.abs(other - found[0]).max() < SAME


def test_a_picture_gets_one_answer_whatever_it_is_called(results: Path, toy_data: Path, tmp_path: Path) -> None:
    source = next((toy_data / "real").glob("*.png"))
    shutil.copy(source, tmp_path / "renamed")
    Image.open(source).save(tmp_path / "other.bmp")
    detector = load_detector(weights(results), device="cpu")
    answers = [detector.predict(item) for item in (source, tmp_path / "renamed", Image.open(tmp_path / "other.bmp"))]
    assert len({answer.probability_fake for answer in answers}) == 1
    assert (answers[0].scores.boxes == answers[2].scores.boxes).all()


def test_draws_differ_and_are_summed_up(results: Path, toy_data: Path) -> None:
    detector = load_detector(weights(results), device="cpu")
    answer = detector.predict(toy_data / "fake" / "0000.png", draws=6)
    fake = detector.calibration.probabilities(answer.scores.values)
    assert len(set(fake)) > 1 and answer.scores.boxes.shape == (6, 4, 4)
    assert answer.probability_fake == fake.mean() and answer.standard_deviation == fake.std(ddof=1)
    assert answer.flips == np.mean([detector.calibration.verdict(p) != answer.verdict for p in fake])
    assert (detector.predict(toy_data / "fake" / "0000.png").scores.boxes == answer.scores.boxes[:1]).all()


def test_effects_are_what_the_score_loses_without_the_crop(results: Path, toy_data: Path) -> None:
    detector = load_detector(weights(results), device="cpu")
    picture = Picture(read_image(toy_data / "fake" / "0000.png", 10**9), "")
    (scores,) = detector.score([picture], draws=2)
    assert scores.attention.sum(axis=1) == pytest.approx([1, 1]) and np.abs(scores.effects).max() > 100 * SAME
    for draw in range(2):
        for crop in range(4):
            rest = np.delete(scores.boxes[draw], crop, axis=0)
            (without,) = detector.score([picture], boxes=rest[None])
            assert scores.effects[draw, crop] == pytest.approx(scores.values[draw] - without.values[0], abs=SAME)
    (alone,) = detector.score([picture], boxes=scores.boxes[:1, :1])
    assert alone.attention.tolist() == [[1.0]] and np.isnan(alone.effects).all()


def test_the_calibration_in_the_metadata_is_that_of_the_metrics(results: Path) -> None:
    metrics = read_json(weights(results).with_name("metrics.json"))
    assert read_about(weights(results))["calibration"] == metrics["calibration"]
    detector = load_detector(weights(results), device="cpu")
    rows = rows_of_test(results, "glass_resnet")
    scores = [np.log(float(row["probability_fake"]) / float(row["probability_real"])) for row in rows]
    labels = np.array([int(row["label"]) for row in rows])
    assert metrics["test_calibrated"]["auc"] == pytest.approx(roc_auc_score(labels == 0, scores))
    fake = detector.calibration.probabilities(np.array(scores))
    expected = -np.log(np.where(labels == 0, fake, 1 - fake)).mean()
    assert metrics["test_calibrated"]["nll"] == pytest.approx(expected)
    assert weights(results).with_name("reliability.png").exists()


def test_the_tables_hold_the_calibrated_metrics_of_all_seeds(results: Path) -> None:
    succeed("model_training.results_tables", "--preset", "demo", "--results-root", results, "--seeds", "1", "2")
    rows = {row["model"]: row for row in read_csv(results / "demo" / "tables" / "calibrated_metrics.csv")}
    of_seeds = [read_json(weights(results, seed=seed).with_name("metrics.json"))["test_calibrated"] for seed in (1, 2)]
    row = rows["glass_resnet"]
    assert (row["n"], rows["standard_resnet"]["n"]) == ("2", "1")
    assert float(row["nll_mean"]) == pytest.approx(np.mean([of_seed["nll"] for of_seed in of_seeds]))
    assert float(row["auc_std"]) == pytest.approx(100 * np.std([of_seed["auc"] for of_seed in of_seeds], ddof=1))


CALIBRATIONS = (  # that none can be
    *({"temperature": value} for value in (-1.0, 0.0, float("nan"), "x")),
    {"real_below": 0.9, "fake_from": 0.1},
    {"balanced": 7.0},
)


def test_weights_that_say_nothing_of_their_model_are_refused(results: Path, tmp_path: Path) -> None:
    detector, path = load_detector(weights(results), device="cpu"), tmp_path / "w.safetensors"
    about = detector.about
    for broken in (
        {},
        {"experiment": "x", "settings": {}},
        about | {"experiment": about["experiment"] | {"x": 1}},
        about | {"settings": about["settings"] | {"patch_size": "32"}},
        about | {"calibration": {"temperature": 1}},
        *(about | {"calibration": about["calibration"] | change} for change in CALIBRATIONS),
        about | {"experiment": about["experiment"] | {"num_crops": 10**9}},
        about | {"settings": about["settings"] | {"patch_size": 20_000}},
    ):
        save_model(path, detector.model, broken)
        with pytest.raises(UserError, match=r"w\.safetensors does not say how its model is built"):
            load_detector(path, device="cpu")
    save_model(path, detector.model, about | {"experiment": about["experiment"] | {"backbone": "timm:resnet18"}})
    with pytest.raises(UserError, match=r"w\.safetensors does not fit this model: "):
        load_detector(path, device="cpu")
    with safe_open(weights(results), framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(state, path, metadata={"about": "[" * 100_000 + "]" * 100_000})
    with pytest.raises(UserError, match=r"w\.safetensors is not a weights file of this project"):
        load_detector(path, device="cpu")
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"w\.safetensors is not a weights file of this project"):
        load_detector(path, device="cpu")


def test_outputs_that_are_no_numbers_are_no_answer(results: Path, toy_data: Path, tmp_path: Path) -> None:
    detector = load_detector(weights(results, "standard_resnet"), device="cpu")
    state = detector.model.state_dict()
    for name in state:
        if name.endswith("running_mean"):
            state[name].fill_(-3e38)
    save_model(tmp_path / "w.safetensors", detector.model, read_about(weights(results, "standard_resnet")))
    flags = ("--weights", tmp_path / "w.safetensors", "--device", "cpu", "--output", tmp_path / "p.csv")
    done = run_module("model_training.predict", *flags, toy_data)
    assert done.returncode == 2 and not (tmp_path / "p.csv").exists()
    assert "error: standard_resnet gives outputs that are infinite or not a number" in done.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------------------------- predict
def test_predict_answers_for_files_folders_patterns_and_lists(results: Path, toy_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    (folder / "below").mkdir(parents=True)
    for number, target in enumerate(("below/é 1.png", "b.png", "c.txt", "d.png")):
        shutil.copy(toy_data / "fake" / f"{2 * number:04d}.png", folder / target)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (tmp_path / "list.csv").write_text("image\nmy photos/d.png\n")
    flags = ("--weights", weights(results), "--device", "cpu", "--output", tmp_path / "p.csv")
    done = run_module("model_training.predict", *flags, folder, f"{folder}/*.txt", f"{tmp_path}/list.csv:image")
    assert done.returncode == 1, done.stderr
    assert "1 of 5 files gave no image" in done.stderr and "broken.jpg: " in done.stderr
    assert "Left out, in folders: 1 files of other kinds (.txt)" in done.stdout
    rows = {Path(row["path"]).name: row for row in read_csv(tmp_path / "p.csv")}
    assert list(rows) == ["b.png", "broken.jpg", "d.png", "é 1.png", "c.txt"]
    detector = load_detector(weights(results), device="cpu")
    for name, row in rows.items():
        if name == "broken.jpg":
            assert row["problem"] and not row["verdict"]
            continue
        answer = detector.predict(row["path"])
        assert float(row["probability_fake"]) == pytest.approx(answer.probability_fake, abs=SAME)
        assert (row["verdict"], row["standard_deviation"]) == (answer.verdict, "")
        assert f"{answer.probability_fake:.3f}" in done.stdout


def test_predict_repeats_draws_and_takes_a_band(results: Path, toy_data: Path, tmp_path: Path) -> None:
    flags = ("--weights", weights(results), "--device", "cpu", "--output", tmp_path / "p.csv", toy_data / "fake")
    done = succeed("model_training.predict", *flags, "--draws", "3", "--band", "0", "1")
    rows = read_csv(tmp_path / "p.csv")
    assert len(rows) == 20 and {row["verdict"] for row in rows} == {"inconclusive"} and "20 inconclusive" in done
    assert all(float(row["standard_deviation"]) > 0 and float(row["flips"]) == 0 for row in rows)


def test_predict_says_what_is_wrong_with_its_arguments(results: Path, tmp_path: Path) -> None:
    preset, path = load_preset("demo"), weights(results)
    for paths, how, sentence in (
        (["nothing.jpg"], {}, "nothing.jpg does not exist: name files, folders, patterns or FILE.csv:COLUMN"),
        (["*.nothing"], {}, "*.nothing holds no image file"),
        (["README.md"], {"draws": 0}, "--draws 0: it must be at least 1"),
        (["README.md"], {"band": (0.9, 0.1)}, "--band 0.9 0.1: expected two probabilities, the smaller first"),
        (["README.md"], {"chunk_size": 0}, "chunk_size = 0: both must be at least 1"),
        (["README.md"], {"output": Path("README.md")}, "README.md is there already, and is not a table that this"),
        (["a.csv"], {}, "a.csv is a list: name its column of paths too, as a.csv:COLUMN"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            predict(preset, path, paths, **({"output": tmp_path / "p.csv"} | how))
    done = run_module("model_training.predict", "--weights", path, "README.md", "--epochs", "3")
    assert done.returncode == 2 and "unknown argument --epochs" in done.stderr and done.stderr.count("\n") == 1


def test_a_file_that_gives_no_image_is_an_answer_of_its_own(tmp_path: Path, toy_data: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"bad")
    sources = [toy_data / "fake" / "0000.png", tmp_path / "bad.png", toy_data / "fake" / "0002.png"]
    for workers in (0, 2):
        answers = list(read_pictures(sources, 10**6, workers, ("native", "jpeg_50")))
        assert [type(answer).__name__ for answer in answers] == ["Picture"] * 2 + ["UnreadableImage"] * 2 + [
            "Picture"
        ] * 2


# ---------------------------------------------------------------------------------------- evaluate, robustness
def evaluation(door: str, results: Path, data: Path, *flags: str | Path) -> str:
    roots = ("--preset", "demo", "--data-root", data, "--results-root", results, "--device", "cpu")
    return succeed(f"model_training.{door}", *roots, *flags)


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
    printed = evaluation("evaluate", results, by_generator, "--weights", *both, "--name", "g", "--format-matched", "60")
    assert "left out, no image: real/broken.png" in printed
    folder = results / "demo" / "evaluation" / "g"
    rows = {row["images"]: row for row in read_csv(folder / "evaluation_raw.csv")}
    counts = {name: (int(row["fake"]), int(row["real"])) for name, row in rows.items()}
    assert counts == {"all": (20, 20), "diffusion": (7, 20), "gan": (13, 20), "gan, same source": (13, 6)}
    chosen = [
        path
        for path in find_images([str(by_generator)])
        if Path(path).parent.name == "gan" or "fake/gan" in Path(path).as_posix()
    ]
    positive = ["fake" in Path(path).parts for path in chosen]
    aucs, precisions = [], []
    for seed in (1, 2):
        detector = load_detector(weights(results, seed=seed), device="cpu")
        fake = [answer.raw_probability_fake for answer in detector.predict_all(chosen)]
        aucs.append(roc_auc_score(positive, fake))
        precisions.append(average_precision_score(positive, fake))
    row = rows["gan, same source"]
    assert float(row["auc_mean"]) == pytest.approx(np.mean(aucs))
    assert float(row["auc_std"]) == pytest.approx(np.std(aucs, ddof=1))
    assert float(row["average_precision_mean"]) == pytest.approx(np.mean(precisions))
    assert float(row["auc_low"]) <= float(row["auc_mean"]) <= float(row["auc_high"])
    formats = (folder / "formats.md").read_text()
    assert "AUC, native | AUC, jpeg 60 | balanced accuracy, native | balanced accuracy, jpeg 60" in formats
    for name in ("roc.png", "calibration.png", "scores.png", "evaluation.tex", "evaluation.md"):
        assert (folder / name).stat().st_size > 500


def test_an_evaluation_that_was_killed_goes_on_where_it_was(results: Path, by_generator: Path) -> None:
    flags = ("--weights", weights(results), "--name", "again")
    evaluation("evaluate", results, by_generator, *flags)
    file = max((results / "demo" / "scores").glob("*.csv"), key=lambda path: path.stat().st_mtime_ns)
    whole = read_csv(file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:20]) + lines[20][:25])  # cut within a row
    evaluation("evaluate", results, by_generator, *flags)
    again = {row["path"]: row for row in read_csv(file) if row["perturbation"] == "native"}
    native = {row["path"]: row for row in whole if row["perturbation"] == "native"}
    assert len(native) == 41 and again.keys() == native.keys()
    kept = [line.split(",")[0] for line in lines[1:20] if ",native," in line]
    assert kept and all(again[path] == native[path] for path in kept)
    for path, row in native.items():  # the others were batched otherwise
        scores = [float(of["probability_fake"]) for of in (row, again[path])]
        assert scores[0] == pytest.approx(scores[1], abs=SAME, nan_ok=True)


def test_scores_of_one_data_set_are_not_taken_for_anothers(results: Path, toy_data: Path, tmp_path: Path) -> None:
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
        evaluation("evaluate", results, root, "--weights", weights(results), "--name", str(turned))
        table = results / "demo" / "evaluation" / str(turned) / "evaluation.csv"
        aucs.append(float(read_csv(table)[0]["auc_mean"]))
    assert aucs[0] == pytest.approx(1 - aucs[1], abs=1e-6) and aucs[0] != aucs[1]


def test_weights_that_are_named_twice_are_refused(results: Path, toy_data: Path, tmp_path: Path) -> None:
    shutil.copy(weights(results), tmp_path / "copy.safetensors")
    preset = load_preset("demo")
    preset = replace(preset, settings=replace(preset.settings, data_root=toy_data, results_root=results))
    with pytest.raises(UserError, match="are the same model and seed: name each once"):
        score_data(preset, [weights(results), tmp_path / "copy.safetensors"])


def test_robustness_has_a_row_for_each_perturbation_and_native_is_that_of_the_test(
    results: Path, toy_data: Path
) -> None:
    both = ("--weights", weights(results), weights(results, "standard_resnet"))
    test_split = ("--data-list", weights(results).with_name("predictions.csv"))
    grid = ("--perturbations", "jpeg_30", "rescale_0.25", "social")
    printed = evaluation("robustness", results, toy_data, *both, *test_split, *grid)
    assert "6 images of" in printed and "trained on" not in printed
    folder = results / "demo" / "robustness" / toy_data.name
    rows = {row["model"]: row for row in read_csv(folder / "robustness.csv")}
    assert list(rows) == ["native", "jpeg_30", "rescale_0.25", "social"]
    of_test = rows_of_test(results, "standard_resnet")  # the standard model's views are the same there
    fake = [float(row["probability_fake"]) for row in of_test]
    expected = roc_auc_score([row["label"] == "0" for row in of_test], fake)
    assert float(rows["native"]["standard_resnet auc_mean"]) == pytest.approx(expected)
    assert (folder / "robustness.png").stat().st_size > 500
    assert "was trained on images of this folder" in evaluation("evaluate", results, toy_data, *both)


def test_perturbations_do_what_their_names_say() -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (300, 1300, 3), dtype=np.uint8)).resize((1300, 300))
    pixels = np.asarray(image).astype(float)
    changed = {name: perturbation(name)(image) for name in GRID}
    sizes = {name: new.size for name, new in changed.items() if new.size != image.size}
    assert sizes == {"crop_0.75": (975, 225), "crop_0.5": (650, 150), "social": (1080, 249)}
    assert all(new.mode == "RGB" for new in changed.values()) and changed["native"] is image
    assert (np.asarray(changed["crop_0.5"]) == pixels[75:225, 325:975]).all()

    def distance(name: str) -> float:
        return float(np.abs(np.asarray(changed[name]) - pixels).mean())

    for kind in ("jpeg", "webp", "rescale", "blur", "noise"):
        distances = [distance(name) for name in GRID if name.startswith(kind)]
        assert distances == sorted(distances) and distances[0] > 1, kind
    assert np.std(np.asarray(changed["noise_2"]) - np.clip(pixels, 0, 255)) == pytest.approx(2, rel=0.05)
    for name in ("jpeg_0", "jpeg_75.5", "jpeg", "rescale_2", "sepia_1"):
        with pytest.raises(UserError, match=f"there is no perturbation {name}"):
            perturbation(name)


# ---------------------------------------------------------------------------------------------------- README
def test_the_commands_of_the_readme_do_what_it_says(results: Path, toy_data: Path, tmp_path: Path) -> None:
    """Its section on one's own images, as it stands there, in a folder that looks like the one after `make demo`."""
    section = (REPOSITORY / "README.md").read_text().partition("## On your own images\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    commands, programs = ([text for kind, text in blocks if kind == wanted] for wanted in ("", "python"))
    assert len(commands) == 5 and len(programs) == 1
    shutil.copytree(toy_data, tmp_path / "datasets" / "demo")
    shutil.copy(toy_data / "fake" / "0000.png", tmp_path / "datasets" / "demo" / "fake" / "0001.png")
    for name in ("glass_resnet", "standard_resnet"):
        shutil.copytree(weights(results, name).parent, tmp_path / "results" / "demo" / name / "seed_100")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_csv(tmp_path / "predictions.csv")) == 2  # of the last predict: a pattern of two files
    for written in (
        *("evaluation/demo/evaluation.md", "evaluation/demo/formats.tex", "robustness/demo/robustness.png"),
        "dataset/audit/audit.json",
    ):
        assert (tmp_path / "results" / "demo" / written).stat().st_size > 100
    assert "0001.png" in (tmp_path / "evidence" / "index.html").read_text()
    shutil.copy(toy_data / "fake" / "0000.png", tmp_path / "photo.jpg")
    code = subprocess.run(
        [sys.executable, "-c", programs[0]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert code.returncode == 0 and 0 <= float(code.stdout) <= 1, code.stderr
