"""Runs that stop or save anywhere, and go on as if they had not."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distilkit.callbacks import ValidateEvery
from distilkit.data import DistillationDataModule
from distilkit.errors import UserError
from distilkit.module import DistillationModule
from distilkit.student import cut_student
from streams import MASKING
from tiny import Texts, build_objective, build_teacher

PER_STEP = 4  # micro-batches of 2 blocks


class At(Callback):
    """Do something after a micro-batch, counted from 1 over the whole run."""

    def __init__(self, micro_batch: int, action: Callable[[Trainer], None]) -> None:
        self.left, self.action = micro_batch, action

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.action(trainer)


class Training:
    """A training of 8 sequences a step, which has dropout and masks to get wrong."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.steps_of_epoch = 0
        self.masking, self.objective = MASKING, build_objective("mlm", "fused")
        self.scheduler: dict[str, Any] = {"scheduler": "constant"}

    def data(self, **fields: Any) -> DistillationDataModule:
        sizes = {"block_size": 32, "global_batch_size": 8, "micro_batch_size": 2, "val_share": 0.2}
        options = {"max_val_blocks": 8, "attend_across_documents": True, "packing": "blocks", "num_workers": 0}
        settings: dict[str, Any] = sizes | options | {"seed": 0, "lm": "mlm", "cache_dir": str(self.folder)} | fields
        return DistillationDataModule(corpus=Texts(60), tokenizer=self.tokenizer, masking=self.masking, **settings)

    def __call__(
        self,
        *callbacks: Callback,
        steps: int = 12,
        resume: Path | None = None,
        validate: int = 100,
        data: dict[str, Any] | None = None,
        **trainer_fields: Any,
    ) -> dict[str, Tensor]:
        """Train, save last.ckpt, and return the student's weights and the number of tokens."""
        teacher = build_teacher("bert", num_layers=2)
        torch.manual_seed(1)
        module = DistillationModule(
            student=cut_student(teacher=teacher, tokenizer=self.tokenizer, layers="half"),
            teacher=teacher,
            tokenizer=self.tokenizer,
            lm="mlm",
            objective=self.objective,
            optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
            **self.scheduler,
            warmup_share=0.0,
            seed=0,
            record={"config": {}},
        )
        defaults: dict[str, Any] = {"max_steps": steps, "max_epochs": 20}
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            val_check_interval=1000,
            use_distributed_sampler=False,
            callbacks=[*callbacks, ValidateEvery(optimizer_steps=validate)],
            **defaults | trainer_fields,
        )
        datamodule = self.data(**(data or {}))
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume)
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self.steps_of_epoch = datamodule.loader().num_steps
        counts = {"tokens": torch.tensor(module.tokens_seen), "steps": torch.tensor(trainer.global_step)}
        return {**{name: tensor.clone() for name, tensor in module.student.state_dict().items()}, **counts}


@pytest.fixture
def training(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Training:
    return Training(tmp_path, tokenizer)


def largest_difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def stop(trainer: Trainer) -> None:
    trainer.should_stop = True


packings = pytest.mark.parametrize("data", [{}, {"packing": "documents"}], ids=["blocks", "documents"])


@packings
def test_a_run_that_is_told_to_stop_finishes_its_step_and_goes_on_from_there(
    training: Training, data: dict[str, Any]
) -> None:
    whole = training(data=data)
    assert 3 < training.steps_of_epoch < 12
    for micro_batch, steps in ((1, 1), (7, 2), (8, 2)):
        stopped = training(At(micro_batch, stop), data=data)
        assert int(stopped["steps"]) == steps
        again = training(resume=training.folder / "last.ckpt", data=data)
        assert largest_difference(whole, again) == 0.0, micro_batch


@packings
def test_a_checkpoint_from_within_a_step_goes_back_to_its_start(training: Training, data: dict[str, Any]) -> None:
    whole = training(data=data)
    file = training.folder / "within.ckpt"
    epoch = PER_STEP * training.steps_of_epoch
    for micro_batch in (1, 7, epoch - PER_STEP + 1, epoch + 3):
        training(At(micro_batch, lambda trainer: trainer.save_checkpoint(file)), steps=9, data=data)
        again = training(resume=file, data=data)
        assert largest_difference(whole, again) == 0.0, micro_batch


@packings
@pytest.mark.parametrize("validate", [100, 2])
def test_a_finished_run_goes_on_with_more_steps_wherever_it_ended(
    training: Training, validate: int, data: dict[str, Any]
) -> None:
    whole = training(validate=validate, data=data)
    epoch = training.steps_of_epoch
    for steps in (epoch - 1, epoch, epoch + 1):
        training(steps=steps, validate=validate, data=data)
        again = training(resume=training.folder / "last.ckpt", validate=validate, data=data)
        assert largest_difference(whole, again) == 0.0, steps


def test_a_run_that_ended_by_its_epochs_goes_on_with_more(training: Training) -> None:
    whole = training(steps=-1, max_epochs=3)
    training(steps=-1, max_epochs=1)
    assert largest_difference(whole, training(resume=training.folder / "last.ckpt", steps=-1, max_epochs=3)) == 0.0


def test_an_epoch_may_be_limited_to_whole_steps(training: Training) -> None:
    limit = 2 * PER_STEP
    whole = training(limit_train_batches=limit)
    for steps in (1, 2, 3):
        training(steps=steps, limit_train_batches=limit)
        again = training(resume=training.folder / "last.ckpt", limit_train_batches=limit)
        assert largest_difference(whole, again) == 0.0, steps
    with pytest.raises(
        UserError,
        match=r"limit_train_batches=10 ends an epoch after 10 micro-batches, within an optimizer step of 4; set "
        r"trainer\.limit_train_batches=8",
    ):
        training(limit_train_batches=10)
    training(limit_train_batches=1000)
    training(steps=1, fast_dev_run=True)


def test_another_accumulation_is_refused_and_the_cure_named(training: Training) -> None:
    with pytest.raises(
        UserError,
        match=r"trainer\.accumulate_grad_batches=7, but .* is 4 here; leave it out, and set data\.micro_batch_size=2 to",
    ):
        training(accumulate_grad_batches=7)
    training(steps=1, accumulate_grad_batches=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "an epoch of seed=0, but this run has 7, .*; resume with seed=0, or start a new run"),
        ({"block_size": 16}, r"data\.block_size=32, but this run has 16"),
        ({"packing": "documents"}, r"data\.packing=blocks, but this run has documents"),
        ({"attend_across_documents": False}, r"data\.attend_across_documents=True, but this run has False"),
        ({"global_batch_size": 4, "micro_batch_size": 1}, r"data\.global_batch_size=8, but this run has 4"),
        (
            {"val_share": 0.1},
            r"trained on the tokens of cache \w{16}, but this run reads \w{16}; resume with the same d",
        ),
    ],
)
def test_a_run_does_not_go_on_in_another_order(training: Training, change: dict[str, Any], message: str) -> None:
    training(steps=2)
    with pytest.raises(UserError, match=message):
        training(resume=training.folder / "last.ckpt", data=change)


