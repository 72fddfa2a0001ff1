import collections
import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers.logger import DummyLogger
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from distilkit.callbacks import ValidateEvery
from distilkit.data.batches import split_step
from distilkit.errors import UserError
from distilkit.language_model import Batch, checkpoint_activations
from distilkit.losses import IGNORE_INDEX
from distilkit.module import DistillationModule
from distilkit.objective import Objective
from distilkit.sharding import FullyShardedStrategy
from distilkit.student import cut_student
from distilkit.teacher import Teacher
from distilkit.watch.throughput import Throughput
from jobs import NotFinite
from operations import Watch
from tiny import build_teacher, full_batch

DISTILBERT = {"alpha_ce": 5.0, "alpha_mlm": 2.0, "alpha_clm": 0.0, "alpha_cos": 1.0, "alpha_mse": 0.0}
DISTILGPT2 = {**DISTILBERT, "alpha_mlm": 0.0, "alpha_clm": 2.0}
PLAIN_SGD = functools.partial(torch.optim.SGD, lr=1.0)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def build_module(
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: Teacher | None = None,
    alphas: dict[str, Any] | None = None,
    soft_targets: Any = "all",
    optimizer: Any = PLAIN_SGD,
    **changes: Any,
) -> DistillationModule:
    teacher = teacher or build_teacher("bert", num_layers=2, **NO_DROPOUT)
    alphas = alphas or (DISTILBERT if teacher.lm == "mlm" else DISTILGPT2)
    torch.manual_seed(1)
    settings: dict[str, Any] = {"scheduler": "constant", "warmup_share": 0.0, "seed": 0, "record": {"config": {}}}
    return DistillationModule(
        student=cut_student(teacher=teacher, tokenizer=tokenizer, layers="half"),
        teacher=teacher,
        tokenizer=tokenizer,
        lm=teacher.lm,
        objective=Objective(**alphas, temperature=2.0, soft_targets=soft_targets, implementation="fused"),
        optimizer=optimizer,
        **{**settings, **changes},
    )


