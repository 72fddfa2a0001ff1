import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from distilkit.errors import UserError
from distilkit.language_model import LM, Batch
from distilkit.losses import IGNORE_INDEX
from distilkit.objective import Objective
from tiny import build_model

PARITY = Path(__file__).parent / "fixtures" / "parity"
EXPECTED = json.loads((PARITY / "expected.json").read_text())


def objective(**changes: Any) -> Objective:
    defaults: dict[str, Any] = {
        "alpha_ce": 0.0,
        "alpha_mlm": 0.0,
        "alpha_clm": 0.0,
        "alpha_cos": 0.0,
        "alpha_mse": 0.0,
        "temperature": 2.0,
        "soft_targets": "all",
        "implementation": "fused",
    }
    return Objective(**{**defaults, **changes})


def weighted_terms(
    chosen: Objective, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch, lm: LM
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    real = batch.get("attention_mask", torch.ones_like(batch["labels"]))
    counts = chosen.denominators(num_tokens=real.sum(), num_labels=(batch["labels"] != IGNORE_INDEX).sum(), lm=lm)
    return chosen.loss(student, teacher, batch, lm=lm, denominators=counts)


def load_parity_model(name: str) -> PreTrainedModel:
    config = AutoConfig.for_model(**json.loads((PARITY / f"{name}.config.json").read_text()))
    auto = AutoModelForCausalLM if config.model_type == "gpt2" else AutoModelForMaskedLM
    model = auto.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(load_file(PARITY / f"{name}.safetensors"), strict=False)
    assert not unexpected
    assert all("decoder" in key or "lm_head" in key or "projector" in key for key in missing)  # tied
    return model.train()  # dropout is 0 in these configs


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: f"{case['mode']}-restricted={case['restrict_ce_to_mask']}")
def test_losses_and_gradient_are_those_of_the_original_training_step(case: dict[str, Any], implementation: Any) -> None:
    mlm = case["mode"] == "mlm"
    student = load_parity_model("distilbert_student" if mlm else "gpt2_student")
    teacher = load_parity_model("bert_teacher" if mlm else "gpt2_teacher").eval()
    inputs = load_file(PARITY / "inputs.safetensors")
    batch: Batch = {"input_ids": inputs[f"{case['mode']}_input_ids"], "labels": inputs[f"{case['mode']}_labels"]}
    batch["attention_mask"] = inputs["attention_mask"]
    if not mlm:  # our causal labels are shifted when the batch is made; the original shifts in the loss
        batch["labels"] = torch.cat([batch["labels"][:, 1:], torch.full((len(batch["labels"]), 1), IGNORE_INDEX)], 1)
    chosen = Objective(
        **{f"alpha_{name}": alpha for name, alpha in case["alpha"].items()},
        temperature=case["temperature"],
        soft_targets="masked" if case["restrict_ce_to_mask"] else "all",
        implementation=implementation,
    )

    total, terms = weighted_terms(chosen, student, teacher, batch, case["mode"])
    total.backward()
    norm = torch.stack([p.grad.double().norm() for p in student.parameters() if p.grad is not None]).norm()

    for name, term in terms.items():
        assert float(term.detach()) == pytest.approx(case[f"loss_{name}"], rel=1e-5), name
    assert float(total.detach()) == pytest.approx(case["total"], rel=1e-5)
    assert float(norm) == pytest.approx(case["grad_l2"], rel=1e-5)


