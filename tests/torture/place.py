"""The folder in which commands are broken, with an unbroken run to compare with."""

import dataclasses
import shutil
from pathlib import Path

from torture.children import run
from torture.training import finished, prepare_place


@dataclasses.dataclass(kw_only=True)
class Place:
    """Where all happens: the overrides of the training, the folder of an unbroken run, and the time it took."""

    folder: Path
    overrides: tuple[str, ...]
    whole: Path
    seconds: float
    count: int = 0

    def new(self) -> Path:
        """Return a new folder for a case, after deleting that of the one before."""
        shutil.rmtree(self.folder / f"case-{self.count}", ignore_errors=True)
        self.count += 1
        return self.folder / f"case-{self.count}"


def make_place(folder: Path) -> Place:
    """Run the training once without a break; its second run, with a cache, is timed."""
    overrides = prepare_place(folder)
    for name in ("first", "whole"):
        done = run("train", *overrides, cwd=folder / name)
        if done.status:
            raise SystemExit(f"the unbroken run ended with status {done.status}:\n{done.out}")
    (whole,) = finished(folder / "whole")
    return Place(folder=folder, overrides=overrides, whole=whole, seconds=done.seconds)
