"""A training that reads its teacher from the cache, against one that runs it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import distilkit.prepare
import distilkit.train
from distilkit.data import DistillationDataModule
from distilkit.data.masking import Masking
from distilkit.errors import UserError
from distilkit.language_model import Batch, token_states
from distilkit.objective import Objective
from distilkit.student import cut_student
from distilkit.teacher import Teacher
from distilkit.teacher_cache import at_labelled_tokens, fill_states, find_states
from jobs import QUIET, SMALL, call, only
from tiny import Texts, build_objective, build_teacher

MASKING: dict[str, Any] = {"mask_share": 0.8, "random_share": 0.1, "smoothing": 0.0, "whole_word": False}
ONE_RATE = Masking(**MASKING, mlm_probability=0.3, epochs=2)
FORMS = pytest.mark.parametrize(
    ("packing", "across"),
    [("blocks", True), ("blocks", False), ("documents", True)],
    ids=["blocks", "apart", "documents"],
)


def data_of(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> DistillationDataModule:
    given: dict[str, Any] = {"corpus": Texts(80), "tokenizer": tokenizer, "lm": "mlm", "masking": ONE_RATE}
    given |= {"cache_dir": str(folder), "block_size": 24, "global_batch_size": 12, "micro_batch_size": 5}
    given |= {"val_share": 0.1, "max_val_blocks": 8, "attend_across_documents": True, "packing": "blocks"}
    return DistillationDataModule(**given | {"num_workers": 0, "seed": 3} | changes)


def loss_and_gradient(
    student: PreTrainedModel, teacher: Teacher, batch: Batch, objective: Objective, read: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    student.zero_grad()
    counts = objective.denominators(num_tokens=batch["num_tokens"], num_labels=batch["num_labels"], lm="mlm")
    loss, _ = objective.loss(student, teacher.model, batch, lm="mlm", denominators=counts, read=read)
    loss.backward()
    return loss.detach(), {
        name: each.grad.clone() for name, each in student.named_parameters() if each.grad is not None
    }


@FORMS
@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_a_cached_step_has_the_loss_and_gradient_of_the_live_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, packing: str, across: bool, temperature: float
) -> None:
    """The live step gets states rounded to bfloat16, as the cache has them: the rest is equal."""
    teacher = build_teacher("bert", num_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half").train()
    form: Any = {"packing": packing, "attend_across_documents": across}
    states = fill_states(data_of(tmp_path, tokenizer, **form), teacher, device=torch.device("cpu"), bf16=False)
    data = data_of(tmp_path, tokenizer, **form)
    data.teacher_states = find_states(data, teacher)
    assert data.teacher_states.folder == states.folder
    objective = at_labelled_tokens(build_objective("mlm", "fused"), masking=data.masking, lm="mlm")
    objective = Objective(**{**vars(objective), "temperature": temperature})
    for epoch, step in ((0, 0), (1, 1), (2, 0), (5, 2)):  # from the third epoch on, masks come again
        for batch in data.replay(epoch=epoch, step=step):
            torch.manual_seed(0)
            cached = loss_and_gradient(student, teacher, batch, objective)
            live: Any = {name: each for name, each in batch.items() if name != "teacher_states"}
            ours, (theirs, _) = objective.read(student, teacher.model, live)
            assert theirs is not None
            exact = theirs[live["labelled"]]
            assert torch.equal(batch["teacher_states"], exact.to(torch.bfloat16))
            rounded = theirs.to(torch.bfloat16).float()
            torch.manual_seed(0)
            wanted = loss_and_gradient(student, teacher, live, objective, read=(ours, (rounded, None)))
            torch.testing.assert_close(cached, wanted, rtol=1e-5, atol=1e-6)
            torch.manual_seed(0)  # against states in float32: bfloat16 keeps 8 bits
            loss, _ = loss_and_gradient(student, teacher, live, objective)
            torch.testing.assert_close(cached[0], loss, rtol=2e-2, atol=1e-3)


def test_masks_come_again_after_the_cached_epochs_and_held_out_text_keeps_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = data_of(tmp_path, tokenizer)
    data.open()
    blocks = data.train_blocks
    assert blocks is not None
    first, second, third = (blocks[(epoch, np.arange(12))]["labels"] for epoch in (0, 1, 2))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha_rel": 1.0}, "the objective has alpha_rel, which reads inner layers; set it to 0"),
        ({"alpha_ce": 0.0, "alpha_cos": 0.0}, "the objective has no term of the teacher's states; set it to 0"),
    ],
)
def test_objectives_that_need_more_than_the_cache_has_are_refused(changes: dict[str, Any], said: str) -> None:
    objective = Objective(**{**vars(build_objective("mlm", "fused")), **changes})
    with pytest.raises(UserError) as refused:
        at_labelled_tokens(objective, masking=ONE_RATE, lm="mlm")
    assert said in str(refused.value)


def test_causal_models_and_masks_that_do_not_come_again_are_refused() -> None:
    with pytest.raises(UserError, match="teacher_cache.epochs is for masked models"):
        at_labelled_tokens(build_objective("clm", "fused"), masking=ONE_RATE, lm="clm")
    changing = Masking(**MASKING, mlm_probability=[[0, 0.3], [1, 0.15]], epochs=2)
    with pytest.raises(UserError, match="so that masks do not come again; set one rate, or teacher_cache.epochs=0"):
        at_labelled_tokens(build_objective("mlm", "fused"), masking=changing, lm="mlm")
    new_ones = Masking(**MASKING, mlm_probability=0.3)
    with pytest.raises(UserError, match="data.masking.epochs=0, but it follows teacher_cache.epochs; leave it out"):
        at_labelled_tokens(build_objective("mlm", "fused"), masking=new_ones, lm="mlm")


def test_no_teacher_has_no_states() -> None:
    data: Any = None
    with pytest.raises(UserError, match="needs a teacher, but teacher=none"):
        find_states(data, None)


def test_prepare_fills_and_train_reads_it_without_running_the_teacher(
    tmp_path: Path, text_file: Path, save_teacher: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["teacher=hf", f"teacher.name={save_teacher('bert')}", *SMALL, f"data.corpus.paths={text_file}"]
    own += [f"cache_dir={tmp_path / 'cache'}", "teacher_cache.epochs=2", "optimizer.lr=0.01"]
    train = [*own, *QUIET, "trainer.max_epochs=3", "callbacks.validation.optimizer_steps=1000"]
    refused = call(distilkit.train.main, *train, cwd=tmp_path)
    assert refused.code == 1
    assert "has no states for this run; run python -m distilkit.prepare with the same overrides first" in refused.err
    refused = call(distilkit.prepare.main, *own, "objective.alpha_rel=1", cwd=tmp_path)
    assert (refused.code, "alpha_rel, which reads inner layers" in refused.err) == (1, True)
    assert not (tmp_path / "cache").exists()  # before the text is tokenized
    done = call(distilkit.prepare.main, *own, cwd=tmp_path)
    assert done.code == 0, done.err
    assert Path(json.loads(done.out.splitlines()[-1])["teacher_states"]).is_dir()

    calls: list[bool] = []

    def counted(model: PreTrainedModel, batch: Batch) -> Tensor:
        calls.append(not model.training)
        return token_states(model, batch)

    monkeypatch.setattr("distilkit.objective.token_states", counted)
    done = call(distilkit.train.main, *train, "validate_first=false", cwd=tmp_path)
    assert done.code == 0, done.err
    steps = json.loads(only(tmp_path, "outputs/distil/*/summary.json").read_text("utf-8"))["optimizer_steps"]
    assert calls.count(False) >= 2 * steps - 3  # the student, two micro-batches a step
    assert calls.count(True) <= 4  # both models in the last score alone
    card = only(tmp_path, "outputs/distil/*/student/README.md").read_text("utf-8")
    assert "soft_targets masked, cos_targets masked" in card
