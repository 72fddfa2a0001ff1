"""Processes of a run that notice when another one is gone, or never comes."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from distilkit.errors import UserError
from distilkit.runs.peers import watching

SCRIPT = """
import sys, time
from distilkit.runs.peers import watching
with watching(num_nodes=1, seconds=3):
    print("here", flush=True)
    time.sleep(float(sys.argv[1]))
"""
STARTER = """
import subprocess, sys, time
from pathlib import Path
from distilkit.runs.ranks import ranks_on_config
with ranks_on_config(Path("config.yaml")):
    rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], "600"])
    print(rank.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place() -> dict[str, str]:
    """Return the variables that torchrun sets for two ranks, without its own store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Collect processes that are ended after the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(*command: str, **variables: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    environment = {**os.environ, **variables}
    return subprocess.Popen([sys.executable, "-c", *command], env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_a_process_that_never_comes_is_named(
    rank: int, missing: int, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**place, "RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    found = (
        f"process {missing} of 2 did not come to 127.0.0.1:{place['MASTER_PORT']} within rank_timeout=1 seconds; see"
    )
    with pytest.raises(UserError, match=re.escape(found)), watching(num_nodes=1, seconds=1):
        raise AssertionError("it did not wait")


def test_processes_of_several_machines_without_a_launcher_wait_for_each_other(
    place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", place["MASTER_PORT"])
    with pytest.raises(UserError, match="process 1 of 2 did not come"), watching(num_nodes=2, seconds=1):
        raise AssertionError("it did not wait")
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(UserError, match="process 0 of 2 did not come"), watching(num_nodes=2, seconds=1):
        raise AssertionError("it did not wait")


@pytest.mark.parametrize("seconds", [0, -1.5, "soon"])
def test_a_time_that_is_none_is_refused(seconds: Any) -> None:
    with pytest.raises(UserError, match=f"rank_timeout={seconds}, but it must be a number of seconds above 0, or null"):
        watching(num_nodes=1, seconds=seconds).__enter__()


def test_a_process_alone_waits_for_nobody(place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(num_nodes=1, seconds=1):
        pass
    for name, value in {**place, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with watching(num_nodes=1, seconds=None):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with watching(num_nodes=1, seconds=1):
        pass
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in {"NTASKS": "1", "PROCID": "0", "JOB_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with watching(num_nodes=1, seconds=1):
        pass
    for ntasks in ("4", "many"):
        monkeypatch.setenv("SLURM_NTASKS", ntasks)
        with pytest.raises(UserError, match=f"cannot read the variables of this SLURM job: .*{ntasks}"):
            watching(num_nodes=1, seconds=1).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_ends_when_another_one_was_killed(
    killed: int, place: dict[str, str], started: list["subprocess.Popen[str]"]
) -> None:
    for rank in (0, 1):
        started.append(start(SCRIPT, "600", **place, RANK=str(rank)))
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    started[killed].kill()
    _, said = started[1 - killed].communicate(timeout=120)
    assert started[1 - killed].returncode == 1
    assert f"error: nothing was heard of process {killed} for rank_timeout=3 seconds, so that process" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_process_that_has_ended_its_job_is_not_missed(
    place: dict[str, str], started: list["subprocess.Popen[str]"]
) -> None:
    for rank, seconds in (("0", "9"), ("1", "1")):
        started.append(start(SCRIPT, seconds, **place, RANK=rank))
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def test_a_rank_does_not_outlive_the_process_that_started_it(started: list["subprocess.Popen[str]"]) -> None:
    parent = start(STARTER, SCRIPT)
    started.append(parent)
    assert parent.stdout is not None
    assert int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)  # while the rank starts
    rest, _ = parent.communicate(timeout=120)  # until the rank has ended, too: it has the same standard output
    assert rest in ("", "here\n")
