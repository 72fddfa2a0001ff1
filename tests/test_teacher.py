import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

import distilkit.train
from distilkit.errors import UserError
from distilkit.language_model import last_hidden_state, lm_of_model, weight_hash
from distilkit.probe import probe
from distilkit.student import cut_student
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


OWN_CODE = """
from transformers import {base}Config, {base}{head}

class OwnConfig({base}Config):
    model_type = "my_own"

class OwnModel({base}{head}):
    config_class = OwnConfig
"""


def save_with_code(folder: Path, model_type: str, *, code: str, auto_class: str) -> str:
    """Save a model whose type transformers does not know, with the code that defines it."""
    build_model(model_type, num_layers=4).save_pretrained(folder)
    (folder / "modeling_own.py").write_text(code, "utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", auto_class: "modeling_own.OwnModel"}
    config |= {"model_type": "my_own", "architectures": ["OwnModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the code that transformers copies out of the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize(
    "model_type, base, head, auto_class, lm",
    [
        ("roberta", "Roberta", "ForMaskedLM", "AutoModelForMaskedLM", "mlm"),
        ("gpt2", "GPT2", "LMHeadModel", "AutoModelForCausalLM", "clm"),
    ],
)
def test_a_model_type_of_its_own_is_loaded_cut_and_read_with_its_code(
    model_type: str, base: str, head: str, auto_class: str, lm: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    code = OWN_CODE.format(base=base, head=head)
    folder = save_with_code(tmp_path / "own", model_type, code=code, auto_class=auto_class)
    with pytest.raises(UserError, match=r"cannot load folder .*remote code needs trust_remote_code=true"):
        load_teacher(name=folder)
    for given in (None, lm):
        teacher = load_teacher(name=folder, trust_remote_code=True, lm=given)
        assert teacher is not None and type(teacher.model).__name__ == "OwnModel"
        assert teacher.lm == lm_of_model(teacher.model) == lm
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
    probe(student=student, teacher=teacher, tokenizer=tokenizer, apart=True, max_length=64)
    plain = build_model(model_type, num_layers=4)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(last_hidden_state(teacher.model, ids), last_hidden_state(plain, ids))


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("code", ["import a_package_that_nobody_has", "raise AttributeError('of an older version')"])
def test_code_that_fails_is_an_error(code: str, tmp_path: Path) -> None:
    folder = save_with_code(tmp_path / "own", "bert", code=code, auto_class="AutoModelForMaskedLM")
    with pytest.raises(UserError, match=r"cannot load folder .*: .*(a_package_that_nobody_has|of an older version)"):
        load_teacher(name=folder, trust_remote_code=True)


def test_another_kind_of_language_model_is_an_error() -> None:
    wrong: Any = "foo"
    with pytest.raises(UserError, match="teacher.lm is 'foo'; it takes mlm or clm"):
        load_teacher(name="anything", lm=wrong)


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


@pytest.mark.parametrize(
    "fields, kept, reason",
    [
        ({}, 0.5, "incomplete metadata"),  # a download that broke off
        ({"intermediate_size": 128}, 1, "ignore_mismatched_sizes"),
        ({"dtype": "torch.float16"}, 1, "has no attribute 'torch.float16'"),
    ],
)
def test_a_damaged_folder_is_an_error(fields: dict[str, Any], kept: float, reason: str, tmp_path: Path) -> None:
    build_model("bert", num_layers=1).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | fields), "utf-8")
    weights.write_bytes(weights.read_bytes()[: int(kept * weights.stat().st_size)])
    with pytest.raises(UserError, match=f"cannot load folder .*{reason}"):
        load_teacher(name=str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = build_model("bert", num_layers=1)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="model.safetensors"):
        load_teacher(name=str(tmp_path))
