"""A budget of training time: the clock of optimizer steps, when they end, and a schedule over time."""

import functools
import math
import re
import statistics
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from distilkit.errors import UserError

VIRTUAL_STEPS = 10_000  # of a schedule over time
_FIRST, _UNSURE = 10, 5  # steps that may compile; of them, those that decide nothing
_RECENT = 20  # steps whose median is the pace
_FEWEST = 10  # steps of a budget
_APART = 10  # steps between two agreements of ranks
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_FORM = re.compile("".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in _UNITS))


def parse_budget(given: Any, *, key: str = "budget") -> float | None:
    """Return the time of a config key in seconds: ``40m``, ``3h``, ``1h30m`` or a number of seconds; None stays None."""
    if given is None:
        return None
    seconds = math.nan
    if isinstance(given, int | float) and not isinstance(given, bool):
        seconds = float(given)
    elif isinstance(given, str) and (found := _FORM.fullmatch(given)):
        seconds = sum(float(number) * _UNITS[unit] for unit, number in found.groupdict().items() if number)
    if not 0 < seconds < math.inf:
        raise UserError(f"{key}={given}, but it must be a time above 0; give 40m, 3h, 90s, 1h30m or seconds as 2400")
    return seconds


def check_budget(budget: float | None, *, step_seconds: float) -> None:
    """Refuse a budget that is shorter than ten optimizer steps."""
    if budget is not None and budget < (short := step_seconds * _FEWEST):
        raise UserError(
            f"budget={budget:g} seconds is shorter than {_FEWEST} optimizer steps of {step_seconds:.3g} seconds; "
            f"set budget={math.ceil(short)}s or more, or a smaller data.global_batch_size"
        )


class Clock:
    """Count the seconds of optimizer steps, without validation, the saving of checkpoints, and compilation.

    Each of the first ten steps of a process counts at most twice the median of those after the first, because they may
    compile. With a ``budget`` in seconds, ``progress`` is the share that is used up. The budget is ``done``, after the
    sixth step at the earliest, when the next step would end farther beyond it than this one ends before it. Ranks take
    the time of the first rank: at the first ten steps, then at every tenth, with the pace of recent steps in between.
    """

    def __init__(self, *, budget: float | None) -> None:
        """Start from zero."""
        self.budget = budget
        self.wall = 0.0  # seconds of all parts of a resumed run, with compilation
        self.before = self.later = 0.0  # seconds of the parts before, and of this part after its first steps
        self.first: list[float] = []  # seconds of the first steps
        self.recent: deque[float] = deque(maxlen=_RECENT)
        self.steps = 0  # of this part
        self.used = self.pace = 0.0  # seconds of the budget, and of a step, on which all ranks agree
        self.done = False
        self.unfinished = 0.0  # seconds since the last step
        self.started: float | None = None  # None: the clock is stopped

    @property
    def seconds(self) -> float:
        """The seconds of training in all parts of a resumed run."""
        limit = 2 * statistics.median_low(self.first[1:] or self.first or [0.0])
        return self.before + sum(min(each, limit) for each in self.first) + self.later + self.unfinished

    @property
    def progress(self) -> float:
        """The share of the budget that is used up, from 0 to 1."""
        assert self.budget is not None
        return 1.0 if self.done else min(1.0, self.used / self.budget)

    @property
    def left(self) -> float:
        """The seconds of the budget that are left, 0 or more."""
        assert self.budget is not None
        return 0.0 if self.done else max(0.0, self.budget - self.used)

    def start(self) -> None:
        """Go on, if the clock is stopped."""
        if self.started is None:
            self.started = perf_counter()

    def stop(self) -> None:
        """Stop until the next start."""
        if self.started is not None:
            elapsed = perf_counter() - self.started
            self.wall += elapsed
            self.unfinished += elapsed
            self.started = None

    def end_step(self, agree: Callable[[list[float]], list[float]] | None = None) -> None:
        """End an optimizer step; ``agree`` returns the first rank's values to all ranks.

        A budget that is shorter than ten steps raises a ``UserError`` after the sixth.
        """
        self.stop()
        self.start()
        seconds, self.unfinished = self.unfinished, 0.0
        self.steps += 1
        if self.steps > 1:
            self.recent.append(seconds)
        if self.steps <= _FIRST:
            self.first.append(seconds)
        else:
            self.later += seconds
        if self.budget is None:
            return
        resumed = self.before > 0
        unsure = self.steps <= (_UNSURE if resumed else 1)  # the pace of the part before is a better one
        if not unsure and (agree is None or self.steps <= _FIRST or self.steps % _APART == 0):
            mine = [self.seconds, statistics.median(self.recent)]
            self.used, self.pace = agree(mine) if agree else mine
        else:
            self.used += self.pace
        if not resumed and self.steps <= _UNSURE:
            return
        self.done = self._is_done()
        if not resumed and self.steps < _FEWEST:
            check_budget(self.budget, step_seconds=self.pace)

    def _is_done(self) -> bool:
        """Return whether the next step would end farther beyond the budget than now is before it."""
        return self.budget is not None and self.pace > 0 and self.budget - self.used < self.pace / 2

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run goes on from."""
        pace = statistics.median(self.recent) if self.recent else self.pace
        return {"seconds": self.seconds, "wall": self.wall, "pace": pace}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from the seconds of the parts before; the budget may be another."""
        self.before = self.used = state["seconds"]
        self.wall, self.pace = state["wall"], state["pace"]
        self.done = self._is_done() or (self.budget is not None and self.used >= self.budget)


def _rate(step: int, *, rate: Callable[[float], float], clock: Clock) -> float:
    return rate(VIRTUAL_STEPS * clock.progress)


def run_over_time(schedule: LambdaLR, clock: Clock) -> None:
    """Let a schedule of ``VIRTUAL_STEPS`` steps follow the progress of a budget instead of the steps taken."""
    rates: Any = schedule.lr_lambdas
    schedule.lr_lambdas = [functools.partial(_rate, rate=rate, clock=clock) for rate in rates]
