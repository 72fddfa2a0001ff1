"""Train with tokenizer=trimmed, prepare with it, and trim without training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerBase,
)

import distilkit.prepare
import distilkit.train
import distilkit.trim.__main__
from jobs import QUIET, SMALL, Outcome, call, only
from tiny import build_model

SIZE = 60


@pytest.fixture
def settings(text_file: Path, cache: Path, save_teacher: Callable[..., Path]) -> tuple[str, ...]:
    """Return the overrides of a training of one step with a trimmed vocabulary."""
    return (
        *("teacher=hf", f"teacher.name={save_teacher('bert')}", *SMALL, *QUIET),
        *(f"data.corpus.paths={text_file}", f"cache_dir={cache}", "tokenizer=trimmed", f"tokenizer.vocab_size={SIZE}"),
        *("trainer.max_steps=2", "hydra.run.dir=run"),
    )


def trained(*overrides: str, cwd: Path) -> Outcome:
    return call(distilkit.train.main, *overrides, cwd=cwd)


def test_a_trimmed_training_exports_a_student_of_the_new_size_and_resumes(
    settings: tuple[str, ...], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    done = trained(*settings, cwd=tmp_path)
    assert done.code == 0, done.err
    said = done.out + done.err
    assert f"{len(tokenizer)} -> {SIZE} words" in said
    assert "parameters" in said
    assert "held-out tokens change" in said
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "student")
    own = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert student.config.vocab_size == len(own) == SIZE
    assert own.mask_token_id == own.get_vocab()["[MASK]"] < SIZE
    batch = own("ba be [MASK] du", return_tensors="pt")
    assert torch.isfinite(student(**batch).logits).all()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["teacher"]["parameters"] < 10**5
    again = [each for each in settings if not each.startswith(("hydra.run.dir", "trainer.max_steps"))]
    resumed = trained(*again, "hydra.run.dir=more", "ckpt_path=run", "trainer.max_steps=3", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    other = [each for each in again if "vocab_size" not in each]
    refused = trained(
        *other, "tokenizer.vocab_size=70", "hydra.run.dir=other", "ckpt_path=run", "trainer.max_steps=3", cwd=tmp_path
    )
    assert refused.code == 1
    assert "tokenizer.vocab_size=60, this run has 70" in refused.err


def test_a_pretrained_student_is_trimmed_as_its_teacher(
    settings: tuple[str, ...], tmp_path: Path, save_teacher: Callable[..., Path]
) -> None:
    student = save_teacher("distilbert", num_layers=2)
    options = ("student=hf", f"student.name={student}", "trainer.max_steps=1", "validate_first=false")
    done = trained(*settings, *options, cwd=tmp_path)
    assert done.code == 0, done.err
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "student").config.vocab_size == SIZE
    again = ("student=hf", f"student.name={tmp_path / 'run' / 'student'}", "hydra.run.dir=two")
    done = trained(*settings, *again, "trainer.max_steps=1", "validate_first=false", cwd=tmp_path)
    assert done.code == 0, done.err  # it is trimmed already


def test_prepare_tokenizes_with_the_trimmed_vocabulary(settings: tuple[str, ...], tmp_path: Path) -> None:
    options = [each for each in settings if not each.startswith("hydra.run.dir")]
    done = call(distilkit.prepare.main, *options, cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    meta = json.loads((Path(found["cache"]) / "meta.json").read_text("utf-8"))
    assert meta["bytes"]["counts"] == 8 * SIZE


def test_cached_states_are_those_of_the_trimmed_teacher(settings: tuple[str, ...], tmp_path: Path) -> None:
    options = [each for each in settings if not each.startswith("hydra.run.dir")]
    done = call(distilkit.prepare.main, *options, "teacher_cache.epochs=1", cwd=tmp_path)
    assert done.code == 0, done.err
    done = trained(*settings, "teacher_cache.epochs=1", "validate_first=false", "trainer.max_steps=1", cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        (["tokenizer.coverage=0.9"], "tokenizer.vocab_size=60 and tokenizer.coverage=0.9, but one of them"),
        (["tokenizer.vocab_size=null"], "tokenizer.vocab_size=null and tokenizer.coverage=null"),
        (["tokenizer.vocab_size=5"], "tokenizer.vocab_size=5, but it must be from 6"),
        (["tokenizer.vocab_size=many"], "tokenizer.vocab_size=many, but it takes int"),
        (["tokenizer.max_documents=0"], "tokenizer.max_documents=0, but it must be at least 1"),
        (["teacher=none", "student=new", "objective=mlm", "~teacher.name"], "teacher=none brings no tokenizer"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(
    changes: list[str], fact: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    if changes[0] == "teacher=none":
        settings = tuple(each for each in settings if not each.startswith("teacher"))
        changes = changes[:-1]
    refused = trained(*settings, *changes, cwd=tmp_path)
    assert refused.code == 1
    assert fact in refused.err, refused.err
    assert "Traceback" not in refused.err


# ------------------------------------------------------------------------------ without training


def trim(*overrides: str, cwd: Path) -> Outcome:
    return call(distilkit.trim.__main__.main, *overrides, cwd=cwd)


def test_trimming_alone_writes_a_folder_that_transformers_loads(
    text_file: Path, cache: Path, save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    model = save_teacher("bert")
    given = (
        f"model={model}",
        "data=text",
        f"data.corpus.paths={text_file}",
        f"cache_dir={cache}",
        "data.val_share=0.1",
    )
    done = trim(*given, "coverage=0.8", "out=small", cwd=tmp_path)
    assert done.code == 0, done.err
    made: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    assert made["out"] == str(tmp_path / "small")
    full, own = (AutoTokenizer.from_pretrained(each) for each in (model, tmp_path / "small"))
    assert made["words"] == [len(full), len(own)]
    assert made["parameters"][1] < made["parameters"][0]
    assert made["mflop_per_token"][1] < made["mflop_per_token"][0]
    assert 0.8 <= made["covered"] < 1
    assert 0 < made["held_out_changed"] < 0.5
    assert " trimmed: " in done.out.splitlines()[-2]
    one, two = (AutoModelForMaskedLM.from_pretrained(each) for each in (model, tmp_path / "small"))
    names = {index: word for word, index in own.get_vocab().items()}
    ids = [full.get_vocab()[names[index]] for index in range(len(own))]
    text = " ".join(word for word in list(own.get_vocab())[5:15] if word.isalpha())
    before, after = (each(text, return_tensors="pt") for each in (full, own))
    assert [ids[each] for each in after["input_ids"][0]] == before["input_ids"][0].tolist()
    torch.testing.assert_close(two(**after).logits, one(**before).logits[..., ids], rtol=0, atol=1e-6)
    again = trim(*given, "coverage=0.8", "out=small", cwd=tmp_path)
    assert again.code == 1
    assert "small exists; choose another folder" in again.err


@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_a_model_without_a_language_model_head_stays_what_it_is(
    kind: Any, text_file: Path, cache: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = kind(build_model("bert", num_layers=1).config).eval()
    model.half().save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    given = ("model=encoder", "data=text", f"data.corpus.paths={text_file}", f"cache_dir={cache}")
    done = trim(*given, f"vocab_size={SIZE}", "out=small", cwd=tmp_path)
    assert done.code == 0, done.err
    small = kind.from_pretrained(tmp_path / "small")
    assert small.dtype == torch.float16
    assert json.loads((tmp_path / "small" / "config.json").read_text("utf-8"))["vocab_size"] == SIZE
    own = AutoTokenizer.from_pretrained(tmp_path / "small")
    text = " ".join(word for word in list(own.get_vocab())[5:15] if word.isalpha())
    with torch.no_grad():
        before, after = (
            each.float()(**words(text, return_tensors="pt")) for each, words in ((model, tokenizer), (small, own))
        )
    for one, two in zip(before.to_tuple(), after.to_tuple(), strict=True):  # states and pooler, or scores of classes
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        (["out=null"], "out is not set"),
        (["model=null"], "model is not set"),
        (["vocab_size=1"], "vocab_size=1, but it must be from 6"),
        (["coverage=2"], "vocab_size=60 and coverage=2"),
        (["vocab_size=null", "coverage=2"], "coverage=2, but it must be above 0 and at most 1"),
        (["vocab_siz=1"], "did you mean vocab_size?"),
    ],
)
def test_what_cannot_be_trimmed_is_refused(
    changes: list[str], fact: str, text_file: Path, cache: Path, save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    given = (f"model={save_teacher('bert')}", "data=text", f"data.corpus.paths={text_file}", f"cache_dir={cache}")
    refused = trim(*given, f"vocab_size={SIZE}", "out=small", *changes, cwd=tmp_path)
    assert refused.code == 1
    assert fact in refused.err, refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "small").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_an_empty_corpus_is_refused(cache: Path, save_teacher: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n", "utf-8")
    given = (f"model={save_teacher('bert')}", "data=text", "data.corpus.paths=empty.txt", f"cache_dir={cache}")
    refused = trim(*given, f"vocab_size={SIZE}", "out=small", cwd=tmp_path)
    assert refused.code == 1
    assert "empty" in refused.err
    assert only(tmp_path, "*").name == "empty.txt"
