"""Evidence for predictions: pictures, maps and the page."""

import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import nn

from config import DEMO
from data.crops import crop_generator, tile_boxes
from data.pictures import Picture, read_pictures
from data.views import ViewSettings
from model_training.inference.detector import UNCALIBRATED, Detector, Prediction, Scores, load_detector
from model_training.inference.effect_map import effect_map, spread
from model_training.inference.evidence import write_evidence
from model_training.inference.evidence_pictures import GAP, LINE, draw_evidence, draw_map
from model_training.tables.figures import BLUE, VERMILLION
from models.backbones import Backbone
from models.glass_models import GlassModel
from models.pooling import build_pool
from tests.conftest import run_module, untrained_weights
from training.runtime import build_runtime
from utils import UserError, find_experiment

P = 32
SETTINGS = replace(DEMO.settings, patch_size=P, pretrained=False, device="cpu")
GLASS, STANDARD = (find_experiment(DEMO, name) for name in ("glass_resnet", "standard_resnet"))
NASTY = ("<img src=x onerror=alert(1)>.png", "\"quoted' & ünï 中文.png", "2.png", "10.png", "\x07\u202e.png")


def picture_of(pixels: np.ndarray) -> Picture:
    (picture,) = read_pictures([Image.fromarray(pixels.astype(np.uint8))], SETTINGS.max_image_pixels)
    return picture


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


MEAN_COLOUR = Backbone(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, (0, 0, 0), (1, 1, 1))


def redness(backbone: Backbone = MEAN_COLOUR) -> Detector:
    """A detector of red in the features, colours: all crops have the same weight, and red is evidence for fake."""
    model = GlassModel(backbone, backbone, build_pool("attention", backbone.width, 0.0), 0.0).eval()
    with torch.no_grad():
        for parameters in (*model.attention.parameters(), *model.classifier[2].parameters()):
            parameters.zero_()
        model.classifier[2].weight[0, 3] = 1  # the crops' red, for fake
    return Detector(model, GLASS, SETTINGS, {}, UNCALIBRATED, build_runtime(SETTINGS))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 30), (32, 32), (97, 131), (20, 300)])
@pytest.mark.parametrize("stride", [7, 32])
def test_tiles_cover_every_pixel_and_end_at_the_border(height: int, width: int, stride: int) -> None:
    boxes, seen = tile_boxes(height, width, P, stride, torch.Generator()), np.zeros((height, width), bool)
    for top, left, tall, wide in boxes.tolist():
        assert (tall, wide) == (min(height, P), min(width, P))
        assert 0 <= top <= height - tall and 0 <= left <= width - wide
        seen[top : top + tall, left : left + wide] = True
    assert seen.all()
    if (height, width, stride) == (97, 131, 7):
        assert all(np.bincount(boxes[:, axis] % 8, minlength=8).min() > 10 for axis in (0, 1))  # all phases


