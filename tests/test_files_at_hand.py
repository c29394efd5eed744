"""Files as people have them: each command says the same of each, in time, and starts no program on it."""

import os
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from data.formats import HEIF
from data.images import read_image
from data.lists import name_of_root, read_csv
from model_training.inference.detector import load_detector
from tests.campaigns.mutated_images import POSTSCRIPT
from tests.conftest import PREPROCESS_FLAGS, TOY_FLAGS, refused, run_module, start_module, succeed, untrained_weights
from tests.odd_images import noise, saved

PHOTO = noise(120, 90).resize((240, 180), Image.Resampling.BICUBIC)
PNG, JPEG, AVIF = (saved(PHOTO, kind, quality=90) for kind in ("PNG", "JPEG", "AVIF"))
GREY = saved(Image.new("RGB", (240, 180), (128, 128, 128)), "JPEG")  # the colour of what a decoder lacks


def with_chunk(kind: bytes, content: bytes, wrong_by: int = 0) -> bytes:
    """The photograph as a PNG with a chunk more after its header and after its pixels."""
    checksum = struct.pack(">I", zlib.crc32(kind + content) ^ wrong_by)
    chunk = struct.pack(">I", len(content)) + kind + content + checksum
    return PNG[:33] + chunk + PNG[33:-12] + chunk + PNG[-12:]


def with_segment(number: int, content: bytes) -> bytes:
    """The photograph as a JPEG with a segment APPn more."""
    return JPEG[:2] + bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(content) + 2) + content + JPEG[2:]


def rgba(colour: tuple[int, int, int], alpha: int) -> bytes:
    """A picture whose left half has this colour and this alpha."""
    image = PHOTO.convert("RGBA")
    image.paste((*colour, alpha), (0, 0, 120, 180))
    return saved(image, "PNG")


