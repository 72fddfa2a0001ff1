"""Run commands side by side, each once: what is finished is skipped, and what was stopped goes on."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from distilkit.errors import UserError

ROOT = Path(__file__).parents[2]  # the folder in which commands run, so that they can be copied
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Command:
    """``python -m module arguments``; ``done`` tells whether it has ended well. A training has its folder as ``run``."""

    name: str
    module: str
    arguments: Sequence[str]
    done: Callable[[], bool]
    run: Path | None = None

    def line(self) -> list[str]:
        """Return the arguments of Python, with those that let a stopped training go on."""
        last = self.run / "checkpoints" / "last.ckpt" if self.run else None
        if last is None or not last.is_file():
            return ["-m", self.module, *self.arguments]
        own = [each for each in self.arguments if not each.startswith("ckpt_path=")]
        return ["-m", self.module, *own, f"ckpt_path={last}"]

    def warn_if_changed(self) -> None:
        """Warn of a finished training with other overrides, which stays."""
        file = self.run and self.run / ".hydra" / "overrides.yaml"
        if file and file.is_file():
            given: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            theirs = {each for each in given if not each.startswith("ckpt_path=")}
            changed = theirs ^ {each for each in self.arguments if not each.startswith(("hydra.", "ckpt_path="))}
            if changed:
                print(f"warning: {self.run} was trained with other overrides: {', '.join(sorted(changed))}; it stays")


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Run at most ``jobs`` commands at a time, with ``threads`` threads each; logs and commands.txt go into ``out``.

    A command holds a lock, as long as it runs, so that several drivers of one folder do not start it twice.
    """

    out: Path
    jobs: int
    threads: int
    running: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, command: Command) -> None:
        """Run a command to its end, unless it has ended before; its failure raises a ``UserError``."""
        log = self.out / "logs" / f"{command.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if command.done():
                command.warn_if_changed()
                return
            if command.run:  # stopped between the two
                shutil.rmtree(command.run / "student", ignore_errors=True)
            code = self._start(command, log=log, lock=lock.fileno())
        if code or not command.done():
            last = log.read_text("utf-8", errors="replace").strip().splitlines()[-3:]
            raise UserError(f"{command.name} failed with status {code}: {' '.join(last)}; see {log}")

    def _start(self, command: Command, *, log: Path, lock: int) -> int:
        line = [sys.executable, *command.line()]
        own = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ, **own}
        with self.guard, (self.out / "commands.txt").open("a", encoding="utf-8") as file:
            file.write(f"OMP_NUM_THREADS={self.threads} python {shlex.join(command.line())}\n")
        print(f"{command.name} ...", flush=True)
        with log.open("ab") as stream:
            given: Any = {"cwd": ROOT, "env": environment, "stdout": stream, "stderr": stream}
            with self.guard:
                if self.stopped.is_set():
                    raise UserError(f"{command.name} was not started")
                # In a session of its own: a second signal, from the terminal, would end a training without its checkpoint.
                process = subprocess.Popen(line, **given, pass_fds=[lock], start_new_session=True)
                self.running.append(process)
            code = process.wait()
        self.running.remove(process)
        return code

    def each(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        """Call a function that runs commands for each item, side by side; go on after failures, and raise them last."""
        failures = []
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for future in as_completed([pool.submit(function, item) for item in items]):
                    if isinstance(error := future.exception(), UserError):
                        print(f"error: {error}", file=sys.stderr, flush=True)
                        failures.append(str(error))
                    elif error:
                        raise error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                with self.guard:
                    self.stopped.set()
                for process in list(self.running):
                    process.send_signal(signal.SIGTERM)
                raise
        if failures:
            raise UserError(f"{len(failures)} of the commands failed; the same command goes on with them")
