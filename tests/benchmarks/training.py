"""Training on this machine: images/s, share of the card's peak FLOP/s, waiting, memory, compilation, saving.

    python -m tests.benchmarks.training [--minutes 9] [--json FILE] [--markdown FILE]

Each configuration runs in a process of its own with a deadline, the most important first, and the report is rewritten
after each, so that an interruption leaves a table. Meaningful numbers need a CUDA device; without one, the same
configurations run at toy size. Images are synthetic, weights random; nothing is downloaded.

TFLOP/s counts the matrix products of the forward and backward pass (`training.memory`); the ceiling is a product of
two 8192 x 8192 matrices in the same precision. Memory is the allocator's peak in MiB: after the first steps, and with
them. The loss after ten steps checks that each way does the same work: it is equal up to rounding within a model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from config import DEMO, PAPER, Experiment, GlassExperiment, Preset
from data.cache.pixel_cache import PIXELS, open_cache
from data.data_preprocess import preprocess
from data.index import read_index
from data.loaders import build_loader
from data.workers import loading_processes
from models.build import build_model
from tests.benchmarks.common import Table, make_parser, make_preset, quiet, repeated, write_images, write_report
from tests.benchmarks.epoch import straightforward_loader, take_normalised_views
from training.checkpoints import Checkpoint
from training.memory import PlannedTraining
from training.progress import Progress
from training.runs import git_commit, hardware, library_versions, seed_everything
from training.runtime import MEGABYTE, Runtime, build_runtime
from training.trainer import Trainer, build_trainer
from utils import find_experiment

ON_CUDA = torch.cuda.is_available()
LOSS_STEPS, MEASURED_SECONDS = (10, 6.0) if ON_CUDA else (2, 0.2)


@dataclass(frozen=True)
class Case:
    """A configuration to measure.

    Args:
        mode: its name in the table.
        source: of the batches: device (one batch, which stays there), cache, files, or straightforward code.
        settings: changes to `config.Settings`.
        seconds: deadline.
    """

    model: str
    mode: str = "compiled"
    source: str = "device"
    num_crops: int | None = None  # None: the tuned one
    settings: tuple[tuple[str, Any], ...] = ()
    fill_memory: bool = False  # with NaN, as deterministic algorithms do by default
    save: bool = False
    seconds: int = 150


def cases() -> list[Case]:
    """All cases, the most important first."""
    models = [experiment.name for experiment in PAPER.experiments]
    eager, blocks, fast = (("compile", False),), (("compile_blocks", True),), (("deterministic", False),)
    vit = [
        Case("glass_vit", save=True),
        Case("glass_vit", "eager", settings=eager),
        Case("glass_vit", "blocks compiled", settings=blocks),
        Case("glass_vit", "bf16", settings=(("precision", "bf16"),)),
        Case("glass_vit", "not deterministic", settings=fast),
        Case("glass_vit", "bf16, not deterministic", settings=(*fast, ("precision", "bf16"))),
        Case("glass_vit", "eager, new memory filled with NaN", settings=eager, fill_memory=True),
    ]
    checkpointing = [Case("glass_vit", "checkpointing", settings=(("activation_checkpointing", "on"),))]
    loading = [Case("glass_vit", source, source) for source in ("cache", "files", "straightforward")]
    others = [Case(name) for name in models if name != "glass_vit"]
    twice = (*eager, ("activation_checkpointing", "on"))
    ways = (("eager", eager), ("eager, checkpointing", twice))
    memory = [Case("glass_vit", mode, num_crops=K, settings=way) for mode, way in ways for K in (1, 4, 16)]
    eager_others = [Case(name, "eager", settings=eager) for name in models if name != "glass_vit"]
    others += [Case("glass_convnext", "blocks compiled", settings=blocks)]
    return [*vit[:3], *checkpointing, *loading, *others, *vit[3:], *memory, *eager_others]


def experiment_of(case: Case) -> Experiment:
    tuned = find_experiment(PAPER, case.model)
    if not ON_CUDA:  # toy size
        tuned = replace(tuned, backbone=find_experiment(DEMO, case.model).backbone, batch_size=4)
    if isinstance(tuned, GlassExperiment):
        K = case.num_crops or tuned.num_crops
        return replace(tuned, num_crops=K if ON_CUDA else min(K, 3))
    return tuned


# ------------------------------------------------------------------------------------------- in the case's process
def measure(case: Case, folder: Path) -> dict[str, Any]:
    """The row of a case."""
    preset = preset_in(folder)
    settings = replace(preset.settings, device="auto", **dict(case.settings))
    experiment, runtime = experiment_of(case), build_runtime(settings)
    with runtime.switched():
        torch.utils.deterministic.fill_uninitialized_memory = case.fill_memory
        return _measure(case, replace(preset, settings=settings), experiment, runtime, folder)


def _measure(case: Case, preset: Preset, experiment: Experiment, runtime: Runtime, folder: Path) -> dict[str, Any]:
    settings = preset.settings
    seed_everything(0)
    trainer = build_trainer(build_model(experiment, settings), experiment, settings, runtime, epochs=1)
    trainer.model.train()
    batches = batches_of(case, preset, experiment, trainer)
    if case.source == "straightforward":
        take_normalised_views(trainer)
    without_repeats = replace(settings, activation_checkpointing="off")
    flops = PlannedTraining(experiment, without_repeats).flops(experiment.crops_per_image)
    batch, start = next(batches), time.perf_counter()
    trainer.train_step(*batch)
    runtime.wait()
    first = time.perf_counter() - start
    for _ in range(LOSS_STEPS - 1):
        loss = trainer.train_step(*next(batches))
    loss, peak = loss.item(), peak_of(runtime.device)
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats(runtime.device)
    steps, waiting, start = 0, 0.0, time.perf_counter()
    while time.perf_counter() < start + MEASURED_SECONDS:
        before = time.perf_counter()
        batch = next(batches)
        waiting += time.perf_counter() - before
        trainer.train_step(*batch)
        steps += 1
        if steps % 5 == 0:
            runtime.wait()  # or the host would run ahead of the clock
    runtime.wait()
    seconds = (time.perf_counter() - start) / steps
    row = {
        "precision": runtime.precision,
        "crops": getattr(experiment, "num_crops", None),
        "batch": experiment.batch_size,
        "images/s": experiment.batch_size / seconds,
        "ms a step": 1000 * seconds,
        "ms waiting": 1000 * waiting / steps,
        "TFLOP/s": flops * experiment.batch_size / seconds / 1e12,
        "peak MiB": peak_of(runtime.device),
        "with first steps": peak,
        "s first step": first,
        f"loss after {LOSS_STEPS}": loss,
    }
    return row | (saving(trainer, folder) if case.save else {})


def batches_of(case: Case, preset: Preset, experiment: Experiment, trainer: Trainer) -> Iterator[tuple]:
    """Pairs of views and labels, without end."""
    index = read_index(preset)
    rows = repeated(index, experiment.batch_size * (8 if ON_CUDA else 2))
    if case.source != "files" and case.source != "straightforward":
        index = replace(index, cache=open_cache(preset.settings, index.records)[0])
    if case.source == "straightforward":
        workers = loading_processes(cpu_computes=not ON_CUDA)
        loader = straightforward_loader(preset.settings, experiment, index, rows, workers)
    else:
        loader = build_loader(preset.settings, experiment, index, rows, training_seed=0)
    if case.source == "device":
        *views, labels = next(iter(loader))
        on_device = [view.to(trainer.runtime.device) for view in views], labels.to(trainer.runtime.device)
        while True:
            yield on_device
    for epoch in count():
        if not isinstance(loader.sampler, torch.utils.data.RandomSampler):
            loader.batch_sampler.set_epoch(epoch)
        for *views, labels in loader:
            yield views, labels


def saving(trainer: Trainer, folder: Path) -> dict[str, float]:
    """Seconds that training waits for a save, and until the file is written."""
    checkpoint, start = Checkpoint(folder / "checkpoint.pt"), time.perf_counter()
    checkpoint.save(trainer, Progress())
    waited = time.perf_counter() - start
    checkpoint.wait()
    return {"s saving": waited, "s until written": time.perf_counter() - start}


def peak_of(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / MEGABYTE if device.type == "cuda" else None


def ceilings() -> list[tuple[str, float, str]]:
    """The machine's limits: products in half precision, copies on the device, copies to it."""
    device = "cuda" if ON_CUDA else "cpu"
    side, rows = (8192, 64 * 11 * 197) if ON_CUDA else (64, 8)
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        name = "fp16" if dtype is torch.float16 else "bf16"
        for m, k, n in ((side, side, side), (rows, 768, 3072), (rows, 3072, 768), (rows, 768, 2304)):
            a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
            rate = 2 * m * k * n / seconds_of(partial(torch.matmul, a, b)) / 1e12
            found.append((f"{name} product {m} x {k} x {n}", rate, "TFLOP/s"))
    source = torch.empty(2**28 if ON_CUDA else 2**20, dtype=torch.uint8, device=device)
    target, host = torch.empty_like(source), torch.empty(len(source), dtype=torch.uint8, pin_memory=ON_CUDA)
    found.append(("copy on the device", 2 * len(source) / seconds_of(lambda: target.copy_(source)) / 1e9, "GB/s"))
    to_device = seconds_of(lambda: target.copy_(host, non_blocking=True))
    found.append(("copy from pinned memory to the device", len(source) / to_device / 1e9, "GB/s"))
    return found


