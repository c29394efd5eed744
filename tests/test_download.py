"""Downloading: says where, how large and what to do next, against a Kaggle of our own; and never hangs or sets."""

import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import data_download

REPOSITORY = Path(__file__).parents[1]
PAPER = "tristanzhang32/ai-generated-images-vs-real-images"


class FakeKaggle(ThreadingHTTPServer):
    """Answers kagglehub's two calls; the door reaches it as its HTTP proxy, on whatever port is free."""

    status, size, files = 200, 1000, ("test/fake/a.png", "test/real/b.png", "train/fake/c.png")
    requests: list[str]

    def archive(self) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name in self.files:
                file.writestr(name, name)
        return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    server: FakeKaggle

    def do_POST(self) -> None:
        self.server.requests.append(self.path.rpartition("/")[2])
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status != 200:
            self.answer(json.dumps({"code": self.server.status, "message": "no"}).encode(), "application/json")
        elif self.path.endswith("/GetDataset"):
            values = {"currentVersionNumber": 3, "totalBytes": self.server.size}
            self.answer(json.dumps(values).encode(), "application/json")
        else:
            self.answer(self.server.archive(), "application/zip")

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def kaggle() -> Iterator[FakeKaggle]:
    server = FakeKaggle(("127.0.0.1", 0), Handler)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def door(tmp_path: Path, *arguments: str, proxy: str | None = None) -> subprocess.CompletedProcess:
    """Run the door with a home of its own; `proxy` None: no network."""
    kept = {name: value for name, value in os.environ.items() if "KAGGLE" not in name and "proxy" not in name.lower()}
    proxy = proxy or "http://127.0.0.1:9"
    environment = kept | {"HOME": str(tmp_path), "KAGGLEHUB_CACHE": str(tmp_path / "cache")}
    environment |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "KAGGLE_API_ENVIRONMENT": "LOCALHOST"}
    command = [sys.executable, "-m", "data.data_download", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)


def proxy_of(kaggle: FakeKaggle) -> str:
    return f"http://127.0.0.1:{kaggle.server_port}"


def test_a_download_says_where_it_lies_and_what_to_do_next(tmp_path: Path, kaggle: FakeKaggle) -> None:
    config_before = (REPOSITORY / "config.py").read_bytes()
    done = door(tmp_path, proxy=proxy_of(kaggle))
    folder = tmp_path / "cache" / "datasets" / PAPER / "versions" / "3"
    assert done.returncode == 0, done.stderr
    assert (folder / "test" / "real" / "b.png").read_text() == "test/real/b.png"
    assert f'data_root: Path = Path("{folder}/test")' in done.stdout
    assert f"python -m data.data_preprocess --data-root {folder}/test" in done.stdout
    assert done.stdout.index("0.0 GB") < done.stdout.index("Downloading")  # the size comes first
    assert (REPOSITORY / "config.py").read_bytes() == config_before


def test_a_second_download_finds_the_first(tmp_path: Path, kaggle: FakeKaggle) -> None:
    first, second = (door(tmp_path, proxy=proxy_of(kaggle)) for _ in range(2))
    assert first.returncode == second.returncode == 0
    assert "was downloaded before" in second.stdout
    assert kaggle.requests.count("DownloadDataset") == 1
    assert door(tmp_path, "--kaggle-dataset", f"{PAPER}/versions/3").returncode == 0  # without a network


def test_a_data_set_larger_than_the_disk_is_refused_before_it_starts(tmp_path: Path, kaggle: FakeKaggle) -> None:
    kaggle.size = 10**18
    done = door(tmp_path, proxy=proxy_of(kaggle))
    assert done.returncode == 2
    assert "needs 2000000000.0 GB more" in done.stderr and "KAGGLEHUB_CACHE" in done.stderr
    assert "DownloadDataset" not in kaggle.requests and not (tmp_path / "cache").exists()


def test_the_known_size_is_said_where_kaggle_does_not_tell_it(tmp_path: Path, kaggle: FakeKaggle) -> None:
    kaggle.size = 0
    assert f"{PAPER}/versions/3: 52.0 GB" in door(tmp_path, proxy=proxy_of(kaggle)).stdout
    other = door(tmp_path, "--kaggle-dataset", "someone/pictures", proxy=proxy_of(kaggle))
    assert "someone/pictures/versions/3: Kaggle does not tell the size" in other.stdout


def test_a_data_set_without_the_expected_folders_is_named(tmp_path: Path, kaggle: FakeKaggle) -> None:
    kaggle.files = ("images/test/fake/a.png", "images/test/real/b.png")
    done = door(tmp_path, proxy=proxy_of(kaggle))
    assert done.returncode == 2
    assert "has no folder test/fake: pass --data-root" in done.stderr


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "API token"), (403, "KAGGLE_API_TOKEN"), (404, "--kaggle-dataset"), (500, "later")]
)
def test_a_refusal_becomes_one_sentence(tmp_path: Path, kaggle: FakeKaggle, status: int, advice: str) -> None:
    kaggle.status = status
    done = door(tmp_path, proxy=proxy_of(kaggle))
    assert done.returncode == 2
    assert advice in done.stderr and done.stderr.count("\n") == 1


def test_without_a_network_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    done = door(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Kaggle cannot be reached") and done.stderr.count("\n") == 1
    assert f"https://www.kaggle.com/datasets/{PAPER}" in done.stderr and "--data-root" in done.stderr


def test_a_name_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    done = door(tmp_path, "--kaggle-dataset", "pictures")
    assert done.returncode == 2 and "pictures" in done.stderr and done.stderr.count("\n") == 1


def test_a_network_that_never_answers_is_given_up() -> None:
    started = time.perf_counter()
    with pytest.raises(TimeoutError):
        data_download._within(0.2, lambda: time.sleep(30))
    assert time.perf_counter() - started < 5


def test_the_demo_preset_does_not_fetch_the_papers_data(tmp_path: Path, kaggle: FakeKaggle) -> None:
    done = door(tmp_path, "--preset", "demo", proxy=proxy_of(kaggle))
    assert done.returncode == 2 and "--demo datasets/demo" in done.stderr
    assert kaggle.requests == []


def test_demo_data_is_written_and_the_next_command_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from data import demo_dataset

    write = demo_dataset.write_demo_dataset
    monkeypatch.setattr(demo_dataset, "write_demo_dataset", lambda root: write(root, images_per_class=1, workers=1))
    data_download.write_demo(tmp_path / "demo images")
    assert [len(list((tmp_path / "demo images" / name).iterdir())) for name in ("fake", "real")] == [1, 1]
    said = capsys.readouterr().out
    assert f"python -m data.data_preprocess --preset demo --data-root '{tmp_path / 'demo images'}'" in said
