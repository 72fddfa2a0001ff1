"""Fine-tune a model on a task, with a second distillation or without, and score it (arXiv 1910.01108, section 3)."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler
from transformers.trainer_pt_utils import LengthGroupedSampler

from distilkit.errors import UserError
from distilkit.task_model import has_token_types

log = logging.getLogger(__name__)

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of a feature and a batch; not every model takes them all
Feature = Mapping[str, Any]
Logits = tuple[Tensor, ...]


class Task(Protocol):
    """What can be fine-tuned on: ``TextTask`` and ``QuestionTask``.

    Features hold ``INPUTS``, each an array of ints, and ``target`` where they are trained on. Logits are a tuple, one tensor
    for each output of the head.
    """

    name: str
    max_length: int
    auto_class: Any

    @property
    def head(self) -> dict[str, Any]:
        """The fields of a model's config that its new head follows from."""
        ...

    def train_examples(self) -> list[Any]:
        """Read the training split."""
        ...

    def scored_examples(self) -> dict[str, list[Any]]:
        """Read the splits that are scored, by name."""
        ...

    def check_teacher(self, teacher: PreTrainedModel, *, name: str) -> None:
        """Make sure that a fine-tuned model has the outputs of this task."""
        ...

    def encode(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, train: bool
    ) -> list[dict[str, Any]]:
        """Turn examples into features."""
        ...

    def logits(self, outputs: Any, attention_mask: Tensor) -> Logits:
        """Take the logits out of a model's output, with nothing on padding."""
        ...

    def hard_loss(self, logits: Logits, targets: Tensor) -> Tensor:
        """Return the mean loss against the labels."""
        ...

    def soft_loss(self, logits: Logits, teacher_logits: Logits, *, temperature: float) -> Tensor:
        """Return the mean loss against the teacher."""
        ...

    def scores(
        self, logits: Sequence[Logits], features: Sequence[Feature], examples: Sequence[Any]
    ) -> dict[str, float]:
        """Score one split."""
        ...

    def predictions(self, logits: Sequence[Logits], features: Sequence[Feature], examples: Sequence[Any]) -> Any:
        """Return what the model says, as JSON."""
        ...


