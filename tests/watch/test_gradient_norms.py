"""The gradient norm of each term is that of a training on this term alone."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from distilkit.watch.gradient_norms import GradientNorms
from test_module import DISTILBERT, FROZEN, build_module, fit, uneven_step

NONE: dict[str, Any] = dict.fromkeys(DISTILBERT, 0.0)


@pytest.mark.parametrize("micro_batch_size", [32, 5])
def test_the_norm_of_a_term_is_that_of_its_own_training(
    micro_batch_size: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    steps = [uneven_step(lm="mlm")]
    module, norms = build_module(tokenizer, optimizer=FROZEN), GradientNorms(by_term=True)
    found = fit(module, steps, micro_batch_size=micro_batch_size, callbacks=[norms]).callback_metrics
    terms = {name.removeprefix("alpha_"): alpha for name, alpha in DISTILBERT.items() if alpha}
    assert {name for name in found if name.startswith("train/gradient_norm_")} == {
        f"train/gradient_norm_{name}" for name in terms
    }
    for name, alpha in terms.items():
        alone = build_module(tokenizer, optimizer=FROZEN, alphas={**NONE, f"alpha_{name}": alpha})
        expected = fit(alone, steps, micro_batch_size=32).callback_metrics["train/gradient_norm"]
        assert float(found[f"train/gradient_norm_{name}"]) == pytest.approx(float(expected), rel=1e-4)


def test_the_norms_change_nothing_that_is_trained_and_are_off_by_default(tokenizer: PreTrainedTokenizerBase) -> None:
    steps = [uneven_step(lm="mlm", seed=seed) for seed in range(3)]
    losses = []
    for by_term in (False, True):
        module = build_module(tokenizer)
        module.student.config.dropout = 0.1
        for part in module.student.modules():
            if type(part).__name__ == "Dropout":
                part.p = 0.1
        found = fit(module, steps, micro_batch_size=8, callbacks=[GradientNorms(by_term=by_term)]).callback_metrics
        losses.append(float(found["train/loss"]))
        assert ("train/gradient_norm_ce" in found) == by_term
    assert losses[0] == losses[1]