def padded_batch(*, labelled: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 120, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 4:] = 0
    ids[mask == 0] = 0
    labels = torch.full_like(ids, IGNORE_INDEX)
    if labelled:
        labels[0, [2, 7]], labels[1, 3], labels[2, 1] = torch.tensor([9, 50]), 77, 31
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def test_restricting_soft_targets_takes_masked_rows_only() -> None:
    student, teacher = build_model("bert", seed=1, num_layers=2), build_model("bert", num_layers=2)
    batch = padded_batch()
    chosen = objective(alpha_ce=1.0, alpha_mse=1.0, soft_targets="masked")
    _, got = weighted_terms(chosen, student, teacher, batch, "mlm")
    with torch.no_grad():
        s, t = (
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (student, teacher)
        )
    rows = batch["labels"] != IGNORE_INDEX
    q, p = (s[rows] / 2).softmax(-1).double(), (t[rows] / 2).softmax(-1).double()
    assert float(got["ce"].detach()) == pytest.approx(float(4 * (p * (p / q).log()).sum() / 4), rel=1e-4)
    assert float(got["mse"].detach()) == pytest.approx(float(((s[rows] - t[rows]) ** 2).sum() / 4), rel=1e-4)


def test_padding_changes_no_term() -> None:
    student, teacher = build_model("bert", seed=1, num_layers=2), build_model("bert", num_layers=2)
    chosen = objective(alpha_ce=5.0, alpha_mlm=2.0, alpha_cos=1.0, alpha_mse=0.1)
    batch = padded_batch()
    wider = {name: torch.nn.functional.pad(batch[name], (0, 7), value=0) for name in ("input_ids", "attention_mask")}
    wider["labels"] = torch.nn.functional.pad(batch["labels"], (0, 7), value=IGNORE_INDEX)
    _, narrow = weighted_terms(chosen, student, teacher, batch, "mlm")
    _, padded = weighted_terms(chosen, student, teacher, wider, "mlm")
    for name in narrow:
        torch.testing.assert_close(narrow[name], padded[name], rtol=1e-5, atol=1e-6)


def test_a_batch_without_labels_has_a_zero_masked_lm_loss() -> None:
    student = build_model("bert", num_layers=1).train()
    total, terms = weighted_terms(objective(alpha_mlm=1.0), student, None, padded_batch(labelled=False), "mlm")
    total.backward()
    assert float(total.detach()) == float(terms["mlm"]) == 0.0


@pytest.mark.parametrize("alpha", ["ce", "mlm", "cos", "mse"])
def test_only_weighted_terms_are_computed(alpha: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"ce": "soft_target_kl", "mlm": "hard_target_cross_entropy", "cos": "hidden_cosine", "mse": "logit_mse"}
    for name, function in functions.items():
        if name != alpha:
            monkeypatch.setattr(f"distilkit.losses.{function}", pytest.fail)
    student, teacher = build_model("bert", seed=1, num_layers=1), build_model("bert", num_layers=1)
    alone = objective(**{f"alpha_{alpha}": 1.0}, implementation="reference")
    _, terms = weighted_terms(alone, student, teacher, padded_batch(), "mlm")
    assert list(terms) == [alpha]


def calls_of(model: PreTrainedModel, counted: list[str]) -> Callable[..., None]:
    def hook(*_: object) -> None:
        counted.append(model.config.model_type)

    return hook


def test_the_teacher_does_not_run_without_a_term_that_reads_it() -> None:
    student, teacher = build_model("distilbert", num_layers=1), build_model("bert", num_layers=1)
    counted: list[str] = []
    teacher.base_model.register_forward_hook(calls_of(teacher, counted))
    weighted_terms(objective(alpha_mlm=1.0), student, teacher, padded_batch(), "mlm")
    assert counted == []
    weighted_terms(objective(alpha_mlm=1.0, alpha_cos=1.0), student, teacher, padded_batch(), "mlm")
    assert counted == ["bert"]


