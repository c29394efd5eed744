"""The field's data sets as they lie: indexed, split, trained and evaluated by the real commands, or refused."""

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import Settings
from data.index import Index
from data.layouts import read_data_set
from data.lists import read_csv
from data.records import ImageRecord
from data.splits import split_index
from tests.conftest import PREPROCESS_FLAGS, TOY_FLAGS, refused, succeed, untrained_weights
from utils import UserError, read_json

RNG = np.random.default_rng(606)
TRAIN, TEST = 12, 4  # images of each class, of each of two generators


def content(is_fake: bool, kind: str = "PNG") -> bytes:
    pixels = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1) if is_fake else np.tile(pixels, (2, 2, 1))).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, is_fake: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(is_fake))
    return path


def cnndetection(root: Path) -> tuple[str, dict[str, int]]:
    for number in range(TRAIN + TEST):
        for is_fake, name in enumerate(("0_real", "1_fake")):
            put(root / "progan" / ("train" if number % 2 else "cat") / name / f"{number}.png", bool(is_fake))
            put(root / "biggan" / name / f"{number}.png", bool(is_fake))
    return "auto", {"biggan": 32, "progan": 32}  # of pictures of trains too, which are no part of a split


def genimage(root: Path) -> tuple[str, dict[str, int]]:
    for generator in ("imagenet_ai_0419_biggan", "imagenet_glide"):
        for part, count in (("train", TRAIN), ("val", TEST)):
            for number in range(count):
                put(root / generator / part / "ai" / f"{number}.png", True)
                put(root / generator / part / "nature" / f"{number}.png", False)
    return "auto", {"imagenet_ai_0419_biggan": 32, "imagenet_glide": 32}


def listed(root: Path) -> tuple[str, dict[str, int]]:
    rows = []
    for number in range(2 * (TRAIN + TEST)):
        for label in (0, 1):
            put(root / "pictures" / f"{number}_{label}.png", label == 1)
            split = "train" if number < 2 * TRAIN - 4 else "val" if number < 2 * TRAIN else "test"
            rows.append(f"pictures/{number}_{label}.png,{label},{split},{('sd', 'dalle')[number % 2] * label}\n")
    (root.parent / "list.csv").write_text("path,label,split,generator\n" + "".join(reversed(rows)))
    return f"{root.parent / 'list.csv'}:0=real", {"": 32, "sd": 16, "dalle": 16}


def nested(root: Path) -> tuple[str, dict[str, int]]:
    for part, count in (("train", 2 * TRAIN), ("test", 2 * TEST)):
        for number in range(count):
            put(root / part / "fake" / ("sd", "dalle")[number % 2] / f"{number}.png", True)
            put(root / part / "real" / f"{number}.png", False)
    return "fake_real", {"": 32, "sd": 16, "dalle": 16}


def prepared(make: object, tmp_path: Path) -> tuple[list[str | Path], str, dict[str, int]]:
    """A data set, indexed: flags that name it, what was said, and its sources."""
    layout, sources = make(tmp_path / "data")
    flags = ["--data-root", tmp_path / "data", "--data-layout", layout, "--results-root", tmp_path / "results"]
    return flags, succeed("data.data_preprocess", *PREPROCESS_FLAGS, *flags), sources


@pytest.mark.parametrize(
    "make",
    [
        cnndetection,
        pytest.param(genimage, marks=pytest.mark.slow),
        listed,
        pytest.param(nested, marks=pytest.mark.slow),
    ],
    ids=lambda make: make.__name__,
)
def test_each_layout_is_indexed_and_evaluated_by_generator(make: object, tmp_path: Path) -> None:
    flags, said, sources = prepared(make, tmp_path)
    assert "here 0 is fake and 1 is real" in said and ("becomes 1" in said) == (make in (cnndetection, listed))
    rows = read_csv(tmp_path / "results" / "demo" / "dataset" / "index.csv")
    for row in rows:
        last = (tmp_path / "data" / row["path"]).parent.name if make is not listed else row["path"][-5]
        assert int(row["label"]) == (last in ("0_real", "nature", "real", "0"))  # 1 is real
    assert [row["label"] for row in rows] == ["0"] * 32 + ["1"] * 32 and Counter(r["source"] for r in rows) == sources
    given = {"": 64} if make is cnndetection else {"train": 40, "valid": 8, "test": 16} if make is listed else None
    assert Counter(row["part"] for row in rows) == (given or {"train": 48, "test": 16})
    weights = untrained_weights(tmp_path / "w.safetensors", "standard_resnet")
    common = ("--preset", "demo", "--device", "cpu", "--num-workers", "0", "--name", "here")
    succeed("model_training.evaluate", "--weights", weights, *flags, *common)
    found = read_csv(tmp_path / "results" / "demo" / "evaluation" / "here" / "evaluation.csv")
    assert {row["images"] for row in found if row["fake"] not in ("0", "32")} >= sources.keys() - {""}
    said = succeed("data.data_audit", *flags, *common[:2], *common[4:6], "--valid-size", "8", "--test-size", "16")
    assert ("Split as given" in said) == (make is not cnndetection) and "left out of the audit" not in said


