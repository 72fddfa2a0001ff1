"""Signals that end a command: at once, or, while a training holds them, where it can be resumed."""

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
_UNHANDLED = signal.SIG_DFL, signal.default_int_handler

_SAME = 1.0  # seconds within which two signals are one: a scheduler signals both a process and its launcher
_WORKER_SECONDS = 60.0  # for which a worker of a data loader outlives SIGTERM


class Stopped(SystemExit):
    """A signal has ended a command where nothing of it can be resumed."""


@dataclass
class Inbox:
    """The signal that this process has received, or 0, and what it means at present."""

    received: int = 0
    at: float = 0.0  # when, by time.monotonic()
    held: bool = False  # a training reads ``received`` where it can end
    launcher: Any = None  # Lightning's, which has started other ranks
    command: Sequence[str] = ()  # the module and the arguments of this process, if it is a command
    owner: int = 0  # the process that listens; its forks inherit the handlers

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal: the first raises ``Stopped`` or is held, and a second one ends the process at once."""
        if os.getpid() != self.owner and _serves_data():
            if number == signal.SIGTERM:  # also sent by a loader that gives up on its workers
                last = threading.Timer(_WORKER_SECONDS, os._exit, (128 + number,))
                last.daemon = True
                last.start()
        elif os.getpid() != self.owner or (self.received and time.monotonic() - self.at > _SAME):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received, self.at = number, time.monotonic()
            if not self.held:
                for child in getattr(self.launcher, "procs", ()):
                    child.send_signal(number)
                raise Stopped(128 + number)


inbox = Inbox()


def _serves_data() -> bool:
    """Return whether this is a worker of a data loader, which a run needs for the rest of a step."""
    data: Any = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None


def _end(number: int, frame: Any) -> None:
    """Handle a signal before and after ``listening``: leave without the traceback of what an import does just then."""
    if first_rank():
        os.write(2, f"{signal.Signals(number).name} ended the command\n".encode())
    with contextlib.suppress(Exception):  # of a print that it has interrupted
        sys.stdout.flush()
    os._exit(128 + number)


def end_at_once() -> None:
    """Let signals end this process in one line, unless they are ignored."""
    for number in ENDING:
        if signal.getsignal(number) in _UNHANDLED:
            signal.signal(number, _end)


@contextlib.contextmanager
def listening(*numbers: int) -> Iterator[None]:
    """Give the signals ``numbers`` to the inbox, unless they are ignored, as by nohup, or handled by the caller."""
    if threading.current_thread() is not threading.main_thread():  # Python has handlers there only
        yield
        return
    outermost = inbox.owner != os.getpid()
    if outermost:
        vars(inbox).update(vars(Inbox(owner=os.getpid())))
    before = {number: found for number in numbers if (found := signal.getsignal(number)) in (*_UNHANDLED, _end)}
    for number in before:
        signal.signal(number, inbox.note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        inbox.held = False
        if outermost:
            inbox.owner = 0


def release() -> None:
    """Act at once on signals from now on; raise ``SystemExit`` with 128 + its number for one that was held.

    Where trainings share this process, in threads of their own, the main thread does this after all of them.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    inbox.held = False
    if inbox.received:
        log.warning("%s: the run is finished", signal.Signals(inbox.received).name)
        raise SystemExit(128 + inbox.received)


def first_rank() -> bool:
    """Return whether this is the first of the processes that a launcher or another process of the run has started."""
    names = "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"  # others may use these for texts
    return not any(os.environ.get(name, "").strip("0").isdecimal() for name in names)


def command_again(changes: Mapping[str, str]) -> str:
    """Write the command line of this process for a shell, with ``changes`` in place of overrides of the same keys."""
    module, *given = inbox.command
    kept = [each for each in given if each.lstrip("+").partition("=")[0] not in changes]
    quoted = {key: "'{}'".format(value.replace("'", r"\'")) for key, value in changes.items()}
    plain = {key: value if re.fullmatch(r"[\w./:~+-]+", value) else quoted[key] for key, value in changes.items()}
    return shlex.join(["python", "-m", module, *kept, *(f"{key}={value}" for key, value in plain.items())])
