"""benchmarks/quality: equal time, tuned rates, held-out scores by block, resumption, the curve and the report."""

import csv
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from matplotlib import image
from omegaconf import OmegaConf
from pytorch_lightning import LightningModule, Trainer

import distilkit.evaluate.__main__
import distilkit.report.__main__
import distilkit.train
from benchmarks.quality import clock, curve, experiment, held_out, report, runner, training
from benchmarks.quality.__main__ import main
from distilkit.errors import UserError
from distilkit.records import Rows, read_file, read_rows, write_json, write_results, write_rows
from distilkit.schedule import build_schedule
from jobs import call
from scores import result, with_rows

ROWS = {
    "cut": {"train": False, "overrides": ["objective=mlm"]},
    "lm": {"overrides": ["objective=mlm"]},
    "triple": {"overrides": ["objective=distilbert"]},
    "one": {"like": "triple", "tune_only": True, "overrides": ["objective.temperature=1"]},
    "two": {"like": "one", "tune_only": True, "overrides": ["objective.temperature=2"]},
    "best": {"best_of": ["one", "two"]},
    "greedy": {"like": "best", "tuned_as": "best", "overrides": ["student=layers", "student.layers=greedy"]},
    "relations": {"select": "val/loss_rel", "overrides": ["objective=minilm"]},
}


@pytest.fixture
def make(tmp_path: Path, save_teacher: Callable[..., Path], text_file: Path) -> Callable[..., experiment.Experiment]:
    """Prepare an experiment with a tiny teacher and the rows above."""
    file = tmp_path / "rows.yaml"
    OmegaConf.save({"mlm": ROWS}, file)

    def prepared(*arguments: str) -> experiment.Experiment:
        given = [f"teacher={save_teacher('bert')}", f"text={text_file}", f"out={tmp_path / 'out'}", f"rows_file={file}"]
        small = ["block_size=32", "val_share=0.1", "val_blocks=10", "precision=32-true", "clock=cpu", "threads=1"]
        own = [f"overrides=[cache_dir={tmp_path / 'cache'}]"]
        return experiment.prepare(experiment.read_settings([*given, *small, *own, *arguments]))

    return prepared


