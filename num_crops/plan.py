"""What will a training need? GPU memory, FLOPs and hours, found without a GPU.

    python -m num_crops.plan --backbone vit --batch-size 64 --num-crops 10 --memory 24 [--figure FILE.png]

Prints one line for each of GLASS and the standard model, each precision, without activation checkpointing and with it:
megabytes (2**20 bytes) of parameters, gradients, optimizer, inputs and activations, the peak of an uncompiled step,
whether it fits, FLOPs per image, and the largest batch and K that fit. Nine tenths of the memory count as usable; CUDA
needs the rest. Batch size and K default to those of glass_resnet in config.py; both models get this batch size. With
--images-per-second, which a training of GLASS at this K prints after each epoch, also prints the hours of this
backbone's part of the paper, if loading keeps up.

Hardware: one CPU core for a minute or two. Output: printed; with --figure, a picture of memory against K.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from tqdm import tqdm

from config import Count, GigaBytes, GlassExperiment, Preset, StandardExperiment
from data.lists import render_table
from data.preparation.charts import new_figure, save_figure
from data.splits import counts_of
from training.memory import USABLE, PlannedTraining, largest
from utils import UserError, run_command

COLUMNS = ("model", "precision", "checkpointing", "parameters", "gradients", "optimizer", "inputs", "activations",
           "peak_MB", "fits", "GFLOPs_an_image", "largest_batch", "largest_K")  # fmt: skip
PRECISIONS = {"fp16": "fp16 or bf16", "fp32": "fp32"}
MOST_IMAGES, MOST_CROPS = 4096, 1024
PerSecond = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Options:
    """The flags of this command."""

    memory: GigaBytes | None = None  # of the card, in GB of 2**30 bytes; default: this machine's GPU
    figure: Path | None = None  # a PNG to write: memory against K
    images_per_second: PerSecond | None = None  # measured in a training of GLASS: also print hours
    images: Count = 12_000  # in the data set, for the hours


def plan(preset: Preset, glass: GlassExperiment, standard: StandardExperiment, **values: Any) -> None:
    """Plan both models; `values` are those of `Options`.

    Raises:
        UserError: no such backbone, unknown memory, a batch that cannot be trained, a figure whose name does not end in
            .png or without crops to show, or too few images for the hours.
    """
    options = Options(**values)
    if options.memory is None and not torch.cuda.is_available():
        raise UserError("this machine has no GPU: give the memory of the card in GB, such as --memory 24")
    if options.figure and options.figure.suffix != ".png":
        raise UserError(f"the figure is written as PNG, and {options.figure} does not end in .png: name another file")
    if options.figure and not glass.crops_per_image:
        raise UserError("a model with branches = global has no crops to draw memory against: leave out --figure")
    held_out = sum(counts_of((preset.settings.valid_size, preset.settings.test_size), options.images))
    if options.images_per_second and held_out >= options.images:
        raise UserError(f"of {options.images} images {held_out} are held out: raise --images, or lower valid_size")
    memory = options.memory or torch.cuda.get_device_properties(0).total_memory / 2**30
    rows, lines, flops = [], {}, {}
    ways = [*product((glass, standard), PRECISIONS.items(), ("off", "on"))]
    for experiment, (precision, label), checkpointing in tqdm(ways, desc="planning", leave=False, disable=None):
        settings = replace(preset.settings, precision=precision, activation_checkpointing=checkpointing)
        try:
            training = PlannedTraining(experiment, settings)
        except UserError as error:
            if checkpointing == "off":
                raise
            print(f"left out, {experiment.name} with checkpointing in {precision}: {error}")
            continue
        needs = cache(training.needs)
        B, K = experiment.batch_size, experiment.crops_per_image
        family, fits = type(experiment).__name__.removesuffix("Experiment").lower(), USABLE * memory * 1024
        if (family, checkpointing) not in flops:
            flops[family, checkpointing] = training.flops(K)
        batch = largest(lambda n, needs=needs, K=K: needs(n, K).peak, fits, B, MOST_IMAGES)
        crops = f"{largest(lambda n, needs=needs, B=B: needs(B, n).peak, fits, K, MOST_CROPS):,}" if K else "-"
        sizes, gflops = [*map(round, astuple(needs(B, K)))], flops[family, checkpointing] / 1e9
        within = "yes" if sizes[-1] <= fits else "no"
        rows.append((family, label, checkpointing, *sizes, within, gflops, batch, crops))
        if K and options.figure:
            name = f"{label}, checkpointing" if checkpointing == "on" else label
            lines[name] = {n: needs(B, n).peak / 1024 for n in sorted({1, K, *range(4, max(K, 16) + 1, 4)})}
    print(f"{glass.backbone}, batches of {glass.batch_size}, K = {glass.num_crops}, a card of {memory:g} GB")
    print(f"Peaks are of uncompiled steps; batches are tried up to {MOST_IMAGES:,}, crops up to {MOST_CROPS:,}.")
    print("A peak is not the sum: gradients are made while activations are freed, or recomputed with checkpointing.\n")
    print(render_table(COLUMNS, rows))
    if options.figure:
        _draw(options.figure, f"GLASS, {glass.backbone}, batches of {glass.batch_size}", lines, memory)
    if options.images_per_second:
        step_flops = {family: flops[family, "off"] for family in ("glass", "standard")}
        one_more = PlannedTraining(glass, preset.settings).flops(glass.num_crops + 1)
        rate = f"{options.images_per_second:g} images/s with GLASS at K = {glass.num_crops}"
        print(f"\nHours at {rate}, with the same FLOPs per second in all else; K of tuning and of the study of crop")
        print("counts is the mean of those tried, validating an image takes a third of a step, no trial is pruned.\n")
        print(_hours(preset, glass, options, step_flops | {"crop": one_more - step_flops["glass"]}))


def _hours(preset: Preset, glass: GlassExperiment, options: Options, flops: Mapping[str, int]) -> str:
    """The table of hours: every image of every epoch, nothing pruned; validating an image takes a third of a step.

    `flops` of a training step per image: of "glass" and "standard", and of each "crop" more.
    """
    settings, total = preset.settings, options.images
    valid, test = counts_of((settings.valid_size, settings.test_size), total)
    final_valid = int((total - test) * settings.final_valid_fraction)
    split, final = (total - test - valid, valid), (total - test - final_valid, final_valid)
    tuning, training, K = preset.tuning, preset.training, glass.num_crops
    tried, counts = preset.glass_space.get("num_crops", (K,)), preset.num_crops.crop_counts
    final_epochs, cost_epochs = training.epochs * len(training.seeds), preset.num_crops.epochs * len(counts)
    work = {  # epochs, the images of one, and the mean K
        "tuning, GLASS": (tuning.trials_of(False) * tuning.epochs, split, sum(tried) / len(tried)),
        "training, GLASS": (final_epochs, final, K),
        "crop counts": (cost_epochs, split, sum(counts) / len(counts)),
        "tuning, standard": (tuning.trials_of(True) * tuning.epochs, split, None),
        "training, standard": (final_epochs, final, None),
        "standard cost": (preset.standard_memory.epochs, split, None),
    }
    rows = []
    for name, (epochs, (trained, validated), crops) in work.items():
        per_image = flops["standard"] if crops is None else flops["glass"] + (crops - K) * flops["crop"]
        seconds = epochs * (trained + validated / 3) * per_image / flops["glass"] / options.images_per_second
        rows.append((name, epochs * (trained + validated) / 1e6, seconds / 3600))
    rows.append(("all of this backbone", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    return render_table(("experiment", "million_images", "hours"), rows)


def _draw(path: Path, title: str, lines: Mapping[str, Mapping[int, float]], memory: float) -> None:
    """Memory in GB against K, a line for each name, and the card's limits."""
    figure, (axes,) = new_figure((5, 3.6), (1, 1))
    for name, points in lines.items():
        style = {"linestyle": "--" if "checkpointing" in name else "-", "color": "C0" if "16" in name else "C1"}
        axes.plot(points.keys(), points.values(), marker=".", label=name, **style)
    axes.axhline(memory, color="black", linewidth=1, label=f"the card's {memory:g} GB")
    axes.axhline(USABLE * memory, color="black", linewidth=1, linestyle=":", label="of which a training can use")
    axes.set(title=title, xlabel="crops K", ylabel="peak of a training step (GB)", xlim=(0, None), ylim=(0, None))
    save_figure(figure, path, axes)


if __name__ == "__main__":
    run_command(
        __doc__,
        plan,
        experiments=("glass_resnet", "standard_resnet"),
        settings=("patch_size", "channels_last", "valid_size", "test_size", "final_valid_fraction"),
        without=(
            "name", "dropout_rate", "lr", "lr_global", "lr_local", "lr_atten_class", "weight_decay", "wd_global",
            "wd_local",
        ),
        options=Options,
    )  # fmt: skip