def test_a_map_shows_a_trace_that_repeats_with_the_grid() -> None:
    """The model looks at every 16th pixel, the trace is in the others, and the tiles are 16 pixels apart."""
    pixels = np.zeros((160, 160, 3), np.uint8)
    rows, columns = np.mgrid[:160, :160]
    pixels[(rows % 16 >= 4) & (rows % 16 < 12) & (columns >= 96), 0] = 255
    backbone = Backbone(
        nn.Sequential(nn.AvgPool2d(1, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, (0,) * 3, (1,) * 3
    )
    found = effect_map(redness(backbone), picture_of(pixels)).pixels
    assert found[32:128, 112:].mean() > 0.01 > -0.005 > found[:, :64].max()


def test_a_pixel_has_the_mean_of_the_tiles_over_it() -> None:
    boxes = np.array([(0, 0, 1, 2), (0, 1, 1, 2)])
    assert spread(np.array([1.0, 4.0]), boxes, 1, 3).tolist() == [[1, 2.5, 4]]


def test_a_map_averages_the_effects_of_tiles_and_points_at_what_looks_fake() -> None:
    pixels = noise(100, 140) // 2
    pixels[40:80, 90:130, 0] = 255
    detector, picture = redness(), picture_of(pixels)
    found = effect_map(detector, picture)
    generator = crop_generator(SETTINGS.main_seed, picture.key, -1)
    assert np.array_equal(found.boxes, tile_boxes(100, 140, P, P // 2, generator))
    assert np.array_equal(found.pixels, spread(len(found.boxes) * found.scores.effects[0], found.boxes, 100, 140))
    row, column = divmod(int(found.pixels.argmax()), 140)
    assert 40 <= row < 80 and 90 <= column < 130
    assert found.pixels[:20, :40].max() < 0


def prediction_of(picture: Picture, boxes: list, effects: list, draws: int = 1) -> Prediction:
    K = len(boxes)
    of_crops = np.array([boxes] * draws).reshape(draws, K, 4), np.full((draws, K), 1 / max(1, K))
    of_effects = np.array([effects] * draws, float).reshape(draws, K), np.zeros((draws, K))
    scores = Scores(np.full(draws, 1.5), *of_crops, *of_effects)
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


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 3000), (3000, 20), (1200, 900)])
@pytest.mark.parametrize("K", [0, 1, 16])
def test_every_shape_and_number_of_crops_is_drawn(height: int, width: int, K: int) -> None:
    picture = picture_of(noise(height, width))
    boxes = picture.boxes(ViewSettings(P, K), draws=1)[0].tolist() if K else []
    effects = [float("nan")] if K == 1 else np.linspace(-1, 1, K).tolist()
    for draws in (1, 3):
        page = draw_evidence(picture, prediction_of(picture, boxes, effects, draws))
        assert max(page.size) < 1800
    assert max(draw_map(picture, effect_map(redness(), picture)).size) < 1800


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
    """A folder with `images`, and their `evidence` by the real command."""
    root = tmp_path_factory.mktemp("predicted")
    for folder, names in (("images", NASTY), ("images/again", ("2.png",))):
        (root / folder).mkdir()
        for i, name in enumerate(names):
            Image.fromarray(noise(60 + 9 * i, 80)).save(root / folder / name)
    (root / "images" / "<b>no image.png").write_text("no")
    weights = untrained_weights(root / "model.safetensors", "glass_resnet")
    options = ["--output", root / "found.csv", "--evidence", root / "evidence", "--evidence-map", "--device", "cpu"]
    options += ["--band", "0.2", "0.8"]
    done = run_module("model_training.predict", "--weights", weights, root / "images", *options)
    assert done.returncode == 1 and "1 of 7 files are left out" in done.stderr, done.stderr
    assert "has no calibration: probabilities are raw\n" in done.stderr
    return root


def test_hostile_names_are_escaped_and_the_page_is_self_contained(predicted: Path) -> None:
    folder = predicted / "evidence"
    page = Page(folder / "index.html")
    for name in (*NASTY, "again/2.png", "<b>no image.png"):
        assert f"images/{name}" in page.text
    assert "not an image" in page.text and "probability, not calibrated, that" in page.text
    assert "real below 0.200, fake from 0.800" in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"b", "link", "iframe", "object"})
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:").startswith("data:"), tag
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 3 * 6
    pictures = {path.name for path in folder.iterdir()} - {"index.html", ".evidence", ".lock"}
    assert len(pictures) == 12 and all(name.isprintable() and "<" not in name for name in pictures)
    assert {unquote(attributes["href"]) for tag, attributes in page.tags if tag == "a"} == pictures


def test_a_folder_with_other_files_is_refused_and_not_changed(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "0001_a.jpg"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="it holds other files"):
        write_evidence(mine.parent, redness(), ["a.png"], [])
    assert mine.read_text() == "mine" and len(list(mine.parent.iterdir())) == 1
    with pytest.raises(UserError, match="is an image in it"):
        write_evidence(tmp_path / "new", redness(), [str(tmp_path / "new" / "a.png")], [])


def test_a_standard_model_has_a_page_without_crops_and_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.png", os.fsdecode(b"\xff.png"))]
    for path in paths:
        Image.fromarray(noise(40, 50)).save(path)
    detector = load_detector(untrained_weights(tmp_path / "model.safetensors", "standard_resnet"), "cpu")

    def write(shown: list[str], with_map: bool = False) -> None:
        write_evidence(tmp_path / "evidence", detector, shown, detector.predict_all(shown), with_map)

    with pytest.raises(UserError, match="no crops"):
        write(paths, with_map=True)
    write(paths)
    assert "\ufffd.png" in Page(tmp_path / "evidence" / "index.html").text
    write(paths[:1])
    names = {path.name for path in (tmp_path / "evidence").iterdir()}
    assert names == {"0001_a.jpg", "index.html", ".evidence", ".lock"}
    assert '<body class="standard">' in (tmp_path / "evidence" / "index.html").read_text()
