"""Kill a training at exact and at random moments, and go on with ckpt_path=auto."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

from torture import moments
from torture.children import Setup, run, start
from torture.moments import at, half_written, micro_batch, named, rename, replace, step, validation
from torture.place import Place
from torture.table import Row
from torture.training import STEPS, finished

EXACT: dict[str, list[Setup]] = {  # by the moment of the kill; a second one is that of the run that goes on
    "in the score before the first step": [validation(2)],
    "before the first optimizer step": [step(1)],
    "between two micro-batches of a step": [micro_batch(14)],
    "within an optimizer step, half of the weights updated": [at("torch.optim.adam:adam", 17, after=True)],
    "after an optimizer step": [step(9, after=True)],
    "in a validation": [validation(8)],
    "in the middle of writing the first checkpoint": [half_written(1)],
    "in the middle of writing a later one": [half_written(5)],
    "before a checkpoint is renamed": [replace(3, where=named("last.ckpt"))],
    "between its rename and the next step": [replace(3, where=named("last.ckpt"), after=True)],
    "after the one before got its number": [replace(2, where=named("last-1.ckpt"), after=True)],
    "at an epoch's end": [at("pytorch_lightning.loops.fit_loop:_FitLoop.on_advance_end", 1)],
    "after the last step, before its checkpoint": [step(STEPS, after=True)],
    "in the export": [at("transformers.modeling_utils:safe_save_file", after=True)],
    "between the export and the summary": [rename(where=named("student"), after=True)],
    "in tokenizing": [at("distilkit.data.cache:tokenize", after=True)],
    "three times": [step(5), step(9), half_written(1)],
}
SHORT = "between two micro-batches of a step", "before a checkpoint is renamed", "between the export and the summary"
RANDOM = 3


def kills(place: Place, *, short: bool, seed: int) -> Iterator[Row]:
    """Yield a row for each kill."""
    for case, setups in EXACT.items():
        if not short or case in SHORT:
            yield _exact(place, case, setups)
    rng = random.Random(seed)
    for index in range(0 if short else RANDOM):
        yield _random(place, index, rng.uniform(0.1, 0.95))


def _exact(place: Place, case: str, setups: list[Setup]) -> Row:
    row, cwd = Row("kill", case), place.new()
    overrides = place.overrides
    if "tokenizing" in case:
        overrides = *overrides, f"cache_dir={cwd}/cache"
    for setup in setups:
        killed = run("train", *overrides, "ckpt_path=auto", cwd=cwd, setup=setup)
        row.expect(killed.status == -9, f"status {killed.status} in place of a kill")
    return _on(row, place, cwd, overrides)


def _random(place: Place, index: int, share: float) -> Row:
    while True:
        row, cwd = Row("kill", f"at random, after {share:.0%} of the time"), place.new()
        child = start("train", *place.overrides, "ckpt_path=auto", cwd=cwd)
        deadline = time.monotonic() + share * place.seconds
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.kill()
        if child.wait().status == -9 and not finished(cwd):
            return _on(row, place, cwd, place.overrides)
        share *= 0.7  # too late: the run was finished


def _on(row: Row, place: Place, cwd: Path, overrides: tuple[str, ...]) -> Row:
    """Run the same command again, and compare."""
    reached = moments.newest_step(cwd)
    done = run("train", *overrides, "ckpt_path=auto", cwd=cwd)
    row.found += f"went on from step {reached}" if reached else "started again"
    row.expect(done.status == 0 and not done.crashed, f"status {done.status}: {done.last_line}")
    row.same(cwd, place.whole)
    return row
