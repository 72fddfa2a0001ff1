"""Relations of queries, keys and values against plain loops, and where they are found in each family."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distilkit.relations import QKV, relation_loss
from watch import Watch


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
