"""A disk that is full at each write of a training: one sentence, and what was saved goes on when there is room.

    python -m tests.campaigns.full_disk [--runs 16]

Needs root, who may mount a small file system in memory. A training runs on disks of growing size until one has room
for all; each that fills up is then made larger and the same command given again, which must end as the training that
was never interrupted. Exit code 1 if one does not.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.campaigns import kills
from tests.conftest import run_module, write_toy_images


@contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """A file system in memory of this size, mounted on `folder`."""
    folder.mkdir()
    size = f"size={int(megabytes * 2**20)}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def run(runs: int, scratch: Path) -> tuple[list[str], list[str]]:
    """Returns a line for each disk that filled up, and a sentence for each that did not end well."""
    data = scratch / "data"
    write_toy_images(data)
    make_folder = kills.indexed_folders(data, scratch)
    campaign = kills.training(data, "standard_convnext")
    campaign.finish(whole := make_folder(0))
    expected = campaign.state(whole)
    needed = 4 * sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) / 2**20
    said, wrong = [], []
    for number in range(runs):
        megabytes = 0.3 + needed * number / runs
        with small_disk(scratch / f"disk {number}", megabytes) as disk:
            shutil.copytree(whole / "demo" / "dataset", disk / "demo" / "dataset")
            # In turn: the state saved within epochs, so that it is written first, and only between them.
            every = ("--checkpoint-every", "2" if number % 2 else "0")
            module, *flags = (*campaign.command(disk), *every)
            done = run_module(module, *flags)
            if done.returncode == 0:
                said.append(f"{megabytes:.1f} MB: enough")
            elif done.returncode != 2 or done.stderr.count("\n") != 1 or "Traceback" in done.stderr:
                wrong.append(f"{megabytes:.1f} MB: exit code {done.returncode}: {done.stderr}")
            else:
                said.append(f"{megabytes:.1f} MB: {done.stderr.strip().replace(str(disk), 'DISK')}")
            subprocess.run(["mount", "-o", "remount,size=2g", disk], check=True)
            again = run_module(module, *flags)
            if again.returncode:
                wrong.append(f"{megabytes:.1f} MB, with room again: {again.stderr}")
            else:
                wrong += campaign.differences(expected, disk, f"disk of {megabytes:.1f} MB")
    return said, wrong


def main() -> None:
    """Run, print, and leave with the code that tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="full_disk_") as folder:
        said, wrong = run(arguments.runs, Path(folder))
    print("\n".join(said))
    print("\n".join(wrong))
    print(f"{arguments.runs} disks: {len(wrong)} did not end well")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
