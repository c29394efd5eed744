"""What weights say about their training, images unlike it, the model card, weights from a hub."""

import hashlib
import html
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from data.lists import read_csv
from model_training.inference.provenance import Provenance, TrainingData
from tests.conftest import TOY_FLAGS, copy_index, refused, start_afresh, succeed, untrained_weights
from training.checkpoints import read_about
from utils import read_json

DATA = "toys | <i>"  # the name of a data root
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def run(toy_data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of one epoch."""
    folder = tmp_path_factory.mktemp("provenance")
    (folder / DATA).symlink_to(toy_data)
    results = copy_index(indexed, folder / "results")
    roots, flags = ("--data-root", folder / DATA, "--results-root", results), ("--epochs", "1", "--seeds", "1")
    succeed("model_training.standard_resnet_training", *TOY_FLAGS, *roots, *flags)
    return results / "demo" / "standard_resnet" / "seed_1"


def predicted(weights: Path | str, output: Path, *arguments: str | Path) -> str:
    return succeed("model_training.predict", "--weights", weights, "--device", "cpu", "--output", output, *arguments)


def test_a_verdict_says_what_the_model_was_trained_and_tested_on(run: Path, toy_data: Path, tmp_path: Path) -> None:
    message = predicted(run / "model.safetensors", tmp_path / "p.csv", toy_data, "--evidence", tmp_path / "evidence")
    metrics = read_json(run / "metrics.json")["test"]
    for sentence in (
        f"Trained on 34 images of the data set {DATA} (",
        f"On 6 other images of that data set: accuracy {metrics['accuracy']:.1%}, AUC {100 * metrics['auc_score']:.1f}",
        "How it does on images of other origin, only a test on such images can tell.",
    ):
        assert sentence in message and html.escape(sentence) in (tmp_path / "evidence" / "index.html").read_text()


def test_images_unlike_those_of_the_training_are_named(run: Path, toy_data: Path, tmp_path: Path) -> None:
    for name, size in (("alike.png", (100, 90)), ("small.jpg", (38, 100)), ("large.webp", (100, 300))):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / name)
    predicted(run / "model.safetensors", tmp_path / "p.csv", tmp_path)
    notes = {Path(row["path"]).name: row["note"] for row in read_csv(tmp_path / "p.csv")}
    assert notes == {
        "alike.png": "",
        "small.jpg": "unlike its training images (smaller)",
        "large.webp": "unlike its training images (WEBP, larger)",
    }
    message = predicted(run / "model.safetensors", tmp_path / "own.csv", toy_data)
    assert not any(row["note"] for row in read_csv(tmp_path / "own.csv")) and "a format or size" not in message


def test_weights_without_provenance_are_reported(toy_data: Path, tmp_path: Path) -> None:
    weights = untrained_weights(tmp_path / "old.safetensors", "standard_resnet")
    assert "do not say what they were trained on" in predicted(weights, tmp_path / "p.csv", toy_data / "fake")


def test_names_in_weights_and_errors_cannot_steer_a_terminal(toy_data: Path, tmp_path: Path) -> None:
    weights = untrained_weights(tmp_path / "w.safetensors", "standard_resnet")
    data = asdict(TrainingData("a\x1b[2J\nb", "f", 1, 1, ("PNG",), 8, 9))
    about = read_about(weights) | {"provenance": {"data": [data], "test": None}}
    save_file(load_file(weights), weights, metadata={"about": json.dumps(about)})
    assert "of the data set a\\x1b[2J\\nb (1 fake" in predicted(weights, tmp_path / "p.csv", toy_data / "fake")
    message = refused("model_training.predict", "--weights", weights, "--device", "cpu", tmp_path / "a\n\x1bc.png")
    assert "a\\n\\x1bc.png does not exist" in message


def test_the_model_card_is_one_that_the_hub_reads(run: Path) -> None:
    card, metrics = ModelCard.load(run / "README.md"), read_json(run / "metrics.json")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy": metrics["test"]["accuracy"], "auc": pytest.approx(metrics["test"]["auc_score"])}
    assert card.data.eval_results[0].dataset_name == DATA
    fingerprint = read_json(run / "run.json")["dataset_fingerprint"]
    for part in (
        f"fingerprint `{fingerprint}`",
        "| accuracy | ",
        "| toys \\| &lt;i&gt;, fingerprint",
        "## Limits",
        "predict --weights model.safetensors",
    ):
        assert part.lower() in card.content.lower()


class Hub(BaseHTTPRequestHandler):
    """Of the hub, what one model's download asks for."""

    def __init__(self, weights: Path, *arguments: object) -> None:
        self.weights = weights.read_bytes()
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        if self.path not in (f"/me/detector/resolve/{name}/model.safetensors" for name in ("main", COMMIT)):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "pickled" in self.path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.weights
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine with the run's weights as me/detector."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, run / "model.safetensors"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield
    server.shutdown()


@pytest.mark.usefixtures("hub")
def test_weights_of_a_hub_give_the_same_predictions(
    run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--device", "cpu", "--output", tmp_path / "hub.csv", toy_data / "real")
    command = "model_training.predict", "--weights"
    process = start_afresh(*command, "hf:me/detector", *flags)  # which reads HF_ENDPOINT when it imports the library
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and f"weights: hf:me/detector@{COMMIT}" in errors, errors
    predicted(run / "model.safetensors", tmp_path / "file.csv", toy_data / "real")
    one, other = (read_csv(tmp_path / name) for name in ("hub.csv", "file.csv"))
    assert [row["raw_probability_fake"] for row in one] == [row["raw_probability_fake"] for row in other]
    for repository in ("me/other", "me/pickled"):
        errors = start_afresh(*command, f"hf:{repository}", *flags).communicate(timeout=120)[1]
        assert f"error: model.safetensors of {repository} cannot be fetched from the hub" in errors
        assert errors.count("\n") == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # what was fetched is there
    errors = start_afresh(*command, f"hf:me/detector@{COMMIT}", *flags).communicate(timeout=120)[1]
    assert f"weights: hf:me/detector@{COMMIT}" in errors and "error" not in errors


def test_a_model_of_drawn_images_says_so() -> None:
    demo, own = (TrainingData("demo", "f", 1, 1, ("PNG",), 8, 9, drawn=drawn) for drawn in (True, False))
    message = "a program drew: it knows nothing of real generators, nor of photographs"
    assert [message in Provenance((data,)).sentence for data in (demo, own)] == [True, False]
    assert Provenance.read({"provenance": asdict(Provenance((demo,)))}).data == (demo,)
