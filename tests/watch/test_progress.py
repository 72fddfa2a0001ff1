"""What a terminal, a notebook and a log show of a training, on a clock that the tests set."""

import io
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import distilkit.watch.progress
import distilkit.watch.screen
from distilkit.errors import UserError
from distilkit.watch.progress import ProgressBar, clock_time

TERMS = {"train/loss_ce": 2.1, "train/loss_mlm": 3.9, "train/loss_cos": 0.12, "train/loss": 8.21}
HELD_OUT = {"val/loss": 7.0, "val/nll": 3.4561, "val/accuracy": 0.4123}


class Run:
    """A training of two micro-batches a step and 1,000 tokens in each step, without models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (distilkit.watch.progress, distilkit.watch.screen):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)
        clock = SimpleNamespace(budget=None, wall=0.0, left=0.0, progress=0.0)
        self.module: Any = SimpleNamespace(shown={}, tokens_seen=0, clock=clock, step_loss=9.5)
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            estimated_stepping_batches=100,
            accumulate_grad_batches=2,
            sanity_checking=False,
            state=SimpleNamespace(fn="fit"),
            num_val_batches=[4],
            num_predict_batches=[8],
        )
        self.bar = ProgressBar(every=30)

    def start(self) -> None:
        self.bar.on_train_start(self.trainer, self.module)

    def micro_batch(self, index: int, *, seconds: float) -> None:
        self.now += seconds
        if index % 2:
            self.trainer.global_step += 1
            self.module.tokens_seen += 1000
            self.module.clock.wall += 2 * seconds
        self.bar.on_train_batch_end(self.trainer, self.module, None, {}, index)

    def train(self, *, steps: int, seconds: float) -> None:
        for index in range(2 * steps):
            self.micro_batch(index, seconds=seconds / 2)

    def validate(self, *, seconds: float) -> None:
        self.now += seconds
        self.module.shown |= HELD_OUT
        self.bar.on_validation_end(self.trainer, self.module)

    def end(self) -> None:
        self.bar.on_train_end(self.trainer, self.module)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Run:
    caplog.set_level(logging.INFO, logger="distilkit.watch.progress")
    return Run(monkeypatch)


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.start()
    run.module.shown |= TERMS
    run.train(steps=7, seconds=10.0)
    run.end()
    terms = "loss 8.210 (ce 2.100, mlm 3.900, cos 0.120)"
    assert caplog.messages == [
        f"step 3 of 100: {terms}, 100 tokens/s, 16:10 left",
        f"step 6 of 100: {terms}, 100 tokens/s, 15:40 left",
        f"trained 7 steps in 1:10: {terms}, 100 tokens/s",
    ]


def test_a_short_training_logs_its_end_only(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.start()
    run.train(steps=2, seconds=10.0)
    run.validate(seconds=5.0)
    run.end()
    held_out = "held-out cross-entropy 3.456 nats, accuracy 41.2%"
    assert caplog.messages == [f"trained 2 steps in 0:25: loss 9.500, 100 tokens/s, {held_out}"]


def test_a_validation_is_one_line_and_its_time_counts_to_what_is_left(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.start()
    run.train(steps=2, seconds=10.0)
    run.validate(seconds=20.0)
    run.train(steps=3, seconds=10.0)
    assert caplog.messages == [
        "step 2 of 100: held-out cross-entropy 3.456 nats, accuracy 41.2%",
        "step 5 of 100: loss 9.500, 100 tokens/s, 23:45 left",  # 15 seconds a step after the first, 95 times
    ]


def test_steps_longer_than_half_a_minute_tell_how_far_they_are(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.trainer.estimated_stepping_batches = 4
    run.start()
    run.train(steps=2, seconds=80.0)
    assert caplog.messages == [
        "step 0 of 4 and 1 of 2 micro-batches",
        "step 1 of 4: loss 9.500, 12 tokens/s, 4:00 left",
        "step 1 of 4 and 1 of 2 micro-batches: loss 9.500, 12 tokens/s, 3:20 left",
        "step 2 of 4: loss 9.500, 12 tokens/s, 2:40 left",
    ]


def test_with_a_budget_its_own_time_is_left(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.trainer.estimated_stepping_batches = float("inf")
    run.module.clock.budget, run.module.clock.left = 5400.0, 3700.4
    run.start()
    run.train(steps=3, seconds=10.0)
    assert caplog.messages == ["step 3: loss 9.500, 100 tokens/s, 1:01:40 left"]


def test_a_resumed_run_counts_its_own_steps(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.trainer.global_step, run.module.tokens_seen, run.module.clock.wall = 50, 50_000, 9000.0
    run.start()
    run.train(steps=3, seconds=10.0)
    run.end()
    assert caplog.messages == [
        "step 53 of 100: loss 9.500, 100 tokens/s, 7:50 left",
        "trained 3 steps in 0:30, up to step 53: loss 9.500, 100 tokens/s",
    ]


def test_other_ranks_and_runs_without_steps_are_silent(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.start()
    run.end()
    run.bar.disable()
    run.start()
    run.train(steps=9, seconds=10.0)
    run.validate(seconds=1.0)
    run.end()
    assert caplog.messages == []


def test_scoring_after_a_fine_tuning_is_logged_too(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.bar.on_predict_start(run.trainer, run.module)
    for index in range(8):
        run.now += 10.0
        run.bar.on_predict_batch_end(run.trainer, run.module, None, None, index)
    assert caplog.messages == ["scoring: 3 of 8 batches", "scoring: 6 of 8 batches"]


def test_a_long_validation_tells_how_far_it_is_also_before_the_first_step(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def batches(seconds: float) -> None:
        for index in range(4):
            run.now += seconds
            run.bar.on_validation_batch_end(run.trainer, run.module, None, None, index)

    run.now, run.trainer.sanity_checking, run.trainer.num_sanity_val_batches = 1000.0, True, [4]
    run.bar.on_sanity_check_start(run.trainer, run.module)
    batches(9.0)
    run.validate(seconds=0.0)
    run.trainer.sanity_checking = False
    run.start()
    run.train(steps=1, seconds=10.0)
    batches(12.0)
    run.validate(seconds=0.0)
    assert caplog.messages == [
        "held-out text: 4 of 4 batches",
        "held-out text: 2 of 4 batches",
        "step 1 of 100: held-out cross-entropy 3.456 nats, accuracy 41.2%",
    ]


def test_a_script_without_logging_gets_the_lines_on_its_output(
    run: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="distilkit.watch.progress")
    run.start()
    run.train(steps=1, seconds=10.0)
    run.end()
    assert capsys.readouterr().out == "trained 1 step in 0:10: loss 9.500, 100 tokens/s\n"


@pytest.fixture
def terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], io.StringIO]:
    """Give the run a terminal of so many columns, and return what is written to it."""

    def make(width: int) -> io.StringIO:
        written = io.StringIO()
        look: Any = {"file": written, "width": width, "height": 20, "force_terminal": True, "color_system": None}
        monkeypatch.setattr(distilkit.watch.screen, "Console", lambda **given: Console(**look, **given))
        return written

    return make


@pytest.mark.parametrize(
    ("width", "bar", "below"),
    [
        (50, 0, "held-out 3.456  loss 8.210 (ce 2.100, mlm 3.900, cos 0.120)"),
        (60, 5, "held-out 3.456  loss 8.210 (ce 2.100, mlm 3.900, cos 0.120)"),
        (80, 15, "held-out 3.456  loss 8.210 (ce 2.100, mlm 3.900, cos 0.120)"),
        (200, 35, "held-out 3.456  loss 8.210 (ce 2.100, mlm 3.900, cos 0.120)"),
    ],
)
def test_a_terminal_has_two_lines(
    width: int, bar: int, below: str, run: Run, terminal: Callable[[int], io.StringIO]
) -> None:
    terminal(width)
    run.start()
    try:
        run.module.shown |= TERMS | HELD_OUT | {"tokens/s": 15234.0}
        run.train(steps=50, seconds=10.0)
        assert run.bar.screen.live is not None
        console = run.bar.screen.console
        drawn = console.render_lines(run.bar.screen.render())
        lines = ["".join(part.text for part in line).rstrip() for line in drawn]
    finally:
        run.bar.teardown(run.trainer, run.module, "fit")
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("step 50 of 100 ━")
    assert lines[0].endswith("50%  8:20 left  15,234 tokens/s")
    assert lines[0].count("━") > bar  # the half that is done
    assert lines[1] == (below if len(below) <= width else below[: width - 1] + "…")


def test_the_two_lines_say_at_once_what_is_done(run: Run, terminal: Callable[[int], io.StringIO]) -> None:
    terminal(80)
    frames = []
    run.trainer.sanity_checking, run.trainer.num_sanity_val_batches = True, [4]
    try:
        run.bar.on_sanity_check_start(run.trainer, run.module)
        frames.append(run.bar.screen.frame)
        run.bar.on_validation_batch_end(run.trainer, run.module, None, None, 0)
        frames.append(run.bar.screen.frame)
        run.trainer.sanity_checking = False
        run.start()
        frames.append(run.bar.screen.frame)
        run.train(steps=1, seconds=10.0)
        run.bar.on_validation_batch_end(run.trainer, run.module, None, None, 3)
        run.validate(seconds=1.0)
        frames.append(run.bar.screen.frame)
    finally:
        run.bar.teardown(run.trainer, run.module, "fit")
    assert frames == [
        ("held-out text", 0.0, "", ""),
        ("held-out text", 0.25, "1 of 4 batches", ""),
        ("step 0 of 100", 0.0, "0%", ""),
        ("step 1 of 100", 0.01, "1%  16:29 left", "held-out 3.456"),
    ]


def test_what_is_logged_stands_above_the_two_lines_and_handlers_get_their_streams_back(
    run: Run, terminal: Callable[[int], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, outside = terminal(80), io.StringIO()
    monkeypatch.setattr("sys.stdout", outside)
    handler = logging.StreamHandler(outside)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    run.start()
    run.train(steps=1, seconds=40.0)
    logging.getLogger("other").warning("go on with: %s", command := " ".join(["python -m distilkit.train"] * 9))
    run.validate(seconds=1.0)
    run.end()
    assert outside.getvalue().startswith("trained 1 step")  # after the two lines are gone
    assert f"go on with: {command}\n" in written.getvalue()  # the terminal wraps it, so that it can be copied
    assert "step 1 of 100: held-out cross-entropy 3.456 nats" in written.getvalue()
    assert handler.stream is outside


def test_a_notebook_changes_what_it_displays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    handle = SimpleNamespace(update=lambda content, raw: shown.append(content))
    monkeypatch.setattr(distilkit.watch.screen, "Console", lambda **_: SimpleNamespace(is_jupyter=True))
    monkeypatch.setattr("IPython.display.display", lambda *content, raw, display_id: handle)
    run.start()
    run.module.shown |= TERMS
    run.train(steps=4, seconds=10.0)
    assert len(shown) == 9  # at the start, and once a second at most
    assert "step 4 of 100  4%  16:00 left  100 tokens/s<br>loss 8.210 (ce 2.100" in shown[-1]["text/html"]
    run.end()
    assert shown[-1]["text/plain"].startswith("trained 4 steps in 0:40: loss 8.210")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (400_000, "111:06:40")]
)
def test_times_are_minutes_or_hours(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def test_an_interval_of_no_length_is_refused() -> None:
    with pytest.raises(UserError, match="callbacks.progress.every=0, but it must be a number of seconds above 0"):
        ProgressBar(every=0)
