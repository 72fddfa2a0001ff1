"""Trainings that end at a budget of time, on a clock that the tests set."""

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from distilkit.budget import VIRTUAL_STEPS, Clock, parse_budget, run_over_time
from distilkit.callbacks import ValidateEvery
from distilkit.errors import UserError
from distilkit.module import DistillationModule
from distilkit.schedule import build_schedule
from distilkit.watch.throughput import Throughput
from test_module import NO_DROPOUT, Steps, build_module, uneven_step
from tiny import build_teacher

LR = 0.01


class Time:
    """A clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr("distilkit.budget.perf_counter", clock)
    return clock


# ---------------------------------------------------------------------------- what is given


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        *(("40m", 2400), ("3h", 10800), ("90s", 90), ("1h30m", 5400), ("1h1m1s", 3661), ("1.5h", 5400)),
        *((90, 90), (0.5, 0.5), ("1h5s", 3605), (None, None)),
    ],
)
def test_a_budget_is_a_time_with_units_or_a_number_of_seconds(given: Any, seconds: float | None) -> None:
    assert parse_budget(given) == seconds


@pytest.mark.parametrize(
    "given",
    ["", "40", "40 minutes", "m40", "30m1h", "-3h", "1h-5m", "0s", "0h0m", 0, -5, True, float("nan"), float("inf"), []],
)
def test_what_is_no_time_above_0_is_refused_with_the_forms_it_takes(given: Any) -> None:
    with pytest.raises(UserError, match="but it must be a time above 0; give 40m, 3h, 90s, 1h30m or seconds") as error:
        parse_budget(given)
    assert str(error.value).startswith(f"budget={given}, ")


# --------------------------------------------------------------------------------- the clock


def train(clock: Clock, time: Time, lengths: Iterator[float] | list[float], agree: Any = None) -> list[float]:
    """Take steps of these seconds until the budget ends, and return the progress at the start of each."""
    shares = []
    for seconds in lengths:
        shares.append(clock.progress)
        clock.start()
        time.now += seconds
        clock.end_step(agree)
        if clock.done:
            break
    return shares


SCHEDULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {}),
    ("constant_with_warmup", {}, {}),
    ("cosine", {}, {}),
    ("cosine_with_restarts", {"num_cycles": 2}, {"num_cycles": 2}),
    ("polynomial", {"power": 2.0}, {"power": 2.0}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"min_lr_rate": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 40}, {"num_decay_steps": VIRTUAL_STEPS // 5}),
]


@pytest.mark.parametrize(("name", "in_steps", "in_time"), SCHEDULES, ids=[name for name, *_ in SCHEDULES])
def test_where_steps_take_equal_times_the_rates_are_those_of_a_schedule_over_steps(
    name: str, in_steps: dict[str, Any], in_time: dict[str, Any], time: Time
) -> None:
    def build(kwargs: dict[str, Any], num_steps: int) -> Any:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
        return build_schedule(optimizer, name=name, warmup_share=0.1, kwargs=kwargs, num_steps=num_steps)

    clock = Clock(budget=100.0)  # 200 steps of half a second
    over_steps, over_time = build(in_steps, 200), build(in_time, VIRTUAL_STEPS)
    run_over_time(over_time, clock)
    expected, actual = [], []
    while not clock.done:
        expected.append(over_steps.get_last_lr()[0])
        actual.append(over_time.get_last_lr()[0])
        clock.start()
        time.now += 0.5
        clock.end_step()
        for schedule in (over_steps, over_time):
            schedule.optimizer.step()
            schedule.step()
    assert len(actual) == 200
    assert actual[1] == actual[0]  # after one step, which may have compiled, nothing is known
    assert actual[2:] == pytest.approx(expected[2:], abs=1e-9)
    assert over_time.get_last_lr() == pytest.approx(over_steps.get_last_lr())


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(lambda: itertools.repeat(1.0), id="equal"),
        pytest.param(lambda: itertools.chain([1.0] * 30, itertools.repeat(3.0)), id="slower"),
        pytest.param(lambda: itertools.chain([3.0] * 20, itertools.repeat(0.7)), id="faster"),
        pytest.param(lambda: itertools.cycle([1.0, 2.0]), id="in turn"),
        pytest.param(lambda: map(random.Random(0).uniform, itertools.repeat(0.5), itertools.repeat(1.5)), id="random"),
    ],
)
@pytest.mark.parametrize("budget", [97.2, 97.5, 98.4])
def test_a_budget_ends_within_half_a_step_and_the_last_step_has_a_rate_of_about_zero(
    lengths: Callable[[], Iterator[float]], budget: float, time: Time
) -> None:
    clock = Clock(budget=budget)
    longest = max(itertools.islice(lengths(), 200))
    shares = train(clock, time, lengths())
    assert abs(clock.seconds - budget) <= longest / 2 + 1e-9
    assert clock.seconds == pytest.approx(time.now)
    assert shares == sorted(shares)
    assert 1 - 1.6 * longest / budget < shares[-1] < 1
    assert (clock.progress, clock.left) == (1.0, 0.0)


def test_the_run_stops_where_the_next_step_would_end_farther_from_the_budget(time: Time) -> None:
    for budget, steps in ((20.4, 20), (20.6, 21)):
        clock = Clock(budget=budget)
        assert len(train(clock, time, [1.0] * 30)) == steps


def test_compilation_validation_and_saving_count_as_no_time(time: Time) -> None:
    clock = Clock(budget=30.0)
    shares = []
    for step in itertools.count():
        shares.append(clock.progress)
        clock.start()
        time.now += {0: 300.0, 1: 100.0, 4: 50.0}.get(step, 1.0)  # compiles three graphs
        clock.end_step()
        if clock.done:
            break
        if step % 5 == 4:
            clock.stop()
            time.now += 1000.0  # validates and saves
    assert len(shares) == 27  # each of the three counts two seconds
    assert clock.seconds == 30.0
    assert clock.wall == 24 + 300 + 100 + 50
    assert shares[1] == 0.0
    assert shares[5:] == pytest.approx([(step + 3) / 30 for step in range(5, 27)])


def test_a_validation_within_a_step_is_not_part_of_it(time: Time) -> None:
    clock = Clock(budget=None)
    clock.start()
    time.now += 2.0
    clock.stop()
    time.now += 100.0
    clock.start()
    clock.start()
    time.now += 3.0
    clock.end_step()
    assert (clock.seconds, clock.wall) == (5.0, 5.0)


def test_a_budget_goes_on_in_a_resumed_run_and_may_be_another(time: Time) -> None:
    for second, steps in ((50.0, 30), (80.0, 60), (20.2, 0), (10.0, 0)):
        first = Clock(budget=50.0)
        train(first, time, [1.0] * 20)
        assert (first.seconds, first.done) == (20.0, False)
        clock = Clock(budget=second)
        clock.load_state_dict(first.state_dict())
        assert clock.progress == (1.0 if steps == 0 else pytest.approx(20.0 / second))
        if clock.done:
            assert (steps, clock.seconds) == (0, 20.0)
            continue
        shares = train(clock, time, [1000.0, 500.0, *[1.0] * 100])  # its first steps compile
        assert len(shares) == steps - 2  # and count two seconds each
        assert clock.seconds == second
        assert shares[1:6] == pytest.approx([used / second for used in (21, 22, 23, 24, 25)])
        assert shares[6] == pytest.approx(28 / second)


def test_a_budget_shorter_than_ten_steps_is_refused_after_the_first_ones(time: Time) -> None:
    for budget, steps in ((9.0, 6), (2.0, 6), (0.1, 6)):
        clock, ended = Clock(budget=budget), time.now
        with pytest.raises(UserError) as error:
            train(clock, time, [1.0] * 20)
        assert time.now - ended == steps
        assert str(error.value) == (
            f"budget={budget:g} seconds is shorter than 10 optimizer steps of 1 seconds; "
            "set budget=10s or more, or a smaller data.global_batch_size"
        )
    assert len(train(Clock(budget=10.0), time, [1.0] * 20)) == 10
    resumed = Clock(budget=9.0)  # by a slower machine
    resumed.load_state_dict({"seconds": 4.0, "wall": 4.0, "pace": 1.0})
    assert len(train(resumed, time, [1.0] * 20)) == 5


def test_ranks_take_the_time_of_the_first_at_every_tenth_step(time: Time) -> None:
    said: list[list[float]] = []
    steps: dict[str, list[int]] = {"first": [], "second": []}

    def of_first(values: list[float]) -> list[float]:
        said.append(values)
        steps["first"].append(first.steps)
        return values

    def to_second(values: list[float]) -> list[float]:
        steps["second"].append(second.steps)
        return said[len(steps["second"]) - 1]

    first, second = Clock(budget=55.0), Clock(budget=55.0)
    slow = itertools.chain([1.0] * 22, itertools.repeat(1.25))
    shares = train(first, time, slow, of_first)
    assert shares == train(second, time, [0.3] * 200, to_second)
    assert steps["first"] == steps["second"] == [*range(2, 11), 20, 30, 40]
    assert abs(first.seconds - 55.0) < 1.25


# ------------------------------------------------------------------------------ whole trainings


class Spend(Callback):
    """Let an optimizer step take some seconds, and a validation many more."""

    def __init__(self, time: Time, *seconds: float) -> None:
        self.time, self.seconds = time, itertools.cycle(seconds)
        self.rates: list[float] = []
        self.shares: list[float] = []
        self.validated: list[int] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"] / LR)
        self.shares.append(pl_module.progress)
        self.time.now += next(self.seconds)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.validated.append(trainer.global_step)
        self.time.now += 500.0


class SlowDisk(TorchCheckpointIO):
    """Take many seconds for a checkpoint."""

    def __init__(self, time: Time) -> None:
        self.time = time

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)
        self.time.now += 500.0


def budgeted(tokenizer: PreTrainedTokenizerBase, budget: float | None, **changes: Any) -> DistillationModule:
    optimizer = functools.partial(torch.optim.SGD, lr=LR)
    settings = {"optimizer": optimizer, "scheduler": "linear", "warmup_share": 0.2, "budget": budget, **changes}
    return build_module(tokenizer, teacher=build_teacher("bert", num_layers=2, **NO_DROPOUT), **settings)


def fit(module: DistillationModule, *callbacks: Callback, resume: Path | None = None, **settings: Any) -> Trainer:
    """Train on an epoch of four optimizer steps, again and again."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=1000,
        log_every_n_steps=1,
        callbacks=[ValidateEvery(optimizer_steps=6), Throughput(), *callbacks],
        **settings,
    )
    steps = [uneven_step(lm="mlm", seed=seed, size=4) for seed in range(4)]
    held_out = DataLoader([uneven_step(lm="mlm", seed=99, size=4)], batch_size=None)
    trainer.fit(module, Steps(steps, 2), held_out, ckpt_path=resume)
    return trainer


