"""Layers by measurement on the command line: the table, the card, a resume and ranks take one choice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoTokenizer

import distilkit.train
from distilkit.errors import UserError
from distilkit.student import measure_layers
from distilkit.teacher import load_teacher
from jobs import QUIET, SMALL, Outcome, call, only, spawn

GREEDY = "student=layers", "student.layers=greedy", "student.num_layers=2", "student.num_blocks=12"


@pytest.fixture
def given(save_teacher: Callable[..., Path], text_file: Path, cache: Path) -> tuple[str, ...]:
    """Return the overrides of a run of two steps."""
    teacher = f"teacher.name={save_teacher('bert')}"
    paths = f"data.corpus.paths={text_file}", f"cache_dir={cache}"
    return ("teacher=hf", teacher, *SMALL, *QUIET, *paths, "trainer.max_steps=2", "validate_first=false")


def train(*overrides: str, cwd: Path) -> Outcome:
    return call(distilkit.train.main, *overrides, cwd=cwd)


def read(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def refuse_to_measure(*_: Any, **__: Any) -> None:
    raise AssertionError("the layers were measured again")


def test_a_run_writes_the_choice_of_its_layers(
    given: tuple[str, ...], tmp_path: Path, save_teacher: Callable[..., Path]
) -> None:
    done = train(*given, *GREEDY, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    folder = tmp_path / "run"
    choice, summary = read(folder / "layer_choice.json"), read(folder / "summary.json")
    assert list(choice) == ["method", "layers", "num_blocks", "evaluations", "table"]
    assert (choice["method"], choice["num_blocks"], choice["evaluations"]) == ("greedy", 12, 6 + 5 + 4 + 3)
    assert summary["layer_choice"] == {name: value for name, value in choice.items() if name != "table"}
    assert summary["layers"] == choice["layers"] and len(choice["layers"]) == 2
    config = OmegaConf.load(folder / "config.yaml")
    assert config.student.layers == choice["layers"]
    assert read(folder / "student" / "config.json")["distilkit_layers"] == choice["layers"]
    # The same measurement, by the parts.
    tokenizer = AutoTokenizer.from_pretrained(save_teacher("bert"))
    data = instantiate(config.data, tokenizer=tokenizer, lm="mlm")
    again = measure_layers(
        teacher=load_teacher(name=str(save_teacher("bert"))),
        tokenizer=tokenizer,
        layers="greedy",
        num_layers=2,
        num_blocks=12,
        draw=data.draw,
    )
    assert again.layers == choice["layers"]
    assert [row["loss"] for row in again.table] == pytest.approx([row["loss"] for row in choice["table"]], rel=1e-6)
    log = only(folder, "*.log").read_text("utf-8")
    assert "student.layers=greedy: 18 evaluations of 12 blocks, at most about 0." in log
    card = (folder / "student" / "README.md").read_text("utf-8")
    assert (
        f"| layers kept | {choice['layers']} |\n| chosen by | greedy, 12 blocks of the training text: the teacher "
        in card
    )
    assert f", without {choice['table'][1]['dropped']} {choice['table'][1]['loss']:.4f}, " in card


def test_a_run_without_a_measurement_has_no_choice(given: tuple[str, ...], tmp_path: Path) -> None:
    done = train(*given, "student=layers", "student.layers=last", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert not (tmp_path / "run" / "layer_choice.json").exists()
    summary = read(tmp_path / "run" / "summary.json")
    assert (summary["layers"], summary["layer_choice"]) == ([3, 4, 5], None)
    card = (tmp_path / "run" / "student" / "README.md").read_text("utf-8")
    assert "| chosen by | `student.layers=last`: by their place |" in card


def test_influence_chooses_in_one_pass_for_a_causal_teacher(
    given: tuple[str, ...], tmp_path: Path, save_teacher: Callable[..., Path]
) -> None:
    causal = f"teacher.name={save_teacher('gpt2')}", "objective=distilgpt2", "data.packing=documents"
    done = train(*given, *causal, "student.layers=influence", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    choice = read(tmp_path / "run" / "layer_choice.json")
    assert (choice["method"], choice["num_blocks"], choice["evaluations"]) == ("influence", 256, 1)
    table = choice["table"]
    highest = sorted(sorted(range(6), key=lambda layer: -table[layer]["influence"])[:3])
    assert choice["layers"] == highest == read(tmp_path / "run" / "summary.json")["layers"]
    card = (tmp_path / "run" / "student" / "README.md").read_text("utf-8")
    assert f"| chosen by | influence, 256 blocks of the training text: layer 0 {table[0]['influence']:.4f}" in card
    assert card.count("(dropped)") == 3


def test_a_resumed_run_keeps_its_layers_and_measures_nothing(
    given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = "+callbacks.stop={_target_: jobs.StopAfter, step: 1}", "callbacks.validation.optimizer_steps=1"
    broken = train(*given, *GREEDY, *stop, "hydra.run.dir=broken", cwd=tmp_path)
    assert "the power went out" in broken.err
    choice = read(tmp_path / "broken" / "layer_choice.json")
    last = f"ckpt_path={tmp_path}/broken/checkpoints/last.ckpt"
    monkeypatch.setattr(distilkit.train, "measure_layers", refuse_to_measure)
    done = train(*given, *GREEDY, last, "hydra.run.dir=resumed", cwd=tmp_path)
    assert done.code == 0, done.err
    summary = read(tmp_path / "resumed" / "summary.json")
    assert (summary["layers"], summary["optimizer_steps"]) == (choice["layers"], 2)
    assert read(tmp_path / "resumed" / "layer_choice.json") == choice
    for other in ("student.layers=influence", "student.num_layers=3"):
        done = train(*given, *GREEDY, other, last, "hydra.run.dir=other", cwd=tmp_path)
        assert done.code == 1
        assert f"was trained with {other.partition('=')[0]}=" in done.err
        done = train(*given, *GREEDY, other, last, "may_change=[student]", "hydra.run.dir=other", cwd=tmp_path)
        assert done.code == 1
        assert f"has layers {choice['layers']}, chosen in another way; resume with the same settings" in done.err
    assert not (tmp_path / "other" / "student").exists()


def test_a_teacher_that_cannot_be_cut_is_refused_before_it_is_measured(
    given: tuple[str, ...], tmp_path: Path, save_teacher: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilkit.train, "measure_layers", refuse_to_measure)
    other = f"teacher.name={save_teacher('bert', hidden_act='silu')}"
    done = train(*given, *GREEDY, other, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 1
    assert "but the teacher has 'silu'; set student.bert_class=same" in done.err


def test_an_objective_that_does_not_fit_is_refused_before_it_is_measured(
    given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilkit.train, "measure_layers", refuse_to_measure)
    done = train(*given, *GREEDY, "objective=minilm", "objective.relation_heads=5", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 1
    assert "objective.relation_heads=5 do not divide the widths" in done.err


def test_a_run_in_bfloat16_is_measured_in_bfloat16(
    given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def spy(*_: Any, **__: Any) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        raise UserError("seen")

    monkeypatch.setattr(distilkit.train, "measure_layers", spy)
    for precision in ("bf16-mixed", "32-true"):
        done = train(*given, *GREEDY, f"trainer.precision={precision}", "hydra.run.dir=run", cwd=tmp_path)
        assert done.err.strip().endswith("seen")
    assert seen == [True, False]


def test_greedy_without_a_teacher_is_refused(given: tuple[str, ...], tmp_path: Path) -> None:
    alone = [item for item in given if not item.startswith("teacher")]
    tokenizer = "tokenizer=wordpiece", "tokenizer.vocab_size=200"
    done = train("teacher=none", "objective=mlm", *tokenizer, *alone, *GREEDY, cwd=tmp_path)
    assert done.code == 1
    assert "a student cannot be cut from teacher=none; set student=new, or choose a teacher" in done.err


@pytest.mark.slow
def test_two_ranks_take_the_choice_of_the_first(given: tuple[str, ...], tmp_path: Path) -> None:
    ranks = "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"
    done = spawn("-m", "distilkit.train", *given, *GREEDY, *ranks, "hydra.run.dir=two", cwd=tmp_path)
    assert done.code == 0, done.err
    alone = train(*given, *GREEDY, "hydra.run.dir=one", cwd=tmp_path)
    assert alone.code == 0, alone.err
    one, two = (read(tmp_path / name / "layer_choice.json") for name in ("one", "two"))
    assert one == two
    assert read(tmp_path / "two" / "summary.json")["layers"] == one["layers"]
    logs = (tmp_path / "two").glob("*.log")
    assert sum(log.read_text("utf-8").count("evaluations of") for log in logs) == 1  # the second rank measured nothing
    assert yaml.safe_load((tmp_path / "two" / "config.yaml").read_text("utf-8"))["student"]["layers"] == one["layers"]
