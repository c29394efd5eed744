"""The audit: headers are read exactly, a leak is found where there is one, copies are named, a match is balanced."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from sklearn.metrics import roc_auc_score

from data.audit.duplicates import near_duplicates
from data.audit.header_classifier import FEATURES, auc, audit_headers
from data.audit.headers import read_header
from data.audit.matching import match_pairs
from data.data_audit import connected_groups
from data.images import open_image
from data.index import read_list
from data.lists import name_of_root, read_csv
from tests.conftest import refused, succeed
from tests.odd_images import saved
from utils import UserError

RNG = np.random.default_rng(606)


def picture(width: int = 96, height: int = 64) -> Image.Image:
    """A random mosaic of 32 x 24 stones, blurred."""
    mosaic = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(mosaic).resize((width, height), Image.Resampling.BICUBIC)


def header_of(path: Path) -> dict[str, Any]:
    with open_image(path, 10**9) as image:
        return read_header(image, path.name, path.stat().st_size)


def values(header: dict[str, Any], *names: str) -> tuple:
    return tuple(header[name] for name in names)


def test_the_quality_of_a_jpeg_is_the_one_it_was_saved_at(tmp_path: Path) -> None:
    names, image = ("jpeg_quality", "jpeg_ijg", "subsampling", "progressive"), picture(16, 16)
    for quality in range(1, 101):
        sampling, progressive = ("4:4:4", "4:2:2", "4:2:0")[quality % 3], quality % 2 == 0
        image.save(tmp_path / "a.jpg", quality=quality, subsampling=sampling, progressive=progressive)
        assert values(header_of(tmp_path / "a.jpg"), *names) == (quality, True, sampling, progressive)
        image.convert("L").save(tmp_path / "grey.jpg", quality=quality)
        assert values(header_of(tmp_path / "grey.jpg"), *names) == (quality, True, "", False)


def test_tables_that_are_not_the_ijgs_get_the_nearest_quality(tmp_path: Path) -> None:
    with Image.open(io.BytesIO(saved(picture(), "JPEG", quality=80))) as image:
        first, *others = map(list, image.quantization.values())
    picture().save(tmp_path / "a.jpg", qtables=[[*first[:5], first[5] + 1, *first[6:]], *others])
    assert values(header_of(tmp_path / "a.jpg"), "jpeg_quality", "jpeg_ijg") == (80, False)


def test_sizes_are_measured_and_the_ending_is_compared_with_the_content(tmp_path: Path) -> None:
    picture(192, 128).save(tmp_path / "a.JPG", "PNG")
    size = (tmp_path / "a.JPG").stat().st_size
    names = ("format", "ending", "ending_fits", "mode", "width", "height", "aspect", "megapixels", "bits_per_pixel")
    expected = ("PNG", "jpg", False, "RGB", 192, 128, 1.5, 192 * 128 / 1e6, 8 * size / (192 * 128))
    header = header_of(tmp_path / "a.JPG")
    assert values(header, *names) == expected
    assert values(header, "divisible_by_8", "divisible_by_64", "jpeg_ijg", "subsampling") == (True, True, False, "")
    assert np.isnan(header["jpeg_quality"])
    picture(40, 56).save(tmp_path / "b.jpeg")
    header = header_of(tmp_path / "b.jpeg")
    assert values(header, "ending_fits", "divisible_by_8", "divisible_by_16") == (True, True, False)


def test_a_camera_and_its_software_are_read_from_every_format(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0131] = "Canon", "EOS 5D", "Firmware 1.0"
    for ending in ("jpg", "png", "webp", "tif"):
        path = tmp_path / f"a.{ending}"
        picture().save(path, exif=exif)
        found = values(header_of(path), "exif", "camera", "software", "generator", "c2pa", "xmp")
        assert found == (True, "Canon EOS 5D", "Firmware 1.0", "", False, False), ending


def test_what_generators_write_is_found(tmp_path: Path) -> None:
    texts = [
        *(("parameters", "a cat\nSteps: 20, Sampler: Euler", "a1111"), ("workflow", '{"nodes": []}', "comfyui")),
        *(("prompt", '{"3": {"class_type": "KSampler"}}', "comfyui"), ("invokeai_metadata", "{}", "invokeai")),
        *(("Software", "NovelAI", "novelai"), ("Comment", "the parameters of a workflow, with a prompt", "")),
    ]
    for keyword, text, generator in texts:
        for compressed in (False, True):
            info = PngImagePlugin.PngInfo()
            info.add_text(keyword, text, zip=compressed)
            picture().save(tmp_path / "a.png", pnginfo=info)
            if not compressed or keyword in ("parameters", "workflow", "invokeai_metadata"):  # the others never are
                assert header_of(tmp_path / "a.png")["generator"] == generator, keyword
    exif = Image.Exif()  # a user comment
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat\nSteps: 20, Sampler: Euler".encode("utf-16-be")
    for ending in ("jpg", "webp"):
        picture().save(tmp_path / f"a.{ending}", exif=exif)
        assert header_of(tmp_path / f"a.{ending}")["generator"] == "a1111"


def test_signed_provenance_is_found_in_jpeg_png_and_webp(tmp_path: Path) -> None:
    box = b"\0\0\0\x1ejumbjumdc2pa\0\x11\0\x10"
    jpeg = saved(picture(), "JPEG")
    segment = b"JP\0\x01\0\0\0\x01" + box
    (tmp_path / "a.jpg").write_bytes(jpeg[:2] + b"\xff\xeb" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:])
    picture().save(tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    chunk = struct.pack(">I", len(box)) + b"caBX" + box + struct.pack(">I", zlib.crc32(b"caBX" + box))
    (tmp_path / "a.png").write_bytes(png[:33] + chunk + png[33:])
    picture().save(tmp_path / "a.webp", exif=Image.Exif(), xmp=b"<x:xmpmeta/>")
    webp = (tmp_path / "a.webp").read_bytes() + b"C2PA" + struct.pack("<I", len(box)) + box
    (tmp_path / "a.webp").write_bytes(webp[:4] + struct.pack("<I", len(webp) - 8) + webp[8:])
    for ending in ("jpg", "png", "webp"):
        assert header_of(tmp_path / f"a.{ending}")["c2pa"], ending
    assert header_of(tmp_path / "a.webp")["xmp"]


def test_damaged_metadata_do_no_harm(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", icc_profile=b"no profile")
    assert values(header_of(tmp_path / "a.jpg"), "exif", "camera", "icc_profile") == (False, "", "unreadable")


def test_the_auc_equals_that_of_scikit_learn() -> None:
    labels, scores = RNG.integers(0, 2, 200), RNG.integers(0, 20, 200) / 20
    weights = RNG.integers(0, 4, 200)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels == 0, scores))
    assert auc(labels, scores, weights) == pytest.approx(roc_auc_score(labels == 0, scores, sample_weight=weights))


def test_pairs_with_the_same_headers_have_the_auc_of_chance() -> None:
    pairs = np.zeros((120, len(FEATURES)))
    pairs[:, 2:5] = RNG.normal(size=(60, 3)).repeat(2, 0)
    labels, groups = np.tile([0, 1], 60), np.arange(60).repeat(2)
    together = audit_headers(pairs, labels, groups, seed=1).all
    apart = audit_headers(pairs, labels, np.arange(120), seed=1).all
    assert together.auc == 0.5 and apart.auc < 0.2
    groups = connected_groups(["a", "b", "a", "c", "d"], [1, 2, 3, 3, 4])
    assert groups[0] == groups[2] == groups[3] and len({groups[0], groups[1], groups[4]}) == 3


def test_as_many_pairs_are_matched_as_the_caliper_allows() -> None:
    scores = np.array([0.5, 0.6, 0.9, 0.4, 0.55, 0.62, 0.1])
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    logits = np.log(scores / (1 - scores))
    for caliper, expected in ((0.1, 1), (0.3, 2), (9, 3)):
        pairs = match_pairs([["x"] * 7], labels, scores, caliper)
        assert len(pairs) == expected
        assert all(labels[fake] == 0 and labels[real] == 1 for fake, real in pairs)
        assert all(abs(logits[fake] - logits[real]) <= caliper * logits.std() + 1e-9 for fake, real in pairs)
    assert len(match_pairs([list("abcabcd")], labels, scores, 9)) == 3
    assert len(match_pairs([list("aaabbbb")], labels, scores, 9)) == 0


def test_flat_images_are_no_copies_of_each_other() -> None:
    hashes = np.zeros((4, 4), np.uint64)
    thumbnails = RNG.integers(0, 2, (4, 32, 32), dtype=np.uint8)  # noise of one grey level
    thumbnails[2:] = 100 * RNG.integers(0, 2, (32, 32), dtype=np.uint8)
    pairs, nearest = near_duplicates(hashes, thumbnails)
    assert [(pair.first, pair.other, pair.bits) for pair in pairs] == [(2, 3, 0)]
    assert nearest.tolist() == [-1, -1, 0, 0]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A data root where sizes leak but for a few images, its audit's folder, and what the audit printed."""
    folder = tmp_path_factory.mktemp("leak")
    root, results = folder / "images", folder / "results"
    for class_name, sizes in (("fake", ((64, 64),)), ("real", ((96, 64), (64, 96)))):
        (root / class_name).mkdir(parents=True)
        for number in range(40):
            shared = number % 2 == 0  # sizes and qualities that both classes have
            size = ((80, 60), (60, 80))[number // 2 % 2] if shared else sizes[number // 2 % len(sizes)]
            quality = 80 if shared else {"fake": 85, "real": 92}[class_name]
            picture(*size).save(root / class_name / f"{class_name}_{number:02d}.jpg", quality=quality)
    same = picture(160, 120)
    same.save(root / "fake" / "same.png")
    same.resize((120, 90)).save(root / "real" / "copy.jpg", quality=60)
    (root / "real" / "same.png").write_bytes((root / "fake" / "same.png").read_bytes())
    for name in ("white", "grey"):
        Image.new("RGB", (70, 70), name).save(root / "fake" / f"{name}.png")
    (root / "fake" / "broken.jpg").write_bytes(saved(picture(), "JPEG")[:300])
    printed = succeed(
        *("data.data_audit", "--valid-size", "0.2", "--test-size", "0.2", "--num-workers", "0"),
        *("--data-root", root, "--results-root", results, "--match", folder / "matched.csv", "--caliper", "0.5"),
    )
    return root, results / "paper" / "dataset" / "audit" / name_of_root(root), printed


def test_a_leak_is_found_and_named(audited: tuple[Path, Path, str]) -> None:
    _, folder, printed = audited
    found = json.loads((folder / "audit.json").read_text())
    assert found["images"] == {"fake": 43, "real": 42}
    assert 0.65 < found["all_headers"]["low"] < found["all_headers"]["auc"] < found["all_headers"]["high"] < 0.98
    alone = {name: values["auc_alone"] for name, values in found["features"].items()}
    assert alone["megapixels"] > 0.65 and alone["jpeg_quality"] > 0.65 and alone["camera"] == alone["c2pa"] == 0.5
    assert found["without_file_size"]["low"] > 0.6
    assert f"Headers: of 85 images, {found['verdict']}." in printed and "mainly by" in found["verdict"]
    rows = read_csv(folder / "audit.csv")
    assert len(rows) == 85 and {row["split"] for row in rows} == {"train", "valid", "test"}
    assert {(row["class"], row["width"], row["jpeg_quality"]) for row in rows} >= {("fake", "64", "85.0")}
    assert (folder / "features.md").read_text().startswith("| feature ")
    for name in ("headers", "giveaway", "nearest"):
        Image.open(folder / f"{name}.png").verify()
    assert [row["path"] for row in read_csv(folder / "unreadable.csv")] == ["fake/broken.jpg"]
    assert "Unreadable: 1 of 86 images" in printed and "fake/broken.jpg" in printed


def test_duplicates_are_found_across_classes_and_splits(audited: tuple[Path, Path, str]) -> None:
    _, folder, printed = audited
    rows = {(row["path_a"], row["path_b"]): row for row in read_csv(folder / "duplicates.csv")}
    assert rows.keys() == {("fake/same.png", "real/same.png"), ("fake/same.png", "real/copy.jpg")}
    exact, near = rows["fake/same.png", "real/same.png"], rows["fake/same.png", "real/copy.jpg"]
    assert (exact["kind"], exact["class_a"], exact["class_b"]) == ("exact", "fake", "real")
    assert near["kind"] == "near" and int(near["bits"]) <= 40
    counts = json.loads((folder / "audit.json").read_text())["duplicates"]
    parts = {row["path"]: row["split"] for row in read_csv(folder / "audit.csv")}
    for kind, row in (("exact", exact), ("near", near)):
        assert (row["split_a"], row["split_b"]) == (parts[row["path_a"]], parts[row["path_b"]])
        assert counts[kind]["pairs"] == counts[kind]["across_classes"] == 1
        assert counts[kind]["across_split"] == (row["split_a"] != row["split_b"])
    assert "Flat: 2 images" in printed


def test_a_match_is_balanced_and_less_discriminative(audited: tuple[Path, Path, str]) -> None:
    root, folder, printed = audited
    rows = read_csv(root.parent / "matched.csv")
    found = json.loads((folder / "audit.json").read_text())
    assert list(rows[0]) == ["path", "label"] and all((root / row["path"]).is_file() for row in rows)
    assert [row["label"] for row in rows] == ["0", "1"] * found["matched"]["pairs"]
    assert len({row["path"] for row in rows}) == len(rows) and 15 <= found["matched"]["pairs"] <= 25
    assert found["matched"]["all_headers"]["auc"] < found["all_headers"]["auc"] - 0.1
    headers = {row["path"]: row for row in read_csv(folder / "audit.csv")}
    for fake, real in zip(rows[::2], rows[1::2], strict=True):
        for name in ("format", "subsampling", "jpeg_quality"):
            assert headers[fake["path"]][name] == headers[real["path"]][name]
    assert f"Matched: {len(rows) // 2} fake and {len(rows) // 2} real images of 85" in printed


def test_a_listed_subset_is_audited_and_shows_no_leak(audited: tuple[Path, Path, str], tmp_path: Path) -> None:
    root, _, _ = audited
    shared = [f"{name}/{name}_{number:02d}.jpg" for name in ("fake", "real") for number in range(0, 40, 2)]
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(shared))
    flags = ("--results-root", tmp_path, "--num-workers", "0", "--data-list", tmp_path / "list.csv")
    printed = succeed("data.data_audit", "--data-root", root, *flags)
    name = name_of_root(root, str(tmp_path / "list.csv"))
    found = json.loads((tmp_path / "paper" / "dataset" / "audit" / name / "audit.json").read_text())
    assert name != name_of_root(root)
    assert found["images"] == {"fake": 20, "real": 20} and found["without_file_size"]["low"] <= 0.5
    assert found["verdict"].startswith(("no evidence", "the headers do not help"))
    assert "Splits are left out of the audit: 40 images" in printed  # the paper's 1,800 do not fit
    (tmp_path / "list.csv").write_text("path\n")
    with pytest.raises(UserError, match="has a heading and no rows"):
        read_list(str(tmp_path / "list.csv"), root, shared)


def test_what_cannot_be_audited_or_matched_is_refused_in_one_sentence(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for class_name, ending in (("fake", "png"), ("real", "jpg")):
        (root / class_name).mkdir(parents=True)
        for number in range(6):
            picture().save(root / class_name / f"{class_name}_{number}.{ending}")
    for match, sentence in ((root / "out.csv", "never written to"), (tmp_path / "out.csv", "raise --caliper")):
        places = ("--data-root", root, "--results-root", tmp_path, "--num-workers", "0", "--match", match)
        said = refused("data.data_audit", *places)
        assert said.startswith("error: ") and sentence in said and not match.exists()
    assert (tmp_path / "paper/dataset/audit" / name_of_root(root) / "audit.json").exists()
    with pytest.raises(UserError, match="4 images in the smaller class are too few"):
        audit_headers(np.zeros((12, len(FEATURES))), np.arange(12) // 4 % 2, np.arange(12), 1)
