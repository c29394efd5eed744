"""A disk that is full at each write of a training: one sentence, and the training resumes once there is space.

    python -m tests.campaigns.full_disk [--runs 16]

Needs root, to mount a small file system in memory. A training runs on disks of growing size until one is large enough;
each that fills up is then enlarged and the same command run again, which must end like a training that was never
interrupted. Exit code 1 if one does not.
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
from tests.conftest import run_module, succeed, write_toy_images


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


def run(runs: int, scratch: Path) -> list[str]:
    """Print a line for each disk; returns a sentence for each run that failed."""
    write_toy_images(data := scratch / "data")
    campaign = kills.training("standard_convnext")
    ready = campaign.folder(data, scratch / "ready")
    succeed(*campaign.command(data, whole := shutil.copytree(ready, scratch / "whole")))
    expected = kills.state_of(whole)
    needed = 4 * sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) / 2**20
    wrong = []
    for number in range(runs):
        megabytes = 0.3 + needed * number / runs
        with small_disk(scratch / f"disk {number}", megabytes) as disk:
            shutil.copytree(ready, disk, dirs_exist_ok=True)
            # In turn: the state is saved within epochs too, so that it is written first, or only between them.
            every = ("--checkpoint-every", "2" if number % 2 else "0")
            command = (*campaign.command(data, disk), *every)
            done = run_module(*command)
            if done.returncode == 0:
                print(f"{megabytes:.1f} MB: enough")
            elif done.returncode != 2 or done.stderr.count("\n") != 1 or "Traceback" in done.stderr:
                wrong.append(f"{megabytes:.1f} MB: exit code {done.returncode}: {done.stderr}")
            else:
                print(f"{megabytes:.1f} MB: {done.stderr.strip().replace(str(disk), 'DISK')}")
            subprocess.run(["mount", "-o", "remount,size=2g", disk], check=True)
            again = run_module(*command)
            if again.returncode:
                wrong.append(f"{megabytes:.1f} MB, with room again: {again.stderr}")
            else:
                wrong += kills.different(expected, kills.state_of(disk), f"disk of {megabytes:.1f} MB")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="full_disk_") as folder:
        failed = run(arguments.runs, Path(folder))
    print("\n".join([*failed, f"{arguments.runs} disks: {len(failed)} failed"]))
    sys.exit(1 if failed else 0)
