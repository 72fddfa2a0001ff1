"""Send signals to a training, and check its status, its checkpoint and the run that goes on."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from torture.children import Setup, run
from torture.moments import at, half_written, micro_batch, send, step, validation
from torture.place import Place
from torture.table import Row
from torture.training import STEPS, finished

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "torture",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
CASES: list[tuple[str, int, int | None, Setup]] = [  # case, exit status, step of the checkpoint or None for none
    ("SIGTERM within a step", 143, 9, micro_batch(18, send("SIGTERM"))),
    ("SIGINT within a step", 130, 9, micro_batch(18, send("SIGINT"))),
    ("SIGHUP within a step", 129, 9, micro_batch(18, send("SIGHUP"))),
    ("SIGUSR1 within a step", 138, 9, micro_batch(18, send("SIGUSR1"))),
    ("SIGUSR1 under SLURM", 138, 9, micro_batch(18, send("SIGUSR1"))),
    ("SIGTERM before the first step", 143, None, validation(2, send("SIGTERM"))),
    ("SIGTERM in a validation", 143, 12, validation(8, send("SIGTERM"))),
    ("SIGINT in the last step", 130, STEPS, step(STEPS, send("SIGINT"))),
    ("SIGTERM while a checkpoint is written", 143, None, half_written(3, send("SIGTERM"))),
    ("SIGTERM while a checkpoint is renamed", 143, None, at("os:replace", 5, send("SIGTERM"))),
    ("SIGTERM in the export", 143, STEPS, at("transformers.modeling_utils:safe_save_file", 1, send("SIGTERM"))),
    ("SIGTERM twice", -15, None, micro_batch(18, send("SIGTERM", times=2))),
]
SHORT = "SIGTERM within a step", "SIGUSR1 under SLURM"


def signals(place: Place, *, short: bool, seed: int) -> Iterator[Row]:
    """Yield a row for each signal."""
    for case, status, wanted, setup in CASES:
        if not short or case in SHORT:
            yield _case(place, case, status, wanted, setup)


def _case(place: Place, case: str, status: int, wanted: int | None, setup: Setup) -> Row:
    row, cwd = Row("signal", case), place.new()
    environment = _fake_slurm(cwd) if "SLURM" in case else {}
    stopped = run("train", *place.overrides, "ckpt_path=auto", cwd=cwd, setup=setup, environment=environment)
    row.expect(stopped.status == status, f"status {stopped.status} in place of {status}")
    row.expect(not stopped.crashed, "a traceback")
    files = sorted(cwd.rglob("checkpoints/last.ckpt"))
    saved = int(torch.load(files[0], weights_only=True)["global_step"]) if files else 0
    row.found = f"status {stopped.status}, " + (f"saved after step {saved}" if saved else "nothing to save")
    row.expect(wanted in (None, saved), f"saved after step {saved} in place of {wanted}")
    if environment:
        asked = (cwd / "scontrol.txt").read_text("utf-8") if (cwd / "scontrol.txt").exists() else "nothing"
        row.expect(asked.strip() == "requeue 7", f"scontrol was asked for {asked!r}")
        row.found += f", scontrol {asked.strip()}"
    if finished(cwd):
        row.found += ", finished before it ended"
    else:
        done = run("train", *place.overrides, "ckpt_path=auto", cwd=cwd, environment=environment)
        row.expect(done.status == 0 and not done.crashed, f"then status {done.status}: {done.last_line}")
    row.same(cwd, place.whole)
    return row


def _fake_slurm(cwd: Path) -> dict[str, str]:
    """Return the variables of a SLURM job, whose scontrol writes down what it is asked for."""
    command = cwd / "bin" / "scontrol"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\necho "$@" >> {cwd}/scontrol.txt\n', "utf-8")
    command.chmod(0o755)
    return SLURM | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
