"""Layers by measurement, against plain loops that cut each candidate and score it in float64."""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.language_model import Batch
from distilkit.layers import Choice, drop_greedily, influences, loss_of, losses_without
from distilkit.student import choose_layers, cut_student, measure_layers
from distilkit.teacher import Teacher
from families import FAMILIES, build_family
from test_student import _DECODER, build_by_layer
from tiny import build_teacher, full_batch


def batches_of(lm: str, *, padded: bool = False, blocks: int = 4) -> list[Batch]:
    """Make two batches of blocks; with ``padded`` the second half of one row is padding, without labels."""
    batches = [full_batch(lm=lm, blocks=blocks, length=24, seed=seed) for seed in (0, 1)]
    for batch in batches if padded else ():
        mask = torch.ones_like(batch["input_ids"])
        mask[-1, 12:] = 0
        batch["labels"][-1, 11:] = -100
        batch["attention_mask"] = mask
        del batch["labelled"]
    return batches


@torch.no_grad()
def plain_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Score a whole model in float64, with its own forward."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        mask = batch.get("attention_mask")
        logits = model.double().eval()(input_ids=batch["input_ids"], attention_mask=mask).logits
        chosen = batch["labels"] != -100
        total += F.cross_entropy(logits[chosen], batch["labels"][chosen], reduction="sum")
        count += int(chosen.sum())
    model.float()
    return float(total) / count


def measured(teacher: Teacher, tokenizer: Any, batches: Sequence[Batch], **given: Any) -> Choice:
    settings: Any = {"layers": "greedy", "num_layers": None, "num_blocks": 8, **given}
    return measure_layers(teacher=teacher, tokenizer=tokenizer, draw=lambda _: batches, **settings)


def search_by_hand(teacher: Teacher, tokenizer: Any, batches: Sequence[Batch], num_layers: int) -> list[Any]:
    """Cut each candidate, score it, and drop the best: the layer and the loss of each step."""
    kept, steps = list(range(teacher.model.config.num_hidden_layers)), []
    while len(kept) > num_layers:
        losses = {}
        for layer in kept:
            left = [each for each in kept if each != layer]
            try:
                cut = cut_student(teacher=teacher, tokenizer=tokenizer, layers=left, bert_class="same")
            except UserError:
                continue
            losses[layer] = plain_loss(cut, batches)
        best = min(losses, key=lambda layer: losses[layer])
        kept.remove(best)
        steps.append((best, losses[best]))
    return steps


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "modernbert", "distilbert"])
def test_greedy_drops_what_a_search_by_hand_drops(
    model_type: str, padded: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = build_teacher(model_type)
    batches = batches_of(teacher.lm, padded=padded)
    choice = measured(teacher, tokenizer, batches, num_layers=2)
    expected = search_by_hand(teacher, tokenizer, batches, 2)
    first, *steps = [row for row in choice.table if row["step"] != "even"]
    assert first == {"step": 0, "dropped": None, "loss": pytest.approx(plain_loss(teacher.model, batches), rel=1e-4)}
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["dropped"] for row in steps] == [layer for layer, _ in expected]
    assert [row["loss"] for row in steps] == pytest.approx([loss for _, loss in expected], rel=1e-4)
    found = sorted(set(range(6)) - {layer for layer, _ in expected})
    taken = False
    for even in [row for row in choice.table if row["step"] == "even"]:
        cut = cut_student(teacher=teacher, tokenizer=tokenizer, layers=[0, 5], bert_class="same")
        assert even["layers"] == [0, 5] and even["loss"] == pytest.approx(plain_loss(cut, batches), rel=1e-4)
        taken = even["loss"] < expected[-1][1]
        assert even["taken"] == taken
    assert (choice.table[-1]["step"] == "even") == (found != [0, 5])
    assert choice.layers == ([0, 5] if taken else found)
    assert (choice.method, choice.num_blocks, choice.evaluations) == ("greedy", 8, 6 + 5 + 4 + 3)


