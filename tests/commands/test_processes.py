"""Several processes of one run: they stop together, none waits for a lost one, and none is left over."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from jobs import QUIET, SMALL, only, spawn

CHECKOUT = Path(__file__).parents[2]
Save = Callable[..., Path]
TWO_RANKS = "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"
TESTS = {"PYTHONPATH": str(CHECKOUT / "tests")}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(text_file: Path, save_teacher: Save, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The module and the overrides of a run of 4 steps on two ranks, whose teacher has dropout."""
    cache = tmp_path_factory.mktemp("cache")
    paths = f"teacher.name={save_teacher('bert')}", f"data.corpus.paths={text_file}", f"cache_dir={cache}"
    given = "-m", "distilkit.train", "teacher=hf", *paths, *SMALL, *QUIET, *TWO_RANKS, "data.micro_batch_size=4"
    return *given, "trainer.max_steps=4", "validate_first=false"


@pytest.fixture(scope="module")
def whole(given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an unbroken run, in which each rank has noted when its host waited."""
    folder = tmp_path_factory.mktemp("whole")
    notes = f"+callbacks.waits={{_target_: jobs.NoteWaits, folder: {folder}}}", "trainer.log_every_n_steps=3"
    # Ranks agree about saves by the clock at steps that grow apart.
    notes += ("callbacks.checkpoint.train_time_interval=null",)
    done = spawn(*given, *notes, "hydra.run.dir=run", cwd=folder, environment=TESTS)
    assert done.code == 0, done.err
    return folder / "run"


def send(name: str, **fields: object) -> str:
    values = ", ".join(f"{key}: {value}" for key, value in {"name": name, **fields}.items())
    return f"+callbacks.send={{_target_: jobs.Send, {values}}}"


def test_the_host_of_no_rank_waits_in_a_step_that_does_not_log(whole: Path) -> None:
    for rank in (0, 1):
        noted = json.loads((whole.parent / f"waits-{rank}.json").read_text("utf-8"))
        # The first one also waits for DDP, which arranges its buckets by the order of the gradients.
        assert {step for step, waits in noted.items() if waits} - {"1"} == {"3"}
        assert set(noted) == {"1", "2", "3", "4"}


def test_all_ranks_stop_after_the_step_in_which_one_has_got_a_signal(
    given: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    one = send("SIGTERM", step=1, rank=1), "hydra.run.dir=run"
    stopped = spawn(*given, *one, cwd=tmp_path, environment=TESTS)
    assert stopped.code == 143, stopped.err
    assert stopped.out.count("SIGTERM: stopped after step 2, saved as ") == 1
    assert "Traceback" not in stopped.out + stopped.err
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    on = spawn(*given, f"ckpt_path={file}", "hydra.run.dir=on", cwd=tmp_path)
    assert on.code == 0, on.err
    first, second = (load_file(run / "student" / "model.safetensors") for run in (tmp_path / "on", whole))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_signal_to_the_first_rank_before_the_first_step_ends_both(given: tuple[str, ...], tmp_path: Path) -> None:
    stopped = spawn(*given, send("SIGTERM", at="setup", rank=0), cwd=tmp_path, environment=TESTS)
    assert stopped.code == 143, stopped.err  # spawn waits until both have closed their output
    assert stopped.out.count("SIGTERM ended the command, which starts again with: ") == 1


def test_a_killed_rank_ends_the_other_one(given: tuple[str, ...], tmp_path: Path) -> None:
    killed = spawn(*given, send("SIGKILL", step=2, rank=1), cwd=tmp_path, environment=TESTS)
    assert killed.code in (1, -9)  # of the lost connection, or by Lightning, which looks for it


def test_a_rank_that_starts_does_not_wait_for_a_first_one_that_was_killed(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    run = subprocess.Popen([sys.executable, *given], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not psutil.Process(run.pid).children():  # rank 1
        assert run.poll() is None
        time.sleep(0.1)
    run.kill()
    run.communicate(timeout=300)  # until rank 1 has closed its output, too


def test_torchrun_passes_a_signal_on_to_ranks_that_save(given: tuple[str, ...], tmp_path: Path) -> None:
    torchrun = "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"
    stopped = spawn(*torchrun, *given, send("SIGTERM", step=1, rank=1), "name=run", cwd=tmp_path, environment=TESTS)
    assert stopped.code == 1  # torchrun's own, for ranks that have ended with 143
    assert "exitcode  : 143" in stopped.err
    assert torch.load(only(tmp_path, "outputs/run/*/checkpoints/last.ckpt"), weights_only=True)["global_step"] == 2


# ------------------------------------------------------------------------------- two hosts


@pytest.fixture
def hosts() -> Iterator[list[tuple[list[str], str, dict[str, str]]]]:
    """Yield two hosts: how a command starts there, the address, and variables.

    They are network namespaces with a cable between them, or, where this user may not make them, this machine twice.
    """
    names = [f"distilkit-{os.getpid()}-{host}" for host in (0, 1)]
    made = [_ip("netns", "add", name) for name in names]
    ends = [f"dk{host}x{os.getpid() % 10**6}" for host in (0, 1)]
    if not all(made) or not _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]):
        yield [([], "127.0.0.1", {})] * 2
        return
    found = []
    for host, (name, end) in enumerate(zip(names, ends, strict=True)):
        _ip("link", "set", end, "netns", name)
        for command in (f"addr add 10.213.7.{host + 1}/24 dev {end}", f"link set {end} up", "link set lo up"):
            assert _ip("-n", name, *command.split())
        found.append((["ip", "netns", "exec", name], f"10.213.7.{host + 1}", {"GLOO_SOCKET_IFNAME": end}))
    yield found
    for name in names:
        _ip("netns", "del", name)


def _ip(*arguments: str) -> bool:
    try:
        return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def start_on(
    hosts: list[tuple[list[str], str, dict[str, str]]], given: tuple[str, ...], tmp_path: Path
) -> list["subprocess.Popen[str]"]:
    """Start one rank on each host by torchrun, with a folder and a cache of its own."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    runs = []
    for host, (prefix, _, variables) in enumerate(hosts):
        (folder := tmp_path / f"host{host}").mkdir()
        torchrun = "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={host}", f"--master-port={port}"
        own = "trainer.devices=1", "+trainer.num_nodes=2", f"cache_dir={folder}/cache", "hydra.run.dir=run"
        command = *prefix, sys.executable, *torchrun, f"--master-addr={hosts[0][1]}", *given, *own
        environment, pipe = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
        runs.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
    return runs


def test_two_hosts_agree_with_one_process(
    given: tuple[str, ...], hosts: list[tuple[list[str], str, dict[str, str]]], tmp_path: Path, save_teacher: Save
) -> None:
    teacher = save_teacher("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    given = *given, f"teacher.name={teacher}", "optimizer.lr=0.01"
    for run in start_on(hosts, given, tmp_path):
        _, said = run.communicate()
        assert run.returncode == 0, said
    alone = spawn(*given, "trainer.devices=1", "trainer.strategy=auto", "hydra.run.dir=alone", cwd=tmp_path)
    assert alone.code == 0, alone.err
    losses = [
        json.loads((tmp_path / run / "summary.json").read_text("utf-8"))["after"]["val/loss"]
        for run in ("host0/run", "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)
    assert not (tmp_path / "host1" / "run" / "student").exists()


def test_a_host_without_a_network_ends_the_run_on_the_other(
    given: tuple[str, ...], hosts: list[tuple[list[str], str, dict[str, str]]], tmp_path: Path
) -> None:
    settings = "rank_timeout=5", "trainer.max_steps=100000", "callbacks.validation.optimizer_steps=1"
    runs = start_on(hosts, (*given, *settings), tmp_path)
    saved = tmp_path / "host0" / "run" / "checkpoints" / "last.ckpt"
    while not saved.exists():
        assert [run.poll() for run in runs] == [None, None], [run.communicate() for run in runs]
        time.sleep(0.2)
    prefix, _, variables = hosts[1]
    if prefix:
        assert _ip("-n", prefix[-1], "link", "set", variables["GLOO_SOCKET_IFNAME"], "down")
    else:
        runs[1].kill()
    _, said = runs[0].communicate(timeout=300)
    assert runs[0].returncode == 1
    assert "nothing was heard of process 1 for rank_timeout=5 seconds, so that process 0 ends" in said or not prefix
    runs[1].kill()
    runs[1].communicate(timeout=300)  # until its rank has ended, too
