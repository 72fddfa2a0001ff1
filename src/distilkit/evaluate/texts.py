"""Tasks that classify or rate one or two texts: GLUE, IMDb, XNLI and a user's own."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.evaluate.fit import finetune_and_score
from distilkit.evaluate.job import Job
from distilkit.evaluate.rows import Example, FileSplit, HubSplit, read_examples, rows_hashes, some_of
from distilkit.losses import soft_target_kl
from distilkit.metrics import OF_NUMBERS, OWN, check_metrics
from distilkit.records import Result, Rows

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TextTask:
    """Read, encode and score a task on texts.

    ``texts`` names one or two columns and ``label`` that of the target. ``labels`` lists the classes in the order of
    their ids, and is None if a number is predicted. With ``data_dir`` the rows come from ``files`` below it, otherwise
    from ``hub``; each has ``train`` and, by name, the splits that are ``scored``. ``max_train_rows`` and
    ``max_scored_rows`` limit a split to some of its rows, always the same ones. With ``submission`` the ``tests`` of
    ``files`` or ``hub`` are predicted for a leaderboard.
    """

    trains: ClassVar[bool] = True
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification

    name: str
    texts: Sequence[str]
    label: str
    labels: Sequence[str] | None
    aliases: Mapping[str, str]
    metrics: Sequence[str]
    max_length: int
    hub: Mapping[str, Any] | None
    files: Mapping[str, Any]
    data_dir: str | None
    skip_malformed: bool
    max_train_rows: int | None
    max_scored_rows: int | None
    submission: bool

    def __post_init__(self) -> None:
        """Check the arguments; nothing is read yet."""
        self.texts, self.metrics = list(self.texts), list(self.metrics)
        self.labels = None if self.labels is None else [str(each) for each in self.labels]
        num_classes = len(self.labels or ())
        if not self.metrics:
            raise UserError(f"task.metrics is empty; it takes one or more of {', '.join(OWN)} and scikit-learn's")
        if any((metric in OF_NUMBERS) != (self.labels is None) for metric in self.metrics if metric in OWN):
            raise UserError(
                f"task.metrics={self.metrics} does not match task.labels={self.labels}: {', '.join(OF_NUMBERS)} are "
                f"for numbers (task.labels=null), {', '.join(set(OWN) - set(OF_NUMBERS))} for classes"
            )
        if self.labels is not None and not 2 <= len(set(self.labels)) == num_classes:
            raise UserError(f"task.labels={self.labels}, but it takes two or more names, each once; null for a number")
        if "f1" in self.metrics and num_classes != 2:
            raise UserError(
                f"task.metrics has f1, which is for two classes, but task.labels has {num_classes}; take f1_macro"
            )
        check_metrics(self.metrics, num_classes=num_classes or None)
        if not 1 <= len(self.texts) <= 2:
            raise UserError(f"task.texts={self.texts}, but it takes one column or two")
        for key, least in (("max_train_rows", 1), ("max_scored_rows", 1), ("max_length", 8)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"task.{key}={value}, but it must be at least {least}")

    def check_data(self, *, train: bool = True) -> dict[str, str]:
        """Read the splits, and return the hash of their texts and labels."""
        self.unlabelled_examples()
        return rows_hashes(self, lambda example: (example.texts, example.label), train=train)

    def measure(self, job: Job) -> list[Result]:
        """Fine-tune a model and score it."""
        return finetune_and_score(self, job)

    def train_examples(self) -> list[Example]:
        """Read the training split."""
        return self._examples(self._source()["train"], self.max_train_rows)

    def scored_examples(self) -> dict[str, list[Example]]:
        """Read the splits that are scored, by name."""
        scored = self._source()["scored"].items()
        return {name: self._examples(node, self.max_scored_rows) for name, node in scored if node is not None}

    def unlabelled_examples(self) -> dict[str, list[Example]]:
        """Read the splits whose labels a leaderboard keeps, by its name of each; none without ``submission``."""
        tests = self._source().get("tests") or {}
        if self.submission and not tests:
            raise UserError(f"task.submission=true, but task {self.name} names no test set; set task.submission=false")
        named = {name: node for name, node in tests.items() if self.submission and node is not None}
        return {name: self._examples(node, None, labelled=False) for name, node in named.items()}

    def _source(self) -> Mapping[str, Any]:
        if self.data_dir is not None:
            return self.files
        if self.hub is None:
            raise UserError(f"task {self.name!r} has no data set on the hub; set task.data_dir=<folder of its files>")
        return self.hub

    def _examples(self, node: Mapping[str, Any], limit: int | None, *, labelled: bool = True) -> list[Example]:
        split: HubSplit | FileSplit
        if self.data_dir is None:
            split = HubSplit(path=self._source()["path"], revision=self._source().get("revision"), **node)
        else:
            root = Path(self.data_dir).expanduser()
            if not root.is_dir():
                raise UserError(f"task.data_dir={self.data_dir} is no folder; give the folder of the task's files")
            own = root / (self.files.get("folder") or ".")
            split = FileSplit(folder=own if own.is_dir() else root, **node)
        examples = read_examples(
            split,
            texts=self.texts,
            label=self.label if labelled else None,
            labels=self.labels,
            aliases=self.aliases,
            skip_malformed=self.skip_malformed,
        )
        return some_of(examples, limit)

    @property
    def head(self) -> dict[str, Any]:
        """Return the fields of a model's config that determine a new head."""
        if self.labels is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(self.labels),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def check_head(self, model: PreTrainedModel, *, name: str) -> None:
        """Make sure that a fine-tuned model predicts the classes of this task, in their order."""
        config: Any = model.config
        theirs = [str(config.id2label[index]) for index in range(config.num_labels)]
        unnamed = [f"LABEL_{index}" for index in range(len(theirs))]
        same = [label.casefold() for label in theirs] == [label.casefold() for label in self.labels or []]
        if len(theirs) != len(self.labels or [0]) or (self.labels and not same and theirs != unnamed):
            raise UserError(
                f"{name!r} predicts {', '.join(theirs)}, but task {self.name} has "
                f"{', '.join(self.labels or ['one number'])}; fine-tune it on this task first, or set task.labels to "
                "its own"
            )
        if self.labels and theirs == unnamed:
            log.warning("%r does not name its classes; they are assumed to be %s, in this order", name, self.labels)

    def encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Turn examples into token ids and a ``target``; the longer text is cut until both fit ``max_length``."""
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
            split_special_tokens=not bare,  # a text that spells a special token is still text
        )
        kind: type = float if self.labels is None else int
        return [
            {name: np.array(encoded[name][index], dtype=np.int32) for name in encoded} | {"target": kind(example.label)}
            for index, example in enumerate(examples)
        ]

    def logits(self, outputs: Any, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the model's logits (examples, classes) as the only output."""
        return (outputs.logits.float(),)

    def hard_loss(self, logits: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, or the mean squared error for numbers."""
        if self.labels is None:
            return F.mse_loss(logits[0].squeeze(-1), targets.float())
        return F.cross_entropy(logits[0], targets)

    def soft_loss(
        self, logits: tuple[Tensor, ...], teacher_logits: tuple[Tensor, ...], *, temperature: float
    ) -> Tensor:
        """Return the mean KL from the teacher times temperature squared, or the mean squared error for numbers."""
        if self.labels is None:
            return F.mse_loss(logits[0], teacher_logits[0])
        return soft_target_kl(logits[0], teacher_logits[0], temperature=temperature).mean()

    def rows(
        self, logits: Sequence[tuple[Tensor, ...]], features: Sequence[Mapping[str, Any]], examples: Sequence[Example]
    ) -> Rows:
        """Return the target and the prediction of each example; ``logits`` has one entry for each feature."""
        stacked = torch.stack([each[0] for each in logits])
        ids, gold = np.array([each.row for each in examples]), np.array([feature["target"] for feature in features])
        if self.labels is None:
            return Rows(ids=ids, gold=gold, said=stacked.squeeze(-1).double().numpy())
        limit = float(np.finfo(np.float16).max)
        half = stacked.clamp(-limit, limit).numpy().astype(np.float16)
        return Rows(ids=ids, gold=gold, said=stacked.argmax(dim=-1).numpy(), logits=half)

    def predictions(
        self, logits: Sequence[tuple[Tensor, ...]], features: Sequence[Mapping[str, Any]], examples: Sequence[Example]
    ) -> Any:
        """Return the model's prediction for each example: the name of a class, or a number."""
        if self.labels is None:
            return [float(each[0]) for each in logits]
        return [self.labels[int(each[0].argmax())] for each in logits]
