"""Damage checkpoints and token caches: a training refuses them, or goes back to what is sound."""

import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torture.children import run
from torture.moments import step
from torture.place import Place
from torture.table import Row

Damage = Callable[[Path], None]


def flip(share: float) -> Damage:
    """Return what flips a bit at a share of a file."""

    def act(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(share * (len(content) - 1))] ^= 8
        file.write_bytes(content)

    return act


def flip_pickle(file: Path) -> None:
    """Flip a bit in the pickle of a checkpoint, which holds numbers and names."""
    with zipfile.ZipFile(file) as archive:
        (info,) = [each for each in archive.infolist() if each.filename.endswith("data.pkl")]
    content = bytearray(file.read_bytes())
    content[info.header_offset + info.file_size // 2] ^= 8
    file.write_bytes(content)


def flip_directory(file: Path) -> None:
    """Flip a bit in the directory at the end of a checkpoint: in the checksum of its first part."""
    with zipfile.ZipFile(file) as archive:
        begin = archive.start_dir
    content = bytearray(file.read_bytes())
    content[begin + 16] ^= 8
    file.write_bytes(content)


def cut(share: float, *, less: int = 0) -> Damage:
    """Return what keeps a share of a file, ``less`` some bytes."""
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size) - less])


def zeros(file: Path) -> None:
    """Overwrite a file with zeros, as some file systems leave it after a power cut."""
    file.write_bytes(bytes(file.stat().st_size))


def all_checkpoints(file: Path) -> None:
    """Cut all checkpoints of a run."""
    for each in file.parent.glob("*.ckpt"):
        cut(0.5)(each)


CHECKPOINTS: dict[str, Damage] = {
    "cut in half": cut(0.5),
    "without its last byte": cut(1, less=1),
    "empty": cut(0),
    "of zeros": zeros,
    "a bit flipped in a tensor": flip(0.5),
    "a bit flipped in the pickle": flip_pickle,
    "a bit flipped in its directory": flip_directory,
    "gone": Path.unlink,
    "cut, and all others of the run": all_checkpoints,
}
CACHES: dict[str, tuple[str, Damage]] = {
    "a bit flipped in train.bin": ("train.bin", flip(0.5)),
    "a bit flipped in val.bin": ("val.bin", flip(0.5)),
    "a bit flipped in counts.bin": ("counts.bin", flip(0.7)),
    "train.bin of zeros": ("train.bin", zeros),
    "train.bin cut in half": ("train.bin", cut(0.5)),
    "meta.json cut in half": ("meta.json", cut(0.5)),
    "val.bin gone": ("val.bin", Path.unlink),
}
SHORT = "cut in half", "a bit flipped in a tensor", "a bit flipped in train.bin"


def damages(place: Place, *, short: bool, seed: int) -> Iterator[Row]:
    """Yield a row for each damage."""
    broken = place.folder / "broken"
    run("train", *place.overrides, cwd=broken, setup=step(19))
    for case, damage in CHECKPOINTS.items():
        if not short or case in SHORT:
            yield _checkpoint(place, broken, case, damage)
    for case, (name, damage) in CACHES.items():
        if not short or case in SHORT:
            yield _cache(place, case, name, damage)


def _checkpoint(place: Place, broken: Path, case: str, damage: Damage) -> Row:
    row, cwd = Row("damage", f"last.ckpt {case}"), place.new()
    shutil.copytree(broken, cwd)
    (file,) = cwd.rglob("last.ckpt")
    damage(file)
    if file.exists():
        exported = run("export.__main__", f"ckpt={file}", f"out={cwd}/exported", cwd=cwd)
        row.expect(exported.status == 1 and not exported.crashed, f"export ended with status {exported.status}")
        row.expect(not (cwd / "exported").exists(), "it was exported")
    if damage is all_checkpoints:
        refused = run("train", *place.overrides, "ckpt_path=last", cwd=cwd)
        row.expect(refused.status == 1 and not refused.crashed, f"ckpt_path=last ended with status {refused.status}")
    done = run("train", *place.overrides, "ckpt_path=auto", cwd=cwd)
    row.expect(not done.crashed, "a traceback")
    said = [line.partition("; ")[2] for line in done.out.splitlines() if "going back to" in line]
    if damage is all_checkpoints:
        said = [line for line in done.out.splitlines() if "no checkpoint that can be read" in line]
    row.found = "; ".join(said).replace(str(cwd), "...")[:160] or "nothing said"
    row.expect(done.status == 0, f"status {done.status}: {done.last_line}")
    row.expect(bool(said) or case == "gone", "not a line about it")
    row.same(cwd, place.whole)
    return row


def _cache(place: Place, case: str, name: str, damage: Damage) -> Row:
    row, cwd = Row("damage", f"the cache: {case}"), place.new()
    shutil.copytree(place.folder / "cache", cwd / "cache")
    (meta,) = (cwd / "cache").rglob("meta.json")
    damage(meta.with_name(name))
    own = *place.overrides, f"cache_dir={cwd}/cache"
    trained = run("train", *own, cwd=cwd)
    row.expect(trained.status == 1 and not trained.crashed, f"a training ended with status {trained.status}")
    row.expect(meta.parent.name in trained.last_line, "the message does not name it")
    verified = run("prepare", *own, "verify=true", cwd=cwd)
    row.expect(verified.status == 1 and not verified.crashed, f"verify=true ended with status {verified.status}")
    row.found = f"refused: {trained.last_line}".replace(str(cwd), "...")[:160]
    return row
