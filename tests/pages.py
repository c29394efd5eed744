"""Helpers for the page of `model_training.app`: a server, clients, a browser, the cards that it shows.

    python -m tests.pages --weights FILE IMAGE docs/app.png

takes a picture of the page with an image dropped on it.
"""

import argparse
import html
import importlib.util
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tests.command_server import Process
from tests.conftest import start_module

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NUMBERS = {"probability": "probability_fake", "deviation": "standard_deviation"}  # of a card, in predictions.csv
Card = dict[str, str]  # a card's data attributes: name, and problem or verdict, probability, deviation, note


class Server:
    """A page that is served, and what its process prints."""

    def __init__(self, process: Process, url: str) -> None:
        self.process, self.url, self.errors = process, url, ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.errors += line

    def stop(self) -> int:
        """Press Ctrl-C twice; returns the exit code."""
        for _ in range(2):
            self.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self._reader.join()


@contextmanager
def served(weights: Path, *flags: str | Path) -> Iterator[Server]:
    """The page, which answers until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start_module("model_training.app", "--weights", weights, "--device", "cpu", "--port", str(port), *flags)
    server = Server(process, f"http://127.0.0.1:{port}")
    try:
        message = process.stdout.readline()
        assert server.url in message, message + server.errors
        yield server
    finally:
        server.stop()


def cards_of(page: str) -> list[Card]:
    """The data attributes of each card in an HTML text."""
    cards = re.findall(r'<article((?:\s+[\w-]+="[^"]*")+)', page)
    return [{name: html.unescape(value) for name, value in re.findall(r'data-(\w+)="([^"]*)"', card)} for card in cards]


def drop_files(url: str, drops: Sequence[Sequence[Path]]) -> list[list[Card]]:
    """The new cards after each drop of some files by one client."""
    from gradio_client import Client, handle_file

    client, answers = Client(url, verbose=False, analytics_enabled=False, download_files=False), []
    for paths in drops:
        *_, page = client.predict([handle_file(path) for path in paths], api_name="/examine")
        answers.append(cards_of(page)[-len(paths) :])
    return answers


def agree(card: Card, row: dict[str, str]) -> bool:
    """Whether a card agrees with a row of predictions.csv, numbers to 1e-6."""
    if row["problem"]:
        return card.get("problem") == row["problem"]
    numbers = [(card.get(name, ""), row[column]) for name, column in NUMBERS.items()]
    return (card.get("verdict"), card.get("note")) == (row["verdict"], row["note"]) and all(
        bool(shown) == bool(value) and abs(float(shown or 0) - float(value or 0)) <= 1e-6 for shown, value in numbers
    )


def missing_browser() -> str:
    """The programs that a browser needs and that are not installed."""
    there = {"chromium": CHROMIUM, "playwright (requirements-browser.txt)": importlib.util.find_spec("playwright")}
    return " and ".join(name for name, found in there.items() if not found)


@contextmanager
def browsed(url: str, width: int = 1280) -> Iterator[Any]:
    """The page at `url` in a browser of its own; playwright's `Page`."""
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
        page.goto(url)
        page.wait_for_selector("h1")
        yield page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("image")
    parser.add_argument("output")
    given = parser.parse_args()
    with served(given.weights) as server, browsed(server.url, 1000) as page:
        page.set_input_files("input[type=file]", [given.image])
        page.wait_for_selector(".card")
        page.wait_for_timeout(1000)
        box = page.locator(".card").bounding_box()
        clip = {"x": 0, "y": 0, "width": 1000, "height": box["y"] + box["height"] + 16}
        page.screenshot(path=given.output, full_page=True, clip=clip)
    with Image.open(given.output) as picture:
        small = picture.convert("RGB").quantize(64)
    small.save(given.output, optimize=True)
