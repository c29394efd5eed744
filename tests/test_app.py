"""The page of `model_training.app`: in a browser, and with several clients at once."""

import glob
import os
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest

from data.lists import read_csv
from model_training.app import PAGES
from tests.conftest import refused, run_module, untrained_weights, wait_until
from tests.odd_images import write_odd_images
from tests.pages import Card, Server, agree, browsed, cards_of, drop_files, missing_browser, served

gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio (requirements-app.txt)")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd images, the weights of a model as its training begins, and what `predict` says of each image."""
    root = tmp_path_factory.mktemp("app")
    write_odd_images(root / "images")
    files = [path for path in (root / "images").rglob("*") if path.is_file()]  # but for a link that leads nowhere
    named = [root / "drops" / f"{n}" / path.name.replace("\n", " ") for n, path in enumerate(files)]
    for source, path in zip(files, named, strict=True):
        path.parent.mkdir(parents=True)
        shutil.copy(source, os.fsdecode(os.fsencode(path).replace(b"\xff", b"_")))
    weights = untrained_weights(root / "model.safetensors", "glass_resnet")
    flags = ("--weights", weights, "--device", "cpu", "--draws", "5", "--output", root / "predictions.csv")
    run_module("model_training.predict", *flags, *glob.glob(f"{root}/drops/*/*"))
    return root


@pytest.fixture(scope="module")
def rows(scratch: Path) -> dict[Path, dict[str, str]]:
    """Each image -> its row."""
    return {Path(row["path"]): row for row in read_csv(scratch / "predictions.csv")}


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[Server]:
    """A page whose uploads lie below `scratch`, and are gone when it has ended."""
    uploads = scratch / "uploads"
    uploads.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(uploads))
        with served(scratch / "model.safetensors") as server:
            yield server
            assert len(list(uploads.glob("app_*/*/*"))) >= 20
            assert server.stop() == 0
    assert not list(uploads.iterdir()) and "Traceback" not in server.errors


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    """The page in a browser."""
    if missing := missing_browser():
        pytest.skip(f"needs {missing}")
    with browsed(server.url) as page:
        yield page


def test_several_clients_at_once_get_the_numbers_of_predict(
    server: Server, scratch: Path, rows: dict[Path, dict[str, str]]
) -> None:
    paths = list(rows)
    drops = [[paths[n::4][i : i + 3] for i in range(0, len(paths[n::4]), 3)] for n in range(4)]
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(drop_files, [server.url] * 4, drops))
    for drop, cards in zip(chain(*drops), chain(*answers), strict=True):
        assert [card["name"] for card in cards] == [path.name for path in drop]
        for path, card in zip(drop, cards, strict=True):
            assert agree(card, rows[path]), (card, rows[path])
    assert sum(row["problem"] != "" for row in rows.values()) == 5  # two texts, two empty ones, one cut short
    assert not server.errors


def cards_in(page: Any, number: int) -> list[Card]:
    """The cards, once there are `number` of them."""
    page.wait_for_function(f"document.querySelectorAll('.card').length >= {number}")
    return cards_of(page.content())


