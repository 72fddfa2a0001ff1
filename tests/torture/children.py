"""Run commands in forks of this process, which has imported torch once: a cold start takes seconds of each command."""

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name

Setup = Callable[[], None]
SECONDS = 180.0  # after which a command hangs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: its exit status, -9 for SIGKILL, what it printed, and what it took."""

    status: int
    out: str
    seconds: float

    @property
    def crashed(self) -> bool:
        """Whether it printed a traceback."""
        return "Traceback (most recent call last)" in self.out

    @property
    def last_line(self) -> str:
        """The last line that it printed, or its error."""
        lines = [line for line in self.out.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["nothing printed"])[-1][:300]


@dataclasses.dataclass(kw_only=True)
class Child:
    """A command that runs."""

    pid: int
    log: Path
    start: float
    ended: Ended | None = None

    def poll(self) -> Ended | None:
        """Return how it ended, or None."""
        if self.ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                seconds = time.monotonic() - self.start
                out = self.log.read_text("utf-8", "replace")
                self.ended = Ended(status=os.waitstatus_to_exitcode(status), out=out, seconds=seconds)
        return self.ended

    def wait(self, seconds: float = SECONDS) -> Ended:
        """Wait for the end; a command that hangs is killed, and that is its status."""
        deadline = time.monotonic() + seconds
        while (ended := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.005)
        return ended

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it has ended."""
        if self.ended is None:
            os.kill(self.pid, number)


def start(
    command: str, *arguments: str, cwd: Path, setup: Setup | None = None, environment: Mapping[str, str] | None = None
) -> Child:
    """Start ``python -m distilkit.<command> *arguments`` in a fork, after ``setup`` has been called in it."""
    cwd.mkdir(parents=True, exist_ok=True)
    log = cwd / f"log-{len(list(cwd.glob('log-*.txt')))}.txt"
    log.touch()
    sys.stdout.flush()
    begun = time.monotonic()
    if pid := os.fork():
        return Child(pid=pid, log=log, start=begun)
    status = 1
    try:  # in the child, which never returns
        number = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(number, 1)
        os.dup2(number, 2)
        os.chdir(cwd)
        os.environ.update(environment or {})
        sys.argv = [f"distilkit.{command}", *arguments]
        if setup is not None:
            setup()
        resolve_name(f"distilkit.{command}:main")()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def run(command: str, *arguments: str, cwd: Path, **more: object) -> Ended:
    """Run a command to its end."""
    return start(command, *arguments, cwd=cwd, **more).wait()  # type: ignore[arg-type]
