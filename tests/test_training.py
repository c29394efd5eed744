"""The training loop does what docs/method.md says, and what fails silently does not."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import config
from standard_memory.profile import profile
from tests.campaigns import plain_loop
from tests.campaigns.kills import MEASURED
from tests.conftest import MakePreset, toy_job
from training.checkpoints import Checkpoint
from training.loop import Job, fit
from training.optimizer import build_optimizer
from training.runtime import MEGABYTE, OutOfMemory, build_runtime
from training.stopping import StopRequest
from utils import Stopped, UserError, find_experiment


def test_learning_rates_follow_the_cosine_to_eta_min_once_an_epoch() -> None:
    experiment = find_experiment(config.PAPER, "glass_resnet")
    parts = ("global_model", "local_model", "attention", "classifier")
    model = nn.ModuleDict({name: nn.Linear(1, 1) for name in parts})
    optimizer, scheduler = build_optimizer(model, experiment, epochs=50, eta_min=1e-6)
    starts = np.array([2.158777650700252e-06, 6.853800121248665e-05, 2.979509550261194e-05])
    for epoch in range(51):
        expected = 1e-6 + (starts - 1e-6) * (1 + math.cos(math.pi * epoch / 50)) / 2
        assert scheduler.get_last_lr() == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


def make_gradients_infinite(job: Job, *steps: int) -> list[torch.Tensor]:
    """In these steps, from 0; returns a list that gets the weights before each step."""
    weight, before = next(iter(job.trainer.model.parameters())), []

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        before.append(weight.detach().clone())
        return gradient / 0 if len(before) - 1 in steps else gradient

    weight.register_hook(hook)
    return before


def test_a_step_whose_gradients_are_not_finite_is_skipped_and_counted_also_after_a_resume(
    toy_preset: MakePreset, tmp_path: Path
) -> None:
    job = toy_job(toy_preset())
    before = make_gradients_infinite(job, 1, 2, 5)
    expected = fit(job)
    assert [record.skipped_steps for record in expected] == [2, 1] and all(record.train_loss < 2 for record in expected)
    assert [torch.equal(a, b) for a, b in pairwise(before)] == [False, True, True, False, False, True, False]

    stop, resumed = StopRequest(), toy_job(toy_preset())
    step, done = resumed.trainer.train_step, make_gradients_infinite(resumed, 1, 2, 5)

    def stopping_step(*batch: object) -> torch.Tensor:
        stop.requested = len(done) == 2  # between the two in a row
        return step(*batch)

    resumed.trainer.train_step = stopping_step
    with pytest.raises(Stopped):
        fit(resumed, checkpoint := Checkpoint(tmp_path / "checkpoint.pt"), stop)
    resumed = toy_job(toy_preset())
    make_gradients_infinite(resumed, *(n - len(done) for n in (1, 2, 5)))
    measured = dict.fromkeys(MEASURED, 0.0)
    assert [replace(r, **measured) for r in fit(resumed, checkpoint)] == [replace(r, **measured) for r in expected]
    assert all(map(torch.equal, resumed.trainer.model.parameters(), job.trainer.model.parameters()))


def test_many_skipped_steps_do_not_change_those_that_follow(toy_preset: MakePreset) -> None:
    scaler, weight = build_runtime(toy_preset().settings).grad_scaler(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for gradient in (*[math.inf] * 200, 1e-30):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * gradient).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1 and weight.grad == 1e-30


def test_training_ends_in_a_sentence_after_many_skipped_steps_in_a_row(toy_preset: MakePreset) -> None:
    job = toy_job(toy_preset(), epochs=20)
    make_gradients_infinite(job, 1, *range(3, 100))  # four steps an epoch
    sentence = r"^20 steps in a row, up to epoch 6, step 3, had gradients .*lower the learning"
    with pytest.raises(UserError, match=sentence):
        fit(job)


@pytest.mark.parametrize("name", [experiment.name for experiment in config.PAPER.experiments])
def test_losses_and_weights_are_those_of_a_plain_loop_with_the_same_equations(
    name: str, toy_preset: MakePreset
) -> None:
    tuned = find_experiment(config.PAPER, name)
    crops = {"num_crops": 4} if isinstance(tuned, config.GlassExperiment) else {}
    small = replace(tuned, backbone=find_experiment(config.DEMO, name).backbone, batch_size=8, **crops)
    found = plain_loop.compare(toy_preset(), small, epochs=2)
    assert found.loss < 1e-7 and found.weight < 1e-12


@pytest.mark.parametrize(
    ("said", "error", "sentence"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", OutOfMemory, "cpu has no memory left for a step in fp32"),
        ("Caught RuntimeError in pin memory thread: CUDA error: out of memory", OutOfMemory, "lower --batch-size"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", OutOfMemory, "lower --batch-size"),
        ("Failed to find C compiler. Please specify", UserError, r"no C compiler .*: install gcc, or .*--no-compile"),
        ("shapes cannot be multiplied", RuntimeError, "^backend='inductor' raised"),
    ],
)
def test_missing_memory_or_compiler_is_one_sentence_also_where_torch_compile_wraps_the_error(
    said: str, error: type[Exception], sentence: str, toy_preset: MakePreset
) -> None:
    with pytest.raises(error, match=sentence), build_runtime(toy_preset().settings).memory_for("a step"):
        try:
            raise RuntimeError(said)
        except RuntimeError as cause:
            raise RuntimeError("backend='inductor' raised") from cause


def test_models_with_which_onednn_crashes_are_not_channels_last_on_the_cpu(toy_preset: MakePreset) -> None:
    runtime = build_runtime(toy_preset().settings)
    for channels, stride, kernel, expected in ((8, 2, 1, False), (8, 1, 1, True), (64, 2, 1, True), (8, 2, 3, True)):
        model = nn.Sequential(*(nn.Conv2d(channels, channels, kernel, stride) for _ in range(3)))
        assert runtime.place(model).channels_last == expected


def test_memory_on_the_cpu_is_the_bytes_kept_for_backward(toy_preset: MakePreset) -> None:
    runtime = build_runtime(toy_preset().settings)
    weight = torch.ones(1000, requires_grad=True)
    with runtime.track_memory() as memory:
        for _ in range(3):  # a graph that was freed no longer counts
            kept = (weight * 2).exp()  # exp keeps its result: 4,000 bytes
            (kept.sin() + kept.cos()).sum().backward()  # both keep their input, one storage: no byte more
            del kept
    layer = nn.Linear(1000, 1000, bias=False)
    with runtime.track_memory() as of_linear:  # keeps its input, 4,000 bytes, and a view of its weight, which is none
        layer(torch.ones(1, 1000, requires_grad=True).exp()).sum().backward()
    assert of_linear.peak_bytes == 4000
    assert memory.peak_bytes == 4000 and memory.peak_mb == 4000 / MEGABYTE
    assert runtime.memory_kind == "saved_for_backward"


def test_the_warm_up_of_a_cost_study_does_not_change_its_training(toy_preset: MakePreset, results: Path) -> None:
    def last_weights(action: Callable[[], object]) -> list[torch.Tensor]:
        """The weights of the last optimizer that took a step, after it."""
        hook = register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.append(optimizer))
        try:
            action()
        finally:
            hook.remove()
        return [weight for group in optimizers[-1].param_groups for weight in group["params"]]

    optimizers: list[torch.optim.Optimizer] = []
    preset = toy_preset(results_root=results, main_seed=1)  # the seed of toy_job
    alone = last_weights(lambda: fit(toy_job(preset, epochs=1)))
    assert len(optimizers) == 4
    measured = last_weights(lambda: profile(preset, find_experiment(preset, "standard_resnet")))
    assert len(optimizers) == 4 + 2 + 4  # two sizes of batches: 8 and 4
    assert all(map(torch.equal, alone, measured))


def test_a_last_batch_of_one_image_is_refused_before_the_first_step_where_batches_are_normalised(
    toy_preset: MakePreset,
) -> None:
    for batch_size in (9, 1):
        with pytest.raises(UserError, match=f"28 training images in batches of {batch_size} leave a batch of one"):
            fit(toy_job(toy_preset(), batch_size=batch_size))
    assert len(fit(toy_job(toy_preset(patch_size=64), epochs=1, batch_size=9))) == 1  # has several values a channel
    assert len(fit(toy_job(toy_preset(), "standard_convnext", 1, batch_size=9))) == 1  # has no batch normalisation
