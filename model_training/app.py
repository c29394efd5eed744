"""Is it fake? A page to drop images on, in a browser.

    python -m model_training.app --weights results/demo/glass_resnet/seed_100/model.safetensors

Serves a page on http://127.0.0.1:7860 until Ctrl-C: drop one or several images on it for the verdict of each with its
calibrated probability, its spread over --draws draws of its crops, the image with its crops outlined, and on request a
map of effects. The numbers are those of model_training.predict with the same options.

It needs `pip install -r requirements-app.txt`. Nothing is sent anywhere and nothing is fetched; the page works without
a network. --host 0.0.0.0 lets others in the network use it: there is no password. One image is decoded and scored at a
time; uploads are kept in a temporary folder for an hour at most, which is removed when the command ends.
"""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from config import Count, Preset
from data.images import UnreadableImage
from data.pictures import Picture, read_pictures
from model_training.inference.detector import Detector, PredictionOptions, load_detector
from model_training.inference.page_parts import card, map_card, template
from models.weights import weights_file
from utils import UserError, run_command

KEPT, PAGES = 40, 50  # most images that a page shows; most pages whose images are kept, 7 MB each
CLEANED, OLDEST = 5, 3600  # seconds between two looks for old uploads, and the age at which they are removed
UPLOAD_BYTES = 2_000_000_000  # limit for one file; 200 megapixels of 16 bits with transparency take 1.6 GB
MAP_PIXELS = 50_000_000  # limit for a map, during which other users wait
STYLE = Path(__file__).with_name("inference") / "app.css"
ON_CLICK = """element.addEventListener("click", event => {
  const button = event.target.closest("button[data-map]");
  if (button) { button.disabled = true; trigger("map", { number: button.dataset.map }); }
});"""
# Without proxies: gradio requests its own page to see whether it is up.
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "*", "NO_PROXY": "*"}
# The browser requests nothing from other computers, although gradio's page would.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'self'"


@dataclass(frozen=True, kw_only=True)
class Options(PredictionOptions):
    """Which weights, where the page is, and how to predict."""

    weights: Path  # model.safetensors of a run, or hf:OWNER/NAME of the Hugging Face hub
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"  # the address to listen on; 0.0.0.0: of all networks
    port: Annotated[int, Field(ge=1, le=65535)] = 7860
    draws: Count = 5  # T, how often each image's crops are drawn; 1 if all draws have the same crops


@dataclass
class Shown:
    """An image on a page."""

    name: str
    path: str
    html: str
    verdict: str  # empty for a file without a prediction