def test_a_browser_shows_what_predict_says_and_a_map_on_request(
    page: Any, scratch: Path, rows: dict[Path, dict[str, str]]
) -> None:
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.reload()
    row = next(row for path, row in rows.items() if path.name == "photo.JPG")
    image, text = scratch / '<b> & "é" 中?.jpg', scratch / "text.jpg"
    shutil.copy(row["path"], image)
    text.write_text("hello")
    page.set_input_files("input[type=file]", [image, text])
    cards = cards_in(page, 2)
    assert [card["name"] for card in cards] == [image.name, text.name]
    assert agree(cards[0], row) and cards[1]["problem"] == "not an image"
    first, second = page.locator(".card").all()
    shown = first.inner_text()
    assert image.name in shown and row["verdict"] in shown and "300 x 200 pixels" in shown
    assert (
        f"P(fake) {float(row['probability_fake']):.3f} ± {float(row['standard_deviation']):.3f} over 5 draws" in shown
    )
    assert "not an image" in second.inner_text()
    assert "What the score does not mean" in page.inner_text("body")

    assert not page.locator(".map").count()
    page.click("button[data-map]")
    page.wait_for_selector(".map img")
    assert "tiles over the whole image" in first.inner_text()
    page.set_input_files("input[type=file]", [text])  # what is shown stays
    assert len(cards_in(page, 3)) == 3 and page.locator(".map").count() == 1
    own = page.url.split("/")[2]
    assert {address.split("/")[2] for address in addresses if address.startswith("http")} == {own}
    for width in (1280, 390):  # nothing is wider than the window
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_port_that_is_taken_and_crops_of_a_model_without_are_refused(server: Server, scratch: Path) -> None:
    port = server.url.rpartition(":")[2]
    message = refused("model_training.app", "--weights", scratch / "model.safetensors", "--port", port)
    assert f"127.0.0.1:{port} cannot be listened on, as it is taken" in message and "GRADIO_SERVER_PORT" not in message
    assert "host is" in refused("model_training.app", "--weights", scratch / "model.safetensors", "--host", "")
    standard = untrained_weights(scratch / "standard.safetensors", "standard_resnet")
    message = refused("model_training.app", "--weights", standard, "--num-crops", "4")
    assert "looks at the whole image and draws no crops" in message


def test_the_images_of_the_last_pages_are_kept_and_a_map_is_drawn_after_a_pause(
    server: Server, rows: dict[Path, dict[str, str]]
) -> None:
    client = gradio_client.Client(server.url, verbose=False, analytics_enabled=False, download_files=False)
    photo = next(path for path in rows if path.name == "photo.JPG")
    text = next(path for path, row in rows.items() if row["problem"] == "not an image")

    def cards(path: Path) -> list[Card]:
        return cards_of(client.predict([gradio_client.handle_file(path)], api_name="/examine")[-1])

    first, web = client.session_hash, httpx.Client(base_url=f"{server.url}/gradio_api", trust_env=False, timeout=60)
    cards(photo)
    with web.stream("GET", f"/heartbeat/{first}") as beat:  # as a browser whose computer then sleeps
        next(beat.iter_lines())
    time.sleep(0.5)
    job = {"fn_index": 1, "data": [None, None], "event_data": {"number": "1"}, "session_hash": first}
    web.post("/queue/join", json=job).raise_for_status()
    with web.stream("GET", "/queue/data", params={"session_hash": first}) as events:
        assert "tiles over the whole image" in next(line for line in events.iter_lines() if "process_completed" in line)
    assert [card["name"] for card in cards(text)] == ["photo.JPG", text.name]
    for number in range(PAGES):
        client.session_hash = f"another{number}"
        cards(text)
    client.session_hash = first
    assert [card["name"] for card in cards(text)] == [text.name]


def test_uploads_are_removed_after_an_hour_even_those_that_were_broken_off(server: Server, scratch: Path) -> None:
    (uploads,) = (scratch / "uploads").glob("app_*")
    address = tuple(server.url.split("/")[2].split(":"))
    part = "--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    before = set(uploads.iterdir())
    with socket.create_connection(address) as client:
        client.sendall(f"{head}Content-Length: 9000\r\n\r\n{part}".encode() + bytes(99))
        wait_until(lambda: set(uploads.iterdir()) - before)
    time.sleep(0.5)  # until what was sent is written
    (broken_off,) = set(uploads.iterdir()) - before
    os.utime(broken_off, (0, 0))
    wait_until(lambda: not broken_off.exists())


def test_no_address_is_fetched_for_a_client(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.01)
        address = f"http://127.0.0.1:{other.getsockname()[1]}/a.png"
        file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
        client = gradio_client.Client(server.url, verbose=False, analytics_enabled=False)
        *_, message = client.predict([file], api_name="/examine")
        assert [card["problem"] for card in cards_of(message)] == ["No such file or directory"]
        with pytest.raises(TimeoutError):
            other.accept()
