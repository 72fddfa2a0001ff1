"""How much a student says what its teacher says, against plain loops over rows."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from distilkit.metrics import agreement, kl
from distilkit.records import Rows


def rows(seed: int, **changes: Any) -> Rows:
    logits = (4 * np.random.default_rng(seed).normal(size=(50, 3))).astype(np.float16)
    made = Rows(ids=np.arange(50), gold=np.arange(50) % 3, said=logits.argmax(axis=1), logits=logits)
    return dataclasses.replace(made, **changes)


def test_agreement_counts_equal_classes() -> None:
    mine, theirs = rows(0), rows(1)
    assert mine.said is not None and theirs.said is not None
    same = sum(one == other for one, other in zip(mine.said, theirs.said, strict=True))
    assert 0 < same < 50
    assert agreement(mine, theirs) == same / 50
    assert agreement(mine, mine) == 1
    texts = [np.array(["a", "b"]), np.array(["a", "c"])]  # answers to questions
    assert agreement(*(Rows(ids=np.array(["x", "y"]), said=each) for each in texts)) == 0.5


def test_kl_is_the_mean_over_rows_from_the_teacher() -> None:
    mine, theirs = rows(0), rows(1)
    total = 0.0
    assert mine.logits is not None and theirs.logits is not None
    for one, other in zip(mine.logits.astype(float), theirs.logits.astype(float), strict=True):
        q, p = (np.exp(each) / np.exp(each).sum() for each in (one, other))
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    assert kl(mine, theirs) == pytest.approx(total / 50, rel=1e-9)
    assert kl(mine, theirs) != pytest.approx(kl(theirs, mine))
    assert kl(mine, mine) == 0
    far = rows(0, logits=np.array([[60000.0, -60000.0, 0.0]] * 50, dtype=np.float16))
    assert math.isfinite(kl(far, mine) or math.nan)


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": np.arange(1, 51)},
        {"ids": np.arange(49)},
        {"gold": np.zeros(50, dtype=np.int64)},
        {"gold": None},
        {"said": None, "logits": None},
        {"said": np.arange(50) / 7, "logits": np.zeros((50, 1), dtype=np.float16)},
    ],
)
def test_other_rows_and_numbers_have_no_fidelity(changes: dict[str, Any]) -> None:
    mine, theirs = rows(0, **changes), rows(1)
    assert (agreement(mine, theirs), kl(mine, theirs)) == (None, None)
    assert (agreement(theirs, mine), kl(theirs, mine)) == (None, None)
