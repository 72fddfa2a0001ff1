"""Break commands in many ways, and print a table of what held: ``make torture``."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import distilkit.export.__main__
import distilkit.prepare
import distilkit.train  # noqa: F401 - once, for all forks
from torture.damage import damages
from torture.disks import disks
from torture.kills import kills
from torture.place import make_place
from torture.signals import signals
from torture.table import Row, print_table
from torture.together import ranks, sweeps, writers

PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "kills": kills,
    "signals": signals,
    "damages": damages,
    "disks": disks,
    "writers": writers,
    "ranks": ranks,
    "sweeps": sweeps,
}


def main() -> int:
    """Run all parts, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--short", action="store_true", help="a few cases of each part, for every change")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    given = parser.parse_args()
    begun, rows = time.monotonic(), []
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        place = make_place(folder)
        for name, part in PARTS.items():
            if name in given.parts or not given.parts:
                for row in part(place, short=given.short, seed=given.seed):
                    print(row.line(), flush=True)
                    rows.append(row)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{time.monotonic() - begun:.0f} s, seed {given.seed}")
    return print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
