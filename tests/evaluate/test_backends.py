"""Scores of a fine-tuned model in bfloat16 and by ONNX Runtime, as rows of their own."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

import distilkit.evaluate.__main__
import distilkit.export.onnx
from distilkit.errors import UserError
from distilkit.evaluate.backends import check_backends, in_backend
from distilkit.metrics import agreement, kl
from distilkit.records import read_results, read_rows
from jobs import Outcome, call, only, write_rows

FAST = ("trainer=cpu", "trainer.enable_progress_bar=false", "finetune.lr=2e-3", "finetune.batch_size=16", "seed=1")


@pytest.fixture
def evaluate(tmp_path: Path, save_teacher: Callable[..., Path]) -> Callable[..., Outcome]:
    model = save_teacher("distilbert", num_layers=1)
    rows = write_rows(tmp_path / "glue" / "SST-2").parent

    def run(*overrides: str) -> Outcome:
        given = [f"model={model}", "name=mine", "task=sst2", f"task.data_dir={rows}", "task.max_length=60", *FAST]
        return call(distilkit.evaluate.__main__.main, *given, *overrides, cwd=tmp_path)

    return run


def test_a_finetuned_model_is_scored_again_in_each_backend(evaluate: Callable[..., Outcome], tmp_path: Path) -> None:
    done = evaluate("finetune.epochs=3", "backends=[bf16,onnx,int8]")
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    plain, *others = read_results([tmp_path / "outputs"])
    assert plain.name == "mine" and plain.folder is not None
    assert {each.name for each in others} == {"mine (bf16)", "mine (onnx)", "mine (int8)"}
    assert len({each.sha256 for each in (plain, *others)}) == 4
    assert all(each.name in done.out for each in others)
    mine = read_rows(plain.folder, "dev")
    assert mine is not None
    differences = {}
    for each in others:
        assert each.folder is not None and each.details["backend"] in each.name
        theirs = read_rows(each.folder, "dev")
        assert theirs is not None and mine.said is not None
        assert each.scores["accuracy"] == np.mean(theirs.said == theirs.gold)
        assert (agreement(theirs, mine) or 0) > 0.9
        differences[each.details["backend"]] = kl(theirs, mine) or 0.0
        assert each.settings == plain.settings
    assert differences["onnx"] < 1e-6 < min(differences["bf16"], differences["int8"])


def test_a_recorded_job_is_done_again_where_a_backend_is_missing(
    evaluate: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert evaluate("finetune.epochs=1").code == 0
    before = only(tmp_path, "outputs/**/results.json").stat().st_mtime_ns
    assert "already scored" not in evaluate("finetune.epochs=1", "backends=[onnx]").out
    plain, other = read_results([tmp_path / "outputs"])
    assert (plain.name, other.name, plain.score) == ("mine", "mine (onnx)", other.score)
    done = evaluate("finetune.epochs=1", "backends=[onnx]")
    assert "already scored" in done.out + done.err and "mine (onnx)" in done.out
    assert only(tmp_path, "outputs/**/sst2/*/results.json").stat().st_mtime_ns > before


@pytest.mark.parametrize("auto_class", [AutoModelForQuestionAnswering, AutoModelForTokenClassification])
def test_every_output_of_a_head_is_that_of_torch(auto_class: Any, save_teacher: Callable[..., Path]) -> None:
    model = auto_class.from_pretrained(save_teacher("bert", num_layers=1)).eval()
    batch = {"input_ids": torch.arange(5, 35).view(3, 10), "attention_mask": torch.ones(3, 10, dtype=torch.long)}
    batch["attention_mask"][1, 6:] = 0
    with in_backend("onnx", model, example=batch, label="tiny") as exported, torch.inference_mode():
        some = {name: tensor[:, :7] for name, tensor in batch.items()}
        found, expected = exported(**some), model(**some)
    assert isinstance(found, SimpleNamespace)
    assert vars(found).keys() == expected.keys()
    for name, tensor in vars(found).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)


def test_other_backends_and_missing_packages_are_refused_before_training(
    evaluate: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ("backends=[fp8]", "backends=int8", "backends=[onnx,onnx]"):
        done = evaluate(given)
        assert (done.code, "it takes a list of bf16, onnx, int8, each once" in done.err) == (1, True), done.err
    done = call(distilkit.evaluate.__main__.main, "model=m", "task=speed", "backends=[onnx]", cwd=tmp_path)
    assert "backends=['onnx'], but task=speed trains no model; set backends=[]" in done.err
    monkeypatch.setattr(distilkit.export.onnx, "PACKAGES", ("onnx", "onnx_of_nobody"))
    check_backends(["bf16"])
    with pytest.raises(UserError, match=r"onnx_of_nobody cannot be imported: pip install 'distilkit\[onnx\]'"):
        check_backends(["int8"])
