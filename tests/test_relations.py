"""Relations of queries, keys and values against plain loops, and where they are found in each family."""

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from distilkit.attention import use_attention
from distilkit.errors import UserError
from distilkit.language_model import Batch, checkpoint_activations, lm_of_model
from distilkit.projections import QKV, projections_of
from distilkit.relations import relation_loss
from families import FAMILIES, build_family
from operations import Watch
from test_objective import objective, padded_batch, weighted_terms
from tiny import build_model, full_batch


def plain_loop(
    student: QKV, teacher: QKV, *, heads: int, causal: bool, real: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """Sum KL(teacher || student) token by token, head by head."""
    total = torch.zeros((), dtype=torch.float64)
    batch, length = student.query.shape[:2]
    for ours, theirs in zip(student, teacher, strict=True):
        for b, head, t in ((b, h, t) for b in range(batch) for h in range(heads) for t in range(length)):
            group = (documents if documents is not None else torch.zeros(batch, length))[b]
            keys = [k for k in range(t + 1 if causal else length) if group[k] == group[t]]
            keys = [k for k in keys if real is None or documents is not None or real[b, k]]
            if real is None or real[b, t]:
                rows = []
                for each in (theirs, ours):
                    states = each[b].double().chunk(heads, dim=-1)[head]  # (length, width / heads)
                    rows.append((states[keys] @ states[t] / math.sqrt(states.shape[-1])).log_softmax(0))
                total = total + F.kl_div(rows[1], rows[0], reduction="sum", log_target=True) / heads
    return total


def draw_qkv(batch: int, length: int, *widths: int, seed: int, dtype: torch.dtype = torch.float64) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    return QKV(*(torch.randn(batch, length, w, generator=generator, dtype=torch.float64).to(dtype) for w in widths))


REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1], [4, 5, 5, 5, 6]])


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("given", [{}, {"real": REAL}, {"documents": DOCUMENTS}], ids=["all", "padding", "documents"])
def test_value_and_gradient_are_those_of_a_plain_loop(
    given: dict[str, Tensor], causal: bool, chunk: int | None
) -> None:
    student, teacher = draw_qkv(2, 5, 8, 4, 4, seed=0), draw_qkv(2, 5, 12, 12, 6, seed=1)
    for each in student:
        each.requires_grad_()
    got = relation_loss(student, teacher, heads=2, causal=causal, **given, chunk=chunk)
    expected = plain_loop(student, teacher, heads=2, causal=causal, **given)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * got, student), torch.autograd.grad(3 * expected, student))


def test_value_and_gradient_are_in_float32_under_autocast() -> None:
    exact, teacher = draw_qkv(2, 5, 8, 8, 8, seed=0), draw_qkv(2, 5, 8, 8, 8, seed=1)
    expected = plain_loop(exact, teacher, heads=2, causal=False)
    student = QKV(*(each.float().requires_grad_() for each in exact))
    with torch.autocast("cpu", torch.bfloat16):
        got = relation_loss(student, QKV(*(each.float() for each in teacher)), heads=2, causal=False)
        assert got.dtype == torch.float32
        got.backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    halves = QKV(*(each.bfloat16().requires_grad_() for each in exact))
    relation_loss(halves, teacher, heads=2, causal=False).backward()
    assert halves.query.grad is not None and halves.query.grad.dtype == torch.bfloat16


def test_equal_relations_cost_nothing_and_give_no_gradient() -> None:
    student = QKV(*(each.requires_grad_() for each in draw_qkv(2, 5, 8, 8, 8, seed=0)))
    loss = relation_loss(student, student, heads=4, causal=False)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert student.query.grad is not None and not student.query.grad.any()


def test_no_more_than_a_chunk_of_relations_is_in_memory() -> None:
    batch, heads, length = 3, 4, 40
    student, teacher = (draw_qkv(batch, length, 8, 8, 8, seed=seed) for seed in (0, 1))
    for each in student:
        each.requires_grad_()
    with Watch() as watch:
        relation_loss(
            student, teacher, heads=heads, causal=False, documents=torch.zeros(batch, length), chunk=2
        ).backward()
    assert watch.largest == 2 * length**2
    assert watch.waits == []
    with Watch() as watch:  # what the chunks avoid is there to be seen
        relation_loss(student, teacher, heads=heads, causal=False, chunk=100).backward()
    assert watch.largest == batch * heads * length**2