def uneven_step(*, lm: str, seed: int = 0, size: int = 32) -> Batch:
    """Make one optimizer step whose samples have very different numbers of tokens and of labels."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(5, 120, (size, 16)))
    real = torch.arange(16) < torch.from_numpy(rng.integers(2, 17, size))[:, None]
    ids[~real] = 0
    labels = torch.full_like(ids, IGNORE_INDEX)
    if lm == "mlm":
        chosen = real & (torch.from_numpy(rng.random((size, 16))) < torch.linspace(0.05, 0.9, size)[:, None])
        labels[chosen] = ids[chosen]
        ids[chosen] = 4
    else:
        labels[:, :-1] = torch.where(real[:, 1:], ids[:, 1:], IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "attention_mask": real.long()}


class Steps:
    """A loader of fixed optimizer steps, split into micro-batches as the data module does."""

    def __init__(self, steps: list[Batch], micro_batch_size: int) -> None:
        self.batches = [batch for step in steps for batch in split_step(step, micro_batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def fit(module: DistillationModule, steps: list[Batch], *, micro_batch_size: int, **settings: Any) -> Trainer:
    accumulate = -(-len(steps[0]["input_ids"]) // micro_batch_size)
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "callbacks": [],
    }
    trainer = Trainer(
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **settings},
    )
    trainer.fit(module, Steps(steps, micro_batch_size))
    return trainer


class Gradients(Callback):
    """Keep the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        student = pl_module.get_submodule("student")
        self.steps.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("soft_targets", ["all", "masked"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_accumulation_changes_neither_loss_nor_gradient(
    model_type: str, soft_targets: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    fields = NO_DROPOUT if model_type == "bert" else NO_GPT2_DROPOUT
    teacher = build_teacher(model_type, num_layers=2, **fields)
    results = {}
    for micro_batch_size in (32, 4, 5):
        module = build_module(tokenizer, teacher=teacher, soft_targets=soft_targets)
        gradients = Gradients()
        steps = [uneven_step(lm=teacher.lm)]
        trainer = fit(module, steps, micro_batch_size=micro_batch_size, callbacks=[gradients])
        assert trainer.global_step == 1
        results[micro_batch_size] = (trainer.callback_metrics, gradients.steps[0])
    whole_metrics, whole = results[32]
    assert {"train/loss", "train/loss_ce", "train/loss_cos"} < set(whole_metrics)
    for metrics, gradient in (results[4], results[5]):
        for name in whole_metrics:
            torch.testing.assert_close(metrics[name], whole_metrics[name], rtol=1e-5, atol=1e-6)
        assert gradient.keys() == whole.keys()
        scale = torch.stack([g.norm() for g in whole.values()]).norm()
        error = torch.stack([(gradient[name] - whole[name]).norm() for name in whole]).norm()
        assert error / scale < 1e-5


class Waits(Callback):
    """Note at which optimizer steps the host waited, from one micro-batch's end to the next one's."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.by_step = watch, collections.defaultdict[int, list[str]](list)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.waits.clear()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step + (not args[1]["is_last"])  # after its last micro-batch, it is counted
        self.by_step[step] += self.watch.waits
        self.watch.waits.clear()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("model_type", "changes"), [("bert", {}), ("gpt2", {}), ("bert", {"soft_targets": "masked"})])
def test_the_host_waits_in_no_step_that_does_not_log(
    model_type: str, changes: dict[str, Any], precision: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = build_teacher(model_type, num_layers=2)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)
    module = build_module(tokenizer, teacher=teacher, optimizer=optimizer, scheduler="linear", **changes)
    steps = [full_batch(lm=teacher.lm, blocks=8, seed=seed) for seed in range(7)]
    for step in steps:
        del step["labelled"]
    with Watch() as watch:
        waits = Waits(watch)
        fit(
            module,
            steps,
            micro_batch_size=4,
            precision=precision,
            gradient_clip_val=5.0,
            log_every_n_steps=3,
            callbacks=[ValidateEvery(optimizer_steps=100), Throughput(), waits],
            check_val_every_n_epoch=None,
        )
    assert {step for step, found in waits.by_step.items() if found} == {3, 6}
    assert set(waits.by_step) == {1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_activation_checkpointing_changes_no_gradient_of_a_step(
    model_type: str, precision: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    gradients = []
    for checkpoints in (False, True):
        module, found = build_module(tokenizer, teacher=build_teacher(model_type, num_layers=2)), Gradients()
        if checkpoints:
            checkpoint_activations(module.student)
        steps = [uneven_step(lm=module.lm)]
        fit(module, steps, micro_batch_size=8, precision=precision, callbacks=[found])
        gradients.append(found.steps[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():  # with dropout, which is drawn again as it was
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


CHANGING = {
    "alpha_ce": [[0, 5], [0.5, 0], [1, 0]],
    "alpha_mlm": [[0, 1], [1, 3]],
    "alpha_clm": 0.0,
    "alpha_cos": [[0, 0], [0.25, 0], [0.25, 1], [1, 1]],
    "alpha_mse": 0.0,
}
FROZEN = functools.partial(torch.optim.SGD, lr=0.0)


@pytest.mark.parametrize("micro_batch_size", [32, 5])
def test_each_step_has_the_gradient_of_its_own_weights(
    micro_batch_size: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    steps, gradients = [uneven_step(lm="mlm", seed=seed) for seed in range(4)], Gradients()
    changing = build_module(tokenizer, alphas=CHANGING, optimizer=FROZEN)
    fit(changing, steps, micro_batch_size=micro_batch_size, callbacks=[gradients])
    weights = [(5.0, 1.0, 0.0), (2.5, 1.5, 1.0), (0.0, 2.0, 1.0), (0.0, 2.5, 1.0)]  # ce, mlm, cos
    for number, (ce, mlm, cos) in enumerate(weights):
        alphas = {**DISTILBERT, "alpha_ce": ce, "alpha_mlm": mlm, "alpha_cos": cos}
        alone, fixed = Gradients(), build_module(tokenizer, alphas=alphas, optimizer=FROZEN)
        fit(fixed, [steps[number]], micro_batch_size=32, callbacks=[alone])
        found, expected = gradients.steps[number], alone.steps[0]
        assert found.keys() == expected.keys()
        scale = torch.stack([each.norm() for each in expected.values()]).norm()
        error = torch.stack([(found[name] - expected[name]).norm() for name in expected]).norm()
        assert error / scale < 1e-5, number


def test_what_only_some_steps_read_has_a_gradient_of_zero_in_the_others(tokenizer: PreTrainedTokenizerBase) -> None:
    alphas = {**dict.fromkeys(DISTILBERT, 0.0), "alpha_cos": 1.0, "alpha_ce": [[0, 0], [0.5, 0], [1, 1]]}
    module, gradients = build_module(tokenizer, alphas=alphas, optimizer=FROZEN), Gradients()
    fit(module, [uneven_step(lm="mlm", seed=seed) for seed in range(4)], micro_batch_size=8, callbacks=[gradients])
    head = [name for name, _ in module.student.named_parameters() if name.startswith("vocab_")]
    assert len(head) == 5  # DDP waits for the gradient of each
    totals = [sum(float(step[name].abs().sum()) for name in head) for step in gradients.steps]
    assert totals[:3] == [0, 0, 0]
    assert totals[3] > 0


def test_weights_follow_the_clock_of_a_budget(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, found = build_module(tokenizer, alphas=CHANGING, optimizer=FROZEN, budget=1000.0), []

    class Weights(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            module.clock.used = 250.0 * trainer.global_step

        def on_train_batch_end(self, *_: Any) -> None:
            found.append(module.step_objective.alpha_mlm)
            assert module.progress_at(99) == module.progress

    monkeypatch.setattr(module.clock, "end_step", lambda agree=None: None)
    fit(module, [uneven_step(lm="mlm", size=4)] * 10, micro_batch_size=4, callbacks=[Weights()], max_steps=4)
    assert found == [1.0, 1.5, 2.0, 2.5]


class Logged(DummyLogger):
    """Keep what each step logs."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.steps[step] = {name: value for name, value in metrics.items() if name.startswith(("train/l", "val/"))}


def test_terms_are_logged_without_their_weights_and_only_where_they_count(tokenizer: PreTrainedTokenizerBase) -> None:
    steps, logged = [uneven_step(lm="mlm")] * 4, Logged()
    fit(build_module(tokenizer, alphas=CHANGING, optimizer=FROZEN), steps, micro_batch_size=8, logger=logged)
    plain = build_module(tokenizer, optimizer=FROZEN)
    terms = {name: float(value) for name, value in fit(plain, steps[:1], micro_batch_size=32).logged_metrics.items()}
    ce, mlm, cos = (terms[f"train/loss_{name}"] for name in ("ce", "mlm", "cos"))
    expected = [
        {"train/loss": 5 * ce + mlm, "train/loss_ce": ce, "train/loss_mlm": mlm},
        {"train/loss": 2.5 * ce + 1.5 * mlm + cos, "train/loss_ce": ce, "train/loss_mlm": mlm, "train/loss_cos": cos},
        {"train/loss": 2 * mlm + cos, "train/loss_mlm": mlm, "train/loss_cos": cos},
        {"train/loss": 2.5 * mlm + cos, "train/loss_mlm": mlm, "train/loss_cos": cos},
    ]
    for found, wanted in zip(logged.steps.values(), expected, strict=True):
        assert found == pytest.approx({**wanted, "train/lr": 0.0}, rel=1e-5)


def test_operations_are_counted_by_what_each_step_reads(tokenizer: PreTrainedTokenizerBase) -> None:
    step = full_batch(lm="mlm", blocks=8)
    counted = {}
    for name, changes in {
        "all": {},
        "without": {"alphas": {**DISTILBERT, "alpha_ce": 0.0, "alpha_cos": 0.0}},
        "masked": {"soft_targets": "masked"},
    }.items():
        throughput, module = Throughput(), build_module(tokenizer, optimizer=FROZEN, **changes)
        fit(module, [step] * 3, micro_batch_size=4, callbacks=[throughput], log_every_n_steps=100)
        counted[name] = throughput.window_flops
    assert counted["all"] > counted["masked"] > counted["without"]


def test_the_smaller_last_step_of_an_epoch_is_taken_by_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    steps = [uneven_step(lm="mlm", seed=seed, size=size) for seed, size in ((0, 32), (1, 32), (2, 11))]
    module, gradients = build_module(tokenizer), Gradients()
    trainer = fit(module, steps, micro_batch_size=4, callbacks=[gradients])
    assert trainer.global_step == 3

    alone, last = build_module(tokenizer, optimizer=functools.partial(torch.optim.SGD, lr=0.0)), Gradients()
    alone.student.load_state_dict(module.student.state_dict())
    with torch.no_grad():  # undo the last step: the learning rate is 1
        for name, parameter in alone.student.named_parameters():
            parameter.add_(gradients.steps[2][name])
    fit(alone, [steps[2]], micro_batch_size=11, callbacks=[last])
    for name, gradient in last.steps[0].items():
        torch.testing.assert_close(gradients.steps[2][name], gradient, rtol=1e-3, atol=1e-5)


def test_only_weighted_terms_are_logged(tokenizer: PreTrainedTokenizerBase) -> None:
    module = build_module(tokenizer, alphas={**DISTILBERT, "alpha_ce": 0.0})
    trainer = fit(module, [uneven_step(lm="mlm")], micro_batch_size=32)
    assert {name for name in trainer.callback_metrics if name.startswith("train/loss")} == {
        "train/loss",
        "train/loss_mlm",
        "train/loss_cos",
    }


def test_the_student_trains_with_dropout_and_the_teacher_without(tokenizer: PreTrainedTokenizerBase) -> None:
    modes: list[tuple[bool, bool]] = []

    class Modes(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            student, teacher = pl_module.get_submodule("student"), pl_module.get_submodule("teacher")
            modes.append((all(m.training for m in student.modules()), any(m.training for m in teacher.modules())))

    module = build_module(tokenizer, teacher=build_teacher("bert", num_layers=2))
    step = uneven_step(lm="mlm")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=1,
        callbacks=[Modes()],
    )
    trainer.validate(module, DataLoader([step], batch_size=None), verbose=False)
    trainer.fit(module, Steps([step, step], 32), DataLoader([step], batch_size=None))
    assert modes == [(True, False), (True, False)]


def test_the_teacher_gets_no_gradient_and_does_not_change(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("bert", num_layers=2)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    fit(build_module(tokenizer, teacher=teacher), [uneven_step(lm="mlm")], micro_batch_size=8)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("bf16-mixed", "auto", torch.bfloat16),
        ("bf16-mixed", "float32", torch.float32),
        ("32-true", "auto", torch.float32),
    ],
)
def test_the_teacher_is_cast_once_where_the_trainer_runs_in_bfloat16_unless_told_not_to(
    precision: Any, dtype: Any, expected: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = dataclasses.replace(build_teacher("bert", num_layers=2, **NO_DROPOUT), dtype=dtype)
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
    module = build_module(tokenizer, teacher=teacher, optimizer=optimizer)
    fit(module, [uneven_step(lm="mlm")], micro_batch_size=32, precision=precision)
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {expected}
    assert {parameter.dtype for parameter in module.student.parameters()} == {torch.float32}
    exact = build_module(tokenizer, optimizer=optimizer)
    fit(exact, [uneven_step(lm="mlm")], micro_batch_size=32)
    terms = {name: float(term) for name, term in module.step_terms.items()}
    assert terms == pytest.approx({name: float(term) for name, term in exact.step_terms.items()}, rel=2e-2)


def test_ranks_may_differ_in_their_cache_but_in_no_other_setting(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    class Strategy:
        def broadcast(self, mine: str) -> str:
            sent.append(mine)
            return sent[0]

    trainer = SimpleNamespace(strategy=Strategy(), precision="32-true", world_size=2)
    monkeypatch.setattr(DistillationModule, "trainer", trainer)

    def start(cache: str, lr: float) -> None:
        config = {"cache_dir": cache, "data": {"cache_dir": cache}, "optimizer": {"lr": lr}}
        build_module(tokenizer, record={"config": config, "metadata": {"license": cache}}).setup("fit")

    start("/scratch/a", 0.1)
    start("/scratch/b", 0.1)
    with pytest.raises(UserError, match="was started with another config than rank 0"):
        start("/scratch/a", 0.2)


def test_sharded_models_refuse_a_loss_that_is_scaled(tokenizer: PreTrainedTokenizerBase) -> None:
    trainer: Any = SimpleNamespace(strategy=FullyShardedStrategy(), precision="16-mixed")
    with pytest.raises(UserError, match=r"the scale of sharded gradients was not tried; set trainer.precision=bf16-m"):
        build_module(tokenizer).check_precision(trainer)
    trainer.precision = "bf16-mixed"
    build_module(tokenizer).check_precision(trainer)


def test_a_cast_teacher_keeps_the_digits_of_its_rotary_frequencies(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("modernbert", num_layers=2)
    before = {name: buffer.clone() for name, buffer in teacher.model.named_buffers()}
    assert before
    module = build_module(tokenizer, teacher=teacher, optimizer=functools.partial(torch.optim.SGD, lr=1e-3))
    fit(module, [uneven_step(lm="mlm")], micro_batch_size=32, precision="bf16-mixed")
    for name, buffer in teacher.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_vectors_are_not_decayed_and_matrices_are(tokenizer: PreTrainedTokenizerBase) -> None:
    optimizer = functools.partial(torch.optim.AdamW, lr=0.0, weight_decay=0.1)
    module = build_module(tokenizer, optimizer=optimizer)
    trainer = fit(module, [uneven_step(lm="mlm")], micro_batch_size=32)
    decayed, free = trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert sum(p.numel() for p in decayed["params"] + free["params"]) == sum(
        p.numel() for p in module.student.parameters()
    )


RELATIONS = {**dict.fromkeys(DISTILBERT, 0.0), "alpha_rel": 1.0, "relation_heads": 4}


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_accumulation_changes_neither_relations_nor_their_gradient(
    model_type: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    fields = NO_DROPOUT if model_type == "bert" else NO_GPT2_DROPOUT
    teacher = build_teacher(model_type, num_layers=2, **fields)
    results = []
    for micro_batch_size in (32, 5):
        module = build_module(tokenizer, teacher=teacher, alphas=RELATIONS | {"teacher_layer": 1})
        gradients = Gradients()
        steps = [uneven_step(lm=teacher.lm)]
        trainer = fit(module, steps, micro_batch_size=micro_batch_size, callbacks=[gradients])
        results.append((trainer.callback_metrics["train/loss_rel"], gradients.steps[0]))
    assert results[0][0] > 0.01
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_relations_alone_freeze_what_comes_after_them_so_that_no_rank_waits_for_its_gradient(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    teacher = build_teacher("bert", num_layers=4, **NO_DROPOUT)
    alphas = RELATIONS | {"student_layer": 0, "teacher_layer": 3}  # the student has two layers
    module = build_module(tokenizer, teacher=teacher, alphas=alphas)
    gradients = Gradients()
    fit(module, [uneven_step(lm="mlm")], micro_batch_size=32, callbacks=[gradients])
    trained = {name for name, parameter in module.student.named_parameters() if parameter.requires_grad}
    assert trained == gradients.steps[0].keys()
    assert {name.partition(".weight")[0].partition(".bias")[0] for name in trained} == {
        *(f"distilbert.embeddings.{name}" for name in ("word_embeddings", "position_embeddings", "LayerNorm")),
        *(f"distilbert.transformer.layer.0.attention.{name}_lin" for name in "qkv"),
    }


def test_a_head_that_no_term_reads_is_frozen_so_that_no_rank_waits_for_its_gradient(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    module = build_module(tokenizer, alphas={**dict.fromkeys(DISTILBERT, 0.0), "alpha_cos": 1.0})
    fit(module, [uneven_step(lm="mlm")], micro_batch_size=32)
    frozen = {name for name, parameter in module.student.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        *(f"vocab_transform.{part}" for part in ("weight", "bias")),
        *(f"vocab_layer_norm.{part}" for part in ("weight", "bias")),
        "vocab_projector.bias",
    }
    assert all(parameter.requires_grad for parameter in build_module(tokenizer).student.parameters())


def test_the_schedule_warms_up_and_decays_to_zero_over_the_optimizer_steps(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    module = build_module(
        tokenizer, optimizer=functools.partial(torch.optim.SGD, lr=0.8), scheduler="linear", warmup_share=0.2
    )
    steps = [uneven_step(lm="mlm", seed=seed, size=8) for seed in range(10)]
    fit(module, steps, micro_batch_size=2, callbacks=[Rates()])
    assert rates == pytest.approx([0.0, 0.4, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_progress_is_the_share_of_steps_that_are_done_and_0_before_it_is_known(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    shares: list[float] = []

    class Shares(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            shares.append(pl_module.progress)

    module = build_module(tokenizer)
    assert module.progress == 0.0
    steps = [uneven_step(lm="mlm", seed=seed, size=8) for seed in range(4)]
    trainer = fit(module, steps, micro_batch_size=4, callbacks=[Shares()])
    assert shares == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert module.progress == 1.0
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again, found = build_module(tokenizer), shares.copy()
    shares.clear()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    longer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[Shares()], **quiet)
    longer.fit(again, Steps(steps, 8), ckpt_path=tmp_path / "a.ckpt")
    assert found and shares == [0.5, 0.625, 0.75, 0.875]


def test_validation_metrics_are_the_plain_formulas_over_all_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    module = build_module(tokenizer)
    steps = [uneven_step(lm="mlm", seed=seed, size=size) for seed, size in ((0, 8), (1, 3))]
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (got,) = trainer.validate(module, DataLoader(steps, batch_size=None), verbose=False)

    models = {"": module.student.eval(), "teacher_": module.teacher}
    logits: dict[str, list[torch.Tensor]] = {"": [], "teacher_": []}
    labels, kl, tokens = [], torch.tensor(0.0), 0
    with torch.no_grad():
        for step in steps:
            rows = step["labels"] != IGNORE_INDEX
            real = step["attention_mask"].bool()
            both = {
                name: m(step["input_ids"], attention_mask=step["attention_mask"]).logits for name, m in models.items()
            }
            labels.append(step["labels"][rows])
            for name, value in both.items():
                logits[name].append(value[rows])
            q, p = ((both[name][real] / 2).log_softmax(-1) for name in ("", "teacher_"))
            kl += 4 * (p.exp() * (p - q)).sum()
            tokens += int(real.sum())
    target = torch.cat(labels)
    for name in models:
        every = torch.cat(logits[name])
        nll = float(torch.nn.functional.cross_entropy(every, target))
        assert got[f"val/{name}nll"] == pytest.approx(nll, rel=1e-5)
        assert got[f"val/{name}perplexity"] == pytest.approx(np.exp(nll), rel=1e-4)
        assert got[f"val/{name}accuracy"] == pytest.approx(float((every.argmax(-1) == target).float().mean()))
    same = torch.cat(logits[""]).argmax(-1) == torch.cat(logits["teacher_"]).argmax(-1)
    assert got["val/agreement"] == pytest.approx(float(same.float().mean()))
    assert got["val/loss_ce"] == pytest.approx(float(kl) / tokens, rel=1e-4)
    step, blocks, first = steps[0], module.after_blocks, steps[0]["labels"] != IGNORE_INDEX
    scores = torch.nn.functional.cross_entropy(logits[""][0], step["labels"][first], reduction="none")
    right = logits["teacher_"][0].argmax(-1) == step["labels"][first]
    for index in range(8):  # its blocks, which come first
        rows = first.nonzero()[:, 0] == index
        assert blocks["tokens"][index] == rows.sum()
        assert blocks["nll"][index] == pytest.approx(float(scores[rows].sum()), rel=1e-5)
        assert blocks["teacher_accuracy"][index] == right[rows].sum()
    assert len(blocks["ids"].unique()) == len(blocks["ids"]) == 11
    weighted = 5 * got["val/loss_ce"] + 2 * got["val/loss_mlm"] + got["val/loss_cos"]
    assert got["val/loss"] == pytest.approx(weighted, rel=1e-5)


def test_a_run_in_double_precision_is_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    step, scores = uneven_step(lm="mlm"), []
    for precision in ("32-true", "64-true"):
        module = build_module(tokenizer, optimizer=FROZEN)
        trainer = fit(module, [step], micro_batch_size=8, precision=precision)
        scores += trainer.validate(module, DataLoader([step], batch_size=None), verbose=False)
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_held_out_text_is_scored_by_the_weights_of_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    step = uneven_step(lm="mlm", size=8)
    scores = []
    for changes in ({}, {"alphas": CHANGING}):
        module = build_module(tokenizer, optimizer=FROZEN, **changes)
        trainer = fit(module, [step], micro_batch_size=8)
        scores += trainer.validate(module, DataLoader([step], batch_size=None), verbose=False)
    plain, changing = scores
    assert changing.keys() == plain.keys()
    weighted = 3 * plain["val/loss_mlm"] + plain["val/loss_cos"]
    assert changing == pytest.approx({**plain, "val/loss": weighted}, rel=1e-5)


def saved_checkpoint(module: DistillationModule, folder: Path) -> tuple[Path, dict[str, Any]]:
    trainer = fit(module, [uneven_step(lm="mlm")], micro_batch_size=32)
    file = folder / "a.ckpt"
    trainer.save_checkpoint(file)
    return file, torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("num_steps", "optimizer_steps", "expected"), [(5, 2, [0, 2, 4, 5]), (7, 3, [0, 3, 6, 7]), (3, 100, [0, 3])]
)
def test_validation_comes_first_then_at_least_every_so_many_steps_and_at_the_end(
    num_steps: int, optimizer_steps: int, expected: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    validated = []

    class Record(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            validated.append(trainer.global_step)

    module = build_module(tokenizer, optimizer=functools.partial(torch.optim.SGD, lr=0.01))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ValidateEvery(optimizer_steps=optimizer_steps), Record()],
        max_epochs=1,
        accumulate_grad_batches=2,
        check_val_every_n_epoch=None,
        val_check_interval=1000,
        num_sanity_val_steps=-1,
    )
    held_out = [uneven_step(lm="mlm", seed=99, size=4)]
    steps = [uneven_step(lm="mlm", seed=seed, size=4) for seed in range(num_steps)]
    trainer.fit(module, Steps(steps, 2), DataLoader(held_out, batch_size=None))
    assert validated == expected
    (scores,) = trainer.validate(module, DataLoader(held_out, batch_size=None), verbose=False)
    assert module.after == pytest.approx(scores)
    assert module.before["val/nll"] != module.after["val/nll"]


@pytest.mark.parametrize("soft_targets", ["all", "masked"])
def test_each_backbone_sees_a_batch_once_in_training_and_in_validation(
    soft_targets: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher, counted = build_teacher("bert", num_layers=2, **NO_DROPOUT), []
    module = build_module(tokenizer, teacher=teacher, soft_targets=soft_targets)
    for model in (module.student, teacher.model):
        model.base_model.register_forward_hook(lambda *_, name=model.config.model_type: counted.append(name))
    step = uneven_step(lm="mlm", size=4)
    trainer = fit(module, [step], micro_batch_size=4)
    assert sorted(counted) == ["bert", "distilbert"]
    trainer.validate(module, DataLoader([step], batch_size=None), verbose=False)
    assert sorted(counted) == ["bert", "bert", "distilbert", "distilbert"]


def test_checkpoints_hold_the_student_and_not_the_teacher(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    module = build_module(tokenizer)
    _, saved = saved_checkpoint(module, tmp_path)
    assert set(saved["state_dict"]) == {f"student.{name}" for name in module.student.state_dict()}
    assert saved["hyper_parameters"]["temperature"] == 2.0
    assert saved["hyper_parameters"]["alpha_ce"] == 5.0
    assert {"config.json", "tokenizer.json"} <= set(saved["distilkit"]["files"])


def resume(module: DistillationModule, file: Path, *callbacks: Callback) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, Steps([uneven_step(lm="mlm")], 32), ckpt_path=file)


def test_resuming_puts_the_student_back_and_goes_on(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    restored: dict[str, torch.Tensor] = {}

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            restored.update({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    module = build_module(tokenizer)
    file, saved = saved_checkpoint(module, tmp_path)
    again = build_module(tokenizer)
    resume(again, file, Start())
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(restored[name], tensor)
    assert again.tokens_seen == 2 * module.tokens_seen


def test_a_resumed_run_takes_the_optimizers_settings_of_its_own_command(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def adam(**given: Any) -> dict[str, Any]:
        settings = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0, "fused": None, **given}
        return {
            "optimizer": functools.partial(torch.optim.AdamW, **settings),
            "scheduler": "linear",
            "warmup_share": 0.5,
        }

    found: list[Any] = []

    class Groups(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            found.append([dict(group) for group in trainer.optimizers[0].param_groups])
            found.append(trainer.lr_scheduler_configs[0].scheduler.get_last_lr())

    file, _ = saved_checkpoint(build_module(tokenizer, **adam()), tmp_path)
    other = adam(lr=1e-5, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1, fused=True)
    resume(build_module(tokenizer, **other), file, Groups())
    (matrices, others), rates = found  # at step 1 of 2, where the warm-up has ended
    for group in (matrices, others):
        assert (group["lr"], group["initial_lr"], group["betas"], group["eps"]) == (1e-5, 1e-5, (0.8, 0.9), 1e-8)
        assert group["fused"] is None  # the state that was restored is not one of a fused optimizer
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert rates == [1e-5, 1e-5]


def test_a_run_is_decayed_from_a_step_of_another(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.steps: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            self.steps.append(trainer.optimizers[0].param_groups[0]["lr"])
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    steps, trunk, end = [uneven_step(lm="mlm", size=4)] * 8, Rates(), Rates()
    warm_and_stay = {"warmup_share": 0.25, "scheduler_kwargs": {"decay_share": 0.125}}
    fit(build_module(tokenizer, scheduler="wsd", **warm_and_stay), steps, micro_batch_size=4, callbacks=[trunk])
    assert trunk.steps == [0, 0.5, 1, 1, 1, 1, 1, 1]
    points = {"points": [[0, 0], [0.125, 1], [4 / 6, 1], [1, 0]]}
    branch = build_module(tokenizer, scheduler="piecewise", warmup_share=0.25, scheduler_kwargs=points)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, max_steps=6, callbacks=[end], **quiet)
    trainer.fit(branch, Steps(steps, 4), ckpt_path=tmp_path / "4.ckpt")
    assert end.steps == pytest.approx([1.0, 0.5])
    assert trainer.global_step == 6


def test_weights_that_change_resume_with_the_same_points_only(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file, saved = saved_checkpoint(build_module(tokenizer, alphas=CHANGING), tmp_path)
    assert saved["distilkit"]["objective"]["alpha_ce"] == [[0, 5], [0.5, 0], [1, 0]]
    resume(build_module(tokenizer, alphas=copy.deepcopy(CHANGING)), file)
    with pytest.raises(
        UserError, match=r"objective.alpha_mlm=\[\[0, 1\], \[1, 3\]\], this run has \[\[0, 1\], \[1, 2\]\]"
    ):
        resume(build_module(tokenizer, alphas={**CHANGING, "alpha_mlm": [[0, 1], [1, 2]]}), file)
    del saved["distilkit"]["objective"]["cos_targets"]  # as of earlier versions, which had its default
    torch.save(saved, file)
    resume(build_module(tokenizer, alphas=CHANGING), file)
    changed = build_module(tokenizer, alphas=CHANGING)
    changed.objective = dataclasses.replace(changed.objective, cos_targets="masked")
    with pytest.raises(UserError, match=r"objective.cos_targets=all, this run has masked; resume with the same"):
        resume(changed, file)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file, saved = saved_checkpoint(build_module(tokenizer), tmp_path)
    with pytest.raises(
        UserError, match=r"trained with objective.alpha_cos=1.0, this run has 0.5; resume with the same"
    ):
        resume(build_module(tokenizer, alphas={**DISTILBERT, "alpha_cos": 0.5}), file)
    on_purpose = build_module(tokenizer, alphas={**DISTILBERT, "alpha_cos": 0.5})
    on_purpose.record["config"] = {"may_change": ["objective.alpha_cos"]}
    resume(on_purpose, file)
    with pytest.raises(
        UserError, match=r"distilled from teacher 'tiny-bert', this run has 'tiny-bert' or other weights"
    ):
        resume(build_module(tokenizer, teacher=build_teacher("bert", num_layers=2, seed=7, **NO_DROPOUT)), file)
    torch.save({**saved, "epoch": 9}, file)
    with pytest.raises(UserError, match=r"the checkpoint has 9 epochs, more than trainer.max_epochs=\d; set"):
        resume(build_module(tokenizer), file)
    saved["distilkit"]["shapes"]["vocab_projector.bias"] = [3]
    torch.save(saved, file)
    with pytest.raises(UserError, match=r"the checkpoint has another student: vocab_projector.bias differs"):
        resume(build_module(tokenizer), file)
    del saved["distilkit"]
    torch.save(saved, file)
    with pytest.raises(UserError, match="the checkpoint was not written by distilkit; give ckpt_path of a run"):
        resume(build_module(tokenizer), file)


def test_a_loss_that_is_not_finite_stops_training(tokenizer: PreTrainedTokenizerBase) -> None:
    module = build_module(tokenizer)
    with torch.no_grad():
        module.student.vocab_projector.bias[7] = float("nan")
    with pytest.raises(
        UserError, match=r"the loss is not finite at step 0 .*Lower optimizer.lr.*there is no checkpoint"
    ):
        fit(module, [uneven_step(lm="mlm")], micro_batch_size=32)


class BadGradient(Callback):
    """Make one entry of a gradient infinite in some optimizer steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step in self.steps:
            next(pl_module.get_submodule("student").parameters()).grad[7, 0] = float("inf")


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_left_out_changes_neither_weights_nor_optimizer_nor_schedule(
    bad: str, fused: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    adam = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.98)}
    optimizer = functools.partial(torch.optim.AdamW, **adam, fused=fused)
    module = build_module(tokenizer, optimizer=optimizer, scheduler="linear", max_skipped=1, alphas=DISTILBERT)
    named = {name: each for name, each in module.student.named_parameters() if each.requires_grad}
    expected = {name: parameter.detach().clone().requires_grad_() for name, parameter in named.items()}
    steps, gradients = [uneven_step(lm="mlm", seed=seed, size=8) for seed in range(6)], Gradients()
    break_ = NotFinite(steps=[2]) if bad == "loss" else BadGradient(2)
    trainer = fit(module, steps, micro_batch_size=4, callbacks=[gradients, break_], log_every_n_steps=1)
    assert (trainer.global_step, module.num_skipped) == (6, 1)
    matrices = [each for each in expected.values() if each.ndim >= 2]
    others = [each for each in expected.values() if each.ndim < 2]
    plain = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], **adam)
    for step in (0, 1, 3, 4, 5):
        for group in plain.param_groups:
            group["lr"] = 1e-2 * (1 - step / 6)
        for name, parameter in expected.items():
            parameter.grad = gradients.steps[step][name]
        plain.step()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=1e-5, atol=1e-7)
    state = trainer.optimizers[0].state[next(iter(named.values()))]
    assert int(state["step"]) == 5


def test_a_run_that_leaves_out_too_many_steps_stops_and_names_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    module = build_module(tokenizer, max_skipped=2, seed=5)
    steps = [uneven_step(lm="mlm", seed=seed, size=4) for seed in range(3)]
    with pytest.raises(
        UserError,
        match=r"at step 5 .*distilkit\.replay\(run, epoch=1, step=2\) returns its batch of seed=5.*; "
        "max_skipped=2 steps were left out before",
    ):
        fit(module, steps, micro_batch_size=4, max_epochs=3, callbacks=[NotFinite(steps=[1, 3, 5])])


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_the_first_step_that_is_not_finite_is_named_although_a_later_one_is_logged(
    bad: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    module = build_module(tokenizer)
    steps = [uneven_step(lm="mlm", seed=seed, size=4) for seed in range(3)]
    break_ = NotFinite(steps=[4]) if bad == "loss" else BadGradient(4)
    with pytest.raises(
        UserError, match=r"the loss is not finite at step 4 or .*\(at step 8: .*replay\(run, epoch=1, step=1\)"
    ):
        fit(module, steps, micro_batch_size=4, max_epochs=3, callbacks=[break_], log_every_n_steps=9)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_norm_of_the_gradient_is_logged_as_it_was_before_clipping(
    clip: float | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    gradients, module = Gradients(), build_module(tokenizer)
    trainer = fit(module, [uneven_step(lm="mlm")], micro_batch_size=8, callbacks=[gradients], gradient_clip_val=clip)
    squares = sum(float(each.double().square().sum()) for each in gradients.steps[0].values())
    assert float(trainer.callback_metrics["train/gradient_norm"]) == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert math.sqrt(squares) > 0.2


def test_spikes_are_counted_over_a_resume(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    module = build_module(tokenizer)
    trainer = fit(module, [uneven_step(lm="mlm")], micro_batch_size=32)
    for spikes in module.spikes.values():
        for value in (*[1.0] * 20, 1000.0):
            spikes.add(torch.tensor(value))
    module.num_skipped = 3
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = build_module(tokenizer)
    resume(again, tmp_path / "a.ckpt")
    assert again.num_skipped == 3
    assert [spikes.seen for spikes in again.spikes.values()] == [23, 23]
    assert int(again.spikes["loss"].count) == 2  # that of the step after the resume, too


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    module = build_module(tokenizer)
    trainer = fit(module, [uneven_step(lm="mlm")], micro_batch_size=32)
    with torch.no_grad():
        module.student.vocab_transform.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"student.vocab_transform.weight is not finite at step 1; no checkpoint"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_all_ranks_stop_where_the_rank_that_holds_the_weights_finds_one_not_finite(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build_module(tokenizer)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, global_step=7, world_size=2)
    monkeypatch.setattr(DistillationModule, "trainer", trainer)
    of_all_ranks = iter([0.0, 1.0])  # all losses were finite, but rank 0 has found a weight
    monkeypatch.setattr(DistillationModule, "sum_over_ranks", lambda *_: torch.tensor(next(of_all_ranks)))
    with pytest.raises(UserError, match="a weight is not finite at step 7; no checkpoint was written"):
        module.on_save_checkpoint({"state_dict": {}})


def test_dropout_depends_on_the_step_and_not_on_what_was_drawn_before(tokenizer: PreTrainedTokenizerBase) -> None:
    step = uneven_step(lm="mlm")
    teacher = build_teacher("bert", num_layers=2, hidden_dropout_prob=0.5)
    losses = []
    for draws in (0, 3):
        module = build_module(tokenizer, teacher=teacher)
        torch.randn(draws)
        trainer = fit(module, [step], micro_batch_size=32)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] == losses[1]


def test_tokens_without_padding_are_counted_over_the_whole_run(tokenizer: PreTrainedTokenizerBase) -> None:
    module, throughput = build_module(tokenizer), Throughput()
    steps = [uneven_step(lm="mlm", seed=seed) for seed in range(3)]
    trainer = fit(module, steps, micro_batch_size=4, callbacks=[throughput])
    assert module.tokens_seen == sum(int(step["attention_mask"].sum()) for step in steps) < 3 * 32 * 16
    assert trainer.callback_metrics["throughput/tokens_per_second"] > 0
    assert 0 < trainer.callback_metrics["throughput/mfu"] < 1


def test_a_resumed_run_counts_tokens_and_seconds_of_both_parts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    module = build_module(tokenizer)
    trainer = fit(module, [uneven_step(lm="mlm")], micro_batch_size=32)
    module.clock.later = module.clock.wall = 1000.0
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again, throughput = build_module(tokenizer), Throughput()
    resume(again, tmp_path / "a.ckpt", throughput)
    assert throughput.window_began == 1000
    assert again.tokens_seen == 2 * module.tokens_seen > 0
    assert again.clock.seconds > 1000
    assert again.clock.wall > 1000


def test_a_wrong_warm_up_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        UserError, match=r"scheduler.warmup_share=1.5, but it must be between 0 and 1; the paper's is 0.05"
    ):
        build_module(tokenizer, warmup_share=1.5)


def test_a_held_out_loss_that_is_not_finite_is_no_score(tokenizer: PreTrainedTokenizerBase) -> None:
    module = build_module(tokenizer)
    with torch.no_grad():
        module.student.distilbert.embeddings.word_embeddings.weight[50] = float("nan")
    steps = [uneven_step(lm="mlm", size=8)]
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(UserError, match="the held-out loss is not finite after step 0"):
        trainer.validate(module, DataLoader(steps, batch_size=None), verbose=False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fused_optimizer_clips_gradients_as_a_plain_one_does(
    tokenizer: PreTrainedTokenizerBase, precision: Any
) -> None:
    def trained(*, fused: bool, clip: float | None) -> torch.Tensor:
        # An eps of 1 lets the size of the gradient through, which Adam would divide out.
        module = build_module(tokenizer, optimizer=functools.partial(torch.optim.AdamW, lr=1.0, eps=1.0, fused=fused))
        step = [uneven_step(lm="mlm")]
        fit(module, step, micro_batch_size=8, precision=precision, gradient_clip_val=clip)
        return torch.nn.utils.parameters_to_vector(module.student.parameters()).detach()

    clipped = trained(fused=True, clip=0.1)
    torch.testing.assert_close(clipped, trained(fused=False, clip=0.1), rtol=1e-5, atol=1e-6)
    assert (clipped - trained(fused=True, clip=None)).abs().max() > 1e-2


@pytest.mark.parametrize(("fused", "clip"), [(True, 5.0), (True, None), (False, 5.0)])
def test_a_fused_optimizer_that_cannot_clip_is_an_error_before_the_first_step(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, fused: bool, clip: float | None
) -> None:
    monkeypatch.setattr(Trainer, "precision", "16-mixed")  # of which a CPU makes bf16-mixed
    module = build_module(tokenizer, optimizer=functools.partial(torch.optim.AdamW, lr=1e-2, fused=fused))
    cure = r"gradient_clip_val=5\.0 cannot clip them.*set optimizer\.fused=null, or trainer\.precision=bf16-mixed"
    refused = pytest.raises(UserError, match=cure) if fused and clip else contextlib.nullcontext()
    with refused:
        fit(module, [uneven_step(lm="mlm")], micro_batch_size=8, gradient_clip_val=clip)
