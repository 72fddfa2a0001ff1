"""Tasks that put one or two texts into a class, or on a scale: GLUE, IMDb, XNLI and a user's own."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import accuracy, f1_score, matthews_corrcoef, pearson_corrcoef, spearman_corrcoef
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.evaluate.rows import Example, FileSplit, HubSplit, read_examples
from distilkit.losses import soft_target_kl

log = logging.getLogger(__name__)

Metric = Callable[[Tensor, Tensor, int], Tensor]

METRICS: dict[str, Metric] = {  # of predictions (rows,), targets (rows,) and the number of classes
    "accuracy": lambda predictions, targets, n: accuracy(predictions, targets, task="multiclass", num_classes=n),
    "f1": lambda predictions, targets, _: f1_score(predictions, targets, task="binary"),  # of class 1, as in GLUE
    "matthews": lambda predictions, targets, n: matthews_corrcoef(
        predictions, targets, task="multiclass", num_classes=n
    ),
    # of predictions that are all the same there is none
    "pearson": lambda predictions, targets, _: pearson_corrcoef(predictions, targets).nan_to_num(),
    "spearman": lambda predictions, targets, _: spearman_corrcoef(predictions, targets).nan_to_num(),
}
_OF_NUMBERS = ("pearson", "spearman")


class TextTask:
    """Read, encode and score a task on texts.

    ``texts`` names one or two columns and ``label`` that of the target; ``labels`` lists the classes in the order of
    their ids, and is None where a number is predicted. With ``data_dir`` the rows come from ``files`` below it, otherwise
    from ``hub``; each has ``train`` and, by name, the splits that are ``scored``. ``max_train_rows`` and
    ``max_scored_rows`` take so many of a split, in an order that is always the same.

    Raises:
        UserError: an argument is none of those that are known, or does not go with another.
    """

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification

    def __init__(
        self,
        *,
        name: str,
        texts: Sequence[str],
        label: str,
        labels: Sequence[str] | None,
        aliases: Mapping[str, str],
        metrics: Sequence[str],
        max_length: int,
        hub: Mapping[str, Any] | None,
        files: Mapping[str, Any],
        data_dir: str | None,
        skip_malformed: bool,
        max_train_rows: int | None,
        max_scored_rows: int | None,
    ) -> None:
        """Check the arguments; nothing is read yet."""
        unknown = [metric for metric in metrics if metric not in METRICS]
        if unknown or not metrics:
            raise UserError(f"task.metrics={list(metrics)}; it takes one or more of {', '.join(METRICS)}")
        if any((metric in _OF_NUMBERS) != (labels is None) for metric in metrics):
            raise UserError(
                f"task.metrics={list(metrics)} does not go with task.labels={labels and list(labels)}: "
                f"{', '.join(_OF_NUMBERS)} are for numbers (task.labels=null), the others for classes"
            )
        if labels is not None and not 2 <= len(set(labels)) == len(labels):
            raise UserError(f"task.labels={list(labels)}, but it takes two or more names, each once; null for a number")
        if "f1" in metrics and len(labels or ()) != 2:
            raise UserError(f"task.metrics has f1, which is for two classes, and task.labels has {len(labels or ())}")
        if not 1 <= len(texts) <= 2:
            raise UserError(f"task.texts={list(texts)}, but it takes one column or two")
        for key, value in (("max_train_rows", max_train_rows), ("max_scored_rows", max_scored_rows)):
            if value is not None and value < 1:
                raise UserError(f"task.{key}={value}, but it must be at least 1, or null for all")
        if max_length < 8:
            raise UserError(f"task.max_length={max_length}, but it must be at least 8 tokens")
        self.name, self.texts, self.label, self.max_length = name, list(texts), label, max_length
        self.labels = None if labels is None else [str(each) for each in labels]
        self.aliases, self.metrics, self.skip_malformed = aliases, list(metrics), skip_malformed
        self.hub, self.files, self.data_dir = hub, files, data_dir
        self.max_train_rows, self.max_scored_rows = max_train_rows, max_scored_rows

    # ------------------------------------------------------------------- rows

    def _split(self, wanted: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> HubSplit | FileSplit:
        if self.data_dir is not None:
            root = Path(self.data_dir).expanduser()
            if not root.is_dir():
                raise UserError(f"task.data_dir={self.data_dir} is no folder; give the one that holds the task's files")
            own = root / (self.files.get("folder") or ".")
            return FileSplit(folder=own if own.is_dir() else root, **wanted(self.files))
        if self.hub is None:
            raise UserError(f"task {self.name!r} has no data set on the hub; set task.data_dir=<folder of its files>")
        return HubSplit(path=self.hub["path"], revision=self.hub.get("revision"), **wanted(self.hub))

    def _examples(self, split: HubSplit | FileSplit, limit: int | None) -> list[Example]:
        examples = read_examples(
            split,
            texts=self.texts,
            label=self.label,
            labels=self.labels,
            aliases=self.aliases,
            skip_malformed=self.skip_malformed,
        )
        if limit is not None and limit < len(examples):
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
            examples = [examples[int(index)] for index in order[:limit]]
        return examples

    def train_examples(self) -> list[Example]:
        """Read the training split."""
        return self._examples(self._split(lambda source: source["train"]), self.max_train_rows)

    def scored_examples(self) -> dict[str, list[Example]]:
        """Read the splits that are scored, by name."""
        source = self.hub if self.data_dir is None else self.files
        names = [name for name, split in (source or self.files)["scored"].items() if split is not None]
        return {
            name: self._examples(
                self._split(lambda source, name=name: source["scored"][name]),  # type: ignore[misc]
                self.max_scored_rows,
            )
            for name in names
        }

    # ------------------------------------------------------- what training needs

    @property
    def head(self) -> dict[str, Any]:
        """The fields of a model's config that its new head follows from."""
        if self.labels is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(self.labels),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def check_head(self, model: PreTrainedModel, *, name: str) -> None:
        """Make sure that a fine-tuned model predicts the classes of this task, in their order.

        Raises:
            UserError: it does not.
        """
        config: Any = model.config
        theirs = [str(config.id2label[index]) for index in range(config.num_labels)]
        unnamed = [f"LABEL_{index}" for index in range(len(theirs))]
        same = [label.casefold() for label in theirs] == [label.casefold() for label in self.labels or []]
        if len(theirs) != len(self.labels or [0]) or (self.labels and not same and theirs != unnamed):
            raise UserError(
                f"{name!r} predicts {', '.join(theirs)}, but task {self.name} has "
                f"{', '.join(self.labels or ['one number'])}; fine-tune it on this task first, or set task.labels to its own"
            )
        if self.labels and theirs == unnamed:
            log.warning("%r does not name its classes; they are taken to be %s, in this order", name, self.labels)

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, train: bool
    ) -> list[dict[str, Any]]:
        """Turn examples into features of token ids and a ``target``, cut to ``max_length`` tokens, longest text first."""
        if not examples:
            return []
        columns = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
        bare = not tokenizer.num_special_tokens_to_add(pair=True)
        if bare and len(columns) == 2:  # GPT-2 has no separator of its own
            columns[1] = [f"{tokenizer.eos_token} {text}" for text in columns[1]]
        encoded = tokenizer(
            *columns,
            truncation="longest_first",
            max_length=self.max_length,
            return_attention_mask=True,
            return_token_type_ids=True,  # a student may have none, and its teacher may need them
            split_special_tokens=not bare,  # what is spelled out in a text is text
        )
        kind: type = float if self.labels is None else int
        return [
            {name: np.array(encoded[name][index], dtype=np.int32) for name in encoded} | {"target": kind(example.label)}
            for index, example in enumerate(examples)
        ]

    def logits(self, outputs: Any, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the model's logits (rows, classes), the only ones of this kind of task."""
        return (outputs.logits.float(),)

    def hard_loss(self, logits: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, or the mean squared error of numbers."""
        if self.labels is None:
            return F.mse_loss(logits[0].squeeze(-1), targets.float())
        return F.cross_entropy(logits[0], targets)

    def soft_loss(
        self, logits: tuple[Tensor, ...], teacher_logits: tuple[Tensor, ...], *, temperature: float
    ) -> Tensor:
        """Return the mean KL from the teacher at a temperature, times its square; of numbers, the mean squared error."""
        if self.labels is None:
            return F.mse_loss(logits[0], teacher_logits[0])
        return soft_target_kl(logits[0], teacher_logits[0], temperature=temperature).mean()

    # ------------------------------------------------------------------ scores

    def scores(
        self, logits: Sequence[tuple[Tensor, ...]], features: Sequence[Mapping[str, Any]], examples: Sequence[Example]
    ) -> dict[str, float]:
        """Score one split: ``logits`` holds each feature's."""
        stacked = torch.stack([each[0] for each in logits])
        targets = torch.tensor([feature["target"] for feature in features])
        predictions = stacked.squeeze(-1) if self.labels is None else stacked.argmax(dim=-1)
        return {name: float(METRICS[name](predictions, targets, stacked.shape[-1])) for name in self.metrics}

    def predictions(
        self, logits: Sequence[tuple[Tensor, ...]], features: Sequence[Mapping[str, Any]], examples: Sequence[Example]
    ) -> Any:
        """Return what the model says of each row, as JSON: the name of a class, or a number."""
        if self.labels is None:
            return [float(each[0]) for each in logits]
        return [self.labels[int(each[0].argmax())] for each in logits]
