"""Cut, train, export and load a tiny model of each family, or see it refused before the first step."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.export import export_checkpoint
from distilkit.language_model import check_split
from distilkit.module import DistillationModule
from distilkit.probe import probe
from families import FAMILIES, family_teacher, table
from test_module import build_module, fit
from tiny import RECORD, full_batch

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_cut_trained_exported_and_loaded_or_refused(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    outcome, teacher = FAMILIES[name][0], family_teacher(name)

    def prepare(*, apart: bool) -> DistillationModule:
        check_split(teacher.model)
        module = build_module(tokenizer, teacher=teacher, record=RECORD | {"config": {}})  # of half the layers
        probe(student=module.student, teacher=teacher, tokenizer=tokenizer, apart=apart, max_length=64)
        return module

    if outcome == "refused":
        with pytest.raises(UserError) as refusal:
            prepare(apart=False)
        assert "\n" not in str(refusal.value) and ("choose" in str(refusal.value) or "set" in str(refusal.value))
        return
    if outcome == "not apart":
        with pytest.raises(UserError, match=r"cannot keep packed documents apart.*; set data.attend_across_doc"):
            prepare(apart=True)
    module = prepare(apart=outcome == "works")
    before = {key: weight.clone() for key, weight in module.student.state_dict().items()}
    steps = [full_batch(lm=module.lm, blocks=4, length=32, seed=seed) for seed in (0, 1)]
    trainer = fit(module, steps, micro_batch_size=2)
    assert trainer.global_step == 2 and trainer.callback_metrics["train/loss"] > 0
    assert any(not torch.equal(weight, before[key]) for key, weight in module.student.state_dict().items())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "student")
    auto = AutoModelForCausalLM if module.lm == "clm" else AutoModelForMaskedLM
    loaded = auto.from_pretrained(tmp_path / "student")
    assert loaded.config.num_hidden_layers == 2
    ids = full_batch(lm=module.lm, blocks=2, length=32)["input_ids"]
    with torch.no_grad():
        ours, again = (model.eval()(input_ids=ids).logits for model in (module.student, loaded))
    torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-5)


def test_the_readme_shows_what_is_tested() -> None:
    text = README.read_text("utf-8")
    assert text.partition("<!-- families -->\n")[2].partition("\n<!-- /families -->")[0] == table()
