"""Fine-tune a model on a task, with a second distillation or without, and score it (arXiv 1910.01108, section 3)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler
from transformers.trainer_pt_utils import LengthGroupedSampler

from distilkit.errors import UserError
from distilkit.evaluate.models import INPUTS, inputs_of
from distilkit.metrics import measure
from distilkit.records import Rows

Feature = Mapping[str, Any]
Logits = tuple[Tensor, ...]


class Trainable(Protocol):
    """What a model can be trained on.

    Features hold ``INPUTS``, each an array of ints, and ``target``. Logits are a tuple with one tensor for each output
    of the head.
    """

    name: str
    max_length: int
    auto_class: ClassVar[Any]

    @property
    def head(self) -> dict[str, Any]:
        """Return the fields of a model's config that determine a new head."""

    def check_head(self, model: PreTrainedModel, *, name: str) -> None:
        """Make sure that a fine-tuned model has the outputs of this task."""

    def logits(self, outputs: Any, attention_mask: Tensor) -> Logits:
        """Take the logits from a model's output, without mass on padding."""

    def hard_loss(self, logits: Logits, targets: Tensor) -> Tensor:
        """Return the mean loss against the labels."""

    def soft_loss(self, logits: Logits, teacher_logits: Logits, *, temperature: float) -> Tensor:
        """Return the mean loss against the teacher."""


