"""The page of `model_training.app` with many clients at once: no answer lost, numbers of `predict`, bounded memory.

    python -m tests.campaigns.app [--requests 200] [--clients 8] [--seed 1] [--weights FILE]

FILES files of every kind (intact and damaged ones, texts, from one pixel to MAX_PIXELS) are uploaded one a request, in
an order drawn with the seed, to a server on two cores. The exit code is 1 if an answer is missing or differs from that
of `predict` (texts equal, numbers to 1e-6), a traceback is printed, or the server has used MEGABYTES or more.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from config import Settings
from data.lists import read_csv
from tests.campaigns.mutated_images import originals
from tests.conftest import run_module, untrained_weights
from tests.odd_images import noise, saved
from tests.pages import agree, drop_files, served
from tests.proc import peak_bytes

FILES, MEGABYTES = 50, 3000
MAX_PIXELS = Settings.max_image_pixels
ENDINGS = {"jpeg": "jpg", "mpo": "jpg", "apng": "png", "pgm": "pgm", "postscript": "eps"}  # else the kind's first word


def write_files(folder: Path) -> list[Path]:
    """Images of every kind; large, tiny and odd ones; files that are no images; and truncated ones, up to FILES."""
    wide = Image.fromarray(np.tile(np.arange(20_000, dtype=np.uint16).astype(np.uint8), (MAX_PIXELS // 20_000, 1)))
    files = {f"{kind}.{ENDINGS.get(kind.split()[0], kind.split()[0])}": data for kind, data in originals().items()}
    whole = list(files.items())
    files |= {
        "large.jpg": saved(wide.convert("RGB"), "JPEG"),
        "large grey.png": saved(wide, "PNG"),
        "too large.png": saved(Image.new("1", (MAX_PIXELS // 100 + 1, 100)), "PNG"),
        "one pixel.png": saved(noise(1, 1), "PNG"),
        "row.png": saved(noise(5000, 1), "PNG"),
        "grey alpha.png": saved(noise(150, 140).convert("LA"), "PNG"),
        "transparent.png": saved(Image.new("RGBA", (90, 80)), "PNG"),
        "é 中.png": saved(noise(120, 130), "PNG"),
        "text.jpg": b"hello",
        "empty.jpg": b"",
    }
    for name, data in whole[: FILES - len(files)]:
        files[f"half of {name}"] = data[: len(data) // 2]
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--requests", 200), ("--clients", 8), ("--seed", 1)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--weights", type=Path)
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    scratch = Path(tempfile.mkdtemp(prefix="app_campaign_"))
    paths = write_files(scratch / "files")
    weights = given.weights or untrained_weights(scratch / "model.safetensors", "glass_resnet")
    flags = ("--weights", weights, "--device", "cpu", "--draws", "5", "--output", scratch / "predictions.csv")
    message = run_module("model_training.predict", *flags, *paths, timeout=900).stderr
    rows = {Path(row["path"]): row for row in read_csv(scratch / "predictions.csv")}

    requests = (paths * -(-given.requests // len(paths)))[: given.requests]
    random.Random(given.seed).shuffle(requests)
    drops = [[[path] for path in requests[n :: given.clients]] for n in range(given.clients)]
    start = time.monotonic()
    with served(weights) as server, ThreadPoolExecutor(given.clients) as clients:
        answers = list(clients.map(drop_files, [server.url] * given.clients, drops))
        seconds, megabytes = time.monotonic() - start, peak_bytes(server.process.pid) / 1e6
    lost, different, problems = 0, 0, 0
    for (path,), cards in zip(chain(*drops), chain(*answers), strict=True):
        lost += [card["name"] for card in cards] != [path.name]
        problems += any("problem" in card for card in cards)
        if not all(agree(card, rows[path]) for card in cards):
            different += 1
            print(f"{path.name}: {cards} differs from {rows[path]}")
    tracebacks = (message + server.errors).count("Traceback")
    print(
        f"{len(paths)} files, {len(requests)} requests of {given.clients} clients: {lost} lost, {different} unlike "
        f"predict, {problems} refused with a reason, {tracebacks} tracebacks; at most "
        f"{megabytes:,.0f} MB, {seconds:.0f} s"
    )
    print(server.errors, end="", file=sys.stderr)
    shutil.rmtree(scratch)
    sys.exit(int(bool(lost or different or tracebacks) or megabytes >= MEGABYTES))