def seconds_of(work: Any, repeats: int = 20) -> float:
    """Mean seconds of a call, after three to warm up."""
    for repeat in range(repeats + 3):
        if repeat == 3:
            if ON_CUDA:
                torch.cuda.synchronize()
            start = time.perf_counter()
        work()
    if ON_CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


# ------------------------------------------------------------------------------------------------- the report
def preset_in(folder: Path) -> Preset:
    small = {} if ON_CUDA else {"patch_size": 32, "num_workers": 1}
    return make_preset(folder / "images", folder, deterministic=True, **small)


def child(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run this module in a process of its own; returns what it prints, or an "error" if it fails or takes too long."""
    command = [sys.executable, "-m", "tests.benchmarks.training", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {seconds:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def report(found: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Write the report of the cases so far; returns it as Markdown."""
    limits = {row[0][:4]: row[1] for row in reversed(found["ceilings"])}  # the first of each precision
    rows = []
    for case, row in found["cases"]:
        rows.append({"model": case["model"], "mode": case["mode"], **row})
        if row.get("precision") in limits:
            rows[-1]["% of ceiling"] = 100 * row["TFLOP/s"] / limits[row["precision"]]
    found_names = (name for row in rows for name in row if name not in ("% of ceiling", "error"))
    names = list(dict.fromkeys(("model", "mode", *found_names)))
    if "TFLOP/s" in names:
        names.insert(names.index("TFLOP/s") + 1, "% of ceiling")
    names += ["error"] * any("error" in row for row in rows)
    tables = [
        Table("Ceilings", ("what", "measured", "unit"), found["ceilings"]),
        Table("Training", names, [[row.get(name) for name in names] for row in rows]),
    ]
    return write_report(arguments, found, tables)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9, help="time limit; default 9")
    parser.add_argument("--cases", type=int, help="measure only this many, the most important ones")
    for hidden in ("--case", "--folder"):  # for the processes that it starts
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        chosen = json.loads(arguments.case)
        result = {"rows": ceilings()} if chosen is None else measure(Case(**chosen), Path(arguments.folder))
        print(json.dumps(result))
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    found = {
        "command": f"python -m tests.benchmarks.training --minutes {arguments.minutes:g}",
        "commit": git_commit(),
        "hardware": hardware(),
        "versions": library_versions(),
        "cases": [],
        "ceilings": child(["--case", "null"], 120).get("rows", []),
    }
    with tempfile.TemporaryDirectory() as scratch:
        write_images(Path(scratch, "images"), 2000 if ON_CUDA else 200)
        with quiet():
            preprocess(preset_in(Path(scratch)), (PIXELS,))
        text = report(found, arguments)
        for case in tqdm(cases()[: arguments.cases], disable=None):
            left = deadline - time.monotonic()
            if left < 10:
                break
            given = ["--case", json.dumps(asdict(case)), "--folder", scratch]
            found["cases"].append((asdict(case), child(given, min(case.seconds, left))))
            text = report(found, arguments)
    print(text)


if __name__ == "__main__":
    main()