def test_later_overrides_replace_earlier_ones_of_the_same_key() -> None:
    assert experiment.merged(["student=half_depth", "+a.b=1"], ["a.b=2", "student=layers", "x=y=z"]) == [
        "student=layers",
        "a.b=2",
        "x=y=z",
    ]
    assert experiment.listed(["a/b.txt", "with space"]) == "[a/b.txt,'with space']"
    assert [experiment.seconds(text) for text in ("90s", "40m", "1.5h")] == [90, 2400, 5400]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "teacher is not set"),
        (["teacher=x", "budgt=3m"], "budgt.*the keys are teacher, text"),
        (["teacher=x", "budget=40"], "budget=40, but it takes a time above zero, such as 90s, 40m or 3h"),
        (["teacher=x", "clock=sun"], "clock=sun, but it takes wall or cpu"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment.read_settings(arguments)


def test_other_settings_need_another_folder(make: Callable[..., experiment.Experiment]) -> None:
    make("budget=3s", "rows=[lm]")
    make("budget=3s", "rows=[lm,triple]", "tasks=[rte]", "jobs=2", "trainer=gpu")
    with pytest.raises(UserError, match="holds results with other settings: budget=4s, before 3s; choose another out"):
        make("budget=4s")
    with pytest.raises(UserError, match="clock=cpu times steps on a CPU, but trainer=gpu"):
        training.measure_speed(make("budget=3s", "trainer=gpu"))


def test_a_gpu_takes_over_from_a_cpu_by_measured_steps_alone(make: Callable[..., experiment.Experiment]) -> None:
    make("clock=wall", "trainer=cpu")
    with pytest.raises(UserError, match="holds results with other settings: trainer=gpu, before cpu"):
        make("clock=wall", "trainer=gpu")


def test_a_trunk_that_fails_holds_back_no_branch_that_is_ready(
    make: Callable[..., experiment.Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, decayed = make("rows=[lm,triple]", "curve=[1,2]", "curve_rows=[triple,lm]"), []

    def point(name: str, tokens: float) -> curve.Point:
        return curve.Point(name=name, tokens=tokens, leaves=1, ends=2, trunk=[], branch=[])

    def train(_: object, each: curve.Point) -> None:
        if (each.name, each.tokens) == ("triple", 2):
            raise UserError("broken")

    monkeypatch.setattr(curve, "points_of", lambda _, name: [point(name, 1), point(name, 2)])
    monkeypatch.setattr(curve, "train_trunk", train)
    monkeypatch.setattr(curve, "decay", lambda _, each: decayed.append((each.name, each.tokens)))
    with pytest.raises(UserError, match="1 of the commands failed"):
        curve.measure_curve(own)
    assert sorted(decayed) == [("lm", 1), ("lm", 2), ("triple", 1)]


def test_bf16_is_taken_where_the_processor_has_units_for_it() -> None:
    assert experiment.has_bf16_units("flags : fpu sse avx512_bf16 clzero")
    assert experiment.has_bf16_units("flags : amx_bf16")
    assert not experiment.has_bf16_units("flags : avx512f avx512_bf16x")


def test_rows_bring_those_that_they_refer_to() -> None:
    assert list(experiment.read_rows(ROWS, ["lm", "greedy"])) == ["lm", "one", "two", "best", "greedy"]
    with pytest.raises(UserError, match="row mlm is unknown; the rows are cut, lm"):
        experiment.read_rows(ROWS, ["mlm"])
    with pytest.raises(UserError, match="row x has lr; a row takes best_of, like"):
        experiment.read_rows({"x": {"lr": 1}}, None)


@pytest.mark.parametrize("lm", ["mlm", "clm"])
def test_the_rows_of_the_file_are_overrides_of_the_command(lm: str) -> None:
    table: Any = OmegaConf.to_container(OmegaConf.load(experiment.HERE / "rows.yaml"))
    rows = experiment.read_rows(table[lm], None)
    assert {"cut", "lm", "triple", "best"} <= set(rows)
    for row in rows.values():
        with initialize_config_module("distilkit.conf.train", version_base="1.3"):
            compose(
                "train", ["teacher=hf", "teacher.name=x", *experiment.merged(["student=half_depth"], row.overrides)]
            )
        assert not row.like or row.like in rows
        assert set(row.best_of) <= {name for name, each in rows.items() if each.tune_only}


class Now:
    """Clocks that stand until they are moved."""

    core = wall = 0.0

    def process_time(self) -> float:
        return self.core

    def perf_counter(self) -> float:
        return self.wall


def test_the_clock_counts_steps_without_validation_and_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, nothing = Now(), Any
    monkeypatch.setattr(clock, "time", now)
    trainer, module = Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path), LightningModule()

    def steps(timer: clock.Clock, count: int, *, first: float) -> None:
        for step in range(count):
            timer.on_train_batch_start(trainer, module, nothing, 0)
            now.core += first if step < clock.SKIPPED else 2.0
            now.wall += first if step < clock.SKIPPED else 3.0
            timer.on_train_batch_end(trainer, module, None, {"is_last": False}, 0)  # a micro-batch of the same step
            timer.on_train_batch_end(trainer, module, None, {"is_last": True}, 0)
            if step % 4 == 0:
                timer.on_validation_start(trainer, module)
                now.core, now.wall = now.core + 100, now.wall + 100

    timer = clock.Clock()
    steps(timer, 9, first=50.0)
    state, timer = timer.state_dict(), clock.Clock()
    timer.load_state_dict(state)
    steps(timer, 7, first=70.0)
    timer.on_train_end(trainer, module)
    assert json.loads((tmp_path / "clock.json").read_text("utf-8")) == {
        "steps": 16,
        "core_seconds_per_step": 2.0,
        "wall_seconds_per_step": 3.0,
        "core_seconds": 32.0,
        "wall_seconds": 48.0,
    }


def test_held_out_blocks_have_the_sums_of_a_plain_loop(
    make: Callable[..., experiment.Experiment], save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    model, overrides = str(save_teacher("bert", num_layers=2)), [*make().common(), "objective=mlm"]
    found = held_out.score(out=tmp_path / "scored", name="mine", model=model, overrides=overrides)
    job = held_out.held_out_job(out=tmp_path / "again", model=model, overrides=overrides)
    job.data.prepare()
    job.data.setup("validate")
    student, expected = job.module.student.eval(), []
    with torch.inference_mode():
        for batch in job.data.val_dataloader():
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                ids, labels = ids[ids != 0], labels[ids != 0]  # the last block is padded
                logits, wanted = student(ids[None]).logits[0].double(), labels >= 0
                nll = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
                expected.append([nll, float((logits.argmax(-1) == labels)[wanted].sum()), float(wanted.sum())])
    rows = read_rows(tmp_path / "scored", "text")
    assert rows is not None and len(rows) == len(expected) == 10
    sums = np.stack([rows.sums[f"masked_{name}"] for name in ("nll", "correct", "tokens")], axis=1)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    nll, right, tokens = np.sum(expected, axis=0)
    assert found.scores["masked_cross_entropy"] == pytest.approx(nll / tokens)
    assert found.scores["perplexity"] == pytest.approx(math.exp(nll / tokens))
    assert found.scores["masked_accuracy"] == pytest.approx(right / tokens)
    assert read_file(tmp_path / "scored" / "results.json")[0].scores == found.scores


def run_here(monkeypatch: pytest.MonkeyPatch, cwd: Path) -> list[runner.Command]:
    """Run the commands of a runner in this process, where a start costs nothing, and list those that ran."""
    entries = {"distilkit.train": distilkit.train.main, "distilkit.evaluate": distilkit.evaluate.__main__.main}
    entries |= {"benchmarks.quality.held_out": held_out.main, "distilkit.report": distilkit.report.__main__.main}
    ran = []

    def run(self: runner.Runner, command: runner.Command) -> None:
        if not command.done():
            ran.append(command)
            ended = call(entries[command.module], *command.line()[2:], cwd=cwd)
            assert ended.code == 0, ended.err

    monkeypatch.setattr(runner.Runner, "run", run)
    return ran


def test_a_whole_experiment_gives_a_table_and_runs_nothing_twice(
    make: Callable[..., experiment.Experiment],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = run_here(monkeypatch, tmp_path)
    sizes = ["rows=[lm]", "learning_rates=[1e-3]", "extensions=0", "speed_runs=1", "speed_steps=8", "tasks=[]"]
    own = make(*sizes, "budget=1s", "similarity=false", "curve=[4000,8000]", "curve_rows=[lm]")
    training.measure_speed(own)
    speeds = own.read("speed.json")
    assert all(each["seconds_per_step"] > 0 for each in speeds.values())
    (own.out / "speed.json").write_text(json.dumps({name: {"seconds_per_step": 0.1} for name in speeds}), "utf-8")
    own.settings.tune_share = 1.0
    training.tune(own)
    training.train(own)
    curve.measure_curve(own)
    file = report.report(own)

    summary = json.loads((own.out / "runs" / "lm" / "summary.json").read_text("utf-8"))
    assert summary["optimizer_steps"] == 10  # 1 s at 0.1 s a step
    after, (scored,) = summary["after"], read_file(own.out / "scores" / "lm" / "held_out" / "results.json")
    assert scored.scores["masked_cross_entropy"] == pytest.approx(after["val/nll"], rel=1e-5)
    assert scored.scores["masked_accuracy"] == pytest.approx(after["val/accuracy"], abs=1e-6)
    assert scored.scores["agreement"] == pytest.approx(after["val/agreement"], abs=1e-6)
    assert own.read("tuning.json")["lm"]["tried"].keys() == {"0.001"}

    # Trunk and branches are one training: the second branch has seen the tokens of all its steps.
    points = own.read("table.json")["curve"]
    assert [round(point["tokens"] / 4000) for point in points] == [1, 2]
    text = file.read_text("utf-8")
    assert "| lm |" in text and "0.001 of 1" in text and (own.out / "report" / "report.md").is_file()
    assert image.imread(own.out / "rows.png").shape[1] > 500 and image.imread(own.out / "curve.png").shape[1] > 500
    assert "Partial results" not in text

    ran.clear()
    training.measure_speed(own)
    training.tune(own)
    training.train(own)
    curve.measure_curve(own)
    assert not ran


def test_a_short_run_is_scored_at_its_end_alone(
    make: Callable[..., experiment.Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, tmp_path)
    own, folder = make(), tmp_path / "run"
    own.runner.run(own.training("lm", folder, ["objective=mlm"], steps=60))
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["val/nll"]] == ["59"]


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., runner.Command]:
    """Write modules that a runner can start, with a ``done`` file of the same name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def script(name: str, code: str, run: Path | None = None) -> runner.Command:
        (tmp_path / f"{name}.py").write_text(f"import pathlib, sys, time\n{code}", "utf-8")
        return runner.Command(name=name, module=name, arguments=["a=1"], done=(tmp_path / name).exists, run=run)

    return script


def test_a_finished_command_is_not_run_again(tmp_path: Path, scripts: Callable[..., runner.Command]) -> None:
    own = runner.Runner(out=tmp_path, jobs=2, threads=1)
    command = scripts("once", f"pathlib.Path({str(tmp_path / 'once')!r}).open('a').write('x')")
    own.each(own.run, [command, command, command])
    assert (tmp_path / "once").read_text("utf-8") == "x"
    assert (tmp_path / "commands.txt").read_text("utf-8") == "OMP_NUM_THREADS=1 python -m once a=1\n"


def test_the_other_commands_run_after_a_failure(
    tmp_path: Path, scripts: Callable[..., runner.Command], capsys: pytest.CaptureFixture[str]
) -> None:
    own = runner.Runner(out=tmp_path, jobs=1, threads=1)
    good = scripts("good", f"pathlib.Path({str(tmp_path / 'good')!r}).touch()")
    with pytest.raises(UserError, match="1 of the commands failed; the same command goes on with them"):
        own.each(own.run, [scripts("bad", "sys.exit('no such layer')"), good])
    assert (tmp_path / "good").exists()
    assert "bad failed with status 1: no such layer" in capsys.readouterr().err


def test_a_stopped_training_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    shared: Any = {"name": "x", "module": "distilkit.train", "done": (tmp_path / "summary.json").is_file}
    first = runner.Command(**shared, arguments=["a=1", "ckpt_path=other.ckpt"], run=tmp_path)
    assert first.line() == ["-m", "distilkit.train", "a=1", "ckpt_path=other.ckpt"]
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    assert first.line() == ["-m", "distilkit.train", "a=1", f"ckpt_path={last}"]


def test_the_end_of_the_driver_ends_its_commands(tmp_path: Path, scripts: Callable[..., runner.Command]) -> None:
    own = runner.Runner(out=tmp_path, jobs=2, threads=1)
    endless = [
        scripts(name, f"pathlib.Path({str(tmp_path / name)!r} + '.on').touch(); time.sleep(60)") for name in "ab"
    ]

    def interrupt(item: object) -> None:
        while not all((tmp_path / f"{name}.on").exists() for name in "ab"):
            time.sleep(0.01)
        raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        runner.Runner(out=tmp_path, jobs=3, threads=1, running=own.running, stopped=own.stopped).each(
            lambda item: own.run(item) if isinstance(item, runner.Command) else interrupt(item), [*endless, 0]
        )
    assert not own.running and time.perf_counter() - start < 50


def test_a_changed_row_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- a=1\n- b=${name}\n- ckpt_path=c\n", "utf-8")
    shared: Any = {"name": "x", "module": "distilkit.train", "done": tmp_path.exists, "run": tmp_path}
    runner.Command(**shared, arguments=["a=1", "b=${name}", "hydra.run.dir=d"]).warn_if_changed()
    assert not capsys.readouterr().out
    runner.Command(**shared, arguments=["a=2", "b=${name}", "hydra.run.dir=d"]).warn_if_changed()
    assert "was trained with other overrides: a=1, a=2; it stays" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (5e-4, [2.5e-4, 5e-4, 1e-3]),
        (2e-3, [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]),
        (9e-3, [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]),
        (1e-5, [6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3]),
    ],
)
def test_a_best_rate_at_an_edge_is_followed_beyond_it(
    make: Callable[..., experiment.Experiment], monkeypatch: pytest.MonkeyPatch, best: float, tried: list[float]
) -> None:
    own = make("rows=[lm]")
    monkeypatch.setattr(training, "_try", lambda run, row, rate: (abs(math.log(rate / best)), rate))
    training.tune(own)
    found = own.read("tuning.json")["lm"]
    assert list(map(float, found["tried"])) == tried
    assert found["learning_rate"] == min(tried, key=lambda rate: abs(math.log(rate / best)))
    assert found["held_out"] == found["learning_rate"]


def test_the_best_candidate_gives_its_overrides_rate_and_steps(
    make: Callable[..., experiment.Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, worse = make("rows=[lm,greedy,cut]", "budget=10m"), {"lm": 1.0, "one": 3.0, "two": 2.0}
    monkeypatch.setattr(training, "_try", lambda run, row, rate: (abs(rate - 5e-4), worse[row.name]))
    with pytest.raises(UserError, match="row best is the best of one, two, which are not tuned; add stage=tune"):
        own.overrides("greedy")
    training.tune(own)
    assert own.overrides("greedy") == [
        "objective=distilbert",
        "objective.temperature=2",
        "student=layers",
        "student.layers=greedy",
    ]
    assert training.tuned(own, "greedy")[-1] == "optimizer.lr=0.0005"
    assert training.tuned(own, "cut") == ["objective=mlm"]
    (own.out / "speed.json").write_text(json.dumps({"two": {"seconds_per_step": 0.5}}), "utf-8")
    assert training.limits(own, "greedy", 0.1) == (120, [])
    assert training.limits(own, "cut", 0.1) == (0, [])
    with pytest.raises(UserError, match="the steps of row lm are not timed; add stage=speed"):
        training.limits(own, "lm", 0.1)
    with pytest.raises(UserError, match="3 seconds are 6 steps of row two, but it takes 10; raise the budget"):
        training.limits(own, "two", 0.005)
    own.settings.clock = "wall"
    assert training.limits(own, "lm", 0.1) == (None, ["budget=60s"])


def test_the_curve_is_one_warmup_a_constant_trunk_and_decays_to_zero() -> None:
    pairs = curve.steps_of([4000, 1000, 2000], tokens_per_step=10, decay_share=0.15)
    assert pairs == [(85, 100), (170, 200), (340, 400)]
    with pytest.raises(
        UserError, match=r"are the steps \[100, 100\] of 10 tokens a step; give points that are further"
    ):
        curve.steps_of([1000, 1004], tokens_per_step=10, decay_share=0.15)

    def rates(overrides: list[str], steps: int) -> Callable[[int], float]:
        given = dict(each.lstrip("+").split("=", 1) for each in overrides)
        kwargs = {name.removeprefix("scheduler.kwargs."): value for name, value in given.items() if "kwargs" in name}
        kwargs = {name: float(value) for name, value in kwargs.items()}
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        share = float(given["scheduler.warmup_share"])
        schedule = build_schedule(
            optimizer, name=given["scheduler.name"], warmup_share=share, kwargs=kwargs, num_steps=steps
        )
        return schedule.lr_lambdas[0]

    for leaves, ends in pairs:
        trunk, branch = curve.schedules(leaves, ends, warmup=5)
        constant, decayed = rates(trunk, leaves), rates(branch, ends)
        assert [constant(step) for step in range(leaves)] == [min(1, step / 5) for step in range(leaves)]
        stable = [decayed(step) for step in range(leaves)]
        assert stable == pytest.approx([min(1, step / 5) for step in range(leaves)], abs=1e-5)
        falls = [decayed(step) for step in range(leaves, ends + 1)]
        assert falls == pytest.approx([(ends - step) / (ends - leaves) for step in range(leaves, ends + 1)], abs=1e-5)


def write_scores(out: Path, name: str, *, nll: float, right: float, seeds: int = 3, noise: int = 0) -> None:
    """Write held-out blocks and two tasks of a row: so many nats a token, and so large a share of right answers."""
    rng = np.random.default_rng(noise)
    tokens = np.full(50, 20.0)
    blocks = (nll + rng.normal(0, 0.01, 50)) * tokens
    sums = {"masked_nll": blocks, "masked_correct": tokens * right, "masked_tokens": tokens}
    sums |= {"nll": blocks, "tokens": tokens}
    folder = out / "scores" / name / "held_out"
    rows = Rows(ids=np.arange(50), sums=sums)
    write_rows(folder, "text", rows)
    scores = {metric: held_out.measure([metric], rows)[metric] for metric in held_out.METRICS} | {"agreement": 0.5}
    about: Any = {"kind": "language_model", "seed": None, "higher_is_better": False, "settings": {}}
    made = result(name, "held_out", scores["perplexity"], scores=scores, details={"rows": {"text": 50}}, **about)
    write_results(folder, [made])
    gold = np.tile([0, 1], 200)
    for task in ("rte", "sst2"):
        for seed in range(1, seeds + 1):
            wrong = np.random.default_rng(seed).permutation(400)[: round(400 * (1 - right))]
            said = gold.copy()
            said[wrong] = 1 - said[wrong]
            with_rows(out / "scores", name, task, Rows(ids=np.arange(400), gold=gold, said=said), seed=seed)


def test_the_report_says_what_reaches_the_target_and_what_is_missing(
    make: Callable[..., experiment.Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, tmp_path)
    own = make("rows=[lm,triple,best]", "tasks=[rte,sst2]", "similarity=false")
    with pytest.raises(UserError, match="has no scores yet; run the stages train and tasks first"):
        report.report(own)
    for name, nll, right in (("teacher", 2.0, 0.9), ("lm", 3.0, 0.6), ("triple", 2.9, 0.65), ("best", 2.5, 0.8)):
        write_scores(own.out, name, nll=nll, right=right)
    text = report.report(own).read_text("utf-8")
    assert "best beats lm and triple, on held-out cross-entropy and on the mean of the tasks, beyond" in text
    record = {each["row"]: each for each in own.read("table.json")["rows"]}["best"]
    assert record["mean"] == pytest.approx(0.8) and record["kept"] == pytest.approx(100 * 0.8 / 0.9)
    low, high = record["nll_less_lm"]
    assert low < -0.5 < high and high - low < 0.02
    assert "Partial results; missing are lm (training); triple (training); best (training)." in text

    write_scores(own.out, "best", nll=2.5, right=0.65)  # no better than the triple loss on tasks
    write_scores(own.out, "triple", nll=2.9, right=0.65, seeds=3)
    text = report.report(own).read_text("utf-8")
    assert "No row beats lm and triple" in text


def test_an_unfinished_report_names_what_it_cannot_say(
    make: Callable[..., experiment.Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, tmp_path)
    own = make("rows=[lm,triple,best]", "tasks=[rte,sst2]")
    write_scores(own.out, "lm", nll=3.0, right=0.6)
    text = report.report(own).read_text("utf-8")
    assert "No row beats lm and triple, " in text and "Not known yet for best." in text
    assert "teacher (held-out text, STS-B by cosine, RTE, SST-2)" in text


def test_the_hours_of_clock_cpu_are_steps_at_their_measured_cost(make: Callable[..., experiment.Experiment]) -> None:
    own = make("rows=[lm]", "tasks=[rte,sst2]")
    write_scores(own.out, "lm", nll=3.0, right=0.6)
    folder = own.out / "runs" / "lm"
    folder.mkdir(parents=True)
    write_json(folder / "summary.json", {"optimizer_steps": 100, "machine": "NVIDIA H100"})
    write_json(folder / "clock.json", {"core_seconds": 7, "wall_seconds": 3})
    write_json(own.out / "speed.json", {"lm": {"seconds_per_step": 0.5}})
    record = report.records_of(own, report.read_scores(own))[1]
    assert record["hours"] == pytest.approx(50 / 3600)
    assert record["machine"] == "NVIDIA H100"
    own.settings.clock = "wall"
    assert report.records_of(own, report.read_scores(own))[1]["hours"] == pytest.approx(3 / 3600)


def test_wrong_stages_are_refused(monkeypatch: pytest.MonkeyPatch, save_teacher: Callable[..., Path]) -> None:
    given = ["quality", f"teacher={save_teacher('bert')}", "stage=[speed,fly]"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="stage=fly, but it takes all or a list of speed, tune, train"):
        main()
