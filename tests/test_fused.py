"""The fused losses against the plain formulas, and what they promise about memory and host syncs."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._python_dispatch import TorchDispatchMode

import distilkit.objective
from distilkit import fused
from distilkit.fused import fused_losses
from distilkit.losses import IGNORE_INDEX, Head, VocabularyLosses, reference_losses
from operations import Watch
from tiny import build_model, build_objective, full_batch

Weights = dict[str, Tensor]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build_heads(
    *, rows: int = 300, vocabulary: tuple[int, int] = (47, 47), bias: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Head, Head]:
    """Build a student of width 8 that wants gradients and a teacher of width 12."""
    student, teacher = (
        Head(
            draw(rows, width, seed=seed, dtype=dtype),
            draw(words, width, seed=seed + 1, dtype=dtype),
            draw(words, seed=seed + 2, dtype=dtype) if bias else None,
        )
        for seed, width, words in ((0, 8, vocabulary[0]), (3, 12, vocabulary[1]))
    )
    for tensor in student:
        if tensor is not None:
            tensor.requires_grad_()
    return student, teacher


def build_labels(rows: int, *, vocabulary: int = 40) -> Tensor:
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(9))
    labels[::3] = IGNORE_INDEX
    return labels


def row_weights(rows: int, *terms: str) -> Weights:
    """Weigh each row differently, and some not at all."""
    return {
        f"{term}_weights": draw(rows, seed=20 + i).abs() * (torch.arange(rows) % 5 > 0) for i, term in enumerate(terms)
    }


def losses_and_gradients(
    implementation: Callable[..., VocabularyLosses], student: Head, *args: Any, **kwargs: Any
) -> tuple[VocabularyLosses, list[Tensor]]:
    losses = implementation(student, *args, **kwargs)
    wanted = [tensor for tensor in student if tensor is not None]
    return losses, list(torch.autograd.grad(3.0 * losses.total, wanted))


ALL_TERMS = [("soft",), ("hard",), ("mse",), ("soft", "hard"), ("soft", "hard", "mse")]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("vocabulary", [(47, 47), (50, 47), (47, 64)], ids=["same", "wider student", "wider teacher"])
@pytest.mark.parametrize("terms", ALL_TERMS, ids="+".join)
def test_losses_and_gradients_are_those_of_the_plain_formulas(
    terms: tuple[str, ...], vocabulary: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fused._VOCABULARY_MULTIPLE, "cpu", 16)
    student, teacher = build_heads(vocabulary=vocabulary, bias=bias)
    settings = student, teacher, build_labels(300)
    options: dict[str, Any] = {**row_weights(300, *terms), "temperature": 3.0}
    got, gradients = losses_and_gradients(fused_losses, *settings, **options, logit_bytes=0)  # chunks of 128 rows
    expected, expected_gradients = losses_and_gradients(reference_losses, *settings, **options)
    for name in VocabularyLosses._fields:
        # The plain formulas are in float32 at best.
        torch.testing.assert_close(getattr(got, name).float(), getattr(expected, name).float(), rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("terms", ALL_TERMS, ids="+".join)
def test_gradients_are_the_derivatives_of_the_total(terms: tuple[str, ...]) -> None:
    student, teacher = build_heads(rows=7, vocabulary=(6, 5))
    labels, options = build_labels(7, vocabulary=5), row_weights(7, *terms)

    def total(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_losses(Head(features, weight, bias), teacher, labels, **options, temperature=2.0).total

    assert torch.autograd.gradcheck(total, tuple(student))


def test_a_tied_weight_gets_the_gradient_of_both_uses() -> None:
    weight = draw(11, 4, seed=1).requires_grad_()
    words = torch.tensor([1, 5, 1])

    def gradient(implementation: Callable[..., VocabularyLosses]) -> Tensor:
        losses = implementation(Head(weight[words], weight, None), None, words, hard_weights=torch.ones(3))
        return torch.autograd.grad(losses.total, weight)[0]

    torch.testing.assert_close(gradient(fused_losses), gradient(reference_losses), rtol=1e-5, atol=1e-6)


def test_frozen_embeddings_leave_the_gradient_of_the_features_alone() -> None:
    student, teacher = build_heads(rows=20)
    frozen = Head(student.features, student.weight.detach(), None)
    options = row_weights(20, "soft", "hard")
    got = fused_losses(frozen, teacher, build_labels(20), **options)
    expected = reference_losses(frozen, teacher, build_labels(20), **options)
    for losses in (got, expected):
        losses.total.backward()
    assert student.features.grad is not None
    torch.testing.assert_close(got.total.float(), expected.total.float())


def test_no_rows_give_zero_and_a_zero_gradient() -> None:
    student, _ = build_heads(rows=0)
    losses = fused_losses(student, None, build_labels(0), hard_weights=torch.ones(0))
    losses.total.backward()
    assert float(losses.total.detach()) == 0.0
    assert student.weight.grad is not None
    assert not student.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_against_double_precision_are_those_of_the_plain_formulas(dtype: torch.dtype) -> None:
    # Many chunks, whose weight gradients are summed in float32.
    in_chunks = functools.partial(fused_losses, logit_bytes=0, min_rows=8)
    student, teacher = build_heads(rows=200, dtype=torch.float32)
    options = {name: weights.float() / 200 for name, weights in row_weights(200, "soft", "hard").items()}
    labels = build_labels(200)
    exact_student, exact_teacher = build_heads(rows=200, dtype=torch.float32)
    exact = Head(*(None if t is None else t.detach().double().requires_grad_() for t in exact_student))  # type: ignore[arg-type]
    exact_teacher = Head(*(None if t is None else t.double() for t in exact_teacher))  # type: ignore[arg-type]
    _, truth = losses_and_gradients(
        in_chunks, exact, exact_teacher, labels, temperature=2.0, **{k: w.double() for k, w in options.items()}
    )
    errors = []
    for implementation in (in_chunks, reference_losses):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = implementation(student, teacher, labels, temperature=2.0, **options)
        gradients = torch.autograd.grad(3.0 * losses.total, [tensor for tensor in student if tensor is not None])
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        errors.append([float((g.double() - t).norm() / t.norm()) for g, t in zip(gradients, truth, strict=True)])
    limit = 1e-6 if dtype == torch.float32 else 1.5e-2
    for ours, plain in zip(*errors, strict=True):
        assert ours < limit
        assert ours < 1.2 * plain + 1e-7


def test_small_weights_do_not_vanish_in_half_precision() -> None:
    student, teacher = build_heads(rows=64, dtype=torch.float32)
    tiny = {"soft_weights": torch.full((64,), 1e-9), "temperature": 2.0}  # a loss over a billion tokens
    _, truth = losses_and_gradients(fused_losses, student, teacher, build_labels(64), **tiny)
    with torch.autocast("cpu", torch.float16):
        _, half = losses_and_gradients(fused_losses, student, teacher, build_labels(64), **tiny)
    for ours, exact in zip(half, truth, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 1e-2


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = build_heads(rows=10)
    for tensor in teacher:
        assert tensor is not None
        tensor.requires_grad_()
    fused_losses(student, teacher, build_labels(10), **row_weights(10, "soft")).total.backward()
    assert [tensor.grad for tensor in teacher if tensor is not None] == [None, None, None]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    fused._elementwise.cache_clear()
    yield
    fused._elementwise.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiled_core_is_the_eager_one(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = build_heads(dtype=torch.float32)
    arguments = student, teacher, build_labels(300)
    options: dict[str, Any] = {k: w.float() for k, w in row_weights(300, "soft", "hard").items()}
    options |= {"temperature": 2.0, "logit_bytes": 0}
    eager, eager_gradients = losses_and_gradients(fused_losses, *arguments, **options)
    with caplog.at_level("INFO"):
        compiled, gradients = losses_and_gradients(fused_losses, *arguments, **options, compile_from=0)
    assert [record.message for record in caplog.records] == ["compiling the loss for cpu"]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, eager_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_without_a_compiler_the_loss_runs_eager_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Any) -> Any:
        def fail(*args: Any) -> None:
            raise RuntimeError("no C++ compiler\ntraceback")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level("INFO"):
        assert fused._elementwise("cpu") == (fused._core_in_parts, fused._add)
        fused._elementwise("cpu")
    assert [record.message for record in caplog.records] == ["the loss runs without torch.compile: no C++ compiler"]


@pytest.mark.parametrize("num_rows", [7, 300])
def test_the_core_in_parts_is_the_core(num_rows: int) -> None:
    labels, weights = build_labels(num_rows), [draw(num_rows, seed=seed).abs() for seed in (1, 2)]
    results = []
    for core in (fused._core, functools.partial(fused._core_in_parts, min_rows=3)):
        logits, targets = draw(num_rows, 47, seed=3), draw(num_rows, 47, seed=4)
        results.append((core(logits, targets, labels, *weights, None, temperature=2.0), logits))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.usefixtures("fresh_compiler")
def test_a_core_that_does_not_compile_runs_eager_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Any) -> Any:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise BackendCompilerFailed(None, RuntimeError("no such register"), None)

        return fail if function is fused._core else function

    monkeypatch.setattr(torch, "compile", broken)
    student, teacher = build_heads()
    settings = student, teacher, build_labels(300)
    options = row_weights(300, "soft", "hard")
    with caplog.at_level("INFO"):
        got, gradients = losses_and_gradients(fused_losses, *settings, **options, logit_bytes=0, compile_from=0)
    expected, expected_gradients = losses_and_gradients(reference_losses, *settings, **options)
    torch.testing.assert_close(got.total.float(), expected.total.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)
    assert len([record for record in caplog.records if "without torch.compile" in record.message]) == 1


def test_backward_makes_no_second_buffer_for_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = build_heads()
    made: list[int] = []

    def watched(make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        made.append((tensor := make(*args, **kwargs)).data_ptr())
        return tensor

    for name in ("zeros_like", "empty_like"):
        monkeypatch.setattr(torch, name, functools.partial(watched, getattr(torch, name)))
    fused_losses(student, teacher, build_labels(300), **row_weights(300, "soft", "hard")).total.mul(3).backward()
    assert {tensor.grad.data_ptr() for tensor in student if tensor is not None and tensor.grad is not None} <= set(made)


def test_the_frozen_embeddings_of_a_teacher_are_padded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_VOCABULARY_MULTIPLE", {"cpu": 128})
    student, teacher = build_heads(vocabulary=(47, 49))
    frozen = Head(teacher.features, torch.nn.Parameter(teacher.weight, requires_grad=False), teacher.bias)
    settings = build_labels(300), row_weights(300, "soft", "hard")

    def loss(head: Head, implementation: Callable[..., VocabularyLosses] = fused_losses) -> Tensor:
        return implementation(student, head, settings[0], **settings[1]).total

    def padded() -> int:
        return fused._cast_rows(frozen.weight, 47, 128, torch.float64).data_ptr()

    with torch.inference_mode():  # a validation comes first
        loss(frozen)
    first = padded()
    loss(frozen).backward()
    assert padded() == first
    torch.testing.assert_close(loss(frozen), loss(teacher, reference_losses))
    with torch.no_grad():
        frozen.weight.mul_(2.0)
    assert padded() != first
    torch.testing.assert_close(loss(frozen), loss(frozen, reference_losses))
    assert not hasattr(student.weight, "_distilkit_cast")


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.masked_select(tensor > 0),
        lambda tensor: tensor.__setitem__(tensor > 0, torch.ones(4)),
        lambda tensor: bool(tensor.sum()),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor.unique(),
    ],
    ids=["index", "masked_select", "index_put", "bool", "nonzero", "unique"],
)
def test_the_watch_sees_what_makes_the_host_wait(wait: Callable[[Tensor], Any]) -> None:
    with Watch() as watch:
        _ = torch.ones(4)[torch.tensor([1, 2])].cumsum(0)
        assert watch.waits == []
        wait(torch.ones(4))
    assert watch.waits


FAMILIES = ["bert", "roberta", "distilbert", "electra", "modernbert", "gpt2", "xlm-roberta"]


@pytest.mark.parametrize("soft_targets", ["all", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_makes_no_tensor_of_tokens_times_vocabulary_and_never_makes_the_host_wait(
    family: str, soft_targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilkit.objective, "fused_losses", functools.partial(fused_losses, logit_bytes=0))
    lm: Any = "clm" if family == "gpt2" else "mlm"
    wide = {"vocab_size": 300}  # wider than anything else, so that logits of all tokens would be the largest tensor
    student = build_model(family, seed=1, num_layers=2, **wide).train()
    teacher = build_model(family, num_layers=2, **wide)
    batch = full_batch(lm=lm, blocks=64)
    tokens, vocabulary = batch["input_ids"].numel(), student.config.vocab_size
    counts = {"num_tokens": torch.tensor(tokens), "num_labels": torch.tensor(len(batch["labelled"]))}
    for implementation in ("fused", "reference"):
        objective = build_objective(lm, implementation, soft_targets)
        rows = tokens if lm == "clm" or soft_targets == "all" else len(batch["labelled"])
        with Watch(vocabulary) as watch:
            denominators = objective.denominators(**counts, lm=lm)
            loss, _ = objective.loss(student, teacher, batch, lm=lm, denominators=denominators)
            loss.backward()
        if implementation == "fused":
            assert watch.waits == []
            assert watch.largest_logits <= fused._MIN_ROWS * vocabulary  # whatever the number of rows
            assert watch.largest < tokens * vocabulary
        else:  # what the fused path avoids is there to be seen
            assert watch.largest_logits >= rows * vocabulary


@pytest.mark.parametrize("soft_targets", ["all", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_follow_the_loss_curve_of_the_plain_formulas(
    family: str, soft_targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks = functools.partial(fused_losses, logit_bytes=0, min_rows=16)  # a step of several chunks
    monkeypatch.setattr(distilkit.objective, "fused_losses", in_chunks)
    lm: Any = "clm" if family == "gpt2" else "mlm"
    teacher = build_model(family, num_layers=2)
    curves = []
    for implementation in ("fused", "reference"):
        student = build_model(family, seed=1, num_layers=1).eval()  # without dropout
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        objective = build_objective(lm, implementation, soft_targets)
        curve = []
        for step in range(50):
            batch = full_batch(lm=lm, blocks=4, seed=step)
            counts = {"num_tokens": torch.tensor(64), "num_labels": torch.tensor(len(batch["labelled"]))}
            denominators = objective.denominators(**counts, lm=lm)
            loss, _ = objective.loss(student, teacher, batch, lm=lm, denominators=denominators)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.1  # it did learn


@pytest.mark.parametrize("sizes", [(126, 128), (128, 126)], ids=["wider teacher", "wider student"])
def test_an_untied_head_and_a_vocabulary_padded_to_another_size_follow_the_plain_formulas(
    sizes: tuple[int, int],
) -> None:
    teacher = build_model("bert", num_layers=2, vocab_size=sizes[1])
    batch = full_batch(lm="mlm")
    counts = {"num_tokens": torch.tensor(256), "num_labels": torch.tensor(len(batch["labelled"]))}
    gradients = []
    for implementation in ("fused", "reference"):
        student = build_model("bert", seed=1, num_layers=1, vocab_size=sizes[0], tie_word_embeddings=False).eval()
        assert student.get_output_embeddings().weight is not student.get_input_embeddings().weight
        objective = build_objective("mlm", implementation)
        denominators = objective.denominators(**counts, lm="mlm")
        objective.loss(student, teacher, batch, lm="mlm", denominators=denominators)[0].backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_without_gradients_none_are_made() -> None:
    student, teacher = build_heads(rows=10)
    arguments = student, teacher, build_labels(10)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return func(*args, **(kwargs or {}))

    counts = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), Products() as products:
            fused_losses(*arguments, **row_weights(10, "soft", "hard"))
        counts.append(products.count)
    assert counts == [5, 2]  # logits twice; in training also gradients of features, weights and bias
