"""Downloading: prints where, how large and what to do next, against a local stand-in for Kaggle; and never hangs."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import config
from data import data_download
from tests.conftest import REPOSITORY
from utils import UserError

NAME = "someone/pictures"


def archive_of(*names: str) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return buffer.getvalue()


class LocalKaggle(ThreadingHTTPServer):
    """Answers kagglehub's two calls; the command reaches it as its HTTP proxy, on whatever port is free."""

    status, archive = 200, archive_of("test/fake/a.png", "test/real/b.png", "train/fake/c.png")
    requests: list[str]


class Handler(BaseHTTPRequestHandler):
    server: LocalKaggle

    def do_POST(self) -> None:
        status, call = self.server.status, self.path.rpartition("/")[2]
        self.server.requests.append(call)
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = {"currentVersionNumber": 3} if status == 200 else {"code": status, "message": ""}
        is_archive = status == 200 and call == "DownloadDataset"
        content = self.server.archive if is_archive else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/zip" if is_archive else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def kaggle() -> Iterator[LocalKaggle]:
    server = LocalKaggle(("127.0.0.1", 0), Handler)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run_download(tmp_path: Path, *arguments: str, kaggle: LocalKaggle | None = None) -> subprocess.CompletedProcess:
    """Run the command with a home of its own; without `kaggle` there is no network."""
    kept = {name: value for name, value in os.environ.items() if "KAGGLE" not in name and "proxy" not in name.lower()}
    proxy = f"http://127.0.0.1:{kaggle.server_port if kaggle else 9}"
    environment = kept | {"HOME": str(tmp_path), "KAGGLEHUB_CACHE": str(tmp_path / "cache")}
    environment |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "KAGGLE_API_ENVIRONMENT": "LOCALHOST"}
    command = [sys.executable, "-m", "data.data_download", "--kaggle-dataset", NAME, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)


def test_a_download_prints_where_it_is_and_what_to_do_next(tmp_path: Path, kaggle: LocalKaggle) -> None:
    done = run_download(tmp_path, kaggle=kaggle)
    folder = tmp_path / "cache" / "datasets" / NAME / "versions" / "3"
    assert done.returncode == 0, done.stderr
    assert (folder / "test" / "real" / "b.png").read_text() == "test/real/b.png"
    assert f'data_root: Path = Path("{folder}/test")' in done.stdout
    assert f"python -m data.data_preprocess --data-root {folder}/test" in done.stdout
    assert done.stdout.index(f"stored under {tmp_path}/cache") < done.stdout.index("Downloading")
    assert run_download(tmp_path, kaggle=kaggle).returncode == 0
    assert kaggle.requests.count("DownloadDataset") == 1
    assert run_download(tmp_path, "--kaggle-dataset", f"{NAME}/versions/3").returncode == 0  # without a network


def test_the_papers_data_on_too_small_a_disk_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=103e9))
    with pytest.raises(UserError, match=r"needs 104 GB .* has 103.0 GB free: .* KAGGLEHUB_CACHE"):
        data_download.download(config.PAPER)
    assert not (tmp_path / "cache").exists()


def test_a_refusal_is_one_sentence_that_says_what_to_do(tmp_path: Path, kaggle: LocalKaggle) -> None:
    def refusal(*arguments: str, network: LocalKaggle | None = kaggle) -> str:
        done = run_download(tmp_path, *arguments, kaggle=network)
        said = done.stderr.splitlines()[-1]  # after a progress bar, if anything was downloaded
        assert done.returncode == 2 and said.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
        return said

    assert "--demo datasets/demo" in refusal("--preset", "demo")
    assert " pictures " in refusal("--kaggle-dataset", "pictures")  # not OWNER/NAME
    assert kaggle.requests == []
    said = refusal(network=None)
    assert said.startswith("error: Kaggle cannot be reached") and "--data-root" in said
    assert f"https://www.kaggle.com/datasets/{NAME}" in said
    kaggle.archive = archive_of("images/test/fake/a.png", "images/test/real/b.png")
    assert "has no folder test/fake: pass --data-root" in refusal()
    shutil.rmtree(tmp_path / "cache")
    for status, advice in ((401, "API token"), (403, "KAGGLE_API_TOKEN"), (404, "--kaggle-dataset"), (500, "later")):
        kaggle.status = status
        said = refusal()
        assert f"HTTP {status}" in said and advice in said


def test_a_network_that_never_answers_ends_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(data_download, "ANSWER_SECONDS", 0.2)
        started = time.perf_counter()
        with pytest.raises(UserError, match="Kaggle cannot be reached"):
            data_download.fetch(NAME)
        assert time.perf_counter() - started < 15
