"""Checkpoints are read whole or refused by the name of their damage, and the newest sound one is found for a resume."""

import contextlib
import functools
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from distilkit.errors import UserError
from distilkit.runs.signals import first_rank

log = logging.getLogger(__name__)

LAST = "last.ckpt"  # the newest; those before it are last-1.ckpt, last-2.ckpt, ...
_NUMBER = re.compile(r"last(?:-(\d+))?\.ckpt")


def check(file: Path) -> None:
    """Raise a ``UserError`` that names the damage of a checkpoint: each part of the file has a checksum.

    The file is read once, a megabyte at a time, and again only if it was written since.
    """
    damage = "is no file"
    if file.is_dir():
        damage = "is a folder, not a file"
    elif file.exists():
        state = file.stat()
        damage = _damage(file.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)
    if damage:
        raise UserError(f"{file} {damage}; give another checkpoint of the run")


@functools.lru_cache(maxsize=256)
def _damage(file: Path, *state: int) -> str:
    """Return what is wrong with a file, or an empty text; ``state`` tells the file from one that replaces it."""
    if file.stat().st_size == 0:
        return "is empty"
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                return "is not a checkpoint, or its beginning is damaged"
        with zipfile.ZipFile(file) as archive:
            part = archive.testzip()
    except zipfile.BadZipFile as error:
        return f"is cut short or damaged ({error})"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except Exception as error:  # a damaged header may ask for a password, a compression, a place in another file
        return f"is damaged ({error})"
    return f"is damaged: the checksum of its part {part} differs" if part else ""


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint of a distilkit run, with memory-mapped tensors; damage raises a ``UserError`` that names it."""
    check(file)
    return _read(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        checkpoint: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, KeyError, TypeError, OSError, EOFError, pickle.UnpicklingError):
        checkpoint = None
    if not isinstance(checkpoint, dict) or "distilkit" not in checkpoint:
        raise UserError(f"{file} is not a checkpoint of distilkit.train; give one below outputs/.../checkpoints")
    return checkpoint


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, the newest first, and the best one as the last resort."""
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = {int(match[1] or 0): file for file in folder.glob("last*.ckpt") if (match := _NUMBER.fullmatch(file.name))}
    return [found[index] for index in sorted(found)] + [file for file in [folder / "best.ckpt"] if file.exists()]


def is_finished(run: Path) -> bool:
    """Return whether a run's folder holds its student and its summary, which is written last."""
    return (run / "summary.json").is_file() and (run / "student").is_dir()


def find_checkpoint(
    given: str | None,
    out: Path,
    *,
    config: Mapping[str, Any],
    differs: Callable[[Mapping[str, Any]], bool],
    in_sweep: bool = False,
    requeued: Path | None = None,
) -> Path | None:
    """Resolve ``ckpt_path`` for a run in the folder ``out``: the newest sound checkpoint, or None to start.

    1. ``auto`` looks into ``out``, then into ``requeued``, the folder of the same job of a scheduler, then at the newest
       run of the name and settings in ``config``; it starts if there is none, or if that one is finished.
    2. ``last`` is the newest run beside ``out``, but no finished one of other settings.
    3. A folder is that of a run, and a file is itself.

    ``differs`` tells whether the record of a checkpoint is of other settings. Of a damaged ``last.ckpt`` the one before
    is taken. No sound checkpoint, a run that ``out`` holds already, and a finished run raise a ``UserError``.
    """
    if given is None:
        if not in_sweep and first_rank() and (files := checkpoints_of(out)):  # which it would write over
            raise UserError(
                f"{out} holds a run that broke off, with {files[0]}; set ckpt_path=auto to go on with it, choose another "
                f"hydra.run.dir, or delete {files[0].parent}"
            )
        return None
    if given == "auto":
        own = next((files for folder in (out, requeued) if folder and (files := checkpoints_of(folder))), None)
        found = _newest_sound(own) if own else _auto(out, config=config, differs=differs, in_sweep=in_sweep)
        if found is None:
            return None
    elif given == "last":
        if in_sweep:  # its neighbours are jobs with other settings
            cure = "give the file, or auto for each job's own folder"
            raise UserError(f"ckpt_path=last is not defined in a sweep; {cure}")
        found = _newest_sound(checkpoints_of(_last(out.parent, config=config, differs=differs)))
    else:
        path = Path(str(given)).expanduser()
        if not path.exists():
            raise UserError(f"ckpt_path={given} is no file; give a .ckpt or the folder of a run, or auto, or last")
        one = path.is_file() and path.name != LAST
        files = [path] if one else checkpoints_of(path if path.is_dir() else path.parent)
        if not files:
            raise UserError(f"ckpt_path={given} has no checkpoint; give the folder of a run, as outputs/distil/RUN")
        found = _newest_sound(files)
    file, step = found
    if step:
        log.info("ckpt_path=%s goes on from step %d of %s", given, step, file)
        return file.absolute()  # a link stays one: the run's records are beside it
    log.info("%s has no steps to resume, so that the run starts from the beginning", file)  # trainer.max_steps=0
    return None


