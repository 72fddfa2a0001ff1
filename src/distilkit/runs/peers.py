"""The other processes of a run: each notices when one of them is gone, so that none waits for it, or outlives it."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from distilkit.errors import UserError
from distilkit.runs.ranks import starter
from distilkit.runs.signals import Stopped

_jobs = count()


def _end_with(parent: int) -> None:
    """End this rank with its parent, also while it waits in a library."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def _place(num_nodes: int) -> tuple[int, int, str, int] | None:
    """Return the number of this process, how many are started apart from each other, and where the first one is."""
    try:
        found: list[Any] = [kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()]
    except (RuntimeError, ValueError) as error:  # --ntasks without --ntasks-per-node, or variables of another kind
        raise UserError(f"Lightning cannot read the variables of this SLURM job: {error}") from error
    if found and found[0].world_size() > 1:  # the first, as Lightning chooses
        return found[0].global_rank(), found[0].world_size(), found[0].main_address, found[0].main_port
    at = os.environ
    if found or num_nodes == 1 or "LOCAL_RANK" in at or "MASTER_PORT" not in at:
        return None
    return int(at.get("NODE_RANK", 0)), num_nodes, at.get("MASTER_ADDR", "127.0.0.1"), int(at["MASTER_PORT"])


@contextmanager
def watching(*, num_nodes: int, seconds: float | None) -> Iterator[None]:
    """End this process when another one of the run is gone for ``seconds``; None does not look for processes elsewhere.

    1. A rank that this machine's first process has started ends with it. Lightning ends the first process with a rank.
    2. Processes of torchrun, srun or several machines wait so long for each other to start. Then each counts in a store
       that the first one holds. A long preparation, validation or save does not stop the counting.
    """
    if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
        raise UserError(f"rank_timeout={seconds}, but it must be a number of seconds above 0, or null")
    parent = starter()
    if parent and sys.platform != "win32":
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    place = None if parent else _place(num_nodes)
    if seconds is None or place is None:
        yield
        return
    store, rank, left = _meet(*place, seconds=seconds), place[0], threading.Event()
    silent = {peer: 0.0 for peer in range(place[1]) if peer != rank}  # seconds
    threading.Thread(target=_beat, args=(store, rank, silent, seconds / 10, left), daemon=True).start()
    threading.Thread(target=_watch, args=(rank, silent, seconds, left), daemon=True).start()
    together = False
    try:
        yield
        together = True
    except SystemExit as stop:
        together = not isinstance(stop, Stopped)
        raise
    finally:  # after an error the other processes would wait for this one, so that they shall end
        left.set()
        with suppress(RuntimeError):
            store.add(str(rank), -(2**40) if together else 0)  # below 0 it has ended


def _meet(rank: int, world_size: int, address: str, port: int, *, seconds: float) -> PrefixStore:
    """Wait until all processes have come to the store of the first one, or of torchrun."""
    limit = timedelta(seconds=seconds)
    first = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    missing = "0"
    try:
        server = TCPStore(address, port, None, first, limit, wait_for_workers=False, multi_tenant=True)
        store = PrefixStore(f"distilkit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_jobs)}", server)
        store.add(str(rank), 1)
        for missing in map(str, range(world_size)):
            store.wait([missing], limit)
    except RuntimeError as error:
        found = f"process {missing} of {world_size} did not come to {address}:{port} within rank_timeout={seconds}"
        raise UserError(f"{found} seconds; see what it prints, or set a larger rank_timeout") from error
    return store


def _beat(store: PrefixStore, rank: int, silent: dict[int, float], every: float, left: threading.Event) -> None:
    """Count, and note which other processes do; without the store this thread ends, and then all are silent."""
    seen = dict.fromkeys(silent, 0)
    with suppress(RuntimeError):
        while not left.wait(every):
            store.add(str(rank), 1)
            for peer in seen:
                if (beats := store.add(str(peer), 0)) != seen[peer]:
                    seen[peer], silent[peer] = beats, 0 if beats > 0 else -math.inf


def _watch(rank: int, silent: dict[int, float], seconds: float, left: threading.Event) -> None:
    """End this process when another is silent; seconds in which this one stood still, too, do not count."""
    while not left.wait(1.0):
        silent.update({peer: ticks + 1 for peer, ticks in silent.items()})
        if gone := [str(peer) for peer, ticks in silent.items() if ticks > seconds]:
            found = f"nothing was heard of process {', '.join(gone)} for rank_timeout={seconds} seconds"
            again = "resume from the last checkpoint"
            print(f"error: {found}, so that process {rank} ends; {again}", file=sys.stderr, flush=True)
            os._exit(1)
