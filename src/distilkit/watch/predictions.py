"""What both models predict for a few held-out words, as a table that grows with each validation."""

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.data.batches import DistillationDataModule
from distilkit.data.masking import VALIDATION_EPOCH
from distilkit.errors import UserError
from distilkit.language_model import LM, Batch, lm_head, token_states
from distilkit.losses import IGNORE_INDEX
from distilkit.module import DistillationModule
from distilkit.sharding import FullyShardedStrategy
from distilkit.watch.trackio_logger import TrackioLogger

log = logging.getLogger(__name__)

_TOP, _AROUND, _BLANK = 5, 12, "____"  # words shown of each model; tokens on each side of the one that is asked for
_VALIDATIONS = 50  # that loggers get, beside the first; the file has all


@dataclass(frozen=True, kw_only=True)
class Row:
    """The most probable words of one model after ``step`` optimizer steps, and their probabilities in percent."""

    step: int
    sentence: str
    word: str
    model: str
    top: list[str]


class Predictions(Callback):
    """Write the top 5 words of both models for masked words of held-out text, for causal models for next words.

    The words are ``num_sentences`` fixed ones, one in each stretch of the held-out blocks. They are read at each
    validation, by the first rank alone, and go to W&B as a table, to TensorBoard as text, and to ``file`` as markdown.
    Each row of a resumed run's earlier parts is kept. ``enabled=None`` is true where W&B or TensorBoard log.
    """

    def __init__(self, *, enabled: bool | None, num_sentences: int, file: str) -> None:
        """Check the number of sentences."""
        if num_sentences < 1:
            cure = "set callbacks.predictions.enabled=false for none"
            raise UserError(f"callbacks.predictions.num_sentences={num_sentences}, but it must be at least 1; {cure}")
        self.enabled, self.num_sentences, self.file = enabled, num_sentences, Path(file)
        self.asked: tuple[Batch, Tensor] | None = None  # blocks, and the flat index of the token that predicts (words,)
        self.texts: list[tuple[str, str]] = []  # of each word its sentence and itself
        self.rows: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far, for a resumed run."""
        return {"rows": [asdict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows of the parts before."""
        self.rows = [Row(**row) for row in state_dict["rows"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn this off where no logger shows it, and with sharded models, whose forward takes all ranks."""
        if self.enabled is None:
            self.enabled = any(
                isinstance(logger, WandbLogger | TensorBoardLogger | TrackioLogger) for logger in trainer.loggers
            )
        if self.enabled and isinstance(trainer.strategy, FullyShardedStrategy):
            rank_zero_only(log.info)(
                "predictions for held-out words are left out, because trainer=fsdp shards the models"
            )
            self.enabled = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask both models, on the first rank; nothing here waits for other ranks."""
        data, module = trainer.datamodule, pl_module  # type: ignore[attr-defined]  # set by one of its connectors
        if not self.enabled or not trainer.is_global_zero:
            return
        if not isinstance(data, DistillationDataModule) or not isinstance(module, DistillationModule):
            return
        if self.asked is None:
            self._choose(data, module.lm)
        assert self.asked is not None
        step = trainer.global_step
        self.rows = [row for row in self.rows if row.step < step or row.model == "teacher"]  # one that is made again
        models = {"teacher": module.teacher if module.scores_teacher else None, "student": module.student}
        known = {row.model for row in self.rows} - {"student"}  # a teacher does not change
        batch, places = (trainer.strategy.batch_to_device(each, module.device) for each in self.asked)
        for name, model in models.items():
            if model is None or name in known:
                continue
            with torch.no_grad(), trainer.precision_plugin.val_step_context(), torch.compiler.set_stance("force_eager"):
                found = top_words(model, batch, places, tokenizer=data.tokenizer)
            for (sentence, word), top in zip(self.texts, found, strict=True):
                self.rows.append(Row(step=step, sentence=sentence, word=word, model=name, top=top))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(f"# Held-out words and what both models say\n\n{markdown(self.rows)}", "utf-8")
        last = sorted({row.step for row in self.rows})[-_VALIDATIONS:]
        some = [row for row in self.rows if row.step in last or row.step == self.rows[0].step]
        for logger in trainer.loggers:
            _log(logger, some, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _choose(self, data: DistillationDataModule, lm: LM) -> None:
        """Choose a word near the middle of each block, and the text around it."""
        blocks = data.val_blocks
        assert blocks is not None
        count = min(self.num_sentences, len(blocks))
        batch = blocks[(VALIDATION_EPOCH, (np.arange(count) * len(blocks)) // count)]
        length, places, words = batch["labels"].shape[1], [], data.tokenizer
        shown = words.mask_token_id, words.unk_token_id
        hidden = torch.tensor([each for each in words.all_special_ids if each not in shown], dtype=torch.long)
        for number, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            labelled = labels != IGNORE_INDEX
            masked = labelled & (ids == words.mask_token_id) if lm == "mlm" else labelled
            found = (masked if masked.any() else labelled).nonzero().flatten()
            if not len(found):
                continue
            at = int(found[(found - int(found.float().mean())).abs().argmin()])
            documents = batch["document_ids"][number] if "document_ids" in batch else torch.zeros_like(ids)
            near = (documents == documents[at]) & ((torch.arange(length) - at).abs() <= _AROUND)
            near &= batch["attention_mask"][number].bool() if "attention_mask" in batch else True
            near &= ~torch.isin(ids, hidden)
            self.texts.append((_sentence(ids, at, near, words, lm), _word(labels[at], words)))
            places.append(number * length + at)
        self.asked = batch, torch.tensor(places, dtype=torch.long)


def _word(token: Tensor | int, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([int(token)])).strip()


def _sentence(ids: Tensor, at: int, near: Tensor, tokenizer: PreTrainedTokenizerBase, lm: LM) -> str:
    """Decode the tokens near a place, with a blank for the one that is asked for; other masks stay."""
    left, right = (ids[near & side].tolist() for side in (torch.arange(len(ids)) < at, torch.arange(len(ids)) > at))
    if lm == "clm":
        return f"{tokenizer.decode([*left, int(ids[at])])} {_BLANK}".replace("\n", " ")
    mask = int(tokenizer.mask_token_id or 0)
    parts = str(tokenizer.decode([*left, mask, *right])).split(str(tokenizer.mask_token))
    before = left.count(mask) + 1
    text = str(tokenizer.mask_token).join(parts[:before]) + _BLANK + str(tokenizer.mask_token).join(parts[before:])
    return text.replace("\n", " ")


def top_words(
    model: PreTrainedModel, batch: Batch, places: Tensor, *, tokenizer: PreTrainedTokenizerBase
) -> list[list[str]]:
    """Return the most probable words at some flat indices (words,) of a batch, each as ``paris 62 %``."""
    logits = F.linear(*lm_head(model, token_states(model, batch)[places]))  # (words, vocabulary)
    shares, ids = logits.float().softmax(dim=-1).topk(min(_TOP, logits.shape[-1]))
    pairs = zip(ids.tolist(), shares.tolist(), strict=True)
    return [[f"{_word(i, tokenizer)} {100 * p:.0f} %" for i, p in zip(*pair, strict=True)] for pair in pairs]


def markdown(rows: Sequence[Row]) -> str:
    """Write a table for each sentence: the teacher's words, and below them the student's by step."""

    def safe(text: str) -> str:
        return re.sub(r"([\\|`*_\[\]<>#~$])", r"\\\1", text)

    texts = list(dict.fromkeys((row.sentence, row.word) for row in rows))
    parts = []
    for number, (sentence, word) in enumerate(texts, 1):
        own = [row for row in rows if (row.sentence, row.word) == (sentence, word)]
        parts += [f"**{number}.** {safe(sentence)}\n", f"The word is **{safe(word)}**.\n"]
        parts += [
            "| step | model |" + "".join(f" {place} |" for place in range(1, _TOP + 1)),
            "|---:|---" + "|---" * _TOP + "|",
        ]
        for row in sorted(own, key=lambda row: row.model == "student"):
            cells = [f"**{safe(top)}**" if top.rsplit(" ", 2)[0] == word else safe(top) for top in row.top]
            parts.append(f"| {row.step if row.model == 'student' else ''} | {row.model} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _log(logger: Logger, rows: Sequence[Row], *, step: int) -> None:
    """Give the rows to a logger that shows text."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("predictions", markdown(rows), step)
    elif isinstance(logger, TrackioLogger):
        logger.log_text("predictions", markdown(rows), step=step)
    elif isinstance(logger, WandbLogger):
        names = ["step", "sentence", "word", "teacher", "student"]
        taught = {(row.sentence, row.word): ", ".join(row.top) for row in rows if row.model == "teacher"}
        ours = [row for row in rows if row.model == "student"]
        data = [
            [row.step, row.sentence, row.word, taught.get((row.sentence, row.word), "-"), ", ".join(row.top)]
            for row in ours
        ]
        logger.log_table("predictions", columns=names, data=data, step=step)
