"""Two processes at once: in one folder, at one cache, as two ranks of which one is killed."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

from torture.children import SECONDS, Child, Ended, run, start
from torture.moments import die, micro_batch
from torture.place import Place
from torture.table import Row
from torture.training import finished


def writers(place: Place, *, short: bool, seed: int) -> Iterator[Row]:
    """Yield a row for two trainings in one folder, and one for two that make a cache."""
    if short:
        return
    row, cwd = Row("writers", "two trainings in one folder"), place.new()
    both = [start("train", *place.overrides, "hydra.run.dir=run", cwd=cwd) for _ in range(2)]
    ended = [child.wait() for child in both]
    row.found = f"status {ended[0].status} and {ended[1].status}"
    refused = [each for each in ended if each.status]
    row.found += "".join(f": {each.last_line}" for each in refused).replace(str(cwd), "...")
    row.expect(len(refused) == 1, "not one of the two is refused")
    row.expect(not any(each.crashed for each in ended), "a traceback")
    row.same(cwd, place.whole)
    yield row
    row, cwd = Row("writers", "two trainings that need one cache"), place.new()
    own = *place.overrides, f"cache_dir={cwd}/cache"
    both = [start("train", *own, f"hydra.run.dir={name}/run", cwd=cwd / name) for name in "ab"]
    ended = [child.wait() for child in both]
    row.found = f"status {ended[0].status} and {ended[1].status}"
    row.expect([each.status for each in ended] == [0, 0], "one failed")
    row.expect(sum("tokenized" in each.out for each in ended) == 1, "not one has made it")
    for name in "ab":
        row.same(cwd / name, place.whole)
    yield row


def _ranks(place: Place, cwd: Path, *more: str, killed: int | None = None) -> list[Ended]:
    """Train on two ranks, as torchrun would start them; kill one in its tenth step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_RUN_ID": "torture", "GROUP_RANK": "0"}
    children: list[Child] = []
    settings = "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", "hydra.run.dir=outputs/run"
    for rank in range(2):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        setup = micro_batch(10, die) if rank == killed else None
        own = *place.overrides, *settings, *more
        children.append(start("train", *own, cwd=cwd, setup=setup, environment=environment))
        time.sleep(0.1)
    return [child.wait(SECONDS) for child in children]


def ranks(place: Place, *, short: bool, seed: int) -> Iterator[Row]:
    """Yield a row for each rank of two that is killed."""
    if short:
        return
    whole = place.folder / "two-ranks"
    if any(each.status for each in _ranks(place, whole)):
        yield Row("rank", "two ranks that nobody kills", wrong=["a failure"])
        return
    (unbroken,) = finished(whole)
    for killed in (0, 1):
        row, cwd = Row("rank", f"rank {killed} of two is killed"), place.new()
        ended = _ranks(place, cwd, killed=killed)
        other = ended[1 - killed]
        row.found = (
            f"the other one ended after {other.seconds - ended[killed].seconds:.0f} s with status {other.status}"
        )
        row.expect(other.status not in (0, -9), "it hung" if other.status == -9 else "it ended as a success")
        row.expect(other.seconds - ended[killed].seconds < 120, "more than two minutes")
        on = _ranks(place, cwd, "ckpt_path=auto")
        row.expect([each.status for each in on] == [0, 0], f"then {[each.status for each in on]}: {on[0].last_line}")
        row.same(cwd, unbroken)
        yield row


def sweeps(place: Place, *, short: bool, seed: int) -> Iterator[Row]:
    """Yield a row for a sweep of four with one failing job, killed in its last job and started again."""
    if short:
        return
    row, cwd = Row("sweep", "four jobs, one fails, killed in the last, started again"), place.new()
    swept = "-m", *place.overrides, "objective.temperature=1,2,-1,4", "hydra.sweep.dir=sweep"
    whole = run("train", *swept, cwd=cwd / "whole")
    row.expect(whole.status == 1, f"the unbroken sweep ended with status {whole.status}")
    killed = run("train", *swept, cwd=cwd / "broken", setup=micro_batch(2 * 2 * 24 + 2 * 15))
    row.expect(killed.status == -9, f"status {killed.status} in place of a kill")
    sweep = cwd / "broken" / "sweep"
    before = {job: (sweep / job / "checkpoints" / "last.ckpt").stat().st_mtime_ns for job in "01"}
    again = run("train", *swept, cwd=cwd / "broken")
    row.expect(again.status == 1, f"then status {again.status}")
    row.expect("1 failed:" in again.out and "temperature=-1" in again.out, "the failed job is not named")
    row.expect((sweep / "comparison.md").is_file(), "no table")
    for job in "01":
        same = (sweep / job / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before[job]
        row.expect(same, f"job {job} was trained twice")
    for job in "013":
        row.same(sweep / job, cwd / "whole" / "sweep" / job)
    row.found = f"{len(finished(sweep))} students, status {again.status}, 1 named failure"
    yield row