@pytest.mark.parametrize("soft_targets, rows", [("all", 25), ("masked", 4)])
def test_logits_are_made_for_the_rows_that_count(soft_targets: str, rows: int) -> None:
    student, teacher = build_model("bert", seed=1, num_layers=1), build_model("bert", num_layers=1)
    seen: list[int] = []
    student.get_submodule("cls.predictions.transform").register_forward_hook(
        lambda module, args, output: seen.append(len(output))
    )
    chosen = objective(alpha_ce=1.0, alpha_mlm=1.0, soft_targets=soft_targets)
    weighted_terms(chosen, student, teacher, padded_batch(), "mlm")
    assert seen == [rows]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"alpha_mlm": -1.0}, r"objective.alpha_mlm=-1.0, but it must be a finite number of at least 0"),
        ({"alpha_ce": float("nan")}, r"objective.alpha_ce=nan, but"),
        ({"alpha_ce": "five"}, r"objective.alpha_ce=five, but it must be a finite number"),
        ({"alpha_ce": 1.0, "temperature": 0.0}, r"objective.temperature=0.0, but it must be above 0; the paper uses 2"),
        ({"alpha_ce": 1.0, "temperature": -2.0}, r"objective.temperature=-2.0, but it must be"),
        ({}, r"all alphas of the objective are 0.*set at least one above 0"),
        ({"alpha_mlm": 1.0, "alpha_clm": 1.0}, r"both set.*set one of them to 0"),
        ({"alpha_ce": 1.0, "soft_targets": "some"}, r"objective.soft_targets is 'some'; it takes all or masked"),
        ({"alpha_ce": 1.0, "soft_targets": 0.3}, r"objective.soft_targets is 0.3; it takes"),
        ({"alpha_cos": 1.0, "cos_targets": "labelled"}, r"objective.cos_targets is 'labelled'; it takes all or masked"),
        (
            {"alpha_ce": [[0, 1], [1, -1]]},
            r"objective.alpha_ce=\[\[0, 1\], \[1, -1\]\]: each value must be a finite number",
        ),
        (
            {"alpha_ce": [[0, 1], [0.5, 0]]},
            r"objective.alpha_ce=.*: its shares of the training do not rise from 0 to 1",
        ),
        ({"alpha_ce": [[0, 0], [1, 0]]}, r"all alphas of the objective are 0 at 0% of the training"),
        ({"alpha_ce": [[0, 0], [1, 5]]}, r"all alphas of the objective are 0 at 0% of the training"),
        ({"alpha_ce": [[0, 5], [1, 0]]}, r"all alphas of the objective are 0 at 100% of the training"),
        (
            {"alpha_ce": [[0, 5], [0.5, 0], [1, 0]], "alpha_mlm": [[0, 0], [0.5, 0], [1, 2]]},
            r"all alphas of the objective are 0 at 50% of the training, so the loss has no term; set at least one ab",
        ),
        ({"alpha_mlm": [[0, 0], [1, 1]], "alpha_clm": [[0, 1], [1, 0]]}, r"both set.*set one of them to 0"),
        (
            {"alpha_ce": 1.0, "temperature": [[0, 2], [1, 1]]},
            r"objective.temperature=\[\[0, 2\], \[1, 1\]\], but it must be",
        ),
        (
            {"alpha_rel": 1.0, "relation_heads": 0},
            r"objective.relation_heads=0, .* null or a whole number of at least 1",
        ),
        (
            {"alpha_rel": 1.0, "student_layer": -1},
            r"objective.student_layer=-1, .* null or a whole number of at least 0",
        ),
        ({"alpha_rel": 1.0, "teacher_layer": 2.0}, r"objective.teacher_layer=2.0, .* a whole number of at least 0"),
        ({"alpha_ce": 1.0, "implementation": "fast"}, r"implementation is 'fast'; it takes fused or reference"),
    ],
)
def test_a_wrong_objective_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        objective(**changes)


