"""The Python API: what ``import distilkit`` gives, and a distillation in one call."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from transformers import AutoModelForMaskedLM

import distilkit
import distilkit.train
from distilkit.api import Distilled
from jobs import QUIET, SMALL, call, only, spawn
from tiny import make_documents

NAMES = {
    "load_teacher": "distilkit.teacher",
    "cut_student": "distilkit.student",
    "Objective": "distilkit.objective",
    "DistillationModule": "distilkit.module",
    "DistillationDataModule": "distilkit.data.batches",
    "distill": "distilkit.api",
    "export_student": "distilkit.api",
    "Distilled": "distilkit.api",
    "replay": "distilkit.api",
    "UserError": "distilkit.errors",
}
SETTINGS = [item for item in SMALL if item != "data=text"]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Remove the seeds that Lightning leaves in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def distill(tmp_path: Path, save_teacher: Callable[..., Path]) -> Callable[..., Distilled]:
    def go(*overrides: str, out: str = "run", **given: Any) -> Distilled:
        given = {"teacher": save_teacher("bert"), "max_steps": 2, "progress": False, **given}
        settings = [*SETTINGS, f"cache_dir={tmp_path}/cache", *overrides]
        return distilkit.distill(out=tmp_path / out, overrides=settings, **given)

    return go


def test_importing_distilkit_imports_no_large_library(tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "pytorch_lightning", "hydra", "numpy")
    code = f"import sys, distilkit; dir(distilkit); print([name for name in {heavy} if name in sys.modules])"
    assert spawn("-c", code, cwd=tmp_path).out == "[]\n"


def test_the_public_names_are_those_of_their_modules() -> None:
    assert set(distilkit.__all__) == {*NAMES, "plan", "__version__"} <= set(dir(distilkit))
    assert callable(distilkit.plan)  # a room and its function
    for name, module in NAMES.items():
        assert getattr(distilkit, name) is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="module 'distilkit' has no attribute 'destill'"):
        _ = distilkit.destill


def test_one_call_gives_the_run_that_the_command_gives(
    distill: Callable[..., Distilled], text_file: Path, save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    result = distill("logger=none", paths=text_file)
    given = "teacher=hf", f"teacher.name={save_teacher('bert')}", f"data.corpus.paths=[{text_file}]"
    done = call(
        distilkit.train.main, *SMALL, *QUIET, *given, f"cache_dir={tmp_path}/cache", "trainer.max_steps=2", cwd=tmp_path
    )
    assert done.code == 0, done.err
    run = only(tmp_path, "outputs/distil/*")
    summary, theirs = (json.loads((folder / "summary.json").read_text("utf-8")) for folder in (result.run, run))
    assert (summary["before"], summary["after"]) == (theirs["before"], theirs["after"])
    assert {f"val/{name}": value for name, value in result.metrics.items()} == summary["after"]
    assert result.verdict is not None
    assert result.verdict.line == summary["verdict"]["line"] == theirs["verdict"]["line"]
    assert {f"val/{name}": value for name, value in result.before.items()} == summary["before"]
    assert (result.run, result.path) == (tmp_path / "run", tmp_path / "run" / "student")
    assert AutoModelForMaskedLM.from_pretrained(result.path).config.n_layers == 3
    config, their_config = (OmegaConf.load(folder / "config.yaml") for folder in (result.run, run))
    config.output_dir = config.callbacks.checkpoint.dirpath = None
    their_config.output_dir = their_config.callbacks.checkpoint.dirpath = None
    config.trainer.default_root_dir = their_config.trainer.default_root_dir = None
    for name in ("signals", "predictions"):
        config.callbacks[name].file = their_config.callbacks[name].file = None
    assert config == their_config


def test_documents_in_memory_are_written_once(distill: Callable[..., Distilled], tmp_path: Path) -> None:
    documents = make_documents(300, seed=3)
    first = distill(text=iter(documents), out="a")
    file = only(tmp_path, "cache/texts/*.jsonl")
    assert [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()] == documents
    second = distill(text=documents, out="b", student="third_depth")
    assert only(tmp_path, "cache/texts/*") == file
    assert len(list(tmp_path.glob("cache/*/meta.json"))) == 1  # one token cache for both
    assert OmegaConf.load(second.run / "config.yaml").data.corpus.paths == str(file)
    assert first.metrics != second.metrics
    assert "| data | 300 documents given to distilkit.distill |" in (first.path / "README.md").read_text("utf-8")


def test_an_interrupt_is_one_for_the_caller_too_and_the_call_goes_on(
    distill: Callable[..., Distilled], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):  # a SystemExit would end a notebook's or a prompt's Python
        distill("+callbacks.send={_target_: jobs.Send, name: SIGINT, step: 1}", paths=text_file)
    assert not (tmp_path / "run" / "student").exists()
    assert distill("ckpt_path=auto", paths=text_file).path.is_dir()


def test_the_same_call_gives_the_same_metrics(distill: Callable[..., Distilled], text_file: Path) -> None:
    first, second = (distill("objective.temperature=4", paths=[text_file], out=out) for out in ("a", "b"))
    assert (first.before, first.metrics) == (second.before, second.metrics)
    assert json.loads((first.run / "summary.json").read_text("utf-8"))["objective"]["temperature"] == 4


def test_a_model_is_trained_without_a_teacher(distill: Callable[..., Distilled], text_file: Path) -> None:
    config = "student.config={hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 2, intermediate_size: 32}"
    small = "objective=mlm", "tokenizer=wordpiece", "tokenizer.vocab_size=200", config
    model = distill(*small, teacher=None, student="new", paths=text_file, out="teacher")
    student = distill(teacher=model.path, paths=text_file, out="student")
    assert json.loads((student.run / "summary.json").read_text("utf-8"))["layers"] == [0]


@pytest.mark.parametrize(
    ("overrides", "given", "message"),
    [
        (
            [],
            {"text": "ba be bi"},
            r"text is a string or holds no document; give documents, such as \[text\], or files as paths=",
        ),
        ([], {"text": [__file__]}, r"text begins with '.*test_api.py', which is a file; use paths= for files"),
        ([], {"text": ["ba", 3]}, r"document 2 of text is a int; give strings"),
        ([], {"text": []}, r"text is a string or holds no document"),
        ([], {"text": ["ba", "be \ud800"]}, r"document 2 of text holds an unpaired surrogate; fix or drop it"),
        ([], {"paths": ""}, r"paths='' is the working folder"),
        (["teacher.name=x"], {}, r"overrides set teacher.name, which an argument of distill sets too"),
        (["card.license=3"], {}, r"card.license=3, but it must be a text or a list of texts"),
        (
            [],
            {"text": ["ba be bi"]},
            r"fewer than one batch of data.global_batch_size=16; add more text or set a smaller",
        ),
        ([], {"text": ["ba"], "paths": "x"}, r"both text and paths are given; give one of them"),
        ([], {"paths": "nowhere/*.txt"}, r"'nowhere/\*.txt' matches no file"),
        ([], {"student": "tiny"}, r"Could not find 'student/tiny'"),
        (["objective.temprature=1"], {}, r"objective.temprature is not in the config; did you mean"),
        (["objective.temperature=1,2"], {}, r"Ambiguous value for argument 'objective.temperature=1,2'"),
        (["objective.temperature=0"], {}, r"objective.temperature=0.0, but it must be above 0"),
        (["sweep=temperature"], {}, r"sweep= needs python -m distilkit.train; from Python, call distill once for each"),
    ],
)
def test_what_is_wrong_is_a_user_error_and_nothing_is_written(
    overrides: list[str], given: dict[str, Any], message: str, distill: Callable[..., Distilled], tmp_path: Path
) -> None:
    with pytest.raises(distilkit.UserError, match=message):
        distill(*overrides, **given)
    assert not list(tmp_path.rglob("student"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_finished_run_is_not_replaced(distill: Callable[..., Distilled], text_file: Path) -> None:
    distill(paths=text_file)
    with pytest.raises(distilkit.UserError, match=r"run holds a finished run; choose another hydra.run.dir .*out"):
        distill(paths=text_file)


def test_progress_is_shown_where_the_output_is_not_utf_8(
    distill: Callable[..., Distilled], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    distill(paths=text_file, progress=True)
    assert b"trained 2 steps in " in written.getvalue()
    assert stream.errors == "strict"  # as the caller has it


@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=len, flush=lambda: None)])
def test_a_standard_output_may_be_missing_or_of_a_class_of_the_caller(
    stream: Any, distill: Callable[..., Distilled], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    assert distill(paths=text_file).metrics


def test_hydra_and_torch_are_left_as_the_caller_has_them(distill: Callable[..., Distilled], text_file: Path) -> None:
    torch.set_float32_matmul_precision("high")
    arguments, job = list(sys.argv), HydraConfig.instance().cfg
    try:
        with initialize_config_module("distilkit.conf.evaluate", version_base="1.2"):
            mine = GlobalHydra.instance().hydra
            distill(paths=text_file)
            assert GlobalHydra.instance().hydra is mine
            assert compose("evaluate", ["model=x"]).model == "x"
        assert not GlobalHydra.instance().is_initialized()
        distill(paths=text_file, out="again")
        assert not GlobalHydra.instance().is_initialized()
        assert (sys.argv, HydraConfig.instance().cfg) == (arguments, job)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
