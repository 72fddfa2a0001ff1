"""Two processes train as one does, whatever the objective, and each resumes the other's checkpoint."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.sharding import _layers
from tiny import build_model
from training import Trained, largest_differences, train

RELATIONS = {"alpha_ce": 0.0, "alpha_cos": 0.0, "alpha_rel": 1.0, "relation_heads": 4}
LATER: Any = [[0, 0], [0.5, 0], [0.5, 2], [1, 2]]  # a weight of the second half
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
FUSED = functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-6, fused=True)


def close(one: Trained, two: Trained) -> bool:
    loss, weights = largest_differences(one, two)
    assert one.tokens == two.tokens
    assert one.steps[len(one.steps) - len(two.steps) :] == two.steps
    assert abs(one.losses[-1] - one.losses[0]) > 0.01  # it did learn
    print(f"loss {loss:.1e}, weights {weights:.1e}")
    return loss < 4e-6 and weights < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shard_teacher": False},
        {"data": {"packing": "documents", "micro_batch_size": 3}},
        {"model_type": "modernbert"},
        {"model_type": "electra"},
        {"optimizer": SGD},
        {"optimizer": FUSED},
        {"gradient_clip_val": 0.1},
        {"activation_checkpointing": True},
        {"compiled": True},
        {"objective": {"alpha_ce": 0.0, "alpha_mlm": 0.0}},
        {"objective": {"alpha_mlm": LATER, "alpha_ce": LATER}},
        {"objective": RELATIONS},
        {"objective": {**RELATIONS, "alpha_mlm": 0.0, "student_layer": 0}},
        {"objective": {**RELATIONS, "alpha_mlm": LATER, "student_layer": 0}},
        {"sharded": False, "objective": RELATIONS, "data": {"packing": "documents"}},
        {"sharded": False, "objective": {"alpha_mlm": LATER, "alpha_ce": LATER}},
    ],
    ids=str,
)
def test_two_processes_train_as_one_does(settings: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    one = train(tmp_path, tokenizer, steps=6, **{**settings, "sharded": False})
    two = train(tmp_path, tokenizer, steps=6, ranks=2, **{"sharded": True, **settings})
    assert two.before["val/nll"] == pytest.approx(one.before["val/nll"], rel=1e-6)
    assert close(one, two)


@pytest.mark.slow
def test_two_sharded_processes_train_a_causal_model_as_one_does(
    causal_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    settings: Any = {"model_type": "gpt2", "steps": 6}
    one = train(tmp_path, causal_tokenizer, **settings)
    assert close(one, train(tmp_path, causal_tokenizer, ranks=2, sharded=True, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 2)])
def test_a_checkpoint_of_sharded_processes_resumes_on_one_and_the_reverse(
    first: int, then: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole = train(tmp_path, tokenizer)
    half = train(tmp_path, tokenizer, ranks=first, sharded=first > 1, steps=5)
    resumed = train(tmp_path, tokenizer, ranks=then, sharded=then > 1, resume="last.ckpt")
    assert len(half.losses) == 5
    assert len(resumed.losses) == 7
    assert close(whole, resumed)
    assert set(resumed.optimizer[0]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.slow
@pytest.mark.parametrize("teacher_dtype", ["auto", "float32"])
def test_sharded_layers_in_bfloat16_are_as_near_to_float32_as_one_process_is(
    teacher_dtype: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    exact = train(tmp_path, tokenizer, steps=6, model_type="modernbert")
    settings: Any = {"steps": 6, "model_type": "modernbert", "precision": "bf16-mixed", "teacher_dtype": teacher_dtype}
    one = train(tmp_path, tokenizer, **settings)
    two = train(tmp_path, tokenizer, ranks=2, sharded=True, **settings)
    assert {tensor.dtype for tensor in two.weights.values()} == two.frequencies == {torch.float32}
    for mine, most in zip(largest_differences(exact, two), largest_differences(exact, one), strict=True):
        assert 0 < mine < 3 * most


@pytest.mark.slow
@pytest.mark.parametrize("shard_teacher", [True, False])
def test_each_process_holds_its_share_of_the_weights(
    shard_teacher: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    one = train(tmp_path, tokenizer, steps=1)
    two = train(tmp_path, tokenizer, steps=1, ranks=2, sharded=True, shard_teacher=shard_teacher)
    student, teacher = one.held
    assert student < teacher
    assert two.held == (student / 2, teacher / (2 if shard_teacher else 1))


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    assert len(_layers(build_model("bert", num_layers=3))) == 3
    model = build_model("bert", num_layers=3)
    model.config.num_hidden_layers = 4
    with pytest.raises(UserError, match="trainer=fsdp shards a model by its layers, but model type 'bert' has no list"):
        _layers(model)