BOMB = zlib.compress(bytes(10**7))
DAMAGED = "damaged: its data ends before the picture does"
UNSUPPORTED = "which is not supported here: convert it to PNG, which changes no pixel"
HEIC = "HEIC, which needs pillow-heif: pip install -r requirements-formats.txt, or convert it to PNG"
if HEIF:
    HEIC = f"HEIC of a kind that {UNSUPPORTED.removeprefix('which ')}"
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6
FILES = {  # name: content, and what is said of it where it is left out
    "whole.png": (PNG, ""),
    "text.png": (with_chunk(b"zTXt", b"a\0\0" + BOMB), ""),
    "unicode.png": (with_chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB), ""),
    "profile.png": (with_chunk(b"iCCP", b"a\0\0" + BOMB), ""),
    "checksum.png": (with_chunk(b"eXIf", b"MM\0*", wrong_by=1), ""),
    "whole.jpg": (JPEG, ""),
    "profile.jpg": (with_segment(2, b"ICC_PROFILE\0"), ""),
    "exif.jpg": (with_segment(1, b"Exif\0\0MM\0*\xff\xff\xff\xff"), ""),
    "whole.webp": (saved(PHOTO, "WEBP", lossless=True), ""),
    "exif.webp": (saved(PHOTO, "WEBP", lossless=True, exif=b"Exif\0\0junk"), ""),
    "whole avif.jpg": (AVIF, ""),
    "grey corner.jpg": (saved(Image.new("RGB", (50, 40), (128, 128, 128)), "JPEG"), ""),
    "tiny.png": (saved(noise(1, 1), "PNG"), ""),
    "row.png": (saved(noise(3000, 10), "PNG"), ""),
    "cutout.png": (rgba((0, 0, 0), 0), ""),
    "cutout.gif.png": (saved(PHOTO.quantize(8), "GIF", transparency=0), ""),
    "moving.gif": (saved(PHOTO.quantize(8), "GIF", save_all=True, append_images=[noise(240, 180).quantize(8)]), ""),
    "first of it.png": (saved(PHOTO.quantize(8).convert("RGB"), "PNG"), ""),
    "moving.webp": (saved(PHOTO, "WEBP", lossless=True, save_all=True, append_images=[noise(240, 180)]), ""),
    "stored.avif": (AVIF, ""),
    "stored turned.jpg": (saved(PHOTO, "JPEG", quality=90, exif=TURNED), ""),
    "stored turned.tif": (saved(PHOTO, "TIFF", exif=TURNED), ""),
    "opaque.png": (rgba((0, 0, 0), 255), ""),
    "16 bit.tif": (saved(Image.fromarray(np.full((90, 80), 300, np.uint16)), "TIFF"), ""),
    "fully transparent.png": (saved(Image.new("RGBA", (90, 80), (200, 0, 0, 0)), "PNG"), "fully transparent: "),
    "float.tif": (saved(Image.fromarray(np.ones((90, 80), np.float32)), "TIFF"), "its samples have 32 bits or a sign"),
    "integer.tif": (saved(Image.fromarray(np.ones((90, 80), np.int32)), "TIFF"), "its samples have 32 bits or a sign"),
    "raw photo.tif": (saved(PHOTO, "TIFF", tiffinfo={254: 1}), f"the preview of a raw photo, {UNSUPPORTED}"),
    "postscript.jpg": (POSTSCRIPT, "not an image"),
    "jpeg2000.jpg": (saved(PHOTO, "JPEG2000"), f"JPEG 2000, {UNSUPPORTED}"),
    "heic.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), HEIC),
    "photo.heic": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100), HEIC),
    "vector.jpg": (b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns="">', f"SVG, {UNSUPPORTED}"),
    "layers.png": (b"8BPS\0\1" + bytes(100), f"Photoshop, {UNSUPPORTED}"),
    "grey, odd head.jpg": (b"\xff\xd8\xff\xe0\0\6JF\0\0" + GREY[20:], ""),
    "cut.jpg": (JPEG[: len(JPEG) // 2] + b"\xff\xd9", DAMAGED),
    "cut grey.jpg": (saved(PHOTO.convert("L"), "JPEG")[:-2000] + b"\xff\xd9", DAMAGED),
    "cut cmyk.jpg": (saved(PHOTO.convert("CMYK"), "JPEG")[:-2000] + b"\xff\xd9", DAMAGED),
}
SAME = {"text.png": "whole.png", "unicode.png": "whole.png", "profile.png": "whole.png", "checksum.png": "whole.png"}
SAME |= {"profile.jpg": "whole.jpg", "exif.jpg": "whole.jpg", "exif.webp": "whole.webp", "whole.webp": "whole.png"}
SAME |= {"moving.gif": "first of it.png", "moving.webp": "whole.png", "stored.avif": "whole avif.jpg"}
SAME |= {"stored turned.jpg": "whole.jpg"}  # as in the paper; a TIFF comes turned
HIDDEN = ("._0001.jpg", ".hidden.png", "__MACOSX/0001.jpg", ".thumbnails/0001.jpg")


@dataclass(frozen=True)
class Outputs:
    """What the commands printed, and what they wrote of each file."""

    predict: subprocess.CompletedProcess
    rows: dict[str, dict[str, str]]  # of predictions.csv
    left_out: dict[str, dict[str, str]]  # command -> file -> reason
    printed: dict[str, str]
    started: bool  # whether any of them started Ghostscript


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    folder = tmp_path_factory.mktemp("at hand")
    root, results, trap = folder / "shots [2023]", folder / "results", folder / "bin"
    for name in (*FILES, *HIDDEN):
        path = root / "fake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES.get(name, (PNG,))[0])
    (root / "real").mkdir()
    for number in range(6):
        (root / "real" / f"{number}.png").write_bytes(saved(noise(80, 70), "PNG"))
    trap.mkdir()
    (trap / "gs").write_text(f"#!/bin/sh\ntouch '{folder}/started'\n")
    (trap / "gs").chmod(0o755)
    roots, printed, before = ("--data-root", root, "--results-root", results), {}, os.environ["PATH"]
    os.environ["PATH"] = f"{trap}:{before}"
    try:
        printed["preprocess"] = succeed("data.data_preprocess", *PREPROCESS_FLAGS, *roots)
        printed["audit"] = succeed("data.data_audit", "--preset", "demo", "--num-workers", "0", *roots)
        weights = untrained_weights(folder / "model.safetensors", "glass_resnet")
        flags = ("--weights", weights, "--device", "cpu", "--output", folder / "p.csv")
        done = run_module("model_training.predict", *flags, f"{root}/fake/*.jpg", root / "fake")
    finally:
        os.environ["PATH"] = before
    found = {"preprocess": "dataset/unreadable.csv", "audit": f"dataset/audit/{name_of_root(root)}/unreadable.csv"}
    rows = {command: read_csv(results / "demo" / file) for command, file in found.items()}
    left_out = {of: {Path(row["path"]).name: row["problem"] for row in listed} for of, listed in rows.items()}
    predicted = {Path(row["path"]).name: row for row in read_csv(folder / "p.csv")}
    return Outputs(done, predicted, left_out, printed, (folder / "started").exists())


def test_all_commands_name_the_same_files_with_the_same_reasons_and_start_no_program(outputs: Outputs) -> None:
    expected = {name: reason for name, (_, reason) in FILES.items() if reason}
    predicted = {name: row["problem"] for name, row in outputs.rows.items() if row["problem"]}
    for found in (predicted, *outputs.left_out.values()):
        assert found.keys() == expected.keys()
        for name, reason in expected.items():
            assert found[name].startswith(reason), name
    assert outputs.predict.returncode == 1 and "Traceback" not in outputs.predict.stderr
    assert not outputs.started


def test_metadata_changes_no_score(outputs: Outputs) -> None:
    scores = {name: float(row["raw_probability_fake"] or "nan") for name, row in outputs.rows.items()}
    for name, whole in SAME.items():
        assert scores[name] == pytest.approx(scores[whole], abs=1e-6), name  # the order of sums in a batch
    assert np.nanstd(list(scores.values())) > 1e-4


def test_hidden_files_are_counted_and_not_used(outputs: Outputs) -> None:
    assert outputs.rows.keys() == FILES.keys()
    assert f"Ignored, in folders: {len(HIDDEN)} files of other kinds (hidden)" in outputs.predict.stdout
    assert f"Ignored, as hidden or without the ending of an image: {len(HIDDEN)} (" in outputs.printed["preprocess"]


def test_small_and_transparent_images_are_noted(outputs: Outputs) -> None:
    notes = {name: row["note"] for name, row in outputs.rows.items() if row["note"]}
    assert notes.pop("stored turned.jpg") == "EXIF orientation"  # a TIFF's decoder turns it
    said = "1 with an EXIF orientation, which is ignored, as in the paper: they are seen as they are stored: "
    assert outputs.predict.stdout.count(said) == 1
    small, transparent = ("smaller than a crop",) * 2, ("transparent parts",) * 2
    assert notes == dict(zip(("tiny.png", "row.png", "cutout.png", "cutout.gif.png"), small + transparent, strict=True))
    assert "2 with a side smaller than a crop" in outputs.predict.stdout
    assert "2 with transparent parts" in outputs.predict.stdout


def test_heic_is_read_with_pillow_heif(tmp_path: Path) -> None:
    library = pytest.importorskip("pillow_heif", reason="requirements-formats.txt is not installed")
    grey = PHOTO.convert("L").convert("RGB")
    for name in ("fake/a.heic", "real/b.HEIF"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        library.from_pillow(grey).save(tmp_path / "data" / name, quality=-1)  # lossless
    roots = ("--data-root", tmp_path / "data", "--results-root", tmp_path / "results")
    assert "Checked 2 images" in succeed("data.data_preprocess", *PREPROCESS_FLAGS, *roots)
    rows = read_csv(tmp_path / "results" / "demo" / "dataset" / "index.csv")
    assert [(row["format"], row["problem"]) for row in rows] == [("HEIF", "")] * 2
    pixels = np.asarray(read_image(tmp_path / "data" / "fake" / "a.heic", 10**6), int)
    assert np.abs(pixels - np.asarray(grey)).max() <= 3  # of the conversion to its colours and back


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_perturbed_scores_do_not_depend_on_threads(workers: int, tmp_path: Path) -> None:
    images = [noise(64, 64) for _ in range(12)]
    images += images[:4]  # some twice
    detector = load_detector(untrained_weights(tmp_path / "model.safetensors", "standard_resnet"), "cpu")
    names, interval = [f"jpeg_{quality}" for quality in (95, 90, 75, 50, 30)], sys.getswitchinterval()
    found = []
    try:
        sys.setswitchinterval(1e-5)  # seconds
        for threads in (0, workers):
            found.append([one.scores.values[0] for one in detector.predict_all(images, threads, names)])
    finally:
        sys.setswitchinterval(interval)
    assert found[0] == found[1] and len(set(found[0])) == 60


def test_an_image_that_no_jpeg_can_hold_is_found_in_preprocessing(toy_data: Path, tmp_path: Path) -> None:
    root, results = tmp_path / "data", tmp_path / "results"
    for class_name in ("fake", "real"):
        (root / class_name).mkdir(parents=True)
        for file in (toy_data / class_name).iterdir():
            (root / class_name / file.name).symlink_to(file)
    tall = root / "fake" / "tall.png"
    tall.write_bytes(saved(Image.new("RGB", (9, 66000)), "PNG"))
    roots, jpeg = ("--data-root", root, "--results-root", results), ("--reencode-jpeg", "90")
    training = ("model_training.standard_resnet_training", *TOY_FLAGS, *roots, *jpeg, "--epochs", "1", "--seeds", "1")
    succeed("data.data_preprocess", *PREPROCESS_FLAGS, *roots)
    said = refused(*training)
    assert (
        f"{tall}: 9x66000 pixels are too long for a JPEG (65500)" in said
        and "data_preprocess --reencode-jpeg 90" in said
    )
    for cache in (("--cache", "--cache-root", tmp_path / "cache"), ()):
        said = succeed("data.data_preprocess", *PREPROCESS_FLAGS, *roots, *jpeg, *cache)
        assert "Unreadable: 1 of 41 images" in said and "fake/tall.png  9x66000 pixels are too long for a JPEG" in said
    succeed(*training)


@pytest.mark.parametrize("target", ["pipe", "/dev/stdout", "/dev/null"])
def test_a_pipe_or_a_device_as_output_is_refused_and_not_replaced(target: str, toy_data: Path, tmp_path: Path) -> None:
    path = tmp_path / target  # which is `target` where that begins with "/"
    if target == "pipe":
        os.mkfifo(path)
    before, weights = os.lstat(path).st_ino, untrained_weights(tmp_path / "model.safetensors", "standard_resnet")
    roots = ("--data-root", toy_data, "--results-root", tmp_path / "results")
    for command in (
        ("model_training.predict", "--weights", weights, "--device", "cpu", toy_data / "fake", "--output", path),
        ("data.data_audit", "--preset", "demo", *roots, "--match", path),
    ):
        process = start_module(*command)  # whose output is a pipe
        assert f"{path} is a pipe or a device" in process.communicate(timeout=100)[1] and process.returncode == 2
    assert os.lstat(path).st_ino == before
