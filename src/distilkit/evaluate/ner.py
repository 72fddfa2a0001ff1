"""Named entities as a task to fine-tune on: a label for each word, scored by whole entities as conlleval does."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from seqeval.metrics.sequence_labeling import get_entities
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.data.blocks import special_tokens_around
from distilkit.data.corpus import has_surrogate
from distilkit.data.table_files import open_text
from distilkit.errors import UserError
from distilkit.evaluate.fit import finetune_and_score
from distilkit.evaluate.job import Job
from distilkit.evaluate.rows import FileSplit, HubSplit, rows_hashes, some_of
from distilkit.losses import IGNORE_INDEX, soft_target_kl
from distilkit.records import Result, Rows

_TAG = re.compile(r"O|[BIESLU]-.+")
_BILOU = str.maketrans("LU", "ES")  # its last and single words as IOBES names them


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """Words and the tag of each, in IOB2: B- begins an entity, I- continues it, O is none; and its place in the split."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    row: int = field(default=0, compare=False)


@dataclass(kw_only=True)
class EntityTask:
    """Read, encode and score sentences with named entities.

    The label of a word is that of its first token. A sentence longer than ``max_length`` tokens is cut into windows
    that share ``doc_stride`` tokens; the label of a word then comes from the window that shows most around it.
    ``labels`` lists the tags in the order of their ids, and is None for those of the training split.
    """

    trains: ClassVar[bool] = True
    auto_class: ClassVar[Any] = AutoModelForTokenClassification
    metrics: ClassVar[Sequence[str]] = ("f1",)

    name: str
    labels: Sequence[str] | None
    max_length: int
    doc_stride: int
    max_train_rows: int | None
    max_scored_rows: int | None
    data_dir: str | None
    columns: Mapping[str, int]
    files: Mapping[str, Any]
    hub: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check the arguments; nothing is read yet."""
        for key, least in (("max_length", 8), ("doc_stride", 0), ("max_train_rows", 1), ("max_scored_rows", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"task.{key}={value}, but it must be at least {least}")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise UserError(f"task.labels={list(self.labels)}, but it takes each name once")

    def check_data(self, *, train: bool = True) -> dict[str, str]:
        """Read the splits, and return the hash of their words and tags."""
        return rows_hashes(self, lambda sentence: (sentence.words, sentence.tags), train=train)

    def measure(self, job: Job) -> list[Result]:
        """Fine-tune a model and score it."""
        return finetune_and_score(self, job)

    def train_examples(self) -> list[Sentence]:
        """Read the training split."""
        return some_of(self._train, self.max_train_rows)

    def scored_examples(self) -> dict[str, list[Sentence]]:
        """Read the splits that are scored, by name."""
        splits = {name: split for name, split in self._source["scored"].items() if split is not None}
        return {name: some_of(self._sentences(name, split), self.max_scored_rows) for name, split in splits.items()}

    def unlabelled_examples(self) -> dict[str, list[Sentence]]:
        """Return nothing: no leaderboard takes files of this task."""
        return {}

    @cached_property
    def _train(self) -> list[Sentence]:
        return self._sentences("train", self._source["train"])

    @property
    def _source(self) -> Mapping[str, Any]:
        return self.hub if self.data_dir is None else self.files

    def _sentences(self, name: str, split: str) -> list[Sentence]:
        if self.data_dir is None:
            where = {key: self.hub[key] for key in ("path", "name", "revision")}
            columns = self.hub["words"], self.hub["tags"]
            sentences = hub_sentences(HubSplit(**where, split=split), columns=columns, labels=self.labels)
        else:
            folder = Path(self.data_dir).expanduser()
            sentences = read_conll(FileSplit(folder=folder, file=split).path(), **self.columns)
        if not any(tag != "O" for sentence in sentences for tag in sentence.tags):
            raise UserError(f"the {name} split of task {self.name} has no entity, every tag is O; check task.columns")
        return [replace(sentence, row=row) for row, sentence in enumerate(sentences)]

    @cached_property
    def classes(self) -> list[str]:
        """The tags in the order of their ids: O first, then B- and I- of each type."""
        if self.labels is not None:
            return list(self.labels)
        types = {tag[2:] for sentence in self._train for tag in sentence.tags if tag != "O"}
        return ["O", *(f"{prefix}-{each}" for each in sorted(types) for prefix in "BI")]

    @property
    def head(self) -> dict[str, Any]:
        """Return the fields of a model's config that determine a new head."""
        ids = {tag: index for index, tag in enumerate(self.classes)}
        return {"num_labels": len(ids), "id2label": dict(enumerate(ids)), "label2id": ids}

    def check_head(self, model: PreTrainedModel, *, name: str) -> None:
        """Make sure that a fine-tuned model predicts the tags of this task, in their order."""
        config: Any = model.config
        theirs = [str(config.id2label[index]) for index in range(config.num_labels)]
        if theirs != self.classes:
            raise UserError(
                f"{name!r} predicts {','.join(theirs)}, but task {self.name} has {','.join(self.classes)}; if these "
                f"are the same in another order, set task.labels=[{','.join(theirs)}], else fine-tune it on this task"
            )

    def encode(self, examples: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Turn sentences into windows.

        A window holds the inputs of a model and four entries: ``sentence`` is the number of its sentence, ``words`` the
        numbers of the words that begin in it, ``places`` the first token of each, and ``target`` (max_length,) the
        label at each of these tokens, -100 elsewhere.
        """
        before, after = special_tokens_around(tokenizer)
        room = self.max_length - len(before) - len(after)
        if room <= self.doc_stride:
            raise UserError(
                f"task.max_length={self.max_length} leaves {room} tokens for a sentence, but windows share "
                f"task.doc_stride={self.doc_stride}; set a smaller task.doc_stride"
            )
        ids_of = {tag: index for index, tag in enumerate(self.classes)}
        windows = []
        for number, sentence in enumerate(examples):
            ids, firsts = first_tokens(sentence.words, tokenizer)
            targets = np.array([ids_of.get(tag, IGNORE_INDEX) for tag in sentence.tags])
            for begin in range(0, max(1, len(ids) - self.doc_stride), room - self.doc_stride):
                piece = np.array([*before, *ids[begin : begin + room], *after], dtype=np.int32)
                words = np.flatnonzero((firsts >= begin) & (firsts < begin + room))
                places = firsts[words] - begin + len(before)
                target = np.full(self.max_length, IGNORE_INDEX, dtype=np.int32)
                target[places[::-1]] = targets[words[::-1]]  # of words that share a token the first one counts
                inputs = {"input_ids": piece, "attention_mask": np.ones_like(piece)}
                inputs |= {"token_type_ids": np.zeros_like(piece), "target": target}
                if len(piece):
                    windows.append({**inputs, "sentence": number, "words": words, "places": places})
        return windows

    def logits(self, outputs: Any, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (windows, length, labels), and 1 where a token is real, (windows, length)."""
        return outputs.logits.float(), attention_mask.float()

    def hard_loss(self, logits: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over words, in nats."""
        targets = targets[:, : logits[0].shape[1]].long()
        total = F.cross_entropy(logits[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def soft_loss(
        self, logits: tuple[Tensor, ...], teacher_logits: tuple[Tensor, ...], *, temperature: float
    ) -> Tensor:
        """Return the mean KL over tokens from the teacher, times temperature squared."""
        real = logits[1] > 0
        return soft_target_kl(logits[0][real], teacher_logits[0][real], temperature=temperature).mean()

    def predictions(
        self,
        logits: Sequence[tuple[Tensor, ...]],
        features: Sequence[Mapping[str, Any]],
        examples: Sequence[Sentence],
    ) -> list[list[str]]:
        """Return the tags of each sentence's words. A word without a token is no entity."""
        found = [["O"] * len(sentence.words) for sentence in examples]
        shown = [np.full(len(sentence.words), -1) for sentence in examples]  # tokens on the shorter side of each word
        for window, (each, _) in zip(features, logits, strict=True):
            places, number = window["places"], window["sentence"]
            sides = np.minimum(places, len(window["input_ids"]) - 1 - places)
            classes = each.argmax(dim=-1).tolist()
            for word, place, side in zip(window["words"], places, sides, strict=True):
                if side > shown[number][word]:
                    shown[number][word], found[number][word] = side, self.classes[classes[place]]
        return found

    def rows(
        self,
        logits: Sequence[tuple[Tensor, ...]],
        features: Sequence[Mapping[str, Any]],
        examples: Sequence[Sentence],
    ) -> Rows:
        """Return a row for each sentence: its entities, those that were found, and those of them that are right."""
        tags = self.predictions(logits, features, examples)
        said = [set(entities(each)) for each in tags]
        gold = [set(entities(sentence.tags)) for sentence in examples]
        right = [len(mine & theirs) for mine, theirs in zip(said, gold, strict=True)]
        counts = {"tp": right, "said": list(map(len, said)), "gold": list(map(len, gold))}
        sums = {name: np.array(each, dtype=np.float64) for name, each in counts.items()}
        ids = np.array([sentence.row for sentence in examples])
        return Rows(ids=ids, said=np.array([" ".join(each) for each in tags]), sums=sums)


def entities(tags: Iterable[str]) -> list[tuple[str, int, int]]:
    """List type, first and last word of each entity, in IOB1, IOB2, IOBES or BILOU, by conlleval's rules."""
    found: list[tuple[str, int, int]] = get_entities([tag[0].translate(_BILOU) + tag[1:] for tag in tags])
    return found


def sentence_of(words: Sequence[str], tags: Sequence[str], *, place: str) -> Sentence:
    """Check a sentence, and turn its tags into IOB2."""
    for word, tag in zip(words, tags, strict=True):
        if not word or has_surrogate(word):
            raise UserError(f"{place}: word {word!r} is empty or has an unpaired surrogate; fix that sentence")
        if not _TAG.fullmatch(tag):
            raise UserError(
                f"{place}: tag {tag!r} of {word!r} is not in IOB1, IOB2, IOBES or BILOU, such as B-PER, I-PER or O; "
                "check task.columns, or task.hub.tags"
            )
    new = ["O"] * len(tags)
    for kind, first, last in entities(tags):
        new[first : last + 1] = [f"B-{kind}", *[f"I-{kind}"] * (last - first)]
    return Sentence(words=tuple(words), tags=tuple(new))


def read_conll(file: Path, *, word: int, tag: int) -> list[Sentence]:
    """Read a word a line, columns separated by tabs or else by spaces, and an empty line after each sentence."""
    sentences: list[Sentence] = []
    lines: list[list[str]] = []
    width, begin = 0, 1
    with open_text(file) as stream:
        for number, line in enumerate(itertools.chain(stream, [""]), start=1):
            fields = line.rstrip().split("\t") if "\t" in line.rstrip() else re.split(" +", line.strip(" \r\n"))
            if line.strip() and fields[0] != "-DOCSTART-":
                width, begin = width or len(fields), begin if lines else number
                lines.append(fields)
                if len(fields) != width or not all(-width <= column < width for column in (word, tag)) or width < 2:
                    raise UserError(
                        f"{file}: line {number} has {len(fields)} columns, the first word has {width}; the word is in "
                        f"task.columns.word={word} and its tag in task.columns.tag={tag}, counted from 0, or from the "
                        "end as -1"
                    )
            elif lines:
                words, tags = [fields[word] for fields in lines], [fields[tag] for fields in lines]
                sentences.append(sentence_of(words, tags, place=f"{file}, from line {begin}"))
                lines = []
    if not sentences:
        raise UserError(
            f"{file} has no sentence; it takes a word and its tag a line, and empty lines between sentences"
        )
    return sentences


def hub_sentences(split: HubSplit, *, columns: tuple[str, str], labels: Sequence[str] | None) -> list[Sentence]:
    """Read rows that are lists of words and of tags; tags that are numbers have names in the data set or ``labels``."""
    table = split.table(columns=columns)
    names = getattr(getattr(table.features[columns[1]], "feature", None), "names", labels)

    def named(tag: str | int) -> str:
        if isinstance(tag, str):
            return tag
        if names is None or not 0 <= tag < len(names):
            raise UserError(
                f"{split} has tag {tag} without a name; list them in their order: task.labels=[O,B-PER,...]"
            )
        return str(names[tag])

    def rows() -> Iterator[Sentence]:
        for index, row in enumerate(table):
            words, tags = row[columns[0]], row[columns[1]]
            if words:
                yield sentence_of(words, list(map(named, tags)), place=f"{split}, row {index}")

    return list(rows())


def first_tokens(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Any]:
    """Tokenize words with a space between them: ids, and the first token of each word, -1 where it has none.

    The spaces make byte-level tokens those that the model was trained on.
    """
    encoded = tokenizer(
        " ".join(words), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    lengths = np.array([len(word) for word in words])
    ends = np.cumsum(lengths + 1) - 1
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    firsts = np.searchsorted(offsets[:, 1], ends - lengths, side="right")
    begins = np.append(offsets[:, 0], len(" ".join(words)))[firsts]
    return encoded["input_ids"], np.where(begins < ends, firsts, -1)
