"""The command plan: a forecast on a tiny teacher, beside the run that it forecasts, on a clock that the work moves."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch.utils._pytree import tree_leaves

import distilkit
from distilkit.module import DistillationModule
from distilkit.plan.__main__ import main
from distilkit.plan.measure import _alternatives
from distilkit.plan.micro_batch import Fit, Point
from distilkit.train import main as train
from jobs import QUIET, SMALL, Outcome, call, spawn

MICRO, OPTIMIZER = 1.0, 0.5  # seconds of the clock
PLAN = ("plan.steps=3", "plan.seconds=600", "plan.alternatives=[minilm,bf16]")


@pytest.fixture(scope="module")
def command(save_teacher: Callable[..., Path], text_file: Path, cache: Path) -> tuple[str, ...]:
    teacher = ("teacher=hf", f"teacher.name={save_teacher('bert')}")
    return (*teacher, *SMALL, f"data.corpus.paths=[{text_file}]", f"cache_dir={cache}")


@pytest.fixture(scope="module")
def clock() -> Iterator[None]:
    """Let a micro-batch and an optimizer step take fixed times, for the forecast as for the run."""
    now = [0.0]

    def ticking(method: Any, seconds: float) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return method(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patched:
        for module in ("plan.step_timer", "plan.measure", "budget"):
            patched.setattr(f"distilkit.{module}.perf_counter", lambda: now[0])
        for name, seconds in (("training_step", MICRO), ("_clip", OPTIMIZER)):
            patched.setattr(DistillationModule, name, ticking(getattr(DistillationModule, name), seconds))
        yield


@pytest.fixture(scope="module")
def planned(clock: None, command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    folder = tmp_path_factory.mktemp("planned")
    price = "plan.price_per_hour=2.5"
    return call(main, *command, *PLAN, price, "trainer.max_steps=4", f"hydra.run.dir={folder}", cwd=folder), folder


@pytest.fixture(scope="module")
def numbers(planned: tuple[Outcome, Path]) -> dict[str, Any]:
    return dict(json.loads((planned[1] / "plan.json").read_text("utf-8")))


def test_it_prints_what_a_person_decides_by_and_writes_plan_json_alone(planned: tuple[Outcome, Path]) -> None:
    done, folder = planned
    assert done.code == 0, done.err
    line = done.out.strip().splitlines()[-1]
    assert line.startswith("10 s on this machine, ") and "of memory" in line and "price 0.01" in line
    assert [file.name for file in folder.iterdir() if file.name != ".lock"] == ["plan.json"]
    assert max(len(each) for each in done.out.splitlines()[:-1] if not each.startswith("[20")) <= 80  # no log line
    for part in (
        "what the teacher predicts",
        "tokens of a document",
        "MFU",
        "on more devices",
        "objective=minilm",
        "full steps",
    ):
        assert part in done.out


def test_plan_json_has_its_keys(numbers: dict[str, Any], planned: tuple[Outcome, Path]) -> None:
    assert list(numbers) == [
        *("line", "machine", "teacher", "student", "text", "micro_batch", "step", "memory_mb", "disk_mb", "run"),
        *("devices", "assumption", "alternatives"),
    ]
    assert numbers["line"] == planned[0].out.strip().splitlines()[-1]
    assert numbers["teacher"]["parameters"] > numbers["student"]["parameters"]
    assert [each["devices"] for each in numbers["devices"]] == [1, 2, 4, 8]
    assert numbers["micro_batch"]["largest"] == 16 and numbers["micro_batch"]["measured"]
    minilm, bf16 = numbers["alternatives"]
    assert minilm["override"] == "objective=minilm" and minilm["ratio"] == pytest.approx(1.0)  # of this clock
    assert bf16["override"] == "trainer.precision=bf16-mixed" and ("ratio" in bf16 or "reason" in bf16)


def test_the_forecast_holds_against_the_run(
    numbers: dict[str, Any], command: tuple[str, ...], tmp_path: Path, clock: None
) -> None:
    done = call(train, *command, *QUIET, "trainer.max_steps=4", f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    measured = summary["training_seconds"] / summary["optimizer_steps"]
    assert measured == 2 * MICRO + OPTIMIZER
    assert numbers["step"]["step_seconds"] == pytest.approx(measured, rel=0.25)
    assert numbers["run"]["steps"] == summary["optimizer_steps"]
    assert numbers["run"]["tokens"] == pytest.approx(summary["tokens_seen"], rel=0.02)
    assert numbers["student"]["parameters"] == summary["student_parameters"]
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    tensors = [each for each in tree_leaves((saved["state_dict"], saved["optimizer_states"])) if torch.is_tensor(each)]
    size = sum({each.data_ptr(): each.nbytes for each in tensors}.values())  # a tied weight counts once
    assert numbers["disk_mb"]["checkpoints"] == pytest.approx(4 * size / 2**20, rel=0.02)  # two, best, a temporary one


def test_python_gives_the_same_plan(
    numbers: dict[str, Any], command: tuple[str, ...], tmp_path: Path, clock: None
) -> None:
    teacher = command[1].removeprefix("teacher.name=")
    text = next(each for each in command if each.startswith("data.corpus.paths"))[19:-1]
    rest = [each for each in command[2:] if not each.startswith("data=") and "corpus.paths" not in each]
    found = distilkit.plan(teacher, paths=text, max_steps=4, price_per_hour=2.5, out=tmp_path, overrides=[*rest, *PLAN])
    assert json.loads((tmp_path / "plan.json").read_text("utf-8"))["line"] == found.line
    for key in ("teacher", "student", "text", "disk_mb", "run", "devices", "assumption"):
        assert found.numbers[key] == numbers[key]
    assert found.examples and callable(distilkit.plan)


@pytest.fixture(scope="module")
def planning(command: tuple[str, ...], clock: None) -> Callable[..., dict[str, Any]]:
    teacher = command[1].removeprefix("teacher.name=")
    rest = [each for each in command[2:] if not each.startswith("data=")]
    quick = ("data=text", "plan.steps=4", "plan.seconds=600", "plan.alternatives=[]", "plan.examples=0")

    def numbers_of(*overrides: str, **given: Any) -> dict[str, Any]:
        return distilkit.plan(teacher, overrides=[*rest, *quick, *overrides], **given).numbers

    return numbers_of


@pytest.mark.parametrize("several", ["experiment=demo", "+sweep=versus"])
def test_recipes_of_runs_that_read_each_other_are_refused_in_one_sentence(several: str, tmp_path: Path) -> None:
    done = call(main, several, "plan.seconds=5", cwd=tmp_path)
    assert str(done.code).startswith(f"error: {several.lstrip('+')} makes several runs, which read what earlier ones")
    assert list(tmp_path.iterdir()) == []


def test_documents_of_different_lengths_take_their_mean_time(
    planning: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, clock: None
) -> None:
    now, plain, seen = [0.0], DistillationModule.training_step, list[Any]()

    def ticking(module: DistillationModule, batch: Any, batch_idx: int) -> Any:
        now[0] += 0.01 * batch["labels"].numel()
        seen.append((module.trainer.global_step, batch["labels"].numel()))
        return plain(module, batch, batch_idx)

    monkeypatch.setattr("distilkit.plan.step_timer.perf_counter", lambda: now[0])
    monkeypatch.setattr(DistillationModule, "training_step", ticking)
    sizes = ("data.packing=documents", "data.global_batch_size=4", "data.micro_batch_size=4", "plan.steps=6")
    step = planning(*sizes, max_steps=4)["step"]
    places = [places for _, places in seen[-7:]]  # those of the last timing
    assert step["step_seconds"] == pytest.approx(0.01 * sum(places) / 7)
    assert sorted(places)[3] != pytest.approx(sum(places) / 7, rel=0.05)  # so that a median would differ


def test_limits_of_batches_count_on_each_device(planning: Callable[..., dict[str, Any]], clock: None) -> None:
    assert planning("trainer.limit_train_batches=0")["run"]["steps"] == 0
    limits = ("trainer.devices=2", "trainer.limit_train_batches=3", "trainer.max_epochs=2")
    assert planning(*limits)["run"]["steps"] == 6  # of a micro-batch on each device


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.price_per_hour=-1", "plan.price_per_hour=-1, but it must be at least 0"),
        ("plan.seconds=0", "plan.seconds=0, but it must be at least 1"),
        ("plan.memory_share=1.5", "plan.memory_share=1.5, but it must be above 0 and at most 1"),
        ("plan.devices=[0]", "plan.devices=[0], but it must be at least 1"),
        ("plan.alternatives=[faster]", "plan.alternatives has faster, but it takes masked, minilm, bf16, shorter"),
        ("plan.memory_share=1e-9", "no micro-batch fits: one block needs"),
        ("budget=-3", "budget=-3, but it must be a time above 0"),
        ("budget=20s", "budget=20 seconds is shorter than 10 optimizer steps of 2.5 seconds; set budget=25s or more"),
        ("plan.nothing=1", "plan.nothing is not in the config"),
        ("trainer.devices=3", "data.global_batch_size=16 is not divisible by the 3 devices; set a multiple of 3"),
        ("trainer.max_epochs=-1", "trainer.max_epochs=-1 and trainer.max_steps=-1 set no end"),
        ("plan.file=/proc/none/plan.json", "/proc/none is not there any more, or cannot be made; set plan.file to"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    override: str, message: str, command: tuple[str, ...], tmp_path: Path, clock: None
) -> None:
    done = call(main, *command, *PLAN, override, f"hydra.run.dir={tmp_path / 'out'}", cwd=tmp_path)
    assert done.code != 0
    assert message in done.err
    assert not list(tmp_path.rglob("plan.json"))


def test_alternatives_are_those_of_the_groups() -> None:
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        given = ["teacher=gpt2", "objective=distilgpt2", "output_dir=out", "trainer=cpu"]
        own, minilm = compose("plan", given), compose("train", ["objective=minilm", "output_dir=out"])
    found = dict(_alternatives(own, ["masked", "minilm", "shorter"], device=torch.device("cpu"), precision="32-true"))
    assert list(found) == ["objective=minilm", "data.block_size=64"]  # a causal model has no masks
    assert found["objective=minilm"]["objective"] == OmegaConf.to_container(minilm.objective)
    assert found["data.block_size=64"] == {"data": {"block_size": 64, "global_batch_size": 512, "micro_batch_size": 64}}


def test_the_help_names_each_key_and_its_examples_compose(tmp_path: Path) -> None:
    text = call(main, "--help", cwd=tmp_path).out
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        keys = set(compose("plan", []).plan) - {"_target_"}
        assert set(re.findall(r"^plan\.(\w+) ", text, re.MULTILINE)) == keys
        examples = text.strip().partition("== Examples ==\n")[2].splitlines()
        assert len(examples) == 5
        for line in examples:
            assert compose("plan", shlex.split(line)[3:]).plan


@pytest.mark.slow
def test_the_forecast_of_memory_holds_against_a_run(
    save_teacher: Callable[..., Path], text_file: Path, cache: Path, tmp_path: Path
) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 128}
    command = (
        *("teacher=hf", f"teacher.name={save_teacher('bert', **wide)}", *SMALL, "data.block_size=128"),
        *("data.global_batch_size=64", "data.micro_batch_size=32", "trainer.max_steps=3"),
        *(f"data.corpus.paths=[{text_file}]", f"cache_dir={cache}"),
    )
    own = ("plan.alternatives=[]", "plan.steps=3", f"hydra.run.dir={tmp_path / 'plan'}")
    done = spawn("-m", "distilkit.plan", *command, *own, cwd=tmp_path)
    assert done.code == 0, done.err
    done = spawn("-m", "distilkit.train", *command, *QUIET, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "plan" / "plan.json").read_text("utf-8"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert numbers["memory_mb"] == pytest.approx(summary["peak_memory_mb"]["host"], rel=0.15)
    points = [Point(**point) for point in numbers["micro_batch"]["points"]]
    assert [point.size for point in points] == [1, 2, 4, 8, 16, 32, 64]
    fit = Fit(points=tuple(points[:5]), least=0.0, limit=0.0)
    # Chunks of logits stop to grow between 16 and 64 blocks, so that a line lies above the peak. One that lies below
    # would let a micro-batch run out of memory.
    assert 0.85 * points[-1].peak < fit.predict(64) < 1.35 * points[-1].peak