def test_checkpoints_of_earlier_versions_go_on(training: Training) -> None:
    whole = training()
    file = training.folder / "last.ckpt"
    training(steps=2)
    saved = torch.load(file, weights_only=False)
    state = saved["DistillationDataModule"]
    assert state.pop("position") == 2 * PER_STEP
    saved["DistillationDataModule"] = {"position": 2 * PER_STEP} | {
        name: value for name, value in state.items() if re.fullmatch("per_step|num_blocks", name)
    }
    torch.save(saved, file)
    assert largest_difference(whole, training(resume=file)) == 0.0


class Labels(Callback):
    """Keep the numbers of labels and tokens of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch["is_first"]:
            self.steps.append((int(batch["num_labels"]), int(batch["num_tokens"])))


@pytest.mark.parametrize("num_workers, limit", [(0, 1.0), (2, 1.0), (0, 2 * PER_STEP)])
def test_a_run_whose_rates_and_weights_change_goes_on_exactly(
    training: Training, num_workers: int, limit: float
) -> None:
    training.masking = dataclasses.replace(MASKING, mlm_probability=[[0, 0.5], [0.75, 0.1], [1, 0.1]])
    weights = {"alpha_ce": [[0, 5], [0.5, 0], [1, 0]], "alpha_cos": [[0, 0], [0.5, 0], [0.5, 1], [1, 1]]}
    training.objective = dataclasses.replace(training.objective, **weights, soft_targets="masked")
    training.scheduler = {"scheduler": "wsd", "scheduler_kwargs": {"decay_share": 0.5}}
    data, whole_labels = {"num_workers": num_workers}, Labels()
    train = functools.partial(training, data=data, limit_train_batches=limit)
    whole = train(whole_labels)
    rates = [max(0.1, 0.5 - 0.4 * step / 9) for step in range(12)]
    full = [step for step in range(12) if whole_labels.steps[step][1] == 8 * 32]  # without a padded block
    assert {0, 11} < set(full)
    assert [whole_labels.steps[step][0] for step in full] == [8 * round(rates[step] * 32) for step in full]
    for micro_batch in (7, 20) if num_workers == 0 else (20,):
        train(At(micro_batch, stop))
        again_labels = Labels()
        again = train(again_labels, resume=training.folder / "last.ckpt")
        assert again_labels.steps == whole_labels.steps[-(-micro_batch // PER_STEP) :]
        assert largest_difference(whole, again) == 0.0, micro_batch


def test_held_out_text_has_the_last_rate(training: Training) -> None:
    def batches(rate: Any) -> list[Any]:
        training.masking = dataclasses.replace(MASKING, mlm_probability=rate)
        data = training.data()
        data.setup()
        return list(data.val_dataloader())

    for one, two in zip(batches([[0, 0.5], [1, 0.15]]), batches(0.15), strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])
        assert torch.equal(one["labels"], two["labels"])


class Keep(Callback):
    """Keep the micro-batches of one optimizer step."""

    def __init__(self, step: int) -> None:
        self.step, self.kept = step, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.kept.append({name: torch.as_tensor(value).clone() for name, value in batch.items()})


@packings
@pytest.mark.parametrize("rate", [0.15, [[0, 0.5], [1, 0.1]]])
def test_a_batch_is_made_again_from_seed_epoch_and_step(training: Training, data: dict[str, Any], rate: Any) -> None:
    training.masking = dataclasses.replace(MASKING, mlm_probability=rate)
    training(data=data, steps=1)
    step = training.steps_of_epoch + 2
    keep = Keep(step)
    training(keep, data=data)
    again = training.data(**data).replay(epoch=1, step=2, progress=step / 12)
    assert len(again) == len(keep.kept) == PER_STEP
    for one, two in zip(again, keep.kept, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(torch.as_tensor(one[name]), two[name]) for name in two)  # type: ignore[literal-required]
    other = training.data(**data).replay(epoch=1, step=1, progress=step / 12)
    assert not torch.equal(other[0]["input_ids"], again[0]["input_ids"])
    shares = [
        training.data(**data).replay(epoch=1, step=2, progress=step / 12, rank=rank, world_size=2) for rank in (0, 1)
    ]
    assert sum(len(part["input_ids"]) for share in shares for part in share) == 8
    with pytest.raises(UserError, match=r"step=99, but an epoch has \d+ steps; count from 0"):
        training.data(**data).replay(epoch=0, step=99)
