"""Evidence for predictions: what pictures, maps and the page show, and where."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import nn

from config import DEMO
from data.crops import tile_boxes
from data.images import UnreadableImage
from data.pictures import Picture, read_pictures
from model_training.detector import UNCALIBRATED, Detector, Prediction, Scores, load_detector
from model_training.effect_map import effect_map, spread
from model_training.evidence import write_evidence
from model_training.evidence_pictures import GAP, LINE, draw_evidence, draw_map
from model_training.figures import BLUE, VERMILLION
from models.backbones import Backbone
from models.build import build_model
from models.glass_models import GlassModel
from tests.conftest import run_module
from training.checkpoints import save_model
from training.runtime import build_runtime
from utils import UserError, find_experiment, resolved

P = 32
SETTINGS = replace(DEMO.settings, patch_size=P, pretrained=False, device="cpu")
GLASS, STANDARD = (find_experiment(DEMO, name) for name in ("glass_resnet", "standard_resnet"))
NASTY = ("<img src=x onerror=alert(1)>.png", "\"quoted' & ünï 中文.png", "2.png", "10.png", "\x07\u202e.png")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def picture_of(pixels: np.ndarray) -> Picture:
    (picture,) = read_pictures([Image.fromarray(pixels.astype(np.uint8))], SETTINGS.max_image_pixels)
    return picture


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def redness() -> Detector:
    """A detector of red: mean colours are the features, all crops weigh the same, and red crops speak for fake."""
    backbone = Backbone("mean", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, (0, 0, 0), (1, 1, 1))
    model = GlassModel(backbone, backbone, 0.0).eval()
    with torch.no_grad():
        for parameters in (*model.attention.parameters(), *model.classifier[2].parameters()):
            parameters.zero_()
        model.classifier[2].weight[0, 3] = 1  # the crops' red, for fake
    return Detector(model, GLASS, SETTINGS, {}, UNCALIBRATED, build_runtime(SETTINGS))


def weights_of(path: Path, experiment: object) -> Path:
    """Random weights, as a training leaves them."""
    about = {"experiment": asdict(experiment), "settings": resolved(SETTINGS)}
    save_model(path, build_model(experiment, SETTINGS), about)
    return path


# ----------------------------------------------------------------------------------------------------- geometry
@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 30), (32, 32), (33, 90), (97, 131), (20, 300)])
@pytest.mark.parametrize("stride", [7, 16, 32])
def test_tiles_cover_every_pixel_and_end_at_the_border(height: int, width: int, stride: int) -> None:
    boxes, seen = tile_boxes(height, width, P, stride), np.zeros((height, width), bool)
    for top, left, tall, wide in boxes.tolist():
        assert (tall, wide) == (min(height, P), min(width, P))
        assert 0 <= top <= height - tall and 0 <= left <= width - wide
        seen[top : top + tall, left : left + wide] = True
    assert seen.all() and len(np.unique(boxes, axis=0)) == len(boxes)


def test_a_pixel_has_the_mean_of_the_tiles_over_it() -> None:
    boxes = np.array([(0, 0, 1, 2), (0, 1, 1, 2)])
    assert spread(np.array([1.0, 4.0]), boxes, 1, 3).tolist() == [[1, 2.5, 4]]


def test_a_map_is_what_the_score_loses_tile_by_tile_and_points_at_what_looks_fake() -> None:
    pixels = noise(100, 140) // 2
    pixels[40:80, 90:130, 0] = 255
    detector, picture = redness(), picture_of(pixels)
    found = effect_map(detector, picture)
    assert np.array_equal(found.boxes, tile_boxes(100, 140, P, P // 2)) and found.pixels.shape == (100, 140)
    N = len(found.boxes)
    for k in range(0, N, 5):
        (without,) = detector.score([picture], boxes=np.delete(found.boxes, k, 0)[None])
        (only,) = detector.score([picture], boxes=found.boxes[None, k : k + 1])
        assert found.alone[k] == pytest.approx(only.values[0], abs=1e-6)
        assert found.effects[k] == pytest.approx(found.score - without.values[0], abs=1e-6)
    assert np.array_equal(found.pixels, spread(N * found.effects, found.boxes, 100, 140))
    row, column = divmod(int(found.pixels.argmax()), 140)
    assert 40 <= row < 80 and 90 <= column < 130
    assert found.pixels[:20, :40].max() < 0


def test_thousands_of_tiles_are_left_out_as_a_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, features = redness().model, torch.rand(11, 3)
    whole = model.classify_without_each(features[0], features)
    monkeypatch.setattr("models.glass_models.ROWS_AT_A_TIME", 4)
    assert torch.allclose(model.classify_without_each(features[0], features), whole)


@pytest.mark.parametrize("stride", [0, P + 1])
def test_a_stride_that_leaves_gaps_is_refused(stride: int) -> None:
    with pytest.raises(UserError, match="stride"):
        effect_map(redness(), picture_of(noise(50, 50)), stride)


# ----------------------------------------------------------------------------------------------------- pictures
def prediction_of(picture: Picture, boxes: list, effects: list, draws: int = 1) -> Prediction:
    K = len(boxes)
    scores = Scores(
        np.full(draws, 1.5),
        np.array([boxes] * draws).reshape(draws, K, 4),
        np.full((draws, K), 1 / max(1, K)),
        np.array([effects] * draws, float).reshape(draws, K),
        np.zeros((draws, K)),
    )
    return Prediction(0.8, "fake", 0.1 if draws > 1 else float("nan"), 0.0, 0.8, *picture.image.size, scores)


def test_outlines_have_the_colour_of_the_sign_and_crops_their_pixels() -> None:
    pixels = noise(400, 500)
    picture = picture_of(pixels)
    page = np.asarray(draw_evidence(picture, prediction_of(picture, [(50, 60, P, P), (200, 300, P, P)], [-0.2, 0.5])))
    corner = np.array([2 * GAP + 2 * LINE, GAP])  # of the image, below two lines of text
    for (top, left), colour in (((50, 60), BLUE), ((200, 300), VERMILLION)):
        y, x = corner + np.array([top, left])
        outline = [page[y, x + P // 2], page[y + P - 1, x + P // 2], page[y + P // 2, x], page[y + P // 2, x + P - 1]]
        assert {tuple(pixel) for pixel in outline} == {ImageColor.getrgb(colour)}
        assert np.array_equal(
            page[y + 3 : y + P - 3, x + 3 : x + P - 3], pixels[top + 3 :, left + 3 :][: P - 6, : P - 6]
        )
    y, x = corner + np.array([LINE + 1, 500 + GAP + 1])  # the first crop: the one of the largest effect
    assert np.array_equal(page[y : y + P, x : x + P], pixels[200 : 200 + P, 300 : 300 + P])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 30), (20, 3000), (3000, 20), (1200, 900)])
@pytest.mark.parametrize("K", [0, 1, 16])
def test_every_shape_and_number_of_crops_is_drawn(height: int, width: int, K: int) -> None:
    picture = picture_of(noise(height, width))
    boxes = picture.boxes(K, P, 1, 0)[0].tolist() if K else []
    effects = [float("nan")] if K == 1 else np.linspace(-1, 1, K).tolist()
    for draws in (1, 3):
        page = draw_evidence(picture, prediction_of(picture, boxes, effects, draws))
        assert max(page.size) < 1800
    assert max(draw_map(picture, effect_map(redness(), picture)).size) < 1800


# --------------------------------------------------------------------------------------------------------- page
class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles, of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images`, and their `evidence` by the real door."""
    root = tmp_path_factory.mktemp("predicted")
    for folder, names in (("images", NASTY), ("images/again", ("2.png",))):
        (root / folder).mkdir()
        for i, name in enumerate(names):
            Image.fromarray(noise(60 + 9 * i, 80)).save(root / folder / name)
    (root / "images" / "<b>no image.png").write_text("no")
    weights = weights_of(root / "model.safetensors", GLASS)
    options = ["--output", root / "found.csv", "--evidence", root / "evidence", "--evidence-map", "--device", "cpu"]
    done = run_module("model_training.predict", "--weights", weights, root / "images", *options)
    assert done.returncode == 1 and "1 of 7 files gave no image" in done.stderr, done.stderr
    return root