def _auto(
    out: Path, *, config: Mapping[str, Any], differs: Callable[[Mapping[str, Any]], bool], in_sweep: bool
) -> tuple[Path, int] | None:
    """Return the newest sound checkpoint of another run to go on with, and its step, or say why there is none."""
    for run in [] if in_sweep else _runs(out.parent):
        record = _record(run)
        if record is None or record["name"] != config["name"] or differs(record):
            continue
        if is_finished(run):
            log.info("ckpt_path=auto starts: the newest run of these settings, %s, is finished", run)
            return None
        with contextlib.suppress(UserError):
            return _newest_sound(checkpoints_of(run))
        log.warning("%s has no checkpoint that can be read", run)
    log.info("ckpt_path=auto starts: there is nothing to go on from %s %s", "in" if in_sweep else "beside", out)
    return None


def _last(folder: Path, *, config: Mapping[str, Any], differs: Callable[[Mapping[str, Any]], bool]) -> Path:
    """Return the newest run in a folder that is not finished, or that has something left to train."""
    others = []
    for run in _runs(folder):
        if not is_finished(run):
            return run
        record = _record(run)
        if record is None or differs(record):
            others.append(run)
        elif _ends(record["config"]) == _ends(config):
            cure = "set trainer.max_steps, trainer.max_epochs or budget above what it has, or start without ckpt_path"
            raise UserError(f"ckpt_path=last, but {run} has finished this training, with {run / 'student'}; {cure}")
        else:
            return run
    found = f"ckpt_path=last, but no run below {folder} has a checkpoint"
    if others:
        found = f"ckpt_path=last, but {others[0]} is finished and has other settings"
    raise UserError(f"{found}; start without ckpt_path")


def _runs(folder: Path) -> list[Path]:
    """Return the runs in a folder that have checkpoints, the newest first."""
    found = {run: filter(Path.is_file, checkpoints_of(run)) for run in folder.glob("*") if run.is_dir()}
    ages = {run: [file.stat().st_mtime for file in files] for run, files in found.items()}
    return sorted((run for run in ages if ages[run]), key=lambda run: max(ages[run]), reverse=True)


def _record(run: Path) -> dict[str, Any] | None:
    """Return the record in a run's newest readable checkpoint, of which only that part is read."""
    for file in checkpoints_of(run):
        with contextlib.suppress(UserError, KeyError, TypeError):
            record: dict[str, Any] = _read(file)["distilkit"]["record"]
            return record
    log.warning("%s has no checkpoint that can be read", run)
    return None


def _ends(config: Mapping[str, Any]) -> list[Any]:
    """Return what ends a training."""
    return [config["budget"], *(config["trainer"].get(name) for name in ("max_steps", "max_epochs", "max_time"))]


def _newest_sound(files: list[Path]) -> tuple[Path, int]:
    """Return the first checkpoint that can be read, with its step; say in one line which ones cannot."""
    damages: list[str] = []
    for file in files:
        try:
            checkpoint = read_checkpoint(file)
            if "optimizer_states" not in checkpoint:  # callbacks.checkpoint.save_weights_only
                raise UserError(f"{file} holds weights alone, from which no run can go on")
            step = int(checkpoint["global_step"])
        except UserError as error:
            damages.append(str(error).partition(";")[0])
            continue
        if damages:
            log.warning("%s; going back to step %d of %s", "; ".join(damages), step, file)
        return file, step
    raise UserError(f"{'; '.join(damages)}; give another checkpoint, or start without ckpt_path")