def test_without_gradients_none_are_made() -> None:
    student, teacher = draw_qkv(2, 5, 8, 8, 8, seed=0), draw_qkv(2, 5, 8, 8, 8, seed=1)
    for each in student:
        each.requires_grad_()
    with torch.no_grad():
        loss = relation_loss(student, teacher, heads=2, causal=False)
    assert not loss.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(loss, plain_loop(student, teacher, heads=2, causal=False))


# ------------------------------------------------------------------------------ of models


def by_hand(model: PreTrainedModel, batch: Batch, layer: int) -> QKV:
    """Compute queries, keys and values from the input and the weights of a layer."""
    whole: Any = model(batch["input_ids"], attention_mask=batch.get("attention_mask"), output_hidden_states=True)
    states, of = whole.hidden_states[layer], model.config.model_type  # (batch, length, width)
    if of == "gpt2":
        block: Any = model.get_submodule(f"transformer.h.{layer}")
        return QKV(*(block.ln_1(states) @ block.attn.c_attn.weight + block.attn.c_attn.bias).chunk(3, dim=-1))
    if of == "modernbert":
        block = model.get_submodule(f"model.layers.{layer}")
        return QKV(*F.linear(block.attn_norm(states), block.attn.Wqkv.weight).chunk(3, dim=-1))
    path = f"distilbert.transformer.layer.{layer}.attention" if of == "distilbert" else ""
    attention = model.get_submodule(path or f"{of}.encoder.layer.{layer}.attention.self")
    names = ("q_lin", "k_lin", "v_lin") if path else ("query", "key", "value")
    return QKV(*(attention.get_submodule(name)(states) for name in names))


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "gpt2", "modernbert"])
def test_the_term_and_its_gradient_are_those_of_a_plain_loop_over_the_layers_weights(family: str) -> None:
    lm: Any = "clm" if family == "gpt2" else "mlm"
    student = build_model(family, seed=1, num_layers=2).double()
    teacher = build_model(family, num_layers=4).double()
    batch = padded_batch()
    chosen = objective(alpha_rel=2.0, relation_heads=4, teacher_layer=2, student_layer=1)
    loss, terms = weighted_terms(chosen, student, teacher, batch, lm)
    wanted = [each for each in student.parameters() if each not in projections_of(student, 1).unread]
    gradients = torch.autograd.grad(2 * loss, wanted)

    # Other models of the same weights, because distilkit's attention has replaced transformers' in the first ones.
    ours, theirs = build_model(family, seed=1, num_layers=2).double(), build_model(family, num_layers=4).double()
    real, qkvs = batch["attention_mask"], (by_hand(ours, batch, 1), by_hand(theirs, batch, 2))
    expected = plain_loop(*qkvs, heads=4, causal=lm == "clm", real=real) / real.sum()
    torch.testing.assert_close(terms["rel"], expected.detach())
    torch.testing.assert_close(loss.detach(), 2 * expected.detach())
    by_name = dict(ours.named_parameters())
    names = [name for name, each in student.named_parameters() if any(each is one for one in wanted)]
    of_loop = torch.autograd.grad(4 * expected, [by_name[name] for name in names])
    for name, gradient, other in zip(names, gradients, of_loop, strict=True):
        torch.testing.assert_close(gradient, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "gpt2", "modernbert"])