@pytest.mark.parametrize("make", [genimage, listed], ids=lambda make: make.__name__)
def test_a_given_split_is_what_a_training_uses(make: object, tmp_path: Path) -> None:
    flags, *_ = prepared(make, tmp_path)
    flags = [*TOY_FLAGS, *flags[:2], *flags[4:], "--valid-size", "8"]  # the index says how the data lie
    said = succeed("model_training.standard_resnet_training", *flags, "--epochs", "1", "--seeds", "1")
    assert f"Split as given: 40 train, 8 valid{' (of the 48 of train)' * (make is genimage)}, 16 test" in said
    tested = read_csv(next((tmp_path / "results").rglob("predictions.csv")))
    rows = read_csv(tmp_path / "results" / "demo" / "dataset" / "index.csv")
    assert {row["path"] for row in tested} == {row["path"] for row in rows if row["part"] == "test"}
    wrong = refused("model_training.standard_resnet_training", *flags, "--epochs", "1", "--data-layout", "fake_real")
    assert "index.csv has the layout " in wrong and ", not fake_real: run python -m data.data_preprocess" in wrong


def test_a_part_drawn_from_train_keeps_groups_and_given_parts_change_the_fingerprint() -> None:
    names = [(label, part, number) for label in (0, 1) for part in ("train", "test") for number in range(20)]
    records = tuple(ImageRecord(f"{label}/{part}/{n}.png", label, part=part) for label, part, n in names)
    index, splits = split_index(Index(Path("x"), records), Settings(group_by="stem", valid_size=0.2, hold_out=("3",)))
    stems = [{Path(records[row].path).stem for row in rows} for rows in (splits.train, splits.valid, splits.test)]
    assert len(splits.valid) == 8 and not stems[0] & stems[1] and len(splits.test) == 42  # 3 of train and of test
    assert sorted(splits.final_train + splits.final_valid) == sorted(splits.train + splits.valid)
    without_parts = replace(index, records=tuple(replace(record, part="") for record in records))
    assert index.fingerprint != without_parts.fingerprint
    with pytest.raises(UserError, match="x gives leaves no images of both classes to train"):
        split_index(Index(Path("x"), tuple(replace(record, part="test") for record in records)), Settings())


def test_given_splits_are_kept_however_they_are_spelt(tmp_path: Path) -> None:
    for root, places in (("deep", ("Train/{}/sd", "TEST/{}/sd")), ("plain", ("{}/training/sd", "{}/testing/sd"))):
        for place in places:
            for is_fake, name in enumerate(("real", "fake")):
                put(tmp_path / root / place.format(name) / "0.png", bool(is_fake))
        data = read_data_set(tmp_path / root)
        found = sorted((image.label, image.part, image.source) for image in data.images)
        assert found == [(label, part, "sd") for label in (0, 1) for part in ("test", "train")]
        assert "Split as given: 2 test, 2 train" in data.described() and not data.plain


