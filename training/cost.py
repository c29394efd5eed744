"""What a model costs: memory, time and the accuracy it buys. docs/method.md, Experiments 3 and 4."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import CostSettings, Experiment, Preset
from data.lists import read_csv, write_csv
from training import processes
from training.checkpoints import Checkpoint
from training.evaluation import predict_batch
from training.loop import Job, check_smallest_batch, fit
from training.progress import Progress
from training.runs import RunFolder, Session, archive, build_job, hardware, open_run, open_session, resolved
from training.stopping import StopRequest
from training.trainer import Trainer
from utils import preset_folder, reading

Step = Callable[[Sequence[torch.Tensor], torch.Tensor, int], object]


@dataclass(frozen=True)
class Cost:
    """Peak memory in MB (2**20 bytes; `Runtime.memory_kind` says of which kind), seconds of an epoch with its
    validation, and the best validation accuracy as a fraction (None in quick mode, which trains too little for one).
    `warm_up_memory_mb` is the peak of the steps before, with compilation; NaN in results of an earlier version.
    """

    peak_memory_mb: float
    epoch_seconds: float
    valid_accuracy: float | None
    warm_up_memory_mb: float = float("nan")


COLUMNS = ("num_crops", *(field.name for field in fields(Cost)))  # of costs.csv; num_crops is empty for standard models


def read_costs(path: Path) -> dict[int | None, Cost]:
    """The costs in costs.csv by number of crops (None for a standard model); empty if there is no such file.

    Raises:
        UserError: the file is malformed.
    """
    if not path.exists():
        return {}
    with reading(path):
        return {
            int(row["num_crops"]) if row["num_crops"] else None: Cost(
                float(row["peak_memory_mb"] or ""),
                float(row["epoch_seconds"] or ""),
                float(row["valid_accuracy"]) if row["valid_accuracy"] else None,
                float(row.get("warm_up_memory_mb") or "nan"),
            )
            for row in read_csv(path)
        }


def find_cost(preset: Preset, package: str, experiment: str, num_crops: int | None) -> tuple[Path, Cost | None]:
    """The folder of one number of crops, and its cost; None if it is not measured.

    The folder is results/<preset>/<package>/<experiment>/<full or quick>, with a subfolder k_<K> for each K, so that
    several can run at once. An earlier version had one costs.csv for all K, without subfolders.
    """
    mode = "quick" if getattr(preset, package).quick else "full"
    folder = preset_folder(preset) / package / experiment / mode
    costs = read_costs(folder / "costs.csv")
    if num_crops not in (None, *costs):
        folder /= f"k_{num_crops}"
        costs = read_costs(folder / "costs.csv")
    return folder, costs.get(num_crops)


def run_cost_study(preset: Preset, experiment: Experiment, package: str, restart: bool) -> dict[int | None, Cost]:
    """Train with each number of crops of the study, in a folder of its own; finished ones are skipped.

    Writes costs.csv (one line) and run.json to each folder, and prints each cost.

    Args:
        package: num_crops, or standard_memory for a model without crops; also the name of its settings in `preset`.
        restart: archive what was started, and start over.

    Raises:
        UserError: no index, no weights, a folder that was started with other settings, or one that is in use.
        Stopped: a signal asked to stop.
    """
    study: CostSettings = getattr(preset, package)
    experiment, counts = replace(experiment, batch_size=study.batch_size), getattr(study, "crop_counts", (None,))
    costs: dict[int | None, Cost] = {}
    with open_session(preset) as session:
        if restart:
            archive(preset, [find_cost(preset, package, experiment.name, num_crops)[0] for num_crops in counts])
        values, rows = _settings_of(session, study, experiment), (session.splits.train, session.splits.valid)
        for num_crops in counts:
            folder, _ = find_cost(preset, package, experiment.name, num_crops)
            with open_run(session, folder, values, results=("costs.csv", "checkpoint.pt")) as run:
                checkpoint = run.checkpoint(background=False)  # writing in the background would slow what is measured
                label = experiment.name if num_crops is None else f"{experiment.name} K = {num_crops}"
                cost = processes.on_main(lambda k=num_crops: find_cost(preset, package, experiment.name, k)[1])
                if not cost:
                    session.stop.raise_if_requested(f"before {label}")
                    chosen = experiment if num_crops is None else replace(experiment, num_crops=num_crops)
                    cost = _measure(  # the job has no name here, or its model would live on into the next K
                        build_job(session, chosen, preset.settings.main_seed, study.epochs, rows, label),
                        study, run, checkpoint, session.stop,
                    )  # fmt: skip
                    line = ("" if num_crops is None else num_crops, *astuple(cost))
                    if processes.is_main():
                        write_csv(folder / "costs.csv", COLUMNS, [line])
                checkpoint.remove()  # here: a process may have been killed after it wrote costs.csv
                costs[num_crops] = cost
                print(f"{label}: {_describe(cost, session.runtime.memory_kind, study.quick)}", flush=True)
    return costs


def _settings_of(session: Session, study: CostSettings, experiment: Experiment) -> dict[str, Any]:
    """What a measured cost depends on: the settings, and, as it is time and memory, the hardware and the loading."""
    machine = {"hardware": hardware(), "loading_processes": session.settings.num_workers}
    values = resolved(session.settings, study, experiment) | machine | {"cached": list(session.index.cached)}
    values["compilation"] = "before them"  # before the epochs that are measured
    if processes.size() > 1:
        values["processes"] = processes.size()
    if session.settings.activation_checkpointing != "off":  # it changes memory and time, not accuracy
        values["recomputation"] = session.settings.activation_checkpointing
    values.pop("num_crops", None)  # it is varied
    return values


def _describe(cost: Cost, memory_kind: str, quick: bool) -> str:
    accuracy = "" if cost.valid_accuracy is None else f", best validation accuracy {cost.valid_accuracy:.2%}"
    return (
        f"{cost.peak_memory_mb:.1f} MB ({memory_kind}; {cost.warm_up_memory_mb:.1f} MB warming up), "
        f"{cost.epoch_seconds:.2f} s an epoch{' (extrapolated)' if quick else ''}{accuracy}"
    )


def _measure(job: Job, study: CostSettings, run: RunFolder, checkpoint: Checkpoint, stop: StopRequest) -> Cost:
    """Train and measure: all epochs, resumed from `checkpoint`, or a few steps in quick mode, extrapolated.

    Full mode takes the maximum memory and the mean seconds over epochs, first epoch included, as the paper does;
    compilation comes before them, with a peak of its own. A quick measurement that is stopped is not saved.
    """
    check_smallest_batch(job)
    if study.quick:
        run.record(job.label)
        warm_up_memory_mb = _warm_up(job)
        return replace(_measure_steps(job, study, stop), warm_up_memory_mb=warm_up_memory_mb)
    if not processes.same(checkpoint.path.exists()):
        run.record(f"{job.label}, epoch 1")
        checkpoint.save(job.trainer, Progress())  # the state that `fit` starts from
    warm_up_memory_mb = _warm_up(job)
    history = fit(job, checkpoint, stop, lambda done: run.record(f"{job.label}, epoch {done.epoch + 1}"))
    return Cost(
        peak_memory_mb=max(record.peak_memory_mb for record in history),
        epoch_seconds=sum(record.epoch_seconds for record in history) / len(history),
        valid_accuracy=max(record.valid_accuracy for record in history),
        warm_up_memory_mb=warm_up_memory_mb,
    )


def _warm_up(job: Job) -> float:
    """One step with each batch size of an epoch, so that all is compiled; returns their peak memory in MB.

    It changes the trainer's state.
    """
    trainer = job.trainer
    steps = ((job.train_loader, 0, trainer.train_step), (job.valid_loader, None, _validation_step(trainer)))
    with trainer.runtime.track_memory() as memory:
        for loader, epoch, step in steps:
            trainer.model.train(epoch is not None)
            batches = loader.batch_sampler
            full = min(batches.batch_size, len(loader.dataset))
            for size in dict.fromkeys((full, len(loader.dataset) % full or full)):
                batch = [(0, epoch)] * size
                *views, labels = loader.dataset.__getitems__(batches.slice_of(batch) if batches.training else batch)
                step(views, labels, size)
    return memory.peak_mb


def _validation_step(trainer: Trainer) -> Step:
    return torch.no_grad()(lambda views, *_: predict_batch(trainer.valid_model, views, trainer.runtime))


def _measure_steps(job: Job, study: CostSettings, stop: StopRequest) -> Cost:
    trainer, runtime = job.trainer, job.trainer.runtime

    def mean_seconds(loader: DataLoader, step: Step) -> float:
        batches = _endless_batches(loader, stop)

        def run(steps: Iterable[tuple[Sequence[torch.Tensor] | None, int]]) -> None:
            for batch, images in steps:
                if batch is not None:
                    *views, labels = batch
                    step(views, labels, images)
            runtime.wait()

        # Batches that workers have ready when the clock starts would hide what loading costs.
        in_flight = loader.num_workers * (loader.prefetch_factor or 0)
        run(islice(batches, max(study.warmup_steps, in_flight)))
        steps = max(study.measured_steps, loader.num_workers)
        start = time.perf_counter()
        run(islice(tqdm(batches, total=steps, leave=False, disable=processes.no_bar()), steps))
        return (time.perf_counter() - start) / steps

    with runtime.track_memory() as memory:
        trainer.model.train()
        train_seconds = mean_seconds(job.train_loader, trainer.train_step)
        trainer.model.eval()
        valid_seconds = mean_seconds(job.valid_loader, _validation_step(trainer))
    rounds = [loader.batch_sampler.rounds for loader in (job.train_loader, job.valid_loader)]
    epoch_seconds = train_seconds * rounds[0] + valid_seconds * rounds[1]
    return Cost(memory.peak_mb, epoch_seconds, None)


def _endless_batches(loader: DataLoader, stop: StopRequest) -> Iterator[tuple[Sequence[torch.Tensor] | None, int]]:
    """Batches without end, each with its images in all processes; None in evaluation where others have one more."""
    for epoch in count():
        loader.batch_sampler.set_epoch(epoch)
        for batch, images in zip_longest(loader, loader.batch_sampler.sizes[: loader.batch_sampler.rounds]):
            stop.raise_if_requested("in a quick measurement, which starts over")
            yield batch, images
