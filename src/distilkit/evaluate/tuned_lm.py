"""Fine-tune a causal language model on a text and score it on another: WikiText-103's perplexity, as published."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from pytorch_lightning import seed_everything
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.evaluate.finetune import Batches
from distilkit.evaluate.fit import load_models, train
from distilkit.evaluate.job import Job, training_settings
from distilkit.evaluate.perplexity import LanguageScore, read_text
from distilkit.language_model import lm_of
from distilkit.losses import IGNORE_INDEX, soft_target_kl
from distilkit.records import Result, cost
from distilkit.runs.storage import permit_reading

_SET = "wikitext-103-raw-v1"  # only scores on all of it may stand next to the published ones


@dataclass(kw_only=True)
class TunedLanguageScore:
    """Train on blocks of ``max_length`` tokens of one stream of documents, and score as ``LanguageScore`` does.

    Of ``train`` only the text and ``max_tokens`` count.
    """

    trains: ClassVar[bool] = True
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    head: ClassVar[dict[str, Any]] = {}

    name: str
    max_length: int
    device: str
    train: LanguageScore
    scored: LanguageScore

    def __post_init__(self) -> None:
        """Check the size of a block; no text is read yet."""
        if self.max_length < 2:
            raise UserError(f"task.max_length={self.max_length}, but it must be at least 2")

    def check_data(self, *, train: bool = True) -> dict[str, str]:
        """Read both texts, and return their hashes."""
        trained = {"train_data": self.train.check_data()["scored_data"]} if train else {}
        return trained | self.scored.check_data()

    def measure(self, job: Job) -> list[Result]:
        """Fine-tune a model, and score it."""
        cfg = job.cfg
        for key, value in (("finetune.held_out", cfg.finetune.held_out), ("backends", list(cfg.backends))):
            if value:
                raise UserError(
                    f"{key}={value}, but task {self.name} has none; set {key}={[] if key == 'backends' else 0}"
                )
        seed_everything(job.seed, workers=True, verbose=False)
        model, tokenizer, teacher = load_models(self, job)
        self.check_head(model, name=job.model)
        blocks = self.blocks(tokenizer) if cfg.finetune.epochs else []
        settings: Any = {"batch_size": cfg.finetune.batch_size, "seed": job.seed, "tokenizer": tokenizer}
        data = Batches(train=blocks, held_out=[], held_out_examples=[], **settings)
        module, trainer, timer = train(self, job, model=model, teacher=teacher, data=data)
        if cfg.save_model and cfg.finetune.epochs:
            model.save_pretrained(job.folder / "model")
            permit_reading(job.folder / "model")
            tokenizer.save_pretrained(job.folder / "model")
        start = time.perf_counter()
        scored = self.scored.result(job, model, tokenizer, kind="clm")
        tokens = int(module.tokens_seen) + scored.cost["tokens"]
        seconds, device = timer.time_elapsed() + time.perf_counter() - start, str(trainer.strategy.root_device)
        own: dict[str, Any] = {
            "train_tokens": sum(len(block["input_ids"]) for block in blocks),
            "max_length": self.max_length,
        }
        own |= training_settings(cfg)
        hubs: Any = [part.corpus.fingerprint().get("hub", {}) for part in (self.train, self.scored)]
        whole = [(hub.get("name"), hub.get("split")) for hub in hubs] == [(_SET, "train"), (_SET, "test")]
        whole = whole and self.train.max_tokens is None and self.scored.max_tokens is None
        changes: Any = {"task": self.name if whole else "tuned_perplexity", "seed": job.seed}
        changes |= {"settings": scored.settings | own}
        changes |= {"teacher": {"name": cfg.teacher, **cfg.distil} if teacher is not None else None}
        return [replace(scored, **changes, cost=cost(seconds=seconds, tokens=tokens, device=device))]

    def blocks(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Cut the stream of the training text into blocks; the last one may be shorter."""
        text = read_text(self.train.corpus, tokenizer, max_tokens=self.train.max_tokens, separator="\n\n")
        stream = np.concatenate(text.documents).astype(np.int32)
        if len(stream) < 2:
            raise UserError("the text to train on is one token; check task.train.paths, or task.train.dataset")
        pieces = [stream[begin : begin + self.max_length] for begin in range(0, len(stream) - 1, self.max_length)]
        ones = np.ones(self.max_length, dtype=np.int32)
        last = np.full(self.max_length, IGNORE_INDEX, dtype=np.int32)
        last[: len(pieces[-1])] = pieces[-1]
        targets: Sequence[Any] = [*pieces[:-1], last]
        return [
            {"input_ids": piece, "attention_mask": ones[: len(piece)], "target": target}
            for piece, target in zip(pieces, targets, strict=True)
        ]

    def check_head(self, model: PreTrainedModel, *, name: str) -> None:
        """Make sure that a model is causal."""
        if lm_of(model.config.model_type, model.config.architectures) != "clm":
            raise UserError(
                f"{name!r} is a masked {model.config.model_type}, but task {self.name} is for causal models"
            )

    def logits(self, outputs: Any, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (blocks, length, words), and 1 where a token is real, (blocks, length)."""
        return outputs.logits.float(), attention_mask.float()

    def hard_loss(self, logits: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next token, in nats."""
        length = logits[0].shape[1]
        return F.cross_entropy(logits[0][:, :-1].flatten(0, 1), targets[:, 1:length].flatten().long())

    def soft_loss(
        self, logits: tuple[Tensor, ...], teacher_logits: tuple[Tensor, ...], *, temperature: float
    ) -> Tensor:
        """Return the mean KL over tokens from the teacher, times temperature squared."""
        real = logits[1] > 0
        return soft_target_kl(logits[0][real], teacher_logits[0][real], temperature=temperature).mean()