def test_a_budget_ends_a_run_over_epochs_with_a_validation_and_a_rate_of_zero(
    time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "each.ckpt")

    module, spend = budgeted(tokenizer, 40.0), Spend(time, 2.0)
    trainer = fit(module, spend, Save(), num_sanity_val_steps=-1, plugins=[SlowDisk(time)])
    assert trainer.global_step == 20
    assert spend.validated == [0, 6, 12, 18, 20]
    assert spend.rates[2:] == pytest.approx([0.5, 0.75, *(left / 16 for left in range(16, 0, -1))])
    assert spend.shares[2:] == pytest.approx([step / 20 for step in range(2, 20)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    assert (module.clock.seconds, module.clock.wall, module.progress) == (40.0, 40.0, 1.0)
    assert trainer.callback_metrics["throughput/tokens_per_second"] == pytest.approx(
        int(uneven_step(lm="mlm", seed=3, size=4)["attention_mask"].sum()) / 2.0
    )


def test_a_run_that_stopped_and_was_resumed_ends_within_its_budget_in_the_sum_of_both_parts(
    time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 9 and args[2]["is_last"]:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                raise SystemExit(143)

    with pytest.raises(SystemExit):
        fit(budgeted(tokenizer, 61.0), Stop(), Spend(time, 2.0))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["distilkit"]["clock"]
    assert saved == {"seconds": 18.0, "wall": 18.0, "pace": 2.0}
    module, spend = budgeted(tokenizer, 61.0), Spend(time, 4.0)  # on a slower machine
    trainer = fit(module, spend, resume=tmp_path / "a.ckpt")
    assert (trainer.global_step, module.clock.seconds) == (9 + 11, 62.0)
    assert spend.rates == pytest.approx(
        [(61 - used) / (0.8 * 61) for used in (18, 20, 22, 24, 26, 28, 42, 46, 50, 54, 58)]
    )
    assert spend.validated == [12, 18, 20]
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    again, idle = budgeted(tokenizer, 61.0), Spend(time, 4.0)
    assert fit(again, idle, resume=tmp_path / "end.ckpt").global_step == 20
    assert (idle.rates, again.clock.seconds) == ([], 62.0)
    assert "used 62 of budget=61 seconds, so that nothing is left to train; a larger budget goes on" in caplog.text
    longer, more = budgeted(tokenizer, 100.0), Spend(time, 4.0)
    assert fit(longer, more, resume=tmp_path / "end.ckpt").global_step == 20 + 10
    assert (more.rates[0], longer.clock.seconds) == (pytest.approx(38 / 80), 102.0)


def test_a_schedule_over_time_goes_on_over_steps_and_the_reverse(
    time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = fit(budgeted(tokenizer, None), Spend(time, 2.0), max_steps=10)
    trainer.save_checkpoint(tmp_path / "steps.ckpt")
    spend = Spend(time, 2.0)
    assert fit(budgeted(tokenizer, 40.0), spend, resume=tmp_path / "steps.ckpt").global_step == 20
    assert spend.rates[0] == pytest.approx(20 / 32)
    trainer = fit(budgeted(tokenizer, 20.0), Spend(time, 2.0))
    trainer.save_checkpoint(tmp_path / "time.ckpt")
    spend = Spend(time, 2.0)
    assert fit(budgeted(tokenizer, None), spend, resume=tmp_path / "time.ckpt", max_steps=20).global_step == 20
    assert spend.rates[0] == pytest.approx(10 / 16)


def test_the_seconds_of_a_checkpoint_of_an_earlier_version_count(
    time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = fit(budgeted(tokenizer, None), Spend(time, 2.0), max_steps=3)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    saved = torch.load(tmp_path / "old.ckpt", weights_only=True)
    del saved["distilkit"]["clock"]
    saved["callbacks"]["Throughput"] = {"seconds": 30.0}
    torch.save(saved, tmp_path / "old.ckpt")
    module = budgeted(tokenizer, None)
    fit(module, Spend(time, 2.0), resume=tmp_path / "old.ckpt", max_steps=5)
    assert (module.clock.seconds, module.clock.wall) == (34.0, 34.0)