def test_models_that_do_not_fit_the_objective_are_an_error() -> None:
    bert, gpt2 = build_model("bert", num_layers=1), build_model("gpt2", num_layers=1)
    narrow = build_model("bert", num_layers=1, hidden_size=16)
    with pytest.raises(UserError, match=r"objective.alpha_clm=1.0 on a masked language model \(bert\); set objective="):
        objective(alpha_clm=1.0).check_models(student=bert, teacher=bert, lm="mlm")
    with pytest.raises(UserError, match=r"objective.alpha_mlm=1.0 on a causal language model \(gpt2\); set objective="):
        objective(alpha_mlm=1.0).check_models(student=gpt2, teacher=gpt2, lm="clm")
    with pytest.raises(
        UserError, match=r"objective.alpha_ce=5.0, objective.alpha_cos=1.0 need a teacher, but teacher=none"
    ):
        objective(alpha_ce=5.0, alpha_cos=1.0).check_models(student=bert, teacher=None, lm="mlm")
    with pytest.raises(
        UserError, match=r"the student is 16 wide and the teacher 32; set objective=minilm, or objective.alpha_"
    ):
        objective(alpha_cos=1.0).check_models(student=narrow, teacher=bert, lm="mlm")


# ------------------------------------------------------------------ weights that change

FALLS, JUMPS = [[0, 5], [0.5, 1], [1, 0]], [[0, 1], [0.25, 1], [0.25, 2], [1, 4]]


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 0.6, 1.0])
def test_the_objective_of_a_step_has_the_weights_of_its_progress(progress: float) -> None:
    changing = objective(alpha_ce=FALLS, alpha_mlm=JUMPS, alpha_cos=1.0)
    ce = float(np.interp(progress, [0, 0.5, 1], [5, 1, 0]))
    mlm = 1.0 if progress < 0.25 else float(np.interp(progress, [0.25, 1], [2, 4]))
    one = changing.at(progress)
    assert (one.alpha_ce, one.alpha_mlm, one.alpha_cos) == pytest.approx((ce, mlm, 1.0))
    assert one.weights.keys() == {"mlm", "cos", *(["ce"] if ce else [])}
    assert one.at(0.0) == one


def test_a_plain_objective_is_that_of_each_of_its_steps_and_of_validation() -> None:
    plain = objective(alpha_ce=5.0, alpha_mlm=2.0)
    assert plain.at(0.3) == plain.of_validation() == plain


def test_an_objective_reads_what_any_of_its_steps_reads() -> None:
    never, later = [[0, 0], [1, 0]], [[0, 0], [0.9, 0], [1, 1]]
    one = objective(alpha_ce=never, alpha_cos=later, alpha_mlm=1.0)
    assert one.weights.keys() == {"cos", "mlm"}
    assert (one.reads_teacher_logits, one.reads_teacher_states, one.reads_teacher) == (False, True, True)
    two = objective(alpha_mse=later, alpha_cos=1.0)
    assert (two.reads_teacher_logits, two.reads_student_logits, two.takes_all_rows("mlm")) == (True, True, True)
    bert = build_model("bert", num_layers=1)
    with pytest.raises(UserError, match=r"objective.alpha_cos=\[\[0, 0\], \[0.9, 0\], \[1, 1\]\] need a teacher, but"):
        one.check_models(student=bert, teacher=None, lm="mlm")
    with pytest.raises(UserError, match=r"the student is 16 wide and the teacher 32"):
        one.check_models(student=build_model("bert", num_layers=1, hidden_size=16), teacher=bert, lm="mlm")