def app(preset: Preset, weights: Path, host: str, port: int, **others: Any) -> None:
    """Serve the page until it is interrupted. The arguments are the fields of `Options`.

    Raises UserError: no weights, invalid options, gradio is not installed, or the port is taken.
    """
    settings, options = preset.settings, Options(weights=weights_file(weights), host=host, port=port, **others)
    detector = load_detector(options.weights, settings.device, settings.max_image_pixels, options)
    if options.crops and not detector.num_crops:
        raise UserError(f"{' and '.join(options.crops)}: {detector.name} looks at the whole image and draws no crops")
    if not detector.draws_differ:
        detector = replace(detector, options=replace(options, draws=1))
    with tempfile.TemporaryDirectory(prefix="app_") as uploads:
        os.environ.update(ENVIRONMENT, GRADIO_TEMP_DIR=uploads)
        try:
            import gradio
        except ImportError:
            raise UserError("the page needs gradio: pip install -r requirements-app.txt") from None
        from starlette.middleware import Middleware

        busy, ended = threading.Lock(), threading.Event()
        page = build_page(detector, busy, ended)
        try:
            page.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, inline=False,
                show_error=True, max_file_size=UPLOAD_BYTES, footer_links=[], run_history=False, ssr_mode=False,
                mcp_server=False, pwa=False, enable_monitoring=False, state_session_capacity=PAGES,
                head=f"<style>{STYLE.read_text(encoding='utf-8')}</style>",
                app_kwargs={"middleware": [Middleware(SelfContained)]},
                theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            )  # fmt: skip
        except OSError:
            where = f"{host}:{port} cannot be listened on"
            raise UserError(f"{where}, as it is taken or not this computer's: name another --host or --port") from None
        open_to = "" if host in ("127.0.0.1", "localhost", "::1") else "open to the network, without a password; "
        print(f"{detector.name}: http://{host}:{port} ({open_to}Ctrl-C ends it)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # removes the uploads, too
        with suppress(KeyboardInterrupt):
            while not ended.wait(CLEANED):
                remove_old(Path(uploads))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave the uploads
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ended.set()
        page.close(verbose=False)
        busy.acquire()  # wait for the image that is being scored


def remove_old(folder: Path) -> None:
    """Remove the uploads that are an hour old; gradio itself does not know of uploads that were broken off."""
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > OLDEST:
                path.unlink()


def build_page(detector: Detector, busy: threading.Lock, ended: threading.Event) -> Any:
    """The page, gradio's `Blocks`.

    Args:
        busy: held while an image is scored or mapped, so that this happens one at a time.
        ended: once it is set, no more images are scored.
    """
    import gradio as gr

    async def keep_path(path: str) -> str:
        return path

    progress, closed_sessions = gr.Progress(), set[str]()
    text, parts = template("app.html").make_module({"detector": detector}), template("card.html").module

    def examine(
        files: list[dict[str, Any]] | None, shown: dict[int, Shown], progress: gr.Progress = progress
    ) -> Iterator[tuple]:
        for number, file in enumerate(files or []):
            name = file.get("orig_name") or Path(file["path"]).name
            progress((number, len(files)), desc=name, unit="images")
            key = max(shown, default=0) + 1
            with busy:
                if ended.is_set():
                    return
                shown[key] = Shown(name, file["path"], *predict_card(detector, key, name, file["path"]))
            while len(shown) > KEPT:
                del shown[min(shown)]
            yield None, parts.overview(shown), "".join(one.html for one in shown.values())

    def draw_map(
        shown: dict[int, Shown], event: gr.EventData, request: gr.Request, progress: gr.Progress = progress
    ) -> str:
        number = int(event.number)
        closed_sessions.discard(request.session_hash)  # a computer that was asleep returns with the same session

        def report(share: float) -> None:
            if ended.is_set() or request.session_hash in closed_sessions:
                raise gr.Error("the page was closed", print_exception=False)
            progress(share, desc=f"map of {shown[number].name}")

        with busy:
            if number in shown:
                drawn = map_or_reason(detector, shown[number].path, report)
                shown[number].html = shown[number].html.replace(parts.map_button(number), drawn)
        return "".join(one.html for one in shown.values())

    def closed(request: gr.Request) -> None:
        closed_sessions.add(request.session_hash)

    with gr.Blocks(title="Was this image generated?", analytics_enabled=False) as page:
        gr.HTML(text.head(), elem_classes="page", apply_default_css=False)
        drop = gr.File(file_count="multiple", label="Drop images here", height=160)
        drop.async_move_resource_to_block_cache = keep_path  # else gradio copies files, and fetches addresses
        overview = gr.HTML(elem_classes="page", apply_default_css=False)
        shown = gr.State({}, time_to_live=OLDEST)
        results = gr.HTML(elem_classes="page", apply_default_css=False, js_on_load=ON_CLICK)
        gr.HTML(text.foot(), elem_classes="page", apply_default_css=False)
        status = gr.HTML(elem_id="status")
        waiting = dict(concurrency_id="model", concurrency_limit=1, show_progress_on=status, trigger_mode="multiple")
        drop.upload(examine, [drop, shown], [drop, overview, results], preprocess=False, api_name="examine", **waiting)
        results.map(draw_map, shown, results, api_name=False, **waiting)
        page.unload(closed)
    return page


def read_picture(detector: Detector, path: str) -> Picture | UnreadableImage:
    """An image as `predict` reads it."""
    settings = detector.settings
    (picture,) = read_pictures([path], settings.max_image_pixels, reencode_jpeg=settings.reencode_jpeg)
    return picture


def predict_card(detector: Detector, key: int, name: str, path: str) -> tuple[str, str]:
    """The card of a file, and its verdict."""
    picture = read_picture(detector, path)
    try:
        (found,) = detector.predict_pictures([picture])
    except UserError as error:
        found = UnreadableImage(str(error))
    return card(detector, key, name, found, picture), getattr(found, "verdict", "")


def map_or_reason(detector: Detector, path: str, report: Callable[[float], None]) -> str:
    """The map of an image, or why there is none; `report` is called with the share that is done."""
    picture = read_picture(detector, path)
    parts = template("card.html").module
    if isinstance(picture, UnreadableImage):
        return parts.no_map(f"{picture}: images are kept for an hour, drop it again")
    if picture.width * picture.height > MAP_PIXELS:
        return parts.no_map(f"more than {MAP_PIXELS:,} pixels: python -m model_training.predict --evidence-map maps it")
    try:
        return map_card(detector, ReportingPicture(**vars(picture), report=report))
    except UserError as error:
        return parts.no_map(str(error))


@dataclass(frozen=True)
class ReportingPicture(Picture):
    """A picture that reports which share of its crops has been cut out."""

    report: Callable[[float], None] = print

    def crops(self, boxes: np.ndarray, patch_size: int) -> Iterator[np.ndarray]:
        """As `Picture.crops`."""
        for done, crop in enumerate(super().crops(boxes, patch_size)):
            if done % (len(boxes) // 100 + 1) == 0:
                self.report(done / len(boxes))
            yield crop


class SelfContained:
    """ASGI middleware: adds POLICY to every response, and ignores uploads that are broken off."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Handle one request."""
        from starlette.requests import ClientDisconnect

        async def answer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        with suppress(ClientDisconnect):
            await self.app(scope, receive, answer)


if __name__ == "__main__":
    run_command(__doc__, app, settings=("device", "max_image_pixels"), options=Options)
