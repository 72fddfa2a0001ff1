import math

import pytest
import torch
from torch import Tensor

from distilkit import losses


def draw(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_soft_target_kl_is_the_plain_formula(temperature: float) -> None:
    student, teacher = draw(9, 23, seed=0), draw(9, 23, seed=1)
    q, p = (student / temperature).exp(), (teacher / temperature).exp()
    q, p = q / q.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
    expected = temperature**2 * (p * (p / q).log()).sum()

    got = losses.soft_target_kl(student.float(), teacher.float(), temperature=temperature).sum()

    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_soft_target_kl_of_two_words_by_hand() -> None:
    # teacher (0.75, 0.25), student (0.5, 0.5): 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812...
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    got = losses.soft_target_kl(torch.zeros(1, 2), teacher, temperature=1.0).sum()
    assert float(got) == pytest.approx(0.13081203594113697, abs=1e-6)


def test_soft_target_gradient_is_temperature_times_the_difference_of_probabilities() -> None:
    student, teacher = draw(5, 11, seed=2).float().requires_grad_(), draw(5, 11, seed=3).float()
    losses.soft_target_kl(student, teacher, temperature=3.0).sum().backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1))
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-4, atol=1e-6)


def test_cross_entropy_is_the_plain_formula_over_labelled_tokens() -> None:
    logits = draw(6, 10, seed=4)
    labels = torch.tensor([3, losses.IGNORE_INDEX, 0, 9, losses.IGNORE_INDEX, 5])
    expected = sum(
        torch.log(logits[i].exp().sum()) - logits[i, label] for i, label in enumerate(labels.tolist()) if label >= 0
    )
    got = losses.hard_target_cross_entropy(logits.float(), labels).sum()
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_cross_entropy_of_even_logits_is_the_logarithm_of_the_vocabulary() -> None:
    got = losses.hard_target_cross_entropy(torch.zeros(2, 8), torch.tensor([1, 7])).sum()
    assert float(got) == pytest.approx(4.1588830833596715)


def test_cross_entropy_without_labels_is_zero_with_zero_gradient() -> None:
    logits = torch.ones(3, 5, requires_grad=True)
    loss = losses.hard_target_cross_entropy(logits, torch.full((3,), losses.IGNORE_INDEX)).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_cosine_is_the_plain_formula() -> None:
    student, teacher = draw(7, 16, seed=5), draw(7, 16, seed=6)
    expected = sum(1 - (s @ t) / (s.norm() * t.norm()) for s, t in zip(student, teacher, strict=True))
    got = losses.hidden_cosine(student.float(), teacher.float()).sum()
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_cosine_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    teacher = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    assert float(losses.hidden_cosine(student, teacher).sum()) == pytest.approx(0.0 + 1.0 + 2.0)


def test_mse_is_the_plain_formula() -> None:
    student, teacher = draw(4, 9, seed=7), draw(4, 9, seed=8)
    got = losses.logit_mse(student.float(), teacher.float()).sum()
    assert float(got) == pytest.approx(float(((student - teacher) ** 2).sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32_whatever_the_logits(dtype: torch.dtype) -> None:
    student, teacher = draw(64, 50, seed=9).to(dtype), draw(64, 50, seed=10).to(dtype)
    expected = losses.soft_target_kl(student.double(), teacher.double(), temperature=2.0).sum()
    got = losses.soft_target_kl(student, teacher, temperature=2.0).sum()
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
