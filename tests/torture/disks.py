"""Fill the disk of a run, of the cache, and of temporary files: a small tmpfs, where this machine allows it."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from torture.children import run
from torture.moments import at, newest_step
from torture.place import Place
from torture.table import Row


def _mount(folder: Path, *, kilobytes: int) -> bool:
    """Mount a small disk, or change its size; return whether that is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    remount = "remount," if folder.is_mount() else ""
    command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={kilobytes}k", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def disks(place: Place, *, short: bool, seed: int) -> Iterator[Row]:
    """Yield a row for each disk that is full."""
    size = (place.whole / "checkpoints" / "last.ckpt").stat().st_size // 1024
    cases = {
        "of the run, at its first checkpoint": ("outputs", size // 2),
        "of the run, at a later checkpoint": ("outputs", int(3.5 * size)),
        "of the run, in the export": ("outputs", 100_000),
        "of the cache": ("cache", 8),
        "of temporary files": ("tmp", 4),
    }
    for case, (name, kilobytes) in cases.items() if not short else ():
        yield _full(place, f"the disk {case}", name, kilobytes)


def _full(place: Place, case: str, name: str, kilobytes: int) -> Row:
    row, cwd = Row("disk", case), place.new()
    disk = cwd / name
    if not _mount(disk, kilobytes=kilobytes):
        row.tried = False
        return row
    overrides, environment = (*place.overrides, "ckpt_path=auto"), {}
    if name == "cache":
        overrides = *overrides, f"cache_dir={disk}"
    if name == "tmp":
        environment = {"TMPDIR": str(disk)}
        (disk / "filled").write_bytes(bytes(2048))

    def fill() -> None:
        with (disk / "filler").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(4096))

    setup = at("distilkit.summary:export_checkpoint", act=fill) if "export" in case else None
    try:
        full = run("train", *overrides, cwd=cwd, environment=environment, setup=setup)
        (disk / "filler").unlink(missing_ok=True)
        row.found = f"status {full.status}, step {newest_step(cwd)} is sound: {full.last_line[:150]}".replace(
            str(cwd), "..."
        )
        row.expect(not full.crashed, "a traceback")
        row.expect(full.status == 1 or (name == "tmp" and full.status == 0), f"status {full.status}")
        row.expect(_mount(disk, kilobytes=100_000), "the disk cannot grow")
        if full.status:
            done = run("train", *overrides, cwd=cwd, environment=environment)
            row.expect(done.status == 0, f"then status {done.status}: {done.last_line}")
        row.same(cwd, place.whole)
    finally:
        subprocess.run(["umount", str(disk)], check=False)
    return row
