"""Activation checkpointing changes memory and no number; the planner is near what was measured on a GPU."""

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import config
from config import NumCrops
from models.build import build_model
from models.checkpointing import checkpoint_blocks
from num_crops.sweep import sweep
from tests.conftest import MakePreset, refused, succeed, toy_job
from training.memory import USABLE, PlannedTraining, largest
from training.runtime import build_runtime
from utils import UserError, find_experiment

PAPER = replace(config.PAPER.settings, pretrained=False, device="cpu")
MEASURED = (  # docs/gpu/README.md: batch 32, fp16, uncompiled
    ("glass_resnet", {1: 3462.9, 4: 7540.2}),
    ("glass_vit", {1: 6565.1, 4: 12866.4}),
)


@pytest.mark.parametrize(
    ("backbone", "precision", "momentum"),
    [
        ("timm:test_resnet", "fp32", 0.1),
        ("timm:test_resnet", "bf16", None),  # None: the mean over all batches, by the counter
        ("timm:mobilevit_xxs", "fp32", 0.1),
        ("convnext", "fp32", None),  # with stochastic depth
        ("convnext", "bf16", None),
    ],
)
def test_training_is_the_same(backbone: str, precision: str, momentum: float | None, toy_preset: MakePreset) -> None:
    ways = []
    for chosen in ("off", "on"):
        job = toy_job(toy_preset(activation_checkpointing=chosen), "glass_resnet", backbone=backbone, num_crops=2)
        trainer = job.trainer
        trainer.runtime = replace(trainer.runtime, precision=precision)
        norms = [m for m in trainer.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for module in norms:
            module.momentum = momentum
        batches = [batch for _, batch in zip(range(2), job.train_loader, strict=False)]
        trainer.model.train()
        losses = [trainer.train_step(views, labels) for *views, labels in batches]
        assert {int(module.num_batches_tracked) for module in norms} <= {2}
        gradients = [parameter.grad for parameter in trainer.model.parameters()]
        ways.append((losses, gradients, trainer.model.state_dict(), torch.get_rng_state()))
    plain, again = ways
    assert list(plain[2]) == list(again[2])
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(nn.functional.dropout(self.norm(self.first(x)).relu(), 0.5, self.training))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="torch.compile needs a C compiler")
def test_training_is_the_same_compiled() -> None:
    ways, runtime = [], replace(build_runtime(PAPER), compile=True)
    for again in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Sequential(*(Block() for _ in range(4)))), torch.randn(32, 8)
        if again:
            checkpoint_blocks(model)
        torch.compiler.reset()
        with runtime.track_memory() as memory:
            loss = runtime.compiled(model)(x).square().mean()
            loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        ways.append((memory.peak_bytes, loss, gradients, model.state_dict()))
        assert {int(block.norm.num_batches_tracked) for block in model[0]} == {1}
    torch.testing.assert_close(ways[1][1:], ways[0][1:], rtol=1e-5, atol=1e-8)
    assert ways[1][0] < ways[0][0] / 2


@pytest.mark.parametrize(("name", "share"), [("glass_vit", 6), ("glass_convnext", 4), ("glass_resnet", 2.5)])
def test_a_crop_keeps_a_fraction_for_backward(name: str, share: float) -> None:
    experiment, saved = replace(find_experiment(config.PAPER, name), branches="local"), []
    model, crops = build_model(experiment, PAPER), torch.randn(1, 2, 3, 224, 224)
    for prepare in (lambda _: None, checkpoint_blocks):
        prepare(model)
        with build_runtime(PAPER).track_memory() as memory:
            model(crops[:, 0], crops)
        saved.append(memory.peak_bytes)
    assert saved[1] < saved[0] / share


def test_evaluation_computes_once_and_a_copy_has_its_own_blocks() -> None:
    block, passes = Block(), []
    checkpoint_blocks(nn.Sequential(nn.Sequential(block)))
    block.first.register_forward_hook(lambda *_: passes.append(1))
    block.eval()(torch.randn(4, 8)).sum().backward()
    copy.deepcopy(block).train()(torch.randn(4, 8))
    assert len(passes) == 2 and block.norm.num_batches_tracked == 0
    assert isinstance(block, Block) and list(block.state_dict()) == list(Block().state_dict())


def test_costs_with_and_without_checkpointing_are_not_mixed(toy_preset: MakePreset, results: Path) -> None:
    costs = NumCrops(batch_size=8, crop_counts=(1,), quick=True, warmup_steps=0, measured_steps=1)
    off = replace(toy_preset(results_root=results), num_crops=costs)
    on = replace(off, settings=replace(off.settings, activation_checkpointing="on"))
    experiment = find_experiment(off, "glass_resnet")
    sweep(off, experiment)
    with pytest.raises(UserError, match="recomputation = None, now on"):
        sweep(on, experiment)


