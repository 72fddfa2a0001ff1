import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from distilkit.errors import UserError
from distilkit.language_model import weight_hash
from distilkit.teacher import load_teacher
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
