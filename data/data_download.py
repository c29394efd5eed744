"""Fetch the paper's data set from Kaggle, or write the demonstration data set.

    python -m data.data_download                        the paper's: about 52 GB, 60,000 images
    python -m data.data_download --demo datasets/demo   400 procedural images, drawn here, without a network

kagglehub keeps what it fetches under ~/.cache/kagglehub; the variable KAGGLEHUB_CACHE moves it. Kaggle needs no
account for public data. While it unpacks, kagglehub needs room for the archive and for the files. A download that
broke off or stands still (stop it with Ctrl-C) is gone on with by the same command. Nothing is set by this command:
it ends by saying what to put in config.py, or which flag to pass.
"""

import argparse
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import config
from config import Preset, Settings
from utils import UserError, run_door

PAPER_BYTES = 52e9  # SPEC, Data; said where Kaggle does not tell the size
ANSWER_SECONDS = 30.0  # kagglehub itself would wait for ever


def download(preset: Preset, demo: str | None = None) -> None:
    """Fetch the preset's Kaggle data set, or write the demonstration data set into the folder `demo`.

    Raises:
        UserError: no network, refused by Kaggle, no such data set, not enough space, or not the expected folders.
    """
    if demo is not None:
        write_demo(Path(demo))
        return
    if preset.name == config.DEMO.name:
        raise UserError(f"preset {preset.name} runs on procedural images: pass --demo {preset.settings.data_root}")
    name = preset.settings.kaggle_dataset
    with _plain_errors(name):
        root = fetch(name) / "test"
    for class_name in ("fake", "real"):
        if not (root / class_name).is_dir():
            raise UserError(
                f"{name} lies in {root.parent} but has no folder test/{class_name}: "
                f"pass --data-root with the folder in it that holds fake/ and real/"
            )
    print(f"\n{name} lies in {root.parent}; the paper uses test/ only.")
    print(f'To use it, put this line in config.py:\n    data_root: Path = Path("{root}")')
    print(f"or pass this to each command:\n    --data-root {shlex.quote(str(root))}")
    print(f"Next:\n    python -m data.data_preprocess --data-root {shlex.quote(str(root))}")


def write_demo(root: Path) -> None:
    """Write the demonstration data set into `root`, and say what to do with it."""
    from data.demo_dataset import write_demo_dataset  # here: it is not needed to reach Kaggle

    write_demo_dataset(root)
    flag = "" if root == config.DEMO.settings.data_root else f" --data-root {shlex.quote(str(root))}"
    print(f"The demonstration data set lies in {root}. Next:\n    python -m data.data_preprocess --preset demo{flag}")


def fetch(name: str) -> Path:
    """Download and unpack a Kaggle data set, unless it is there already; returns its folder.

    Prints where it goes, its size and the free space before it starts.

    Args:
        name: OWNER/DATASET, or OWNER/DATASET/versions/NUMBER.

    Raises:
        UserError: the disk has not enough space.
        Exception: what kagglehub raises.
    """
    import kagglehub  # here, like all of its modules, so that nothing else waits for it
    from kagglehub.cache import Cache
    from kagglehub.config import get_cache_folder
    from kagglehub.handle import parse_dataset_handle

    handle, size, cache = parse_dataset_handle(name), 0, Cache()
    if not (handle.is_versioned() and cache.load_from_cache(handle)):
        version, size = _within(ANSWER_SECONDS, lambda: ask_kaggle(handle.owner, handle.dataset))
        handle = handle if handle.is_versioned() else handle.with_version(version)
    if folder := cache.load_from_cache(handle):
        print(f"{handle} was downloaded before")
        return Path(folder)
    folder, archive = Path(cache.get_path(handle)), Path(cache.get_archive_path(handle))
    if not size and name == Settings.kaggle_dataset:
        size = PAPER_BYTES
    print(f"{handle}: {f'{size / 1e9:.1f} GB' if size else 'Kaggle does not tell the size'}")
    print(f"goes to {folder} (the variable KAGGLEHUB_CACHE changes {get_cache_folder()})")
    missing = 2 * size - bytes_under(archive) - bytes_under(folder)  # the archive goes when all is unpacked
    free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
    print(f"free space there: {free / 1e9:.1f} GB", flush=True)
    if free < missing:
        raise UserError(
            f"{handle} needs {missing / 1e9:.1f} GB more at {get_cache_folder()} (archive and unpacked files) and "
            f"{free / 1e9:.1f} GB are free: make room, or set KAGGLEHUB_CACHE to a folder on a larger disk"
        )
    return Path(kagglehub.dataset_download(str(handle)))


def ask_kaggle(owner: str, dataset: str) -> tuple[int, int]:
    """The current version of a Kaggle data set, and its unpacked size in bytes (0 if Kaggle does not tell)."""
    from kagglehub.clients import build_kaggle_client
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = owner, dataset
    with build_kaggle_client() as client:
        answer = client.datasets.dataset_api_client.get_dataset(request)
    return answer.current_version_number, answer.total_bytes


def bytes_under(path: Path) -> int:
    """Size of a file, or of all files in a folder; 0 if there is none."""
    if path.is_file():
        return path.stat().st_size
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """`action()`, or TimeoutError; a thread that nobody waits for, because name look-ups cannot be interrupted."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


@contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    """Turn what kagglehub and its HTTP library raise into one sentence that says what to do."""
    try:
        import requests  # kagglehub's HTTP library
        from kagglehub.exceptions import DataCorruptionError
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install kagglehub") from None
    page = f"https://www.kaggle.com/datasets/{name}"
    try:
        yield
    except requests.HTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"Kaggle refuses {name} (HTTP {status}): make an API token at https://www.kaggle.com/settings/api, "
                f"put it in ~/.kaggle/access_token or in the variable KAGGLE_API_TOKEN, and run this again"
            ) from None
        if status == 404:
            raise UserError(f"Kaggle has no data set {name}: set kaggle_dataset (--kaggle-dataset)") from None
        raise UserError(f"Kaggle answers HTTP {status} for {name}: run this again later") from None
    except (requests.RequestException, TimeoutError) as error:
        raise UserError(
            f"Kaggle cannot be reached ({type(error).__name__}): check the network or proxy settings and run this "
            f"again, or fetch {page} on another machine, unpack it, and pass --data-root FOLDER/test"
        ) from None
    except (DataCorruptionError, BadZipFile):
        raise UserError(f"the archive of {name} arrived damaged: delete it, and run this again") from None
    except OSError as error:
        raise UserError(f"{name} cannot be stored ({error}): mend that, and run this again") from None
    except ValueError as error:  # a data set's name or a credentials file that kagglehub cannot read
        raise UserError(f"kagglehub cannot fetch {name} ({error}): mend that, and run this again") from None


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--demo", metavar="DIR", help="write the demonstration data set into DIR instead")


if __name__ == "__main__":
    not_read = [name for name in Settings.__dataclass_fields__ if name != "kaggle_dataset"]
    run_door(__doc__, download, without=not_read, arguments=_add_demo)
