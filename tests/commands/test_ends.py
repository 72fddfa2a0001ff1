"""How a training ends on the command line: before its first step, or with a budget of time."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

import distilkit
import distilkit.train
from distilkit.records import read_metrics
from distilkit.student import cut_student
from distilkit.teacher import load_teacher
from jobs import QUIET, SMALL, NotFinite, Outcome, call, only, spawn

TESTS = Path(__file__).parents[1]


@pytest.fixture
def given(text_file: Path, cache: Path, save_teacher: Callable[..., Path]) -> tuple[str, ...]:
    """Return the overrides of a run that is ended by nothing but three epochs."""
    teacher = "teacher=hf", f"teacher.name={save_teacher('bert')}"
    return *teacher, *SMALL, f"data.corpus.paths={text_file}", f"cache_dir={cache}"


def summary_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return content


def clock(seconds: float, **more: float) -> str:
    """Return a callback whose optimizer steps take so many seconds, on a clock that it sets."""
    return OmegaConf.to_yaml({"_target_": "jobs.SetClock", "seconds": seconds, **more}).strip().replace("\n", ", ")


# ------------------------------------------------------------------------------- without a step


STEPLESS = {
    "with a table of metrics": (),
    "scored once, at the end": ("validate_first=false",),
    "without a logger": (*QUIET, "teacher.dtype=float32"),
    "without a teacher": ("teacher=none", "student=hf", "objective=mlm"),
}
IN_ONE_PROCESS = """
import dataclasses, json, sys
from pathlib import Path
from distilkit.train import main
from jobs import call
outcomes = [call(main, *arguments, cwd=Path.cwd()) for arguments in json.loads(sys.argv[1])]
print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
"""


@pytest.fixture(scope="module")
def stepless(
    text_file: Path, cache: Path, save_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Outcome, Path]]:
    """Make runs of no steps in one process of their own, whose warnings are not those of pytest."""
    folder, teacher, runs = tmp_path_factory.mktemp("stepless"), save_teacher("bert"), []
    for number, more in enumerate(STEPLESS.values()):
        models = ("teacher=hf", f"teacher.name={teacher}")
        if "student=hf" in more:
            models = (f"student.name={teacher}", f"tokenizer.name={teacher}")
        given = *models, *SMALL, f"data.corpus.paths={text_file}", f"cache_dir={cache}", *more
        runs.append([*given, "trainer.max_steps=0", f"hydra.run.dir={number}"])
    environment = {"PYTHONPATH": str(TESTS)}
    done = spawn("-c", IN_ONE_PROCESS, json.dumps(runs), cwd=folder, environment=environment)
    assert done.code == 0, done.err
    outcomes = [Outcome(**fields) for fields in json.loads(done.out.splitlines()[-1])]
    return {
        name: (outcome, folder / str(number))
        for number, (name, outcome) in enumerate(zip(STEPLESS, outcomes, strict=True))
    }


@pytest.mark.parametrize("name", STEPLESS)
def test_a_run_of_no_steps_scores_the_student_and_writes_it_as_it_was_cut(
    name: str,
    stepless: dict[str, tuple[Outcome, Path]],
    save_teacher: Callable[..., Path],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (done, folder), more, teacher = stepless[name], STEPLESS[name], save_teacher("bert")
    assert done.code == 0, done.err
    assert "Warning" not in done.err, done.err
    assert "WARNING" not in done.out, done.out
    summary = summary_of(folder)
    assert summary["before"] == summary["after"] != {}
    assert (summary["optimizer_steps"], summary["tokens_seen"], summary["tokens_per_second"]) == (0, 0, None)
    assert (summary["training_seconds"], summary["wall_seconds"], summary["budget_seconds"]) == (0.0, 0.0, None)
    written = AutoModelForMaskedLM.from_pretrained(folder / "student").state_dict()
    model: Any = AutoModelForMaskedLM.from_pretrained(teacher)
    if "student=hf" not in more:
        model = cut_student(teacher=load_teacher(name=str(teacher)), tokenizer=tokenizer, layers="half")
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())
    if "logger=none" not in more:
        assert [step for step, _ in read_metrics(folder / "metrics.csv")["val/nll"]] == [0]
        assert (folder / "loss_curves.png").is_file()


def test_a_run_that_resumes_a_student_without_training_is_one_from_the_beginning(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    cut = f"{tmp_path}/cut/checkpoints/last.ckpt"
    for run, more in (("cut", ["trainer.max_steps=0"]), ("on", [f"ckpt_path={cut}"]), ("whole", [])):
        steps = [] if run == "cut" else ["trainer.max_steps=2"]
        done = call(distilkit.train.main, *given, *QUIET, *more, *steps, f"hydra.run.dir={run}", cwd=tmp_path)
        assert done.code == 0, done.err
        assert (f"{cut} has no steps to resume, so that the run starts from the beginning" in done.out) == (run == "on")
    on, whole = (summary_of(tmp_path / run) for run in ("on", "whole"))
    assert on["optimizer_steps"] == 2
    assert on["after"] == whole["after"] != on["before"] == whole["before"]


def test_a_sweep_compares_a_student_without_training_with_one_that_was_trained(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    swept = call(
        distilkit.train.main, "-m", *given, *QUIET, "trainer.max_steps=0,2", "hydra.sweep.dir=sweep", cwd=tmp_path
    )
    assert swept.code == 0, swept.out + swept.err
    assert "Traceback" not in swept.out + swept.err
    rows = (tmp_path / "sweep/comparison.md").read_text("utf-8").splitlines()
    labels = {row.split("|")[1].strip() for row in rows if row.startswith("|")}
    assert {"trainer.max_steps=0", "trainer.max_steps=2"} <= labels
    first, second = (summary_of(tmp_path / "sweep" / job) for job in "01")
    assert first["before"] == first["after"] == second["before"] != second["after"]


# --------------------------------------------------------------------------------- with a budget


def test_a_budget_ends_a_run_whose_file_says_what_it_took(given: tuple[str, ...], tmp_path: Path) -> None:
    more = f"+callbacks.clock={{{clock(2.0)}}}", "budget=1m", "callbacks.validation.optimizer_steps=20"
    done = call(distilkit.train.main, *given, *more, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    folder = tmp_path / "run"
    summary, config = summary_of(folder), OmegaConf.load(folder / "config.yaml")
    assert (summary["optimizer_steps"], summary["training_seconds"], summary["budget_seconds"]) == (30, 60.0, 60.0)
    assert (config.trainer.max_steps, config.trainer.max_epochs, config.budget) == (-1, -1, "1m")
    curves = read_metrics(folder / "metrics.csv")
    assert [step for step, _ in curves["val/nll"]] == [0, 20, 30]
    assert curves["train/lr"][-1] == (30, pytest.approx(config.optimizer.lr / 30 / 0.95))
    assert [rate for _, rate in curves["throughput/tokens_per_second"][:10]] == [16 * 32 / 2.0] * 10
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["global_step"], last["optimizer_states"][0]["param_groups"][0]["lr"]) == (30, 0.0)
    assert AutoModelForMaskedLM.from_pretrained(folder / "student").config.n_layers == 3


@pytest.mark.parametrize("epoch", ["within an epoch", "after an epoch"])
def test_a_budget_that_a_signal_cut_in_two_gives_the_weights_of_an_unbroken_one(
    epoch: str, given: tuple[str, ...], tmp_path: Path
) -> None:
    limit = 9 * 2 if epoch == "after an epoch" else 1.0
    more = *given, *QUIET, f"+callbacks.clock={{{clock(2.0)}}}", "budget=40.5", f"+trainer.limit_train_batches={limit}"
    send = "+callbacks.send={_target_: jobs.Send, name: SIGTERM, step: 8}"
    stopped = call(distilkit.train.main, *more, send, "hydra.run.dir=stopped", cwd=tmp_path)
    assert stopped.code == 143, stopped.out
    file = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert torch.load(file, weights_only=True)["global_step"] == 9
    for run, again in (("on", [f"ckpt_path={file}"]), ("whole", [])):
        done = call(distilkit.train.main, *more, *again, f"hydra.run.dir={run}", cwd=tmp_path)
        assert done.code == 0, done.err
    on, whole = (summary_of(tmp_path / run) for run in ("on", "whole"))
    for name in ("optimizer_steps", "tokens_seen", "training_seconds", "after"):
        assert on[name] == whole[name], name
    assert (whole["optimizer_steps"], whole["training_seconds"]) == (20, 40.0)
    one, two = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("on", "whole"))
    assert all(torch.equal(one[weight], two[weight]) for weight in two)


def test_a_budget_shorter_than_ten_steps_writes_no_student(given: tuple[str, ...], tmp_path: Path) -> None:
    more = f"+callbacks.clock={{{clock(2.0)}}}", "budget=19s", "hydra.run.dir=run"
    done = call(distilkit.train.main, *given, *QUIET, *more, cwd=tmp_path)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "budget=19 seconds is shorter than 10 optimizer steps of 2 seconds; set budget=20s or more" in done.err
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"config.yaml", "train.log", ".hydra", ".lock"}


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        (["budget=0"], "budget=0, but it must be a time above 0; give 40m, 3h, 90s, 1h30m or seconds as 2400"),
        (["budget=soon"], "budget=soon, but it must be a time above 0"),
        (["budget=9m", "trainer.max_steps=5"], "budget=9m and trainer.max_steps=5 would both end the training; "),
        (["budget=9m", "trainer.max_steps=5"], "drop one of the two: set trainer.max_steps=-1, or budget=null"),
        (["budget=9m", "trainer.max_epochs=2"], "set trainer.max_epochs=-1, or budget=null"),
        (["budget=9m", "+trainer.max_time={minutes: 9}"], "set trainer.max_time=null, or budget=null"),
        (["trainer.max_epochs=-1"], "both -1, without end; set one of them above 0, or a budget as budget=40m"),
    ],
)
def test_what_does_not_go_with_a_budget_is_refused(
    more: list[str], facts: str, given: tuple[str, ...], tmp_path: Path
) -> None:
    done = call(distilkit.train.main, *given, *QUIET, *more, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 1
    assert facts in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_call_from_python_takes_a_budget(
    text_file: Path, cache: Path, save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    settings = [*SMALL[1:], f"cache_dir={cache}", "logger=none", f"+callbacks.clock={{{clock(2.0)}}}"]
    call_ = {"paths": text_file, "progress": False, "overrides": settings}
    result = distilkit.distill(save_teacher("bert"), out=tmp_path / "run", budget="40s", **call_)
    assert summary_of(result.run)["optimizer_steps"] == 20
    with pytest.raises(distilkit.UserError, match="overrides set budget, which an argument of distill sets too"):
        distilkit.distill(None, out=tmp_path / "b", budget=40, overrides=["budget=3"])


# -------------------------------------------------------------------- the time of another run


def test_a_job_takes_as_long_as_another_one_and_fails_alone_where_that_has_no_time(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    def sweep(*more: str) -> Outcome:
        return call(
            distilkit.train.main, "-m", *given, *QUIET, f"+callbacks.clock={{{clock(2.0)}}}", *more, cwd=tmp_path
        )

    first = sweep("budget=50", "hydra.sweep.dir=refused", "+other=x")
    assert first.code == 1
    assert "other is unknown" in first.out
    assert sweep("budget=50", "hydra.sweep.dir=first").code == 0
    later = (
        "budget='${training_seconds:first/0}','${training_seconds:first/7}','${training_seconds:${hydra:sweep.dir}/0}'"
    )
    done = sweep(later, "hydra.sweep.dir=second")
    assert done.code == 1
    assert "Traceback" not in done.out + done.err, done.out
    (line,) = done.out.rpartition("1 failed:\n")[2].strip().splitlines()
    assert "budget cannot be read: " in line
    assert "first/7/summary.json does not exist; its run has failed or is not finished" in line
    took = [summary_of(tmp_path / "second" / job)["training_seconds"] for job in "02"]
    assert took == [50.0, 50.0]
    config = OmegaConf.load(tmp_path / "second" / "0" / "config.yaml")
    assert (config.budget, config.trainer.max_epochs) == (50.0, -1)


def test_the_time_of_a_run_without_training_is_no_budget(given: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"training_seconds": 0.0}')
    done = call(distilkit.train.main, *given, *QUIET, "budget=${training_seconds:run}", cwd=tmp_path)
    assert done.code == 1
    assert "run/summary.json has training_seconds=0.0; give the folder of a run that has trained" in done.err


# -------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_ranks_end_at_the_same_step_by_the_clock_of_the_first(given: tuple[str, ...], tmp_path: Path) -> None:
    more = f"+callbacks.clock={{{clock(2.0, of_rank=1.5)}}}", "budget=70s", "hydra.run.dir=run"
    ranks = "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"
    environment = {"PYTHONPATH": str(TESTS)}
    done = spawn("-m", "distilkit.train", *given, *more, *ranks, cwd=tmp_path, environment=environment)
    assert done.code == 0, done.err
    summary = summary_of(tmp_path / "run")
    assert (summary["optimizer_steps"], summary["training_seconds"]) == (35, 70.0)
    refused = spawn(
        *("-m", "distilkit.train", *given, *more[:1], *ranks), "budget=9s", cwd=tmp_path, environment=environment
    )
    assert refused.code == 1
    assert "budget=9 seconds is shorter than 10 optimizer steps of 2 seconds" in refused.err
    zero = spawn(*("-m", "distilkit.train", *given, *ranks), "trainer.max_steps=0", "name=zero", cwd=tmp_path)
    assert zero.code == 0, zero.err
    found = summary_of(only(tmp_path, "outputs/zero/*"))
    assert found["before"] == found["after"] != {}


# ----------------------------------------------------------------- steps that are not finite


def bad(*steps: int, rank: int = 0) -> str:
    return f"+callbacks.bad={{_target_: jobs.NotFinite, steps: {list(steps)}, rank: {rank}}}"


def test_steps_that_are_not_finite_are_left_out_counted_and_made_again(
    given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = *given, "trainer.max_steps=6", "non_finite=skip", "max_skipped=2"
    done = call(distilkit.train.main, *more, bad(1, 4), "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    summary = summary_of(tmp_path / "run")
    assert (summary["skipped_steps"], summary["optimizer_steps"]) == (2, 6)
    assert "2 of 6 optimizer steps were left out" in " ".join(summary["verdict"]["warnings"])
    curves = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [value for _, value in curves["train/skipped_steps"]] == [0, 1, 1, 1, 2, 2]
    assert "left out a step: the loss is not finite at step 4 or its gradient is not" in done.out
    assert "distilkit.replay(run, epoch=0, step=4) returns its batch of seed=42" in done.out
    kept = NotFinite.batches[2:]
    (tmp_path / "soft").mkdir()  # a run without a weight that tells which labels it has
    soft = OmegaConf.merge(OmegaConf.load(tmp_path / "run" / "config.yaml"), {"objective": {"alpha_mlm": 0}})
    OmegaConf.save(soft, tmp_path / "soft" / "config.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", None)  # a batch needs no model
        for run in ("run", "soft"):
            again = distilkit.replay(tmp_path / run, epoch=0, step=4)
            assert len(again) == len(kept) == 2
            for one, two in zip(again, kept, strict=True):
                assert torch.equal(one["input_ids"], two["input_ids"])
                assert torch.equal(one["labels"], two["labels"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "soft"]
    stopped = call(distilkit.train.main, *more, bad(1, 3, 4), "hydra.run.dir=stopped", cwd=tmp_path)
    assert stopped.code == 1
    assert "max_skipped=2 steps were left out before" in stopped.err
    assert "there is no checkpoint to go on from" in stopped.err


@pytest.mark.parametrize("wrong", ["non_finite=ignore", "max_skipped=0", "max_skipped=many"])
def test_other_ways_to_go_on_are_refused(wrong: str, given: tuple[str, ...], tmp_path: Path) -> None:
    done = call(distilkit.train.main, *given, wrong, cwd=tmp_path)
    assert done.code == 1
    assert f"error: {wrong}, but it " in done.err


def test_a_batch_is_made_again_from_the_folder_of_a_run_only(tmp_path: Path) -> None:
    with pytest.raises(distilkit.UserError, match="has no config.yaml; give the folder of a run of distilkit.train"):
        distilkit.replay(tmp_path, epoch=0, step=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "distilkit.sharding.FullyShardedStrategy"])
def test_two_ranks_leave_out_a_step_that_is_not_finite_on_one_of_them(
    strategy: str, given: tuple[str, ...], tmp_path: Path
) -> None:
    ranks = "trainer.accelerator=cpu", "trainer.devices=2", f"trainer.strategy={strategy}"
    if strategy != "ddp":
        ranks = *ranks[:2], f"trainer.strategy={{_target_: {strategy}}}"
    more = *given, *ranks, "trainer.max_steps=4", "non_finite=skip", "max_skipped=1"
    environment = {"PYTHONPATH": str(TESTS)}
    done = spawn(
        "-m", "distilkit.train", *more, bad(2, rank=1), "hydra.run.dir=run", cwd=tmp_path, environment=environment
    )
    assert done.code == 0, done.err
    assert summary_of(tmp_path / "run")["skipped_steps"] == 1
    refused = spawn("-m", "distilkit.train", *more, bad(1, 2, rank=1), cwd=tmp_path, environment=environment)
    assert refused.code == 1
    assert "max_skipped=1 steps were left out before" in refused.err


# ------------------------------------------------------------------------- records over a resume


BY_CLOCK = "throughput/", "memory/", "progress/hours"


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv, without what was measured by the clock."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(stream)]
    return [{name: value for name, value in row.items() if not name.startswith(BY_CLOCK)} for row in rows]


@pytest.mark.parametrize("folder", ["on", "broken"], ids=["in a new folder", "in its own"])
@pytest.mark.parametrize(
    "end",
    [
        "+callbacks.stop={_target_: jobs.StopAfter, step: 5}",
        "+callbacks.send={_target_: jobs.Send, name: SIGTERM, step: 3}",
    ],
    ids=["killed", "signal"],
)
def test_the_records_of_a_resumed_run_are_those_of_an_unbroken_one(
    end: str, folder: str, given: tuple[str, ...], tmp_path: Path
) -> None:
    more = *given, "trainer.max_steps=8", "callbacks.validation.optimizer_steps=3", f"+callbacks.clock={{{clock(2.0)}}}"
    broken = call(distilkit.train.main, *more, end, "hydra.run.dir=broken", cwd=tmp_path)
    assert broken.code in (1, 143)
    step = 4 if broken.code == 143 else 3
    assert torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    file = f"ckpt_path={tmp_path}/broken/checkpoints/last.ckpt"
    for run, again in ((folder, [file]), ("whole", [])):
        done = call(distilkit.train.main, *more, *again, f"hydra.run.dir={run}", cwd=tmp_path)
        assert done.code == 0, done.err
    on, whole = tmp_path / folder, tmp_path / "whole"
    assert rows_of(on) == rows_of(whole)
    assert [int(row["step"]) for row in rows_of(on) if "train/loss" in row] == list(range(8))
    same = "before", "after", "tokens_seen", "training_seconds", "wall_seconds", "tokens_per_second", "input_forms"
    one, two = summary_of(on), summary_of(whole)
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert two["before"]
    assert two["input_forms"]


def test_a_checkpoint_that_stands_alone_begins_new_records_and_says_so(given: tuple[str, ...], tmp_path: Path) -> None:
    more = *given, "callbacks.validation.optimizer_steps=2", "validate_first=false"
    assert call(distilkit.train.main, *more, "trainer.max_steps=2", "hydra.run.dir=a", cwd=tmp_path).code == 0
    (tmp_path / "a/checkpoints/last.ckpt").rename(tmp_path / "moved.ckpt")
    again = "ckpt_path=moved.ckpt", "trainer.max_steps=4"
    done = call(distilkit.train.main, *more, *again, "hydra.run.dir=b", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "has no metrics.csv, so that this run's begins after step 2" in done.out
    assert [int(row["step"]) for row in rows_of(tmp_path / "b") if "train/loss" in row] == [2, 3]
    assert [step for step, _ in read_metrics(tmp_path / "b" / "metrics.csv")["val/nll"]] == [4]


def test_a_resumed_run_goes_on_in_its_run_of_wandb_and_in_its_tensorboard(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = "{_target_: pytorch_lightning.loggers.TensorBoardLogger, save_dir: '${output_dir}', name: '', version: tensorboard}"
    more = *given, "logger=wandb", f"+logger.tensorboard={board}", "validate_first=false", "trainer.max_steps=6"
    more = *more, "callbacks.validation.optimizer_steps=3"
    stop = "+callbacks.stop={_target_: jobs.StopAfter, step: 5}"
    broken = call(distilkit.train.main, *more, stop, "hydra.run.dir=broken", cwd=tmp_path)
    assert "the power went out" in broken.err
    wandb.finish()  # as the end of its process would
    again = f"ckpt_path={tmp_path}/broken/checkpoints/last.ckpt"
    for run in ("on", "twice"):
        done = call(distilkit.train.main, *more, again, f"hydra.run.dir={run}", cwd=tmp_path)
        assert done.code == 0, done.err
        again = f"ckpt_path={tmp_path}/on/checkpoints/last.ckpt"
    ids = {only(tmp_path / run, "wandb/offline-run-*").name.rpartition("-")[2] for run in ("broken", "on", "twice")}
    assert len(ids) == 1
    assert torch.load(tmp_path / "on/checkpoints/last.ckpt", weights_only=True)["distilkit"]["wandb_id"] in ids
    events = EventAccumulator(str(tmp_path / "on" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))