class Batches(LightningDataModule):
    """Serve features in batches padded to their longest, of like lengths together.

    The order of an epoch is a function of ``(seed, epoch)``, so that a resumed run repeats it; the trainer must reload
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
        """Take encoded features.

        Raises:
            UserError: the batch size is below 1.
        """
        super().__init__()
        if batch_size < 1:
            raise UserError(f"finetune.batch_size={batch_size}, but it must be at least 1")
        self.train, self.held_out, self.held_out_examples = train, held_out, held_out_examples
        self.tokenizer = tokenizer
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffle, and keep like lengths together."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        sampler = LengthGroupedSampler(
            self.batch_size,
            lengths=[len(feature["input_ids"]) for feature in self.train],
            generator=torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63),
        )
        return self._loader(self.train, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Serve the part of the training split that was held out for choosing, if any."""
        return self.ordered(self.held_out)

    def ordered(self, features: Sequence[Feature]) -> DataLoader[Any]:
        """Serve features from the longest to the shortest; each batch tells its ``rows``."""
        rows = sorted(range(len(features)), key=lambda row: -len(features[row]["input_ids"]))
        return self._loader([{**features[row], "row": row} for row in rows])

    def _loader(self, features: Sequence[Feature], sampler: Any = None) -> DataLoader[Any]:
        # The trainer drops nothing: the last batch of an epoch may be smaller.
        return DataLoader(features, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate)  # type: ignore[arg-type]

    def collate(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Pad to the longest; ``target`` and ``row`` become tensors beside the tokens."""
        batch: dict[str, Any] = dict(
            self.tokenizer.pad([{name: feature[name] for name in INPUTS} for feature in features], return_tensors="pt")
        )
        batch["num_tokens"] = sum(len(feature["input_ids"]) for feature in features)
        for name in ("target", "row"):
            if name in features[0]:
                batch[name] = torch.tensor([feature[name] for feature in features])
        return batch


class FinetuningModule(LightningModule):
    """Train a model with a task's head, beside a fine-tuned teacher or alone.

    The loss is ``alpha_task`` times the task's own plus, with a teacher, ``alpha_ce`` times the KL at ``temperature``.
    AdamW without decay of norms and biases, warmed up over ``warmup_share`` of the steps, then falling to zero.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        task: Task,
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
        for name, value, fits, limit in (
            ("finetune.lr", lr, lr > 0, "above 0"),
            ("finetune.weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("finetune.warmup_share", warmup_share, 0 <= warmup_share <= 1, "between 0 and 1"),
            ("distil.temperature", temperature, temperature > 0, "above 0"),
            ("distil.alpha_ce", alpha_ce, alpha_ce >= 0, "at least 0"),
            ("distil.alpha_task", alpha_task, alpha_task >= 0 and alpha_task + alpha_ce > 0, "above 0, or alpha_ce"),
        ):
            if not fits:
                raise UserError(f"{name}={value}, but it must be {limit}")
        self.model, self.teacher, self.task = model, teacher, task
        self.lr, self.weight_decay, self.warmup_share = lr, weight_decay, warmup_share
        self.alphas = (alpha_task, alpha_ce) if teacher is not None else (1.0, 0.0)
        self.temperature, self.seed = temperature, seed
        self.tokens_seen, self.seconds, self.started = 0, 0.0, time.perf_counter()
        self.collected: dict[int, Logits] = {}
        self.strict_loading = False  # the teacher is in no checkpoint
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        model.train()  # models come in eval mode, and ``Trainer.fit`` leaves modes alone

    def logits(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Logits:
        """Run a model on what it takes of a batch: DistilBERT knows no token types."""
        inputs = {name: batch[name] for name in INPUTS if name != "token_type_ids" or has_token_types(model)}
        return self.task.logits(model(**inputs), batch["attention_mask"])

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Make dropout a function of (seed, epoch, batch), so that a resumed run repeats it."""
        torch.manual_seed(hash((self.seed, self.current_epoch, batch_idx)) % 2**63)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch.

        Raises:
            UserError: it is not finite.
        """
        logits = self.logits(self.model, batch)
        alpha_task, alpha_ce = self.alphas
        loss = alpha_task * self.task.hard_loss(logits, batch["target"])
        if self.teacher is not None and alpha_ce:
            with torch.no_grad():
                targets = self.logits(self.teacher, batch)
            loss = loss + alpha_ce * self.task.soft_loss(logits, targets, temperature=self.temperature)
        self.tokens_seen += int(batch["num_tokens"])
        log_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by one of its connectors
        if log_every and (self.trainer.global_step + 1) % log_every == 0:
            if not math.isfinite(float(loss.detach())):
                raise UserError(
                    f"the loss is not finite at step {self.trainer.global_step}; lower finetune.lr={self.lr}"
                )
            self.log("train/loss", loss.detach())
        return loss

    def on_train_epoch_start(self) -> None:
        """Keep the teacher out of dropout: the trainer restores modes, and validation switches them."""
        if self.teacher is not None:
            self.teacher.eval()

    def on_validation_epoch_start(self) -> None:
        """Start afresh."""
        self.collected = {}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Collect the logits of the held-out rows."""
        self.collected |= self.predict_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Score the held-out rows, to choose by."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        logits = [self.collected[row] for row in range(len(self.collected))]
        scores = self.task.scores(logits, data.held_out, data.held_out_examples)
        self.log("held_out", sum(scores.values()) / len(scores), prog_bar=True)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[int, Logits]:
        """Return each row's logits, without what stands on its padding."""
        logits = [each.float().cpu() for each in self.logits(self.model, batch)]
        return {int(row): tuple(each[index] for each in logits) for index, row in enumerate(batch["row"])}

    def configure_optimizers(self) -> Any:
        """Decay matrices only, warm up and fall to zero over all steps."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        # Lightning does not clip the gradients of a fused optimizer where it mixes precisions.
        whole = str(self.trainer.precision) == "32-true"
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=whole)
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_scheduler(
            "linear", optimizer, num_warmup_steps=round(self.warmup_share * num_steps), num_training_steps=num_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
        checkpoint["spent"] = {"tokens": self.tokens_seen, "seconds": self.seconds + time.perf_counter() - self.started}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.tokens_seen, self.seconds = checkpoint["spent"]["tokens"], checkpoint["spent"]["seconds"]

    def on_train_start(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_end(self) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self.started
