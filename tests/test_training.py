"""The training loop does what the specification says, and what fails silently does not."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import config
from config import Preset, Training
from data.datasets import load_splits
from data.loaders import build_loader
from model_training.run import train_and_evaluate
from models.build import build_model
from num_crops.sweep import sweep
from standard_memory.profile import profile
from tests.conftest import copy_index, edited_index
from training.checkpoints import load_model, save_model
from training.cost import Cost, read_costs
from training.evaluation import evaluate
from training.loop import build_trainer, fit
from training.metrics import compute_metrics
from training.optimizer import build_optimizer
from training.runtime import MEGABYTE, build_runtime
from utils import UserError, find_experiment, read_csv, read_json, run_folder, seed_everything


def train(preset: Preset, name: str) -> Path:
    train_and_evaluate(preset, find_experiment(preset, name))
    return run_folder(preset, name, preset.training.seeds[0])


@pytest.mark.parametrize("name", ["standard_convnext", "glass_vit"])
def test_same_seed_gives_the_same_bytes_with_0_and_2_workers(
    name: str, toy_preset: Callable[..., Preset], indexed: Path, tmp_path: Path
) -> None:
    folders = []
    for workers in (0, 2):
        results = copy_index(indexed, tmp_path / str(workers))
        folders.append(train(toy_preset(num_workers=workers, results_root=results), name))
    histories = [
        [
            {key: value for key, value in row.items() if key != "epoch_seconds"}
            for row in read_csv(folder / "history.csv")
        ]
        for folder in folders
    ]
    assert histories[0] == histories[1] and len(histories[0]) == 2
    for file in ("predictions.csv", "metrics.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.fixture(scope="module")
def finished(indexed: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Preset, Path]:
    """A preset and the folder of a finished run of glass_resnet under it."""
    results = copy_index(indexed, tmp_path_factory.mktemp("finished") / "results")
    settings = replace(
        config.DEMO.settings, data_root=toy_data, results_root=results, patch_size=32, valid_size=6, test_size=10,
        num_workers=0, device="cpu",
    )  # fmt: skip
    preset = replace(config.DEMO, settings=settings, training=Training(epochs=3, seeds=(7,)))
    return preset, train(preset, "glass_resnet")


def test_a_run_folder_holds_what_was_promised(finished: tuple[Preset, Path]) -> None:
    preset, folder = finished
    assert sorted(file.name for file in folder.iterdir()) == [
        "history.csv", "metrics.json", "model.safetensors", "predictions.csv", "run.json", "training_curve.png",
    ]  # fmt: skip
    run = read_json(folder / "run.json")
    assert run["settings"]["lr_local"] == find_experiment(preset, "glass_resnet").lr_local
    assert run["settings"]["seed"] == 7 and run["settings"]["epochs"] == 3
    assert {"commit", "versions", "hardware", "dataset_fingerprint"} <= run.keys()


def test_every_metric_can_be_recomputed_from_the_predictions(finished: tuple[Preset, Path]) -> None:
    _, folder = finished
    rows = read_csv(folder / "predictions.csv")
    probabilities = np.array([[float(row["probability_fake"]), float(row["probability_real"])] for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    stored = {k: math.nan if v is None else v for k, v in read_json(folder / "metrics.json")["test"].items()}
    assert compute_metrics(probabilities, labels) == pytest.approx(stored, rel=1e-15, nan_ok=True)
    assert all(row["path"].startswith(("fake/", "real/")[int(row["label"])]) for row in rows)


def test_the_checkpoint_is_the_first_best_epoch_and_gives_the_predictions(finished: tuple[Preset, Path]) -> None:
    preset, folder = finished
    accuracies = [float(row["valid_accuracy"]) for row in read_csv(folder / "history.csv")]
    metrics = read_json(folder / "metrics.json")
    assert metrics["best_epoch"] == accuracies.index(max(accuracies)) + 1
    experiment = find_experiment(preset, "glass_resnet")
    model = build_model(experiment, preset.settings)
    about = load_model(folder / "model.safetensors", model)
    assert about["epoch"] == metrics["best_epoch"] and about["experiment"]["num_crops"] == experiment.num_crops
    index, splits = load_splits(preset)
    again = evaluate(model, build_loader(preset, experiment, index, splits.test), build_runtime(preset.settings))
    written = [float(row["probability_real"]) for row in read_csv(folder / "predictions.csv")]
    assert again.probabilities[:, 1] == pytest.approx(written, rel=1e-6)


def test_a_finished_seed_is_skipped_and_a_new_one_is_run(
    finished: tuple[Preset, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    preset, folder = finished
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}
    train_and_evaluate(
        replace(preset, training=replace(preset.training, seeds=(7, 8))), find_experiment(preset, "glass_resnet")
    )
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}
    assert (folder.parent / "seed_8" / "metrics.json").exists()
    assert "seed 7" in (out := capsys.readouterr().out) and "finished before" in out


def test_a_folder_of_other_settings_or_data_is_refused(finished: tuple[Preset, Path]) -> None:
    preset, folder = finished
    with pytest.raises(UserError, match=r"label_smoothing = 0\.1, now 0\.2"):
        train(replace(preset, settings=replace(preset.settings, label_smoothing=0.2)), "glass_resnet")
    with (
        edited_index(folder.parents[2], lambda text: text.replace(".jpg", ".JPG", 1)),
        pytest.raises(UserError, match=r"dataset_fingerprint = .*, now "),
    ):
        train(preset, "glass_resnet")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("run.json", content) for content in ("{}", "[]", "5", '{"settings": 5}', "{", "")),
        *(("metrics.json", content) for content in ("{}", "[]", '{"test": {}}', '{"best_epoch": 1, "test": 5}')),
        ("metrics.json", '{"best_epoch": 1, "test": {"accuracy": 12345}}'),
    ],
)
def test_a_damaged_file_of_a_finished_run_is_one_sentence(
    finished: tuple[Preset, Path], file: str, content: str
) -> None:
    preset, folder = finished
    original = (folder / file).read_text()
    try:
        (folder / file).write_text(content)
        with pytest.raises(UserError, match=rf"seed_7/{file} does not hold what this project writes there"):
            train(preset, "glass_resnet")
    finally:
        (folder / file).write_text(original)


COSTS = "num_crops,peak_memory_mb,epoch_seconds,valid_accuracy\r\n"


@pytest.mark.parametrize("rows", ["x,1,2,0.5", "1,1,2", "1,1,x,0.5", "1,1,2,50", "1,1,2,nan", f"1,{200_000 * '1'},2,"])
def test_damaged_costs_are_one_sentence(rows: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.csv"
    assert read_costs(path) == {}
    path.write_text(f"{COSTS}4,1,2,0.5\n2,1,2,\n")
    assert read_costs(path) == {4: Cost(1, 2, 0.5), 2: Cost(1, 2, None)}
    path.write_text(f"{COSTS}{rows}\n")
    with pytest.raises(UserError, match=r"costs\.csv does not hold what this project writes there"):
        read_costs(path)


def test_a_sweep_and_a_profile_say_that_their_costs_are_damaged(
    toy_preset: Callable[..., Preset], indexed: Path, tmp_path: Path
) -> None:
    preset = toy_preset(results_root=copy_index(indexed, tmp_path))
    for measure, room, name in (
        (sweep, "num_crops", "glass_resnet"),
        (profile, "standard_memory", "standard_resnet"),
    ):
        path = tmp_path / "demo" / room / name / "full" / "costs.csv"
        measure(preset, find_experiment(preset, name))
        path.write_text("renamed,peak_memory_mb,epoch_seconds,valid_accuracy\n1,1,2,0.5\n")
        with pytest.raises(UserError, match=rf"{room}/{name}/full/costs\.csv does not hold what this project writes"):
            measure(preset, find_experiment(preset, name))


def test_a_run_that_failed_before_its_first_epoch_may_be_begun_anew_otherwise(
    toy_preset: Callable[..., Preset], indexed: Path, tmp_path: Path
) -> None:
    results = copy_index(indexed, tmp_path)
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        train(toy_preset(results_root=results, weights_files=("timm:resnet10t=nowhere.pth",)), "standard_resnet")
    folder = train(toy_preset(results_root=results), "standard_resnet")
    assert read_json(folder / "run.json")["settings"]["weights_files"] == []


def test_an_unreadable_file_keeps_every_other_image_in_its_split(finished: tuple[Preset, Path]) -> None:
    preset, folder = finished
    _, whole = load_splits(preset)
    broken = whole.train[3]

    def break_one(text: str) -> str:
        lines = text.splitlines()
        lines[broken + 1] += "truncated"
        return "\n".join(lines) + "\n"

    with edited_index(folder.parents[2], break_one):
        _, splits = load_splits(preset)
    assert splits.train == [row for row in whole.train if row != broken]
    assert (splits.valid, splits.test) == (whole.valid, whole.test)
    assert splits.final_train + splits.final_valid == [
        row for row in whole.final_train + whole.final_valid if row != broken
    ]


def toy_trainer(preset: Preset, name: str = "standard_resnet", epochs: int = 2, **changes: float):  # noqa: ANN201
    experiment = replace(find_experiment(preset, name), batch_size=8, **changes)
    index, splits = load_splits(preset)
    seed_everything(1)
    trainer = build_trainer(build_model(experiment, preset.settings), experiment, preset.settings, epochs)
    train_loader = build_loader(preset, experiment, index, splits.train, training_seed=1)
    return trainer, train_loader, build_loader(preset, experiment, index, splits.valid)


def test_training_loss_is_smoothed_cross_entropy_and_evaluation_loss_is_not(toy_preset: Callable[..., Preset]) -> None:
    trainer, train_loader, valid_loader = toy_trainer(toy_preset(), dropout_rate=0.0)
    model = trainer.model.eval()
    *views, labels = next(iter(train_loader))
    with torch.no_grad():
        logits = model((views[0].float() / 255 - model.input_mean) / model.input_std).double()
    log_probabilities = logits.log_softmax(dim=1)
    own = -log_probabilities[torch.arange(len(labels)), labels]
    expected = (0.9 * own + 0.1 * -log_probabilities.mean(dim=1)).mean().item()
    assert trainer.train_step(views, labels).item() == pytest.approx(expected, rel=1e-4)  # still in eval mode
    predictions = evaluate(model, valid_loader, trainer.runtime)
    own = -np.log(predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels])
    assert predictions.loss == pytest.approx(own.mean(), rel=1e-9)


def test_learning_rates_follow_the_cosine_to_eta_min_once_an_epoch() -> None:
    experiment = find_experiment(config.PAPER, "glass_resnet")
    model = nn.ModuleDict(
        {name: nn.Linear(1, 1) for name in ("global_model", "local_model", "attention", "classifier")}
    )
    optimizer, scheduler = build_optimizer(model, experiment, epochs=50, eta_min=1e-6)
    for epoch in range(51):
        for group, start in zip(
            optimizer.param_groups, (2.158777650700252e-06, 6.853800121248665e-05, 2.979509550261194e-05), strict=True
        ):
            expected = 1e-6 + (start - 1e-6) * (1 + math.cos(math.pi * epoch / 50)) / 2
            assert group["lr"] == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8


def test_a_loss_that_is_not_finite_names_epoch_step_and_images(toy_preset: Callable[..., Preset]) -> None:
    trainer, train_loader, valid_loader = toy_trainer(toy_preset(), lr=1e37)
    with pytest.raises(UserError, match=r"epoch 1, step 2: .*(fake|real)/\d{4}\.(jpg|png)") as caught:
        fit(trainer, train_loader, valid_loader, 2)
    batch = train_loader.sampler.order()[8:16]
    assert all(train_loader.dataset.names[position] in str(caught.value) for position in batch)


def test_each_epoch_steps_the_schedule_once(toy_preset: Callable[..., Preset]) -> None:
    trainer, train_loader, valid_loader = toy_trainer(toy_preset(), lr=1e-3)
    rates = []
    fit(trainer, train_loader, valid_loader, 2, lambda record: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([(1e-3 + 1e-6) / 2, 1e-6])


def test_bytes_become_normalised_floats(toy_preset: Callable[..., Preset]) -> None:
    trainer, _, _ = toy_trainer(toy_preset())
    (view,) = trainer.runtime.to_device(
        trainer.model, [torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)]
    )
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert view.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_the_history_counts_images_not_batches(toy_preset: Callable[..., Preset]) -> None:
    trainer, train_loader, valid_loader = toy_trainer(toy_preset(), lr=0.0, dropout_rate=0.0, weight_decay=0.0)
    losses = []
    step = trainer.train_step
    trainer.train_step = lambda views, labels: losses.append((step(views, labels), len(labels))) or losses[-1][0]
    (record,) = fit(trainer, train_loader, valid_loader, 1)
    assert [size for _, size in losses] == [8, 8, 8, 4]  # the last batch is smaller and is kept
    assert record.train_loss == pytest.approx(sum(loss.item() * size for loss, size in losses) / 28)


def test_memory_on_the_cpu_is_the_bytes_kept_for_backward(toy_preset: Callable[..., Preset]) -> None:
    runtime = build_runtime(toy_preset().settings)
    weight = torch.ones(1000, requires_grad=True)
    with runtime.track_memory() as memory:
        for _ in range(3):  # a graph that is gone does not count any more
            kept = (weight * 2).exp()  # exp keeps its result: 4,000 bytes
            (kept.sin() + kept.cos()).sum().backward()  # both keep their input, one storage: no byte more
            del kept
    layer = nn.Linear(1000, 1000, bias=False)
    with runtime.track_memory() as of_linear:  # keeps its input, 4,000 bytes, and a view of its weight, which is none
        layer(torch.ones(1, 1000, requires_grad=True).exp()).sum().backward()
    assert of_linear.peak_bytes == 4000
    assert memory.peak_bytes == 4000 and memory.peak_mb == 4000 / MEGABYTE
    assert runtime.memory_kind == "saved_for_backward"


def test_memory_grows_with_crops_by_the_same_step(toy_preset: Callable[..., Preset]) -> None:
    peaks = []
    for num_crops in (1, 2, 3):
        trainer, train_loader, valid_loader = toy_trainer(toy_preset(), "glass_resnet", num_crops=num_crops)
        peaks.append(fit(trainer, train_loader, valid_loader, 1)[0].peak_memory_mb)
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.02) and peaks[1] > peaks[0] > 0


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "a.safetensors", nn.Linear(3, 2), {"seed": 1})
    assert load_model(tmp_path / "a.safetensors", nn.Linear(3, 2)) == {"seed": 1}
    with pytest.raises(UserError, match="does not fit"):
        load_model(tmp_path / "a.safetensors", nn.Linear(4, 2))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match="not a weights file"):
        load_model(tmp_path / "b.safetensors", nn.Linear(3, 2))


def test_a_device_that_is_not_there_is_one_sentence(toy_preset: Callable[..., Preset]) -> None:
    for device, sentence in (("cuda:99", "CUDA devices"), ("abacus", "expected auto"), ("meta", "cpu and cuda")):
        with pytest.raises(UserError, match=sentence):
            build_runtime(toy_preset(device=device).settings)