def test_a_student_that_is_its_teacher_has_no_relation_loss(family: str) -> None:
    student, teacher = build_model(family, num_layers=2), build_model(family, num_layers=2)
    _, terms = weighted_terms(objective(alpha_rel=1.0), student, teacher, padded_batch(), "mlm")
    assert float(terms["rel"]) == 0.0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_padding_and_packing_change_nothing(family: str) -> None:
    lm: Any = "clm" if family == "gpt2" else "mlm"
    student, teacher = build_model(family, seed=1, num_layers=2), build_model(family, num_layers=2)
    chosen = objective(alpha_rel=1.0, relation_heads=4)
    padded = padded_batch()  # documents of 12, 9 and 4 tokens
    _, alone = weighted_terms(chosen, student, teacher, padded, lm)
    wider = cast(Batch, {name: F.pad(padded[name], (0, 7)) for name in ("input_ids", "attention_mask", "labels")})  # type: ignore[literal-required]
    real = padded["attention_mask"].bool()
    ids = padded["input_ids"][real][None]  # (1, 25)
    documents = torch.arange(3)[:, None].expand(real.shape)[real][None]
    packed: Batch = {"input_ids": ids, "labels": torch.full_like(ids, -100), "document_ids": documents}
    for batch in (wider, packed):
        _, terms = weighted_terms(chosen, student, teacher, batch, lm)
        torch.testing.assert_close(terms["rel"], alone["rel"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["modernbert", "gpt2", "gpt_bigcode", "gpt_neox", "falcon", "phi3", "gte", "nomic_bert"]
)
def test_parts_of_a_fused_projection_are_what_attention_gets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, attention = build_family(name), F.scaled_dot_product_attention
    got: list[tuple[Tensor, ...]] = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        got.append(args[:3] or tuple(kwargs[part] for part in ("query", "key", "value")))
        return attention(*args, **kwargs)

    projections_of(model, 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    batch: Batch = {
        "input_ids": torch.tensor([[7], [9]]),
        "labels": torch.tensor([[7], [9]]),
    }  # no rotation at position 0
    with torch.no_grad():
        _, found = projections_of(model, 2).read(batch, whole=True)
    for recorded, attended in zip(found, got[2], strict=True):  # (batch, heads, 1, width / heads) each
        repeats = attended[0].numel() // recorded[0].numel()
        torch.testing.assert_close(recorded, attended[:, ::repeats].transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["bloom", "deberta", "codegen", "mpt", "openai-gpt"])
def test_parts_of_a_fused_projection_are_those_of_the_models_code(name: str) -> None:
    model, outputs = build_family(name), list[Tensor]()
    projection = next(
        each
        for path, each in model.named_modules()
        if ".2." in path and path.endswith(("query_key_value", "in_proj", "qkv_proj", "Wqkv", "c_attn"))
    )
    _, found = projections_of(model, 2).read(full_batch(lm="clm", blocks=2, length=5), whole=False)
    projection.register_forward_hook(lambda *args: outputs.append(args[2]))
    projections_of(model, 2).read(full_batch(lm="clm", blocks=2, length=5), whole=True)
    if name in ("bloom", "deberta"):  # of each of 4 heads: 8 queries, 8 keys, 8 values
        parts = [each.flatten(2) for each in outputs[0].unflatten(2, (4, 3, 8)).unbind(3)]
    elif name == "codegen":  # in four parts, for as many devices: queries, values, keys
        parts = [each.flatten(2) for each in outputs[0].unflatten(2, (4, 3, 8)).unbind(3)]
        parts = [parts[0], parts[2], parts[1]]
    else:
        parts = list(outputs[0].chunk(3, dim=2))
    for recorded, expected in zip(found, parts, strict=True):
        torch.testing.assert_close(recorded, expected)


def test_a_projection_that_also_reads_distances_is_recorded_for_its_tokens() -> None:
    found, batch = projections_of(build_family("deberta-v2"), 2), full_batch(lm="mlm", blocks=2, length=5)
    torch.testing.assert_close(found.read(batch, whole=True)[1], found.read(batch, whole=False)[1])


def count_calls(model: PreTrainedModel, called: list[str], prefix: str) -> None:
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(f"{prefix}.{name}"))


def test_both_models_stop_at_the_layer_that_is_read_and_no_head_is_called() -> None:
    student, teacher, called = build_model("distilbert", num_layers=2), build_model("bert", num_layers=4), list[str]()
    chosen = objective(alpha_rel=1.0, teacher_layer=1, student_layer=0)
    weighted_terms(chosen, student, teacher, padded_batch(), "mlm")
    count_calls(student, called, "student")
    count_calls(teacher, called, "teacher")
    chosen.loss(student, teacher, padded_batch(), lm="mlm", denominators={"rel": torch.tensor(25)})
    assert "teacher.bert.encoder.layer.0" in called and "teacher.bert.encoder.layer.1.attention.self.value" in called
    assert "student.distilbert.transformer.layer.0.attention.v_lin" in called
    later = (
        "layer.1.output",
        "layer.1.intermediate",
        "layer.2",
        "layer.3",
        "cls",
        "out_lin",
        "vocab",
        "transformer.layer.1",
    )
    assert [name for name in called for each in later if each in name] == []


def test_a_model_that_another_term_reads_runs_once_to_its_end() -> None:
    student, teacher, called = build_model("distilbert", num_layers=2), build_model("bert", num_layers=2), list[str]()
    chosen = objective(alpha_rel=1.0, alpha_mlm=1.0, relation_heads=2)
    projections_of(student, 1), projections_of(teacher, 1)
    count_calls(student, called, "student")
    count_calls(teacher, called, "teacher")
    _, both = weighted_terms(chosen, student, teacher, padded_batch(), "mlm")
    assert [called.count(name) for name in ("student.distilbert", "student.vocab_transform", "teacher.bert")] == [
        1,
        1,
        1,
    ]
    assert "teacher.bert.encoder.layer.1.output" not in called
    for alone in (objective(alpha_rel=1.0), objective(alpha_mlm=1.0)):
        _, one = weighted_terms(alone, student, teacher, padded_batch(), "mlm")
        torch.testing.assert_close(one, {name: both[name] for name in one})


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_a_backbone_that_cannot_stop_gives_the_same(how: str, family: str) -> None:
    results = []
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    for changed in (False, True):
        student = build_model(family, seed=1, num_layers=3, **no_dropout).train()
        teacher = build_model(family, num_layers=3)
        if changed and how == "compiled":
            for model in (student, teacher):
                use_attention(model)
                model.base_model.compile(backend="eager")
        elif changed:
            checkpoint_activations(student)
        chosen = objective(alpha_rel=1.0, student_layer=1)
        chosen.check_models(student=student, teacher=teacher, lm="mlm")
        for _ in range(2):
            student.zero_grad()
            loss, _ = weighted_terms(chosen, student, teacher, padded_batch(), "mlm")
            loss.backward()
        results.append({name: each.grad for name, each in student.named_parameters() if each.grad is not None})
    assert results[0].keys() == results[1].keys()
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", [name for name, (outcome, _) in FAMILIES.items() if outcome != "refused"])
def test_a_family_gives_a_finite_loss_with_gradients_or_is_refused(name: str) -> None:
    student, teacher = build_family(name), build_family(name)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    lm = lm_of_model(student)
    chosen = objective(alpha_rel=1.0, relation_heads=2)
    if name in ("longformer", "mamba", "rwkv"):
        with pytest.raises(UserError, match=rf"layer 3 of a {name} has no queries, .*; set objective.alpha_rel=0, or"):
            chosen.check_models(student=student, teacher=teacher, lm=lm)
        return
    chosen.check_models(student=student, teacher=teacher, lm=lm)
    unread = chosen.unread_parameters(student)
    loss, _ = weighted_terms(chosen, student, teacher, full_batch(lm=lm, blocks=3, length=11), lm)
    loss.backward()
    assert 1e-6 < float(loss.detach()) < 100
    of_entities = ("entity", "w2e", "e2w", "e2e")  # which text alone does not reach in LUKE
    read = [each for of, each in student.named_parameters() if not any(part in of for part in of_entities)]
    read = [each for each in read if each.requires_grad and each not in unread]
    assert all(each.grad is not None and each.grad.isfinite().all() for each in read)
    assert all(each.grad is None for each in unread) and unread
