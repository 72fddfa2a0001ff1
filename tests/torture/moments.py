"""Moments of a command at which something happens to it: the n-th call of a function, before it or after it."""

import functools
import io
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from torture.children import Setup


def die() -> None:
    """End this process at once, as the kernel does where memory is out."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def send(name: str, times: int = 1) -> Callable[[], None]:
    """Return what sends this process a signal; a second one comes two seconds later."""

    def act() -> None:
        for index in range(times):
            time.sleep(2.0 * bool(index))
            os.kill(os.getpid(), signal.Signals[name])

    return act


def at(
    target: str,
    call: int = 1,
    act: Callable[[], None] = die,
    *,
    after: bool = False,
    where: Callable[..., bool] = lambda *_, **__: True,
) -> Setup:
    """Act before, or ``after``, the call of this number of those calls of ``module:name`` that ``where`` accepts."""

    def setup() -> None:
        module, _, path = target.partition(":")
        *owner_path, name = path.split(".")
        owner = resolve_name(f"{module}:{'.'.join(owner_path)}" if owner_path else module)
        original, count = getattr(owner, name), itertools.count(1)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            hit = where(*args, **kwargs) and next(count) == call
            if hit and not after:
                act()
            result = original(*args, **kwargs)
            if hit and after:
                act()
            return result

        setattr(owner, name, wrapped)

    return setup


def half_written(call: int, act: Callable[[], None] = die) -> Setup:
    """Act when half of the checkpoint of this number has been written."""

    def setup() -> None:
        original, count = torch.save, itertools.count(1)

        def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if next(count) == call:
                whole = io.BytesIO()
                original(content, whole)
                half = whole.getvalue()[: len(whole.getvalue()) // 2]
                if isinstance(file, str | Path):
                    Path(file).write_bytes(half)
                else:
                    file.write(half)
                    file.flush()
                act()
            original(content, file, *args, **kwargs)

        torch.save = save

    return setup


def named(pattern: str) -> Callable[..., bool]:
    """Accept calls whose second argument, the target of a rename, is a path of this name."""
    return lambda _, target, *rest, **more: Path(target).name == pattern


step = functools.partial(at, "torch.optim.adamw:AdamW.step")
micro_batch = functools.partial(at, "distilkit.module:DistillationModule.training_step")
validation = functools.partial(at, "distilkit.module:DistillationModule.validation_step")
replace = functools.partial(at, "os:replace")
rename = functools.partial(at, "os:rename")


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint below a folder, or 0."""
    files = sorted(folder.rglob("checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    return int(torch.load(files[-1], weights_only=True)["global_step"]) if files else 0
