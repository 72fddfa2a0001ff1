import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

import distilkit.train
from distilkit.errors import UserError
from distilkit.language_model import weight_hash
from distilkit.teacher import load_teacher
from jobs import QUIET, SMALL, call
from tiny import build_model


def test_a_teacher_is_frozen_in_eval_mode_and_float32_however_it_was_stored(tmp_path: Path) -> None:
    build_model("bert", num_layers=2).half().save_pretrained(tmp_path)
    teacher = load_teacher(name=str(tmp_path))
    assert teacher is not None
    assert teacher.lm == "mlm"
    assert not any(module.training for module in teacher.model.modules())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in teacher.model.parameters())


def test_no_name_is_no_teacher() -> None:
    assert load_teacher(name=None) is None


def test_the_hash_follows_the_weights(tmp_path: Path) -> None:
    model = build_model("gpt2", num_layers=1)
    before = weight_hash(model)
    assert weight_hash(build_model("gpt2", num_layers=1)) == before
    with torch.no_grad():
        model.transformer.wpe.weight[3, 3] += 1e-3
    assert weight_hash(model) != before


def test_a_teacher_without_its_head_is_an_error_that_names_the_missing_weights(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"no trained language-model head: .*cls.predictions.transform.dense.weight.*alpha_ce=0"
    ):
        load_teacher(name=str(tmp_path))
    assert load_teacher(name=str(tmp_path), needs_head=False) is not None


def test_a_teacher_without_its_head_has_no_scores_and_no_head_to_give(
    tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "teacher"
    build_model("bert", num_layers=2).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    first, second = (load_teacher(name=str(folder), needs_head=False) for _ in range(2))
    assert first is not None and second is not None
    assert not first.has_head
    assert first.sha256 == second.sha256  # of what it has
    assert (
        "has no trained head: it is not scored, and the head of a student that is cut from it is random" in caplog.text
    )
    settings = ("teacher=hf", f"teacher.name={folder}", "trainer.max_steps=1", "hydra.run.dir=run")
    terms = ("objective.alpha_ce=0", "objective.alpha_mse=0")
    folders = (f"data.corpus.paths=[{text_file}]", f"cache_dir={tmp_path / 'cache'}")
    done = call(distilkit.train.main, *settings, *terms, *folders, *SMALL, *QUIET, cwd=tmp_path)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    for scores in (summary["before"], summary["after"]):
        assert "val/nll" in scores and "val/loss_cos" in scores
        assert not [name for name in scores if "teacher" in name or "agreement" in name]


def test_a_teacher_without_some_layers_is_an_error_whatever_is_read_of_it(tmp_path: Path) -> None:
    build_model("bert", num_layers=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), "utf-8")
    with pytest.raises(UserError, match=r"bert.encoder.layer.2.* are missing from its files; give all of its files"):
        load_teacher(name=str(tmp_path), needs_head=False)


def test_a_teacher_that_cannot_be_found_is_an_error() -> None:
    with pytest.raises(UserError, match="cannot load hub id 'nobody/nothing' at revision 'v9'.* needs the network"):
        load_teacher(name="nobody/nothing", revision="v9")


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"folder {re.escape(repr(str(tmp_path)))}.*config.json and model.safetensors"):
        load_teacher(name=str(tmp_path))
    build_model("bert", num_layers=1).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot load folder .*model.safetensors"):
        load_teacher(name=str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = build_model("bert", num_layers=1)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="model.safetensors"):
        load_teacher(name=str(tmp_path))
