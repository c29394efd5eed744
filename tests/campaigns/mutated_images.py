"""Thousands of damaged image files: each must be decoded or refused with a reason, soon and in little memory.

    python -m tests.campaigns.mutated_images [--files 5000] [--seed 1]
    python -m tests.campaigns.mutated_images --commands [--files 10000] [--seed 1]

Small files of every kind are damaged (bits flipped, bytes removed, overwritten or inserted, a file's head set before
another's tail, sizes in headers overwritten) and read as training reads them, each in at most SECONDS, in a process
of at most MEGABYTES (Linux). The exit code is 1 if a file crashed it, hung, took more, or gave anything but an image or
`UnreadableImage`; such files are kept.

With --commands, `data_preprocess`, `data_audit` and `predict` get the files as data sets of BATCH each. They must end
within COMMAND_SECONDS with an expected exit code, without a traceback, and must start none of the PROGRAMS that image
libraries know.
"""

import argparse
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from multiprocessing import TimeoutError, get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import PAPER
from data.images import UnreadableImage, read_image
from data.lists import read_csv
from data.records import CLASSES
from tests.odd_images import saved
from tests.proc import peak_bytes

SECONDS, MEGABYTES = 30.0, 2000  # a progressive JPEG of 150 megapixels takes 1,540 MB, and 10 s on a busy machine
BATCH, COMMAND_SECONDS = 2500, 900
PROGRAMS = ("gs", "djpeg", "cjpeg", "ppmquant", "xv", "xdg-open")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n0 0 40 30 rectfill\nshowpage\n%%EOF\n"