@pytest.mark.parametrize(("name", "peaks"), MEASURED)
def test_the_planner_is_within_a_tenth_of_what_was_measured(name: str, peaks: dict[int, float]) -> None:
    training = PlannedTraining(find_experiment(config.PAPER, name), PAPER)
    for K, measured in peaks.items():
        assert training.needs(32, K).peak == pytest.approx(measured, rel=0.1)
    forward = {"glass_resnet": 2 * 4.09e9, "glass_vit": 2 * 17.56e9}[name]  # torchvision's documents, of one view
    assert training.flops(1) == pytest.approx(3 * 2 * forward, rel=0.03)


@pytest.mark.slow
def test_the_planner_as_a_command(tmp_path: Path) -> None:
    arguments = ("--backbone", "timm:test_resnet", "--batch-size", "8", "--num-crops", "4", "--patch-size", "64")
    figure = tmp_path / "plan.png"
    more = ("--memory", "0.5", "--figure", figure, "--images-per-second", "100")
    printed = succeed("num_crops.plan", *arguments, *more)
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    found = {tuple(row[:3]): row for row in rows if len(row) == 13}
    assert len(found) == 2 * 2 * 2 + 1 and figure.read_bytes().startswith(b"\x89PNG")
    row = found["glass", "fp16 or bf16", "on"]
    settings = replace(PAPER, patch_size=64, activation_checkpointing="on")
    experiment = replace(find_experiment(config.PAPER, "glass_resnet"), backbone="timm:test_resnet", batch_size=8)
    needs, limit = PlannedTraining(experiment, settings).needs, USABLE * 512
    batch, K = int(row[11]), int(row[12])
    assert needs(batch, 4).peak <= limit < needs(batch + 1, 4).peak
    assert needs(8, K).peak <= limit < needs(8, K + 1).peak
    assert int(row[8]) == round(needs(8, 4).peak) and row[9] == "yes"
    hours = {row[0]: float(row[2]) for row in rows if len(row) == 3 and row[0] != "experiment"}
    images = 50 * 5 * (9690 + 510 / 3)  # of final training, at 100 a second
    assert hours["training, GLASS"] == pytest.approx(images / 100 / 3600, abs=0.01) and len(hours) == 7
    assert hours.pop("all of this backbone") == pytest.approx(sum(hours.values()), abs=0.05)
    assert "give the memory of the card in GB" in refused("num_crops.plan", *arguments)


@pytest.mark.parametrize("name", ["glass_resnet", "standard_resnet"])
def test_a_backbone_without_blocks_is_refused(name: str) -> None:
    experiment = replace(find_experiment(config.PAPER, name), backbone="timm:vgg11")
    with pytest.raises(UserError, match=r"has no repeated blocks, .* set activation_checkpointing off"):
        PlannedTraining(experiment, replace(PAPER, activation_checkpointing="on"))


@pytest.mark.slow
def test_the_planner_takes_models_without_crops_and_refuses_what_it_cannot_plan() -> None:
    arguments = ("num_crops.plan", "--backbone", "timm:test_resnet", "--patch-size", "32", "--memory")
    printed = succeed(*arguments, "0.5", "--batch-size", "8", "--branches", "global")
    assert "Peaks are of uncompiled steps" in printed
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines() if re.match("glass|standard", line)]
    assert len(rows) == 8 and {row[12] for row in rows} == {"-"} and all(0 < float(row[10]) < 1 for row in rows)
    with_branch = (*arguments, "0.5", "--branches", "global", "--figure", "x.png")
    assert "has no crops to draw memory against" in refused(*with_branch)
    assert "a batch of 1 cannot be trained" in refused(*arguments, "0.5", "--batch-size", "1", "--num-crops", "1")
    assert "3600 are held out" in refused(*arguments, "0.5", "--images-per-second", "9", "--images", "3600")
    assert "finite" in refused(*arguments, "0.5", "--images-per-second", "inf")


def test_a_model_that_chooses_its_crops_is_planned_with_all_crops_that_it_receives() -> None:
    experiment, settings = find_experiment(config.PAPER, "glass_resnet"), replace(PAPER, patch_size=32)
    of_four, chosen = (
        PlannedTraining(replace(experiment, backbone="timm:test_resnet", crop_sampler=sampler), settings).needs(8, 4)
        for sampler in ("texture_high", "cooi")
    )
    assert chosen.inputs == pytest.approx(of_four.inputs * (1 + 49) / (1 + 4))  # with the global view
    assert chosen.activations == of_four.activations and chosen.peak > of_four.peak


def test_the_largest_batch_is_0_where_one_image_cannot_be_trained_and_two_do_not_fit() -> None:
    experiment = replace(find_experiment(config.PAPER, "standard_resnet"), backbone="timm:test_resnet")
    needs = PlannedTraining(experiment, replace(PAPER, patch_size=32)).needs
    assert largest(lambda n: needs(n, 0).peak, needs(2, 0).peak - 0.01, 8, 64) == 0