def test_held_out_text_has_each_term() -> None:
    found = objective(alpha_ce=FALLS, alpha_mlm=JUMPS).of_validation()
    assert (found.alpha_ce, found.alpha_mlm) == (5, 4)
    masked = objective(alpha_ce=1.0, soft_targets="masked")
    assert masked.of_validation() == masked


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"teacher_layer": 3},
            r"objective.teacher_layer=3, but the teacher has layers 0 to 2; set it within that range",
        ),
        (
            {"student_layer": 1},
            r"objective.student_layer=1, but the student has layers 0 to 0; set it within that range",
        ),
        ({"relation_heads": 5}, r"heads=5 do not divide the widths \[24, 32\] of .*; set one of 1, 2, 4, 8"),
        ({"relation_heads": 16}, r"heads=16 do not divide the widths \[24, 32\]"),
    ],
)
def test_relations_that_do_not_fit_the_models_are_an_error(changes: dict[str, Any], message: str) -> None:
    student, teacher = build_model("bert", num_layers=1, hidden_size=24), build_model("bert", num_layers=3)
    with pytest.raises(UserError, match=message):
        objective(alpha_rel=1.0, **changes).check_models(student=student, teacher=teacher, lm="mlm")
    with pytest.raises(UserError, match=r"objective.alpha_rel=1.0 need a teacher, but teacher=none"):
        objective(alpha_rel=1.0).check_models(student=student, teacher=None, lm="mlm")


@pytest.mark.parametrize("depth, layer", [(1, 0), (6, 5), (12, 11), (16, 13), (24, 20), (32, 27)])
def test_the_teachers_layer_is_the_last_or_an_upper_middle_one(depth: int, layer: int) -> None:
    student, teacher = build_model("bert", num_layers=2), build_model("bert", num_layers=1, hidden_size=768)
    teacher.config.num_hidden_layers = depth
    chosen = objective(alpha_rel=1.0)
    assert chosen.relation_layers(student, teacher) == (1, layer)
    assert objective(alpha_rel=1.0, teacher_layer=0, student_layer=0).relation_layers(student, teacher) == (0, 0)


@pytest.mark.parametrize(
    "widths, heads", [((384, 768), 48), ((256, 384), 16), ((768, 768), 48), ((24, 32), 2), ((8, 8), 1)]
)
def test_relation_heads_are_the_papers_or_the_most_that_divide_both_widths(widths: tuple[int, int], heads: int) -> None:
    student, teacher = (build_model("bert", num_layers=1, hidden_size=width) for width in widths)
    chosen = objective(alpha_rel=1.0)
    assert chosen.num_relation_heads(student, teacher) == heads
    chosen.check_models(student=student, teacher=teacher, lm="mlm")


LEFT_OUT = {"alpha_ce": 5.0, "alpha_cos": 1.0, "alpha_mse": 0.1, "alpha_rel": 1.0, "relation_heads": 4}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize(("lm", "soft_targets"), [("mlm", "all"), ("mlm", "masked"), ("clm", "all")])
def test_blocks_that_are_left_out_change_no_term_and_no_gradient(
    lm: LM, soft_targets: Any, implementation: str, padded: bool
) -> None:
    model_type = "bert" if lm == "mlm" else "gpt2"
    student, teacher = build_model(model_type, seed=1, num_layers=2), build_model(model_type, num_layers=2)
    chosen = objective(**LEFT_OUT, **{f"alpha_{lm}": 2.0}, soft_targets=soft_targets, implementation=implementation)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 120, (3, 12), generator=generator)
    labels = ids.where(torch.rand(ids.shape, generator=generator) < 0.3, IGNORE_INDEX)
    labels[2] = IGNORE_INDEX
    batch: Batch = {"input_ids": ids, "labels": labels, "left_out": torch.tensor([False, False, True])}
    if padded:
        batch["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.tensor([11]), 0)
    counts = chosen.denominators(num_tokens=torch.tensor(24), num_labels=torch.tensor(7), lm=lm)

    def results(rows: slice, *, whole: bool = True) -> list[torch.Tensor]:
        part: Any = {name: tensor[rows] for name, tensor in batch.items()}
        if not whole:
            del part["left_out"]
        student.zero_grad()
        torch.manual_seed(0)
        total, terms = chosen.loss(student, teacher, part, lm=lm, denominators=counts)
        total.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
        return [total.detach(), *terms.values(), *gradients]

    assert all(float(each.abs().max()) == 0 for each in results(slice(2, 3)))
    for one, two in zip(results(slice(3)), results(slice(2), whole=False), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