def originals() -> dict[str, bytes]:
    """Small files, one of each kind that a data folder may hold."""
    values = np.random.default_rng(0).integers(0, 256, (150, 190, 3), dtype=np.uint8)
    smooth = Image.fromarray(values).resize((380, 300), Image.Resampling.BICUBIC)
    frames = [smooth, smooth.rotate(90), smooth.rotate(180)]
    exif = smooth.getexif()
    exif[0x010E] = "a description"
    sixteen = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (120, 90), dtype=np.uint16))

    palette, alpha = smooth.quantize(64), smooth.convert("RGBA")
    return {
        "jpeg": saved(smooth, "JPEG", quality=80),
        "jpeg progressive": saved(smooth, "JPEG", progressive=True, subsampling=0),
        "jpeg grey, EXIF, ICC": saved(smooth.convert("L"), "JPEG", exif=exif, icc_profile=bytes(3000)),
        "jpeg CMYK": saved(smooth.convert("CMYK"), "JPEG"),
        "jpeg restarts": saved(smooth, "JPEG", restart_marker_rows=1),
        "mpo": saved(smooth, "MPO", save_all=True, append_images=frames[1:]),
        "png": saved(smooth, "PNG"),
        "png palette": saved(palette, "PNG", transparency=0),
        "png alpha": saved(alpha, "PNG", exif=exif),
        "png 16 bit": saved(sixteen, "PNG"),
        "png 1 bit": saved(smooth.convert("1"), "PNG"),
        "apng": saved(smooth, "PNG", save_all=True, append_images=frames[1:]),
        "gif": saved(palette, "GIF", save_all=True, append_images=[f.quantize(64) for f in frames[1:]]),
        "webp": saved(smooth, "WEBP", quality=70),
        "webp lossless": saved(alpha, "WEBP", lossless=True, exif=exif),
        "webp animated": saved(smooth, "WEBP", save_all=True, append_images=frames[1:]),
        "bmp": saved(smooth, "BMP"),
        "bmp palette": saved(palette, "BMP"),
        "tiff": saved(smooth, "TIFF"),
        "tiff lzw": saved(smooth, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": saved(smooth, "TIFF", compression="jpeg"),
        "tiff deflate 16 bit": saved(sixteen, "TIFF", compression="tiff_adobe_deflate"),
        "tiff float": saved(sixteen.convert("F"), "TIFF"),
        "ppm": saved(smooth, "PPM"),
        "pgm 16 bit": saved(sixteen, "PPM"),
        "ppm as text": b"P3 30 20 255\n" + b" ".join(b"%d" % value for value in values[:20, :30].ravel()),
        "avif": saved(smooth, "AVIF", quality=70),
        "avif alpha, EXIF": saved(alpha, "AVIF", exif=exif, icc_profile=bytes(300)),
        "postscript": POSTSCRIPT,
    }


def flip_bits(data: bytearray, random_: random.Random, _: list[bytes]) -> None:
    """A few bits, half of the time near the head."""
    for _ in range(random_.choice((1, 3, 20, 200))):
        position = random_.randrange(min(len(data), random_.choice((64, 1024, len(data)))))
        data[position] ^= 1 << random_.randrange(8)


def truncate(data: bytearray, random_: random.Random, _: list[bytes]) -> None:
    del data[random_.randrange(len(data)) :]


def overwrite(data: bytearray, random_: random.Random, _: list[bytes]) -> None:
    """A run of one value, or of random ones."""
    start, length = random_.randrange(len(data)), random_.choice((1, 2, 4, 16, 500))
    run = random_.randbytes(length) if random_.random() < 0.5 else bytes([random_.choice((0, 255))]) * length
    data[start : start + length] = run


def remove_or_insert(data: bytearray, random_: random.Random, _: list[bytes]) -> None:
    """Some bytes less, more, or twice."""
    start, length = random_.randrange(len(data)), random_.choice((1, 7, 100, 3000))
    kind = random_.randrange(3)
    if kind == 0:
        del data[start : start + length]
    else:
        data[start:start] = random_.randbytes(length) if kind == 1 else data[start : start + length]


def splice(data: bytearray, random_: random.Random, others: list[bytes]) -> None:
    """The head of one file before the tail of another."""
    other, head = random_.choice(others), random_.randrange(1, min(len(data), 2000))
    data[head:] = other[random_.randrange(len(other)) :]


def change_size(data: bytearray, random_: random.Random, _: list[bytes]) -> None:
    """Another width or height in the header, often a huge one, with a checksum that agrees."""
    size = random_.choice((0, 1, 13, 5000, 14000, 30000, 65535, 2**31 - 1))
    if data[:4] == b"\x89PNG":
        place = random_.choice((16, 20))
        data[place : place + 4] = struct.pack(">I", size)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data[:2] == b"\xff\xd8":
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            at = data.find(marker)
            if at > 0:
                place = at + random_.choice((5, 7))
                data[place : place + 2] = struct.pack(">H", size % 65536)
    else:
        place = 18 if data[:2] == b"BM" else {b"GIF8": 6, b"RIFF": 24}.get(bytes(data[:4]), 8)
        data[place : place + 2] = struct.pack("<H", size % 65536)


DAMAGE = (flip_bits, truncate, overwrite, remove_or_insert, splice, change_size)


def read_one(path: Path) -> tuple[str, float, int]:
    """Read a file, in a process of its own; returns the outcome, its seconds and the peak memory in MB."""
    start = time.perf_counter()
    try:
        image = read_image(path, PAPER.settings.max_image_pixels)
        outcome = "image" if image.mode == "RGB" and min(image.size) > 0 else f"wrong: {image.mode} {image.size}"
    except UnreadableImage as error:
        outcome = f"reason: {error}" if str(error).strip() else "wrong: no reason"
    except BaseException as error:
        outcome = f"wrong: {type(error).__name__}: {error}"
    return outcome, time.perf_counter() - start, peak_bytes() // 2**20


def damaged_files(files: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Kind, damage and content of each file."""
    random_, sources = random.Random(seed), originals()
    kinds, contents = list(sources), list(sources.values())
    for number in tqdm(range(files), desc="damaged files", unit=" files", disable=None):
        kind, damage = kinds[number % len(kinds)], random_.choice(DAMAGE)
        damage(data := bytearray(sources[kind]), random_, contents)
        if random_.random() < 0.2:
            data = data or bytearray(1)
            random_.choice(DAMAGE)(data, random_, contents)
        yield kind, damage.__name__, bytes(data)


def run(files: int, seed: int, folder: Path) -> tuple[Counter, list[str], float, int]:
    """Damage and read; returns outcomes by kind, what went wrong, the longest time, and the peak memory in MB."""
    context = get_context("spawn")
    outcomes: Counter = Counter()
    wrong, longest, peak, process = [], 0.0, 0, context.Pool(1)
    for number, (kind, damage, data) in enumerate(damaged_files(files, seed)):
        path = folder / f"{number:05d}.jpg"
        path.write_bytes(data)
        try:
            outcome, seconds, memory = process.apply_async(read_one, (path,)).get(SECONDS)
        except TimeoutError:
            outcome, seconds, memory = "hung or crashed", SECONDS, 0
        longest, peak = max(longest, seconds), max(peak, memory)
        if memory > MEGABYTES:
            outcome = f"took {memory} MB"
        if outcome == "image" or outcome.startswith("reason"):
            outcomes[kind, outcome.partition(":")[0]] += 1
            path.unlink()
        else:
            outcomes[kind, "wrong"] += 1
            wrong.append(f"{path} ({kind}, {damage}): {outcome}")
            process.terminate()
            process = context.Pool(1)
    process.terminate()
    return outcomes, wrong, longest, peak


def run_commands(files: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Damage, and run the commands on all; returns the outcomes of `predict` by kind, and what went wrong."""
    from tests.conftest import ENVIRONMENT, PREPROCESS_FLAGS, REPOSITORY, untrained_weights  # with torch; see proc.py

    trap, started = folder / "bin", folder / "started"
    trap.mkdir()
    for name in PROGRAMS:
        (trap / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {started}\n')
        (trap / name).chmod(0o755)
    weights = untrained_weights(folder / "model.safetensors", "standard_resnet")
    environment = os.environ | ENVIRONMENT | {"PATH": f"{trap}:{os.environ['PATH']}"}
    outcomes: Counter = Counter()
    wrong = []
    for number, (kind, damage, data) in enumerate(damaged_files(files, seed)):
        batch = folder / f"batch_{number // BATCH}"
        for class_name in () if number % BATCH else CLASSES:
            (batch / class_name).mkdir(parents=True)
            (batch / class_name / "whole.png").write_bytes(originals()["png"])
        path = batch / CLASSES[number % 2] / f"{number:05d} {kind} {damage}.jpg"
        path.write_bytes(data)
        if number + 1 < files and (number + 1) % BATCH:
            continue
        own = (*PREPROCESS_FLAGS, "--data-root", batch, "--results-root", folder / "results")
        audited = (*PREPROCESS_FLAGS[:2], *PREPROCESS_FLAGS[4:], *own[len(PREPROCESS_FLAGS) :])
        output = folder / f"{batch.name}.csv"
        for module, codes, *flags in (
            ("data.data_preprocess", (0,), *own, "--cache", "--cache-root", folder / "cache"),
            ("data.data_audit", (0,), *audited),
            ("model_training.predict", (0, 1), "--weights", weights, "--device", "cpu", "--output", output, batch),
        ):
            command, pipes = [sys.executable, "-m", module, *map(str, flags)], dict(capture_output=True, text=True)
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=COMMAND_SECONDS, **pipes)
            if done.returncode not in codes or "Traceback" in done.stderr or started.exists():
                wrong.append(f"{module} on {batch}: exit code {done.returncode}, {done.stderr[-2000:]}")
        for row in read_csv(output):
            kind = Path(row["path"]).stem.partition(" ")[2].rpartition(" ")[0]
            if kind:  # not one of the intact files
                outcomes[kind, "reason" if row["problem"] else "image" if row["verdict"] else "wrong"] += 1
    return outcomes, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mutated_images_"))
    spent = ""
    if arguments.commands:
        outcomes, wrong = run_commands(arguments.files, arguments.seed, folder)
    else:
        outcomes, wrong, longest, peak = run(arguments.files, arguments.seed, folder)
        spent = f": longest {longest:.2f} s, peak memory {peak} MB"
    print("| kind | decoded | refused with a reason | anything else |\n|---|---:|---:|---:|")
    for kind in originals():
        print(f"| {kind} | {outcomes[kind, 'image']} | {outcomes[kind, 'reason']} | {outcomes[kind, 'wrong']} |")
    print(f"\n{arguments.files} files, seed {arguments.seed}{spent}")
    if wrong:
        print("\n".join(wrong))
        sys.exit(1)
    shutil.rmtree(folder)
