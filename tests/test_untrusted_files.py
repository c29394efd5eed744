"""Folders, images and weights as strangers give them: each is used, or refused with its reason."""

import hashlib
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import config
from data.data_preprocess import preprocess
from data.images import read_image
from data.index import read_index
from data.layouts import read_data_set
from models.build import build_model
from tests.conftest import PREPROCESS_FLAGS, MakePreset, succeed
from tests.odd_images import saved
from training.checkpoints import load_model, save_model
from utils import UserError, find_experiment


def test_links_back_to_a_folder_above_are_not_followed_for_ever(tmp_path: Path) -> None:
    for class_name in ("fake", "real"):
        (tmp_path / class_name / "deep").mkdir(parents=True)
        (tmp_path / class_name / "deep" / "a.jpg").write_bytes(b"x")
        (tmp_path / class_name / "deep" / "back").symlink_to(tmp_path / class_name)
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real" / "deep")  # a second way, not a loop
    names = [image.path for image in read_data_set(tmp_path).images]
    assert names == ["fake/deep/a.jpg", "real/again/a.jpg", "real/deep/a.jpg"]


def test_pipes_and_devices_are_not_opened(toy_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "fake").mkdir(parents=True)
    (root / "real").symlink_to(toy_data / "real")
    (root / "fake" / "good.png").write_bytes(next((toy_data / "fake").glob("*.png")).read_bytes())
    os.mkfifo(root / "fake" / "pipe.jpg")
    (root / "fake" / "zero.jpg").symlink_to("/dev/zero")
    flags = ("--results-root", tmp_path / "results", "--cache-root", tmp_path / "cache", "--cache")
    message = succeed("data.data_preprocess", *PREPROCESS_FLAGS, "--data-root", root, *flags, timeout=60)
    assert "fake/pipe.jpg  not a file" in message and "fake/zero.jpg  not a file" in message


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of this size with one grey row of data, and these chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (min(width, 5000) + 1))
    parts = (chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
FRAMES = {"save_all": True, "append_images": [NOISE.rotate(180), NOISE.rotate(90, expand=False)]}
BAD = {  # name: content, beginning of its reason; None where it gives an image
    "truncated.png": (saved(NOISE, "PNG")[:-7000], "image file is truncated"),
    "truncated.webp": (saved(NOISE, "WEBP")[:-700], "could not create decoder object"),
    "header only.jpg": (saved(NOISE, "JPEG")[:200], ""),
    "page.png": (b"<!doctype html><title>404</title>", "not an image"),
    "animated gif.png": (saved(NOISE.quantize(8), "GIF", **FRAMES), None),
    "animated.webp": (saved(NOISE, "WEBP", lossless=True, **FRAMES), None),
    "animated.png": (saved(NOISE, "PNG", **FRAMES), None),
    "two pictures.jpg": (saved(NOISE, "MPO", **FRAMES), None),
    "bomb.png": (png(50_000, 50_000), "50000x50000 pixels are more than max_image_pixels = 200000000"),
    "lies.png": (png(10_000, 10_000), "image file is truncated"),
    "no width.png": (png(0, 10), ""),
    "no height.jpg": (saved(NOISE, "JPEG").replace(b"\0\x3c\0\x50", b"\0\0\0\x50", 1), ""),
    "text bomb.png": (png(1, 1, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), None),
    "much metadata.jpg": (saved(NOISE, "JPEG", comment=b"x" * 65_000, icc_profile=bytes(2_000_000)), None),
    "ycck.jpg": (saved(NOISE.convert("CMYK"), "JPEG").replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2"), None),
    "16 bit.tif": (saved(Image.fromarray(np.full((9, 9), 65535, np.uint16)), "TIFF"), None),
    "a 'quoted', \n \"name\"\t.jpg": (saved(NOISE, "JPEG"), None),
}


def test_each_bad_file_is_decoded_or_refused_with_a_reason(tmp_path: Path, toy_preset: MakePreset) -> None:
    root = tmp_path / "images"
    (root / "real" / "folder called x.jpg").mkdir(parents=True)
    NOISE.save(root / "real" / "folder called x.jpg" / "inside.png")
    (root / "fake").mkdir()
    for name, (content, _) in BAD.items():
        (root / "fake" / name).write_bytes(content)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", ".hidden.jpg"):
        (root / "fake" / name).write_bytes(b"\0")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    preset = toy_preset(data_root=root, results_root=tmp_path / "results", cache_root=tmp_path / "cache")
    preprocess(preset, ("pixels",))
    records = {record.path: record for record in read_index(preset).records}
    assert records.keys() == {*(f"fake/{name}" for name in BAD), "real/folder called x.jpg/inside.png"}
    for name, (content, reason) in BAD.items():
        record = records[f"fake/{name}"]
        assert record.content == hashlib.sha256(content).hexdigest()
        if reason is None:
            assert (record.problem, min(record.width, record.height) > 0) == ("", True), name
        else:
            assert record.problem and record.problem.startswith(reason), (name, record.problem)
    first = np.asarray(NOISE)
    for name in ("animated.webp", "animated.png"):
        assert np.array_equal(np.asarray(read_image(root / "fake" / name, 10**9)), first), name
    assert np.asarray(read_image(root / "fake" / "16 bit.tif", 10**9)).min() == 255
    assert {path: path.read_bytes() for path in before} == before


HEAD = "1.1.weight"
WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a missing key": (lambda s: s.pop(HEAD), rf"it lacks 1 tensors \({HEAD}\)"),
    "another key": (lambda s: s.update(more=torch.zeros(1)), r"it has, besides the model's, 1 tensors \(more\)"),
    "another shape": (lambda s: s.update({HEAD: torch.zeros(3, 512)}), rf"{HEAD} is \(3, 512\), expected"),
    "another dtype": (lambda s: s.update({HEAD: s[HEAD].half()}), rf"{HEAD} is torch.float16, expected torch.float32"),
    "a negative variance": (
        lambda s: s["0.bn1.running_var"][0].fill_(-1),
        r"bn1\.running_var has variances below zero",
    ),
    "a NaN": (lambda s: s[HEAD][0].fill_(math.nan), rf"{HEAD} has values that are infinite or not a number"),
}


@pytest.mark.parametrize("problem", WEIGHTS)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    problem: str, tmp_path: Path, toy_preset: MakePreset
) -> None:
    change, reason = WEIGHTS[problem]
    model = build_model(find_experiment(config.DEMO, "standard_resnet"), toy_preset().settings)
    save_model(tmp_path / "model.safetensors", model.state_dict(), {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_model(tmp_path / "model.safetensors", model) == {}
    change(changed := {name: tensor.clone() for name, tensor in before.items()})
    save_file(changed, tmp_path / "model.safetensors", metadata={"about": "{}"})
    with pytest.raises(UserError, match=reason):
        load_model(tmp_path / "model.safetensors", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
