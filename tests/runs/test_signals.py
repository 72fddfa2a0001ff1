"""Signals that a command listens to."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from distilkit.runs.signals import Stopped, command_again, inbox, listening, release


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Handle signals as a new process does; other tests of this process may have left handlers."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


HELD = """
import os, signal, time
from distilkit.runs.signals import inbox, listening, release
with listening(signal.SIGTERM):
    inbox.held = True
    os.kill(os.getpid(), signal.SIGTERM)
    {more}
    print("held", flush=True)
    release()
"""
FORKED = """
import os, signal, sys, time, types
from distilkit.runs.signals import inbox, listening
sys.modules["torch.utils.data"] = types.SimpleNamespace(get_worker_info=lambda: {worker})
with listening(signal.SIGTERM, signal.SIGINT):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), {signal})
        print("lives", flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""


def run(script: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ("", 143, "held\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "held\n"),  # a scheduler and a launcher send the same one
        ("time.sleep(1.2); os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
    ],
)
def test_a_signal_is_held_and_a_second_one_ends_the_process_at_once(more: str, status: int, said: str) -> None:
    assert run(HELD.format(more=more)) == (status, said)


@pytest.mark.parametrize(
    ("worker", "name", "said"),
    [
        ("object()", "signal.SIGINT", "lives\n0\n"),  # the step that the run finishes needs its data
        ("object()", "signal.SIGTERM", "lives\n0\n"),
        ("None", "signal.SIGTERM", "-15\n"),
    ],
)
def test_workers_of_a_data_loader_outlive_a_signal_and_other_forks_do_not(worker: str, name: str, said: str) -> None:
    assert run(FORKED.format(worker=worker, signal=name)) == (0, said)


def test_a_signal_that_is_not_held_ends_the_command_where_it_is() -> None:
    with pytest.raises(Stopped) as stopped, listening(signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stopped.value.code, signal.getsignal(signal.SIGTERM)) == (143, signal.SIG_DFL)


def test_ranks_get_a_signal_that_is_not_held() -> None:
    sent: list[int] = []
    rank: Any = type("Rank", (), {"send_signal": lambda self, number: sent.append(number)})()
    with pytest.raises(Stopped), listening(signal.SIGTERM):
        inbox.launcher = type("Launcher", (), {"procs": [rank]})
        os.kill(os.getpid(), signal.SIGTERM)
    assert sent == [signal.SIGTERM]


def test_signals_that_are_ignored_or_handled_by_the_caller_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    handlers = {signal.SIGHUP: signal.SIG_IGN, signal.SIGUSR1: lambda number, frame: seen.append(number)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with listening(signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            release()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [signal.SIGUSR1]


def test_another_thread_has_no_handlers() -> None:
    found: list[Any] = []

    def listen() -> None:
        with listening(signal.SIGTERM):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_a_command_imports_ends_it_in_one_line(name: str, status: int, tmp_path: Path) -> None:
    line = f"import os, signal, time; os.kill(os.getpid(), signal.{name}); time.sleep(9)"
    (tmp_path / "torch.py").write_text(line, "utf-8")
    found = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "distilkit.train"], env=found, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, f"{name} ended the command\n")


@pytest.mark.parametrize("path", ["/runs/a/last.ckpt", "/my runs/1,2=(x)/last.ckpt", "/it's/last.ckpt"])
def test_the_command_that_goes_on_is_read_by_the_shell_and_by_hydra(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "command", ["distilkit.train", "name=a b", "ckpt_path=old", "+ckpt_path=older", "-m"])
    *kept, new = shlex.split(command_again({"ckpt_path": path}))
    assert kept == ["python", "-m", "distilkit.train", "name=a b", "-m"]
    (override,) = OverridesParser.create().parse_overrides([new])
    assert (override.key_or_group, override.value()) == ("ckpt_path", path)