WRONG = {  # files, where a folder ends in / and the text of a list has a comma -> what is said
    ("real/fake/a.png", "fake/a.png"): "real/fake/a.png lies in folders of both classes, so that labels",
    ("g/real/fake/a.png", "g/fake/a.png"): "real/fake/a.png lies in folders of both classes, so that labels",
    ("g/0_fake/a.png", "g/1_real/a.png"): "has 0_fake, 1_real, so that labels might be reversed",
    ("g/0_real/a.png", "g/1_fake/a.png", "h/ai/a.png", "h/nature/a.png"): "has 0_real, 1_fake, ai, nature, so that ",
    ("fake/a.png", "real/a.png", "0_real/a.png", "1_fake/a.png"): "has 0_real, 1_fake, fake, real, so that ",
    ("cats/a.png", "dogs/a.png"): "/fake does not exist: a data root holds fake/ and real/; or, at any depth",
    ("0_fakes/a.jpg", "0_real/a.jpg", "ai/", "x.csv/"): "{root} holds 0_fakes/, 0_real/, ai/, x.csv/",
    ("fake/a.jpg", *(f"{n}/" for n in range(7))): "{root} holds 0/, 1/, 2/, 3/, 4/ and 3 more",
    ("fake/a.jpg", "real/a.cr2"): ".heif): it holds a.cr2",
    (
        "train/ai/a.png",
        "train/nature/a.png",
        "val/ai/a.png",
        "new/ai/a.png",
    ): "has train, val and beside them new: list",
    ("a.png", "path,label\na.png,1"): "labels a.png 1, which may mean either class: expected fake or real, or what the "
    "numbers mean, as --data-layout {root}/list.csv:0=real",
    ("a.png", "path,label\na.png,cat"): "labels a.png cat, which may mean either class: expected fake or real",
    ("a.png", "path,label\nb.png,fake"): "lists b.png, which is no file of ",
    ("a.png", "path,label\n./../list.csv,fake"): "lists ./../list.csv, which is no file of ",
    ("a.png", "path,label\n/etc/passwd,fake"): "lists /etc/passwd, which is no file of ",
    ("g/fake/a.png", "g/real/a.png", "path,label\ng/fake/a.png,real"): "has fake, real, list.csv, so that ",
    ("train/fake/a.png", "train/real/a.png", "test/Fake/a.png"): "has a folder Fake, to be called fake: ",
    ("a.png", "path,label\na.png,fake\n./a.png,real"): "lists ./a.png twice",
    ("a.png", "b.png", "path,label,split\na.png,fake,train\nb.png,real,"): "with and without a split",
    ("a.png", "path,label,split\na.png,fake,dev"): "in a split dev: expected train, val or test",
    ("a.png", "path,label\na.png,fake"): "lists images of one class only",
}


@pytest.mark.parametrize("files", WRONG)
def test_a_layout_that_is_ambiguous_or_unknown_is_refused(files: tuple[str, ...], tmp_path: Path) -> None:
    for name in files:
        path = tmp_path / ("list.csv" if "," in name else name)
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(name)
    with pytest.raises(UserError) as error:
        read_data_set(tmp_path)
    assert WRONG[files].format(root=tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_layout_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "g" / "0_real" / "a.png", False)
    for root, layout, said in (
        (tmp_path, "ai_nature", "/ai does not exist: a data root holds fake/ and real/; or"),
        (tmp_path / "none", "auto", "holds nothing, since it does not exist"),
        (tmp_path, "coco", "data_layout is coco: expected auto, fake_real, 0_real_1_fake, ai_nature, LIST.csv or LIST"),
    ):
        with pytest.raises(UserError, match=said):
            read_data_set(root, layout)


def test_the_index_of_a_plain_data_set_keeps_its_columns_and_its_fingerprint(toy_data: Path, indexed: Path) -> None:
    heading = (indexed / "demo" / "dataset" / "index.csv").read_text().partition("\n")[0]
    assert heading == "path,label,bytes,content,format,mode,width,height,problem,key"
    expected = [(f"{name}/{path.name}", label) for label, name in enumerate(("fake", "real"))
                for path in sorted((toy_data / name).iterdir())]  # fmt: skip
    assert [(image.path, image.label) for image in read_data_set(toy_data).images] == expected
    rows = read_csv(indexed / "demo" / "dataset" / "index.csv")
    text = "\n".join(sorted(f"{r['path']}\0{r['label']}\0{r['content']}\0True" for r in rows))
    fingerprint = f"40-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    assert read_json(indexed / "demo" / "dataset" / "statistics.json")["fingerprint"] == fingerprint


