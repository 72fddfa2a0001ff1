from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distilkit.watch.throughput import forward_cost, peak_flops, step_flops
from test_objective import objective
from tiny import build_model, build_objective, full_batch

VOCABULARY = 4000  # wide enough that each of the vocabulary's products is a tenth of the whole and more
SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4},
    "roberta": {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_head": 4},
}


def addmm_flops(total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """Count a product that is added in place, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("soft_targets", ["all", "masked"])
@pytest.mark.parametrize("family", SHAPES)
def test_the_flops_of_a_step_are_those_that_torch_counts(family: str, soft_targets: str) -> None:
    lm: Any = "clm" if family == "gpt2" else "mlm"
    student = build_model(family, seed=1, num_layers=2, **SHAPES[family]).train()
    teacher = build_model(family, num_layers=4, **SHAPES[family]).requires_grad_(False)
    for implementation in ("fused", "reference"):
        objective, batch = (
            build_objective(lm, implementation, soft_targets),
            full_batch(lm=lm, blocks=2, length=60),
        )
        rows = {"num_tokens": torch.tensor(120), "num_labels": torch.tensor(len(batch["labelled"]))}
        counts = objective.denominators(**rows, lm=lm)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
        with sdpa_kernel(SDPBackend.MATH), counter:
            objective.loss(student, teacher, batch, lm=lm, denominators=counts)[0].backward()
        expected = step_flops(objective, forward_cost(student), forward_cost(teacher), batch, lm=lm)
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.05), implementation


@pytest.mark.parametrize("others", [{}, {"alpha_mlm": 1.0}], ids=["relations alone", "with masked LM"])
def test_relations_and_the_shorter_forwards_before_them_count(others: dict[str, float]) -> None:
    shape = {**SHAPES["bert"], "attention_probs_dropout_prob": 0.0}  # with it, attention is computed again in backward
    student = build_model("bert", seed=1, num_layers=3, **shape).train()
    teacher = build_model("bert", num_layers=5, **shape).requires_grad_(False)
    chosen, batch = objective(alpha_rel=1.0, teacher_layer=2, **others), full_batch(lm="mlm", blocks=2, length=60)
    counts = chosen.denominators(num_tokens=torch.tensor(120), num_labels=torch.tensor(20), lm="mlm")
    layers = chosen.relation_layers(student, teacher)
    costs = forward_cost(student, layers[0]), forward_cost(teacher, layers[1])
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with sdpa_kernel(SDPBackend.MATH), counter:
        chosen.loss(student, teacher, batch, lm="mlm", denominators=counts)[0].backward()
    expected = step_flops(chosen, *costs, batch, lm="mlm")
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)
    assert step_flops(chosen, forward_cost(student, 2), forward_cost(teacher, 3), batch, lm="mlm") > 1.05 * expected


def test_the_heads_count_for_the_rows_that_are_read() -> None:
    costs = forward_cost(build_model("bert", num_layers=1)), forward_cost(build_model("bert", num_layers=2))
    batch = full_batch(lm="mlm")
    every, masked = (
        step_flops(build_objective("mlm", "fused", rows), *costs, batch, lm="mlm") for rows in ("all", "masked")
    )
    skipped = batch["input_ids"].numel() - len(batch["labelled"])
    assert every - masked == skipped * (3 * costs[0].head + costs[1].head)


def test_a_pass_of_the_teacher_that_another_student_has_made_does_not_count() -> None:
    shape = {**SHAPES["bert"], "attention_probs_dropout_prob": 0.0}  # with it, attention is computed again in backward
    student = build_model("bert", seed=1, num_layers=1, **shape).train()
    teacher = build_model("bert", num_layers=4, **shape).requires_grad_(False)
    chosen, batch = build_objective("mlm", "reference", "all"), full_batch(lm="mlm", blocks=2, length=60)
    counts = chosen.denominators(num_tokens=torch.tensor(120), num_labels=torch.tensor(20), lm="mlm")
    costs = forward_cost(student), forward_cost(teacher)
    batch["teacher_reads"], found = {}, []
    for _ in range(2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            chosen.loss(student, teacher, batch, lm="mlm", denominators=counts)[0].backward()
        assert counter.get_total_flops() == pytest.approx(step_flops(chosen, *costs, batch, lm="mlm"), rel=0.05)
        found.append(counter.get_total_flops())
    assert found[0] - found[1] == pytest.approx(120 * (costs[1].backbone + 60 * costs[1].attention), rel=1e-3)


def test_the_peak_of_this_machine_is_a_plausible_number() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15