def test_names_are_text_in_the_page_and_it_needs_nothing_else(predicted: Path) -> None:
    page = Page(predicted / "evidence" / "index.html")
    for name in (*NASTY, "again/2.png", "<b>no image.png"):
        assert f"images/{name}" in page.text
    assert "not an image" in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"b", "link", "iframe", "object"})
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:").startswith("data:"), tag
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 3 * 6


def test_each_image_has_its_own_pictures_beside_the_page(predicted: Path) -> None:
    folder = predicted / "evidence"
    names = {path.name for path in folder.iterdir()} - {"index.html", ".evidence"}
    assert len(names) == 12 and all(name.isprintable() and "<" not in name for name in names)
    linked = [attributes["href"] for tag, attributes in Page(folder / "index.html").tags if tag == "a"]
    assert len(linked) == 12


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_columns_sort_as_numbers_or_names(predicted: Path, tmp_path: Path) -> None:
    def clicked(*buttons: int) -> list[list[str]]:
        clicks = "".join(f"document.querySelectorAll('th button')[{i}].click();" for i in buttons)
        shown = (
            "[...table.tBodies].map(image => [...image.rows[0].cells].slice(1, 3).map(c => c.dataset.value).join('|'))"
        )
        page = tmp_path / "page.html"
        text = (predicted / "evidence" / "index.html").read_text(encoding="utf-8")
        page.write_text(
            f"{text}<script>{clicks}document.body.innerText = 'ROWS' + {shown}.join('\\n') + 'ROWS'</script>"
        )
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
        dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        rows = dumped.split("ROWS")[-2].replace("<br>", "\n").split("\n")
        return [row.split("|") for row in rows]

    names = [Path(path).name for path, _ in clicked(0)]
    assert names.index("2.png") < names.index("10.png")
    values = [float(value) for _, value in clicked(1)]
    assert len(values) == 6 and values == sorted(values)
    assert [float(value) for _, value in clicked(1, 1)] == values[::-1]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "0001_a.jpg"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="something else"):
        next(write_evidence(mine.parent, redness(), ["a.png"], []))
    assert mine.read_text() == "mine" and len(list(mine.parent.iterdir())) == 1
    with pytest.raises(UserError, match="is an image in it"):
        next(write_evidence(tmp_path / "new", redness(), [str(tmp_path / "new" / "a.png")], []))


def test_a_standard_model_has_a_page_without_crops_and_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.png", os.fsdecode(b"\xff.png"))]
    for path in paths:
        Image.fromarray(noise(40, 50)).save(path)
    detector = load_detector(weights_of(tmp_path / "model.safetensors", STANDARD), "cpu")

    def write(shown: list[str], with_map: bool = False) -> Iterator[Prediction | UnreadableImage]:
        return write_evidence(tmp_path / "evidence", detector, shown, detector.predict_all(shown), with_map)

    with pytest.raises(UserError, match="no crops"):
        next(write(paths, with_map=True))
    assert len(list(write(paths))) == 2
    assert "\ufffd.png" in (tmp_path / "evidence" / "index.html").read_text(encoding="utf-8")
    assert len(list(write(paths[:1]))) == 1
    assert {path.name for path in (tmp_path / "evidence").iterdir()} == {"0001_a.jpg", "index.html", ".evidence"}
    assert '<body class="standard">' in (tmp_path / "evidence" / "index.html").read_text()
