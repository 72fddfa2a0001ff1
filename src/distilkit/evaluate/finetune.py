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
from distilkit.evaluate.models import INPUTS, inputs_of

log = logging.getLogger(__name__)

Feature = Mapping[str, Any]
Logits = tuple[Tensor, ...]


class FinetuningTask(Protocol):
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

    def check_head(self, model: PreTrainedModel, *, name: str) -> None:
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


NUMBERS: dict[str, tuple[type, float, float, bool]] = {  # kind, least, most, and whether the least is allowed itself
    "finetune.lr": (float, 0, math.inf, False),
    "finetune.batch_size": (int, 1, math.inf, True),
    "finetune.epochs": (int, 0, math.inf, True),
    "finetune.weight_decay": (float, 0, math.inf, True),
    "finetune.warmup_share": (float, 0, 1, True),
    "finetune.held_out": (float, 0, 0.9, True),
    "finetune.patience": (int, 1, math.inf, True),
    "distil.alpha_task": (float, 0, math.inf, True),
    "distil.alpha_ce": (float, 0, math.inf, True),
    "distil.temperature": (float, 0, math.inf, False),
    "seed": (int, 0, 2**32 - 1, True),  # what numpy takes
}


def check_numbers(values: Mapping[str, Any]) -> None:
    """Make sure that values, by the config keys of ``NUMBERS``, are numbers within their limits.

    Raises:
        UserError: one is not.
    """
    for key, value in values.items():
        kind, least, most, closed = NUMBERS[key]
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and (least <= value if closed else least < value) and value <= most
        if not fits or (kind is int and not float(value).is_integer()):
            what = "a whole number" if kind is int else "a number"
            low = f"of at least {least:g}" if closed else f"above {least:g}"
            high = f" and at most {most}" if most < math.inf else ""
            raise UserError(f"{key}={value}, but it must be {what} {low}{high}")


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
        check_numbers({"finetune.batch_size": batch_size})
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


def hold_out(examples: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Split training rows into those to train on and those to choose by: the same ones for every seed and setting.

    Questions on one paragraph stay on one side.

    Raises:
        UserError: the share is out of range, or leaves one side empty.
    """
    check_numbers({"finetune.held_out": share})
    groups: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(getattr(example, "context", index), []).append(index)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    members = [list(groups.values())[group] for group in order]
    held: list[int] = []
    while members and len(held) < round(share * len(examples)):
        held += members.pop()
    if share and not (held and members):
        raise UserError(f"finetune.held_out={share} of {len(examples)} training rows leaves one side empty")
    kept = set(range(len(examples))) - set(held)
    return [examples[index] for index in sorted(kept)], [examples[index] for index in sorted(held)]


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
        task: FinetuningTask,
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
        check_numbers(
            {
                "finetune.lr": lr,
                "finetune.weight_decay": weight_decay,
                "finetune.warmup_share": warmup_share,
                "distil.alpha_task": alpha_task,
                "distil.alpha_ce": alpha_ce,
                "distil.temperature": temperature,
            }
        )
        if not alpha_task + alpha_ce:
            raise UserError("distil.alpha_task=0 and distil.alpha_ce=0 leave no loss; set one of them above 0")
        self.model, self.teacher, self.task = model, teacher, task
        self.lr, self.weight_decay, self.warmup_share = lr, weight_decay, warmup_share
        self.alphas = (alpha_task, alpha_ce) if teacher is not None else (1.0, 0.0)
        self.temperature, self.seed = temperature, seed
        self.tokens_seen, self.seconds, self.started = 0, 0.0, time.perf_counter()
        self.collected: dict[int, Logits] = {}
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
        """Run a model on what it takes of a batch: DistilBERT knows no token types."""
        return self.task.logits(model(**inputs_of(model, batch)), batch["attention_mask"])

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
        return {row: tuple(each[index] for each in logits) for index, row in enumerate(batch["row"].tolist())}

    def configure_optimizers(self) -> Any:
        """Decay matrices only, warm up and fall to zero over all steps."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        # Lightning does not clip the gradients of a fused optimizer where it mixes precisions.
        whole = str(self.trainer.precision) == "32-true"
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=whole or None)
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