WRITE = """
import sys
from datasets import Dataset, DatasetDict, Features, Image, Value
kind, target, *files = sys.argv[1:]
rows = [dict(image={"bytes": open(file, "rb").read(), "path": None}, label=file[-5], model="sd") for file in files]
if kind == "saved":
    features = Features(image=Image(), label=Value("string"), model=Value("string"))
    rows = [row | {"label": ["real", "fake"][int(row["label"])]} for row in rows]
    DatasetDict({name: Dataset.from_list(rows[start::2], features=features)
                 for start, name in enumerate(("train", "validation"))}).save_to_disk(target)
else:
    rows = [dict(image_data=row["image"]["bytes"], label=int(row["label"]), model_name="sd") for row in rows]
    Dataset.from_list(rows).to_parquet(target + "/train.parquet")
"""


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_hugging_face_data_set_is_written_byte_for_byte_with_a_list(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets.load", reason="requirements-datasets.txt is not installed")
    files = [tmp_path / f"{number}_{number // 2 % 2}.png" for number in range(40)]
    for number, file in enumerate(files):
        file.write_bytes(content(number // 2 % 2 == 1, "JPEG" if number % 3 else "PNG"))
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", WRITE, kind, source, *files], check=True, env=offline, cwd=tmp_path)
    command = ("data.data_download", "--hugging-face", source, "--folder", folder)
    assert f"and list.csv are in {folder}" in succeed(*command, "--images", "7")
    with open(next(folder.glob(".*.csv")), "a") as progress:
        progress.write("train/0000")  # as a kill leaves it
    first = folder / "train" / "00000000.png"
    written = first.stat().st_mtime_ns
    said = succeed(*command)
    assert "40 images and list.csv" in said and (":0=real" in said) == (kind == "parquet")
    assert first.stat().st_mtime_ns == written
    rows = read_csv(folder / "list.csv")
    order = files if kind == "parquet" else files[0::2] + files[1::2]
    assert [(folder / row["path"]).read_bytes() for row in rows] == [file.read_bytes() for file in order]
    assert {row["generator"] for row in rows} == {"sd"}
    layout = ["--data-layout", f"{folder / 'list.csv'}:0=real"] if kind == "parquet" else []
    said = succeed("data.data_preprocess", *PREPROCESS_FLAGS, "--data-root", folder, *layout, "--results-root", source)
    assert ("20 test, 20 train" in said) == (kind == "saved") and "1 generators or sources: sd 40" in said
    index = read_csv(source / "demo" / "dataset" / "index.csv")
    labels = {row["content"]: row["label"] for row in index}
    assert all(labels[hashlib.sha256(file.read_bytes()).hexdigest()] == str(1 - int(file.stem[-1])) for file in files)
    assert f"{folder} holds something else than other" in refused(*command[:2], "other", *command[3:])


CLIMB = """
import json, sys
from datasets import Dataset, DatasetDict, Features, Image
kind, target, file = sys.argv[1:]
rows = Dataset.from_list([dict(image={"bytes": None, "path": file})], features=Features(image=Image()))
if kind == "split":
    DatasetDict({"train": rows}).save_to_disk(target + "/data")
    rows.save_to_disk(target + "/escaped")
    json.dump({"splits": ["../escaped"]}, open(target + "/data/dataset_dict.json", "w"))
else:
    rows.to_parquet(target + "/data/train.parquet")
"""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("split", "has a split '../escaped', which is no folder name"), ("path", "row 0 has its image in ")],
)
def test_a_hugging_face_data_set_neither_reads_nor_writes_outside(kind: str, reason: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets.load", reason="requirements-datasets.txt is not installed")
    (source := tmp_path / "source" / "data").mkdir(parents=True)
    secret = put(tmp_path / "secret.png", True)
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", CLIMB, kind, source.parent, secret], check=True, env=offline)
    before = set(tmp_path.rglob("*.png"))
    folder = tmp_path / "folders" / "own"
    assert reason in refused("data.data_download", "--hugging-face", source, "--folder", folder)
    assert set(tmp_path.rglob("*.png")) == before and not (folder / "list.csv").exists()


@pytest.mark.parametrize("kind", ["files", "archive"])
def test_images_beside_the_rows_of_a_hugging_face_data_set_are_read(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets.load", reason="requirements-datasets.txt is not installed")
    (source := tmp_path / "data").mkdir()
    if kind == "files":
        image = put(source / "train" / "fake" / "0.png", True).read_bytes()
        put(source / "train" / "real" / "0.png", False)
    else:
        image = content(True)
        with zipfile.ZipFile(source / "images.zip", "w") as archive:
            archive.writestr("0.png", image)
        place, offline = f"zip://0.png::{source}/images.zip", os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", CLIMB, kind, tmp_path, place], check=True, env=offline)
    succeed("data.data_download", "--hugging-face", source, "--folder", tmp_path / "folder")
    assert (tmp_path / "folder" / "train" / "00000000.png").read_bytes() == image
