"""Download the paper's data set from Kaggle or one of Hugging Face, or write the demonstration data set.

    python -m data.data_download                        the paper's: about 52 GB, 60,000 images
    python -m data.data_download --demo datasets/demo   400 procedural images, drawn here, without a network
    python -m data.data_download --hugging-face ComplexDataLab/OpenFake --folder datasets/openfake
    python -m data.data_download --preset demo_local --demo datasets/demo_local   only a region of each fake one is fake

--hugging-face takes a name on the hub, or a folder of save_to_disk or of parquet files, then a configuration if there
are several. Images are written with the bytes of the data set, not encoded again, and listed in FOLDER/list.csv.

kagglehub stores what it downloads under ~/.cache/kagglehub, or in the folder that the variable KAGGLEHUB_CACHE names.
Kaggle needs no account for public data. Unpacking needs space for the archive and for the files. The same command
resumes a download that was interrupted or that stalls (stop it with Ctrl-C). It changes no setting: it ends by printing
what to put in config.py, or which flag to pass.
"""

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import config
from config import Number, Preset, Settings
from utils import UserError, first_line, run_command

PAPER_BYTES = 52e9  # unpacked; docs/method.md, Data
FOLDER = Path("datasets/hugging_face")
ANSWER_SECONDS = 20.0  # kagglehub itself waits for Kaggle's answer without a limit
TOKEN_ADVICE = (
    "create an API token at https://www.kaggle.com/settings/api, put it in ~/.kaggle/access_token or in the variable "
    "KAGGLE_API_TOKEN, and run this again"
)
ADVICE = {401: TOKEN_ADVICE, 403: TOKEN_ADVICE, 404: "set kaggle_dataset (--kaggle-dataset) to one that exists"}


@dataclass(frozen=True)
class Options:
    """What to write instead of fetching from Kaggle."""

    demo: str | None = None  # a folder: write the demonstration data set into it instead
    hugging_face: tuple[str, ...] = ()  # a name on the hub or a folder, and a configuration: write its images instead
    folder: Path = FOLDER  # where --hugging-face writes them
    images: Number = 0  # how many of each split --hugging-face writes; 0: all


def download(
    preset: Preset, demo: str | None = None, hugging_face: Sequence[str] = (), folder: Path = FOLDER, images: int = 0
) -> None:
    """Download the preset's Kaggle data set, or write what the other arguments name; see `Options`.

    Raises:
        UserError: no network, refused by Kaggle, no such data set, not enough space, or unexpected folders.
    """
    if demo is not None:
        write_demo(Path(demo), preset if preset.reproduce.demo_data else config.DEMO)
        return
    if hugging_face:
        from data.hugging_face import stream  # here: downloading does not need it

        rows, root = stream(hugging_face, folder, images or None), shlex.quote(str(folder))
        layout = f" --data-layout {root}/list.csv:0=real  # or 0=fake, as the data set says"
        layout *= any(row["label"] in ("0", "1") for row in rows)
        print(f"{len(rows):,} images and list.csv are in {folder}. Next:")
        print(f"    python -m data.data_preprocess --data-root {root}{layout}")
        return
    if preset.reproduce.demo_data:
        raise UserError(f"preset {preset.name} runs on procedural images: pass --demo {preset.settings.data_root}")
    name = preset.settings.kaggle_dataset
    root = fetch(name) / "test"
    for class_name in ("fake", "real"):
        if not (root / class_name).is_dir():
            raise UserError(
                f"{name} is in {root.parent} but has no folder test/{class_name}: "
                f"pass --data-root with the folder in it that holds fake/ and real/"
            )
    print(f"\n{name} is in {root.parent}; the paper uses test/ only.")
    print(f'To use it, put this line in config.py:\n    data_root: Path = Path("{root}")')
    print(f"or pass this to each command:\n    --data-root {shlex.quote(str(root))}")
    print(f"Next:\n    python -m data.data_preprocess --data-root {shlex.quote(str(root))}")


def write_demo(root: Path, preset: Preset) -> None:
    """Write the preset's demonstration data set into `root`, and print the next command."""
    from data.demo_dataset import write_demo_dataset  # here: downloading does not need it

    write_demo_dataset(root, preset.reproduce.demo_images, preset.reproduce.demo_data)
    flag = "" if root == preset.settings.data_root else f" --data-root {shlex.quote(str(root))}"
    command = f"python -m data.data_preprocess --preset {preset.name}{flag}"
    print(f"The demonstration data set is in {root}. Next:\n    {command}")


def fetch(name: str) -> Path:
    """Download and unpack a Kaggle data set, if it is not there yet; returns its folder.

    Args:
        name: OWNER/DATASET, or OWNER/DATASET/versions/NUMBER.

    Raises:
        UserError: not enough disk space, or an error of Kaggle or kagglehub.
    """
    import kagglehub  # here: --demo and --help do not wait for it
    import requests  # kagglehub's HTTP library

    cache = Path(os.environ.get("KAGGLEHUB_CACHE", Path.home() / ".cache" / "kagglehub")).absolute()
    page, started = f"https://www.kaggle.com/datasets/{name}", (cache / "datasets" / name).exists()
    size = PAPER_BYTES if name.startswith(Settings.kaggle_dataset) else 0
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    print(f"{name}: {f'about {size / 1e9:.0f} GB' if size else f'{page} shows its size'}")
    print(f"stored under {cache} (KAGGLEHUB_CACHE changes it), where {free / 1e9:.1f} GB are free", flush=True)
    if not started and free < 2 * size:
        raise UserError(
            f"{name} needs {2 * size / 1e9:.0f} GB (archive and unpacked files) and {cache} has {free / 1e9:.1f} GB "
            f"free: free some space, or set KAGGLEHUB_CACHE to a folder on a larger disk"
        )
    by_hand = f"download {page} on another machine, unpack it, and pass --data-root FOLDER/test"
    try:
        if not (started and "/versions/" in name):  # which kagglehub finds without asking Kaggle
            try:
                requests.head("https://www.kaggle.com", timeout=ANSWER_SECONDS)
            except requests.RequestException as error:
                if isinstance(error, requests.Timeout):  # kagglehub reports the others itself
                    raise
        return Path(kagglehub.dataset_download(name))
    except requests.HTTPError as error:
        status = getattr(error.response, "status_code", None)
        advice = ADVICE.get(status, f"run this again later, or {by_hand}")
        raise UserError(f"Kaggle answers HTTP {status} for {name}: {advice}") from None
    except requests.RequestException as error:
        kind = type(error).__name__
        raise UserError(f"Kaggle cannot be reached ({kind}): check network and proxy settings, or {by_hand}") from None
    except Exception as error:  # of kagglehub: a malformed name or credentials file, a damaged archive, a full disk
        raise UserError(
            f"kagglehub cannot download {name} to {cache} ({first_line(error)}): fix that and run this again, or "
            f"{by_hand}"
        ) from None


if __name__ == "__main__":
    run_command(__doc__, download, settings=("kaggle_dataset",), options=Options)