@pytest.mark.parametrize("name", [name for name, (outcome, _) in FAMILIES.items() if outcome != "refused"])
def test_a_family_without_a_layer_has_the_loss_of_the_student_that_is_cut_so(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build_family(name).requires_grad_(False)
    lm = "mlm" if "MaskedLM" in type(model).__name__ else "clm"
    teacher = Teacher(model=model, name="tiny", revision="main", lm=lm, sha256="0")
    batches = batches_of(lm, blocks=2)[:1]
    if FAMILIES[name][0] == "works":  # documents of one block, kept apart
        batches[0]["document_ids"] = (torch.arange(24) >= 9).long().repeat(2, 1)
    compared = 0
    for layer, loss in losses_without(model, batches, [0, 1, 3]).items():
        left = [each for each in (0, 1, 3) if each != layer]
        assert loss_of(model, batches, left) == pytest.approx(loss, rel=1e-5)
        try:
            cut = cut_student(teacher=teacher, tokenizer=tokenizer, layers=left, bert_class="same").eval()
        except UserError:
            continue
        assert loss_of(cut, batches, [0, 1]) == pytest.approx(loss, rel=1e-5)
        compared += 1
    assert compared >= 2


def test_twelve_to_six_layers_are_57_evaluations_and_the_cost_is_said_first(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = build_teacher("bert", num_layers=12, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    batches = batches_of("mlm")
    with caplog.at_level(logging.INFO, logger="distilkit.layers"):
        choice = measured(teacher, tokenizer, batches)
    candidates = [row["candidates"] for row in choice.table if "candidates" in row]
    assert choice.evaluations == sum(map(len, candidates)) == 57
    assert len(choice.layers) == 6
    first, *others = [record.getMessage() for record in caplog.records]
    assert first.startswith("student.layers=greedy: 57 evaluations of 8 blocks, at most about 0.")
    assert first.endswith(" minutes") and len(others) == 6


def test_all_layers_need_no_search(tokenizer: PreTrainedTokenizerBase) -> None:
    choice = measured(build_teacher("bert"), tokenizer, batches_of("mlm"), num_layers=6)
    assert (choice.layers, choice.evaluations, len(choice.table)) == ([0, 1, 2, 3, 4, 5], 0, 1)


# --------------------------------------------------------------------------- the search itself


def searched(
    losses: Callable[[tuple[int, ...]], float], *, depth: int = 4, even: Sequence[int] = (0, 3), check: Any = None
) -> tuple[list[int], list[dict[str, Any]]]:
    """Search with a loss that is given for each cut."""
    return drop_greedily(
        depth=depth,
        even=list(even),
        loss_of=lambda kept: losses(tuple(kept)),
        losses_without=lambda kept: {each: losses(tuple(k for k in kept if k != each)) for each in kept},
        check=check or (lambda layers: None),
    )


def test_greedy_that_ends_worse_than_equal_distances_takes_those_and_says_so() -> None:
    # Layer 3 is the cheapest to lose alone, but only 0 and 3 together are good.
    losses = {(0, 1, 2): 1.0, (0, 3): 1.5}
    kept, table = searched(lambda cut: losses.get(cut, 2.0))
    assert kept == [0, 3]
    assert table[-1] == {"step": "even", "layers": [0, 3], "loss": 1.5, "taken": True}
    assert [row["dropped"] for row in table[:-1]] == [None, 3, 2]
    kept, table = searched(lambda cut: {**losses, (0, 1): 1.4}.get(cut, 2.0))
    assert kept == [0, 1] and not table[-1]["taken"]


def test_no_search_is_worse_than_equal_distances() -> None:
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        cuts = [cut for size in range(1, 8) for cut in itertools.combinations(range(7), size)]
        losses = dict(zip(cuts, torch.rand(len(cuts), generator=generator).tolist(), strict=True))
        even = choose_layers(7, 3)
        kept, _ = searched(losses.__getitem__, depth=7, even=even)
        assert losses[tuple(kept)] <= losses[tuple(even)]


def test_ties_drop_the_last_layer_and_a_loss_that_is_no_number_is_the_worst() -> None:
    assert searched(lambda _: 1.0, depth=5, even=[0, 2, 4])[0] == [0, 1, 2]
    for bad in range(4):
        kept, _ = searched(lambda cut, bad=bad: 1.0 if bad in cut else math.nan, even=[0, 1])
        assert bad in kept


def test_what_cannot_be_cut_is_no_candidate() -> None:
    def check(layers: list[int]) -> None:
        if 0 not in layers or layers == [0, 3]:
            raise UserError(f"no student of {layers}")

    def losses(cut: tuple[int, ...]) -> float:
        return float(sum(cut))  # layer 3 costs most, and 0 nothing

    kept, table = searched(losses, check=check)
    assert kept == [0, 1] and table[-1]["step"] == 2  # equal distances are refused too
    kept, _ = searched(lambda cut: -losses(cut), check=check)
    assert kept == [0, 2]  # not [0, 3] nor [2, 3]

    def never(layers: list[int]) -> None:
        raise UserError(f"no student of {layers}")

    message = r"none of layers \[0, 1, 2, 3\] can be dropped: no student of \[.*\]; set student.layers=first, or give"
    with pytest.raises(UserError, match=message):
        searched(losses, check=never)


# ------------------------------------------------------------------------ what a family allows


@pytest.mark.parametrize("method", ["greedy", "influence"])
def test_modernbert_keeps_its_first_layer_and_the_kind_of_each(
    method: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, scored = build_teacher("modernbert"), []

    def prefer_to_drop_the_first(_: Any, __: Any, kept: Sequence[int] = range(6)) -> dict[int, float]:
        scored.append(list(kept))
        return {layer: float(layer) for layer in kept}

    monkeypatch.setattr("distilkit.layers.losses_without", prefer_to_drop_the_first)
    monkeypatch.setattr("distilkit.layers.influences", prefer_to_drop_the_first)
    monkeypatch.setattr("distilkit.layers.loss_of", lambda *_: 9.0)
    choice = measured(teacher, tokenizer, batches_of("mlm"), layers=method, num_layers=3)
    assert choice.layers == [0, 4, 5]
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers=choice.layers)
    kinds = teacher.model.config.layer_types
    assert student.config.layer_types == [kinds[layer] for layer in choice.layers] == [kinds[0], kinds[1], kinds[2]]
    assert scored[0] == [0, 1, 2, 3, 4, 5]


def test_a_bert_that_no_distilbert_equals_is_measured_as_its_own_class(tokenizer: PreTrainedTokenizerBase) -> None:
    choice = measured(build_teacher("bert", hidden_act="silu"), tokenizer, batches_of("mlm"))
    assert len(choice.layers) == 3


def test_a_pattern_by_the_numbers_of_layers_leaves_the_first_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_by_layer("diffllama", _DECODER)  # each layer has a constant of its number
    choice = measured(teacher, tokenizer, batches_of("clm"), num_layers=4)
    assert choice.layers == [0, 1, 2, 3]
    assert [row["dropped"] for row in choice.table] == [None, 5, 4]


# --------------------------------------------------------------------------------- influence


@torch.no_grad()
def influences_by_hand(model: PreTrainedModel, batches: Sequence[Batch]) -> list[float]:
    """Read all states by the model's own option; the last one of GPT-2 is behind its norm, so take it from a hook."""
    stack = model.transformer.h if model.config.model_type == "gpt2" else model.base_model.encoder.layer
    sums, tokens = torch.zeros(len(stack), dtype=torch.float64), 0
    for batch in batches:
        last: list[Tensor] = []
        hook = stack[-1].register_forward_hook(
            lambda _, __, output, last=last: last.append(output[0] if isinstance(output, tuple) else output)
        )
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        found = model(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states
        hook.remove()
        states = [state.double() for state in (*found[: len(stack)], last[0])]
        for layer, (given, returned) in enumerate(itertools.pairwise(states)):
            for row, token in mask.nonzero().tolist():
                one, two = given[row, token], returned[row, token]
                sums[layer] += 1 - (one @ two) / (one.norm() * two.norm())
        tokens += int(mask.sum())
    return [float(total) / tokens for total in sums]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_influence_is_one_minus_the_cosine_of_a_layers_input_and_output(
    model_type: str, padded: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = build_teacher(model_type)
    batches = batches_of(teacher.lm, padded=padded)
    expected = influences_by_hand(teacher.model, batches)
    assert list(influences(teacher.model, batches).values()) == pytest.approx(expected, rel=1e-4)
    choice = measured(teacher, tokenizer, batches, layers="influence", num_layers=2)
    highest = sorted(sorted(range(6), key=lambda layer: -expected[layer])[:2])
    assert choice.layers == [row["layer"] for row in choice.table if row["kept"]] == highest
    assert (choice.evaluations, [row["layer"] for row in choice.table]) == (1, [0, 1, 2, 3, 4, 5])
    assert [row["influence"] for row in choice.table] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------- around them


def test_a_measured_teacher_is_left_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("bert")
    batches = batches_of("mlm")
    before = plain_loss(teacher.model, batches)
    measured(teacher, tokenizer, batches)
    measured(teacher, tokenizer, batches, layers="influence")
    assert plain_loss(teacher.model, batches) == before
    for layer in teacher.model.bert.encoder.layer:
        assert "forward" not in vars(layer) and not layer._forward_hooks


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("first", None, [0, 1, 2]),
        ("first", 4, [0, 1, 2, 3]),
        ("last", None, [3, 4, 5]),
        ("last", 1, [5]),
        ("last", 6, [0, 1, 2, 3, 4, 5]),
        ("half", 3, [0, 2, 5]),
        ("third", 2, [0, 5]),
        ([1, 4], 2, [1, 4]),
    ],
)
def test_named_layers(layers: Any, num_layers: int | None, expected: list[int], tokenizer: Any) -> None:
    student = cut_student(teacher=build_teacher("gpt2"), tokenizer=tokenizer, layers=layers, num_layers=num_layers)
    assert student.config.distilkit_layers == expected


def test_a_student_is_cut_from_the_layers_that_were_measured(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher, asked = build_teacher("bert"), []

    def draw(count: int) -> list[Batch]:
        asked.append(count)
        return batches_of("mlm")

    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="greedy", num_layers=2, num_blocks=8, draw=draw)
    assert student.config.distilkit_layers == measured(teacher, tokenizer, batches_of("mlm"), num_layers=2).layers
    assert asked == [8]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": "greedy"}, r"student.layers=greedy measures .* none are given; call cut_student with draw=Distil"),
        ({"layers": "influence", "init": "random"}, "student.init=random copies no layer, .*; set student.layers=half"),
        ({"layers": "random"}, "'random'; it takes half, third, first, last, greedy, influence or a list such as"),
        ({"layers": "first", "num_layers": 0}, "student.num_layers=0, but it must be from 1 to 6, the layers of tiny-"),
        ({"layers": "greedy", "num_layers": 7}, "student.num_layers=7, but it must be from 1 to 6"),
        ({"layers": "last", "num_layers": 2.5}, "student.num_layers=2.5, but it must be from 1 to 6"),
        ({"layers": "last", "num_layers": True}, "student.num_layers=True, but it must be from 1 to 6"),
        (
            {"layers": "half", "num_layers": 4},
            "student.num_layers=4, but student.layers=half keeps 3; leave student.num",
        ),
        ({"layers": "third", "num_layers": 3}, "student.num_layers=3, but student.layers=third keeps 2"),
        ({"layers": [0, 4], "num_layers": 3}, r"student.num_layers=3, but student.layers=\[0, 4\] keeps 2"),
        ({"layers": "greedy", "num_blocks": 0}, "student.num_blocks=0, but it must be a whole number of at least 1"),
        ({"layers": "influence", "num_blocks": 1.5}, "student.num_blocks=1.5, but it must be a whole number"),
        (
            {"layers": "greedy", "teacher": None},
            "cannot be cut from teacher=none; set student=new, or choose a teacher",
        ),
    ],
)
def test_wrong_choices_are_an_error(given: Mapping[str, Any], message: str, tokenizer: Any) -> None:
    settings: Any = {"teacher": build_teacher("bert"), "tokenizer": tokenizer, **given}
    with pytest.raises(UserError, match=message):
        cut_student(**settings)


def test_greedy_needs_a_trained_head_and_influence_none(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = build_teacher("bert")
    teacher = Teacher(**{**vars(whole), "has_head": False})
    with pytest.raises(UserError, match="greedy reads the loss of tiny-bert, which has no trained .*layers=influence"):
        measured(teacher, tokenizer, batches_of("mlm"))
    assert len(measured(teacher, tokenizer, batches_of("mlm"), layers="influence").layers) == 3


def test_documents_too_short_for_a_label_change_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher, batches = build_teacher("bert"), batches_of("mlm")
    ids = batches[0]["input_ids"][:, :3]
    short: Batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    found, expected = (measured(teacher, tokenizer, each) for each in ([short, *batches], batches))
    assert [row["loss"] for row in found.table] == [row["loss"] for row in expected.table]
    assert found.num_blocks == expected.num_blocks + 4


def test_a_loss_that_is_not_finite_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("bert")
    teacher.model.bert.encoder.layer[0].output.dense.weight[0, 0] = math.inf
    with pytest.raises(UserError, match="the loss of the cut teacher is not finite; set trainer.precision=32-true"):
        measured(teacher, tokenizer, batches_of("mlm"))


def test_a_model_without_a_stack_of_layers_is_refused() -> None:
    model = build_family("albert")
    with pytest.raises(UserError, match="'albert' has 0 stacks of 4 layers, so that none can be left out; choose"):
        loss_of(model, batches_of("mlm"), [0, 1])