class FinetuningTask(Trainable, Protocol):
    """What a model can be fine-tuned on and scored by rows: ``TextTask``, ``QuestionTask`` and ``EntityTask``."""

    @property
    def metrics(self) -> Sequence[str]:
        """Return the names of the metrics whose mean is the score."""

    def train_examples(self) -> list[Any]:
        """Read the training split."""

    def scored_examples(self) -> dict[str, list[Any]]:
        """Read the splits that are scored, by name."""

    def unlabelled_examples(self) -> dict[str, list[Any]]:
        """Read the splits to predict for a leaderboard, by its name of each."""

    def encode(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Turn examples into features."""

    def rows(self, logits: Sequence[Logits], features: Sequence[Feature], examples: Sequence[Any]) -> Rows:
        """Return what the model says of each example of a split; ``metrics`` score it."""

    def predictions(self, logits: Sequence[Logits], features: Sequence[Feature], examples: Sequence[Any]) -> Any:
        """Return the model's predictions, as JSON."""


class Batches(LightningDataModule):
    """Serve features in batches of similar lengths, padded to their longest.

    The order of an epoch is a function of ``(seed, epoch)``, so that a resumed run repeats it. The trainer must reload
    its loaders at each epoch.
    """

    def __init__(
        self,
        *,
        train: Sequence[Feature],
        held_out: Sequence[Feature],
        held_out_examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int,
    ) -> None:
        """Take encoded features."""
        super().__init__()
        self.train, self.held_out, self.held_out_examples = train, held_out, held_out_examples
        self.pad = DataCollatorWithPadding(tokenizer)
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffle, and keep similar lengths together."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        sampler = LengthGroupedSampler(
            self.batch_size,
            lengths=[len(feature["input_ids"]) for feature in self.train],
            generator=torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63),
        )
        return self._loader(self.train, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Serve the held-out part of the training split, which may be empty."""
        return self.ordered(self.held_out)

    def ordered(self, features: Sequence[Feature]) -> DataLoader[Any]:
        """Serve features from the longest to the shortest, with the place of each in ``row``."""
        order = sorted(range(len(features)), key=lambda row: -len(features[row]["input_ids"]))
        return self._loader([{**features[row], "row": row} for row in order])

    def _loader(self, features: Sequence[Feature], sampler: Any = None) -> DataLoader[Any]:
        tensors: Any = [{name: each[name] for name in (*INPUTS, "target", "row") if name in each} for each in features]
        return DataLoader(tensors, batch_size=self.batch_size, sampler=sampler, collate_fn=self.pad)


def hold_out(examples: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Split training examples into those to train on and those to choose by, the same for every seed and setting.

    Questions on one paragraph stay on one side.
    """
    groups: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(getattr(example, "context", index), []).append(index)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    members = [list(groups.values())[group] for group in order]
    held: set[int] = set()
    while members and len(held) < round(share * len(examples)):
        held.update(members.pop())
    if share and not (held and members):
        raise UserError(
            f"finetune.held_out={share} of {len(examples)} training rows leaves one side empty; set another share"
        )
    kept = [example for index, example in enumerate(examples) if index not in held]
    return kept, [examples[index] for index in sorted(held)]


class FinetuningModule(LightningModule):
    """Train a model with a task's head, alone or next to a fine-tuned teacher.

    The loss is ``alpha_task`` times the task's own plus, with a teacher, ``alpha_ce`` times the KL at ``temperature``.
    AdamW does not decay norms and biases. Its rate warms up over ``warmup_share`` of the steps, then falls to zero.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        task: Trainable,
        lr: float,
        weight_decay: float,
        warmup_share: float,
        alpha_task: float,
        alpha_ce: float,
        temperature: float,
        seed: int,
    ) -> None:
        """Wrap the models."""
        super().__init__()
        self.model, self.teacher, self.task = model, teacher, task
        self.lr, self.weight_decay, self.warmup_share = lr, weight_decay, warmup_share
        self.alphas = (alpha_task, alpha_ce) if teacher is not None else (1.0, 0.0)
        self.temperature, self.seed = temperature, seed
        self.tokens_seen: int | Tensor = 0  # a tensor on the device once it trains
        self.collected: dict[int, Logits] = {}
        self.shown: dict[str, float] = {}  # on the host, for the progress
        self.strict_loading = False  # the teacher is in no checkpoint
        if teacher is not None:
            teacher.requires_grad_(False)
        self.train()  # models come in eval mode, and ``Trainer.fit`` leaves modes alone

    def train(self, mode: bool = True) -> "FinetuningModule":
        """Switch the model between dropout and none; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def logits(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Logits:
        """Run a model on those inputs of a batch that it takes."""
        return self.task.logits(model(**inputs_of(model, batch)), batch["attention_mask"])

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Make dropout a function of (seed, epoch, batch), so that a resumed run repeats it."""
        torch.manual_seed(hash((self.seed, self.current_epoch, batch_idx)) % 2**63)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        logits = self.logits(self.model, batch)
        alpha_task, alpha_ce = self.alphas
        loss = alpha_task * self.task.hard_loss(logits, batch["target"])
        if self.teacher is not None and alpha_ce:
            with torch.no_grad():
                targets = self.logits(self.teacher, batch)
            loss = loss + alpha_ce * self.task.soft_loss(logits, targets, temperature=self.temperature)
        self.tokens_seen += batch["attention_mask"].sum()
        log_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by one of its connectors
        if log_every and (self.trainer.global_step + 1) % log_every == 0:
            self.shown["train/loss"] = float(loss.detach())
            if not math.isfinite(self.shown["train/loss"]):
                raise UserError(
                    f"the loss is not finite at step {self.trainer.global_step}; lower finetune.lr={self.lr}"
                )
            self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Collect the logits of the held-out features."""
        self.collected |= self.predict_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Score the held-out examples, to choose by, and forget their logits."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        logits = [self.collected[row] for row in range(len(self.collected))]
        self.collected = {}
        task = cast(FinetuningTask, self.task)
        scores = measure(task.metrics, task.rows(logits, data.held_out, data.held_out_examples))
        self.shown["held_out"] = sum(scores.values()) / len(scores)
        self.log("held_out", self.shown["held_out"])

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[int, Logits]:
        """Return the logits of each feature by its ``row``."""
        logits = [each.float().cpu() for each in self.logits(self.model, batch)]
        return {row: tuple(each[index] for each in logits) for index, row in enumerate(batch["row"].tolist())}

    def configure_optimizers(self) -> Any:
        """Decay matrices only; warm up and fall to zero over all steps."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        # Lightning cannot clip the gradients of a fused optimizer in mixed precision.
        whole = str(self.trainer.precision) == "32-true"
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=whole or None)
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_scheduler(
            "linear", optimizer, num_warmup_steps=round(self.warmup_share * num_steps), num_training_steps=num_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out, and keep the count of tokens."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
        checkpoint["tokens_seen"] = int(self.tokens_seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the count of tokens."""
        self.tokens_seen = checkpoint["tokens_seen"]
