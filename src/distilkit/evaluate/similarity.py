"""How well a model's states tell which sentences are alike, without any training."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.evaluate.job import Job
from distilkit.evaluate.models import described, inputs_of, load_task_model, load_task_tokenizer
from distilkit.evaluate.perplexity import choose_device
from distilkit.evaluate.rows import Example, FileSplit, HubSplit, read_examples, rows_hash
from distilkit.language_model import max_positions
from distilkit.metrics import measure
from distilkit.records import Result, Rows, cost, write_rows


@dataclass(kw_only=True)
class Similarity:
    """Compare the cosine of two sentences' mean states with how alike people find them.

    The state of a sentence is the mean of its tokens' last hidden states, special tokens included.
    """

    trains: ClassVar[bool] = False
    metrics: ClassVar[Sequence[str]] = ("spearman", "pearson")

    name: str
    data_dir: str | None
    hub: Mapping[str, Any]
    files: Mapping[str, Any]
    skip_malformed: bool
    max_length: int
    batch_size: int
    device: str

    def __post_init__(self) -> None:
        """Check the values; nothing is read yet."""
        for key, least in (("max_length", 8), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)}, but it must be at least {least}")
        self.place = choose_device(self.device)

    def pairs(self) -> list[Example]:
        """Read pairs of sentences, each with a number."""
        split: HubSplit | FileSplit
        if self.data_dir is None:
            given = dict(self.hub)
            label = given.pop("label")
            split = HubSplit(**given)
        else:
            given, root = dict(self.files), Path(self.data_dir).expanduser()
            label, folder = "label", root / given.pop("folder")
            split = FileSplit(folder=folder if folder.is_dir() else root, **given)
        columns: Any = {"texts": ("sentence1", "sentence2"), "label": label, "labels": None, "aliases": {}}
        return read_examples(split, **columns, skip_malformed=self.skip_malformed)

    def check_data(self, *, train: bool = True) -> dict[str, str]:
        """Read the pairs, and return the hash of their texts and numbers."""
        return {"scored_data": rows_hash((pair.texts, pair.label) for pair in self.pairs())}

    def measure(self, job: Job) -> list[Result]:
        """Score one model."""
        pairs = self.pairs()
        hub: Any = {"revision": job.revision, "trust_remote_code": False}
        model = load_task_model(job.model, auto_class=AutoModel, head={}, **hub).eval().to(self.place)
        vocabulary = model.get_input_embeddings().num_embeddings
        tokenizer = load_task_tokenizer(job.model, tokenizer=job.tokenizer, vocabulary=vocabulary, **hub)
        limit = max_positions(model) if hasattr(model.config, "max_position_embeddings") else self.max_length
        start = time.perf_counter()
        texts = [text for pair in pairs for text in pair.texts]
        length = min(self.max_length, limit)
        states, tokens = mean_states(model, tokenizer, texts, max_length=length, batch_size=self.batch_size)
        # Rounded, or the ranks of equal sentences would be those of float32's noise.
        said = F.cosine_similarity(states[0::2], states[1::2]).numpy().round(6)
        gold = np.array([pair.label for pair in pairs])
        rows = Rows(ids=np.array([pair.row for pair in pairs]), gold=gold, said=said)
        write_rows(job.folder, "dev", rows)
        scores = measure(self.metrics, rows)
        return [
            Result(
                name=job.name,
                model=job.model,
                sha256=job.sha256,
                **described(model),
                task=self.name,
                kind="zero_shot",
                seed=None,  # nothing is drawn
                settings={"max_length": self.max_length, "vocabulary": len(tokenizer)},
                scores=scores,
                score=fmean(scores.values()),
                details={"rows": {"dev": len(pairs)}},
                cost=cost(seconds=time.perf_counter() - start, tokens=tokens, device=str(self.place)),
            )
        ]


@torch.inference_mode()
def mean_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
) -> tuple[Tensor, int]:
    """Return the mean last hidden state of each text's tokens, (texts, width) in float64, and the number of tokens."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, split_special_tokens=True)
    order = sorted(range(len(texts)), key=lambda row: -len(encoded["input_ids"][row]))
    means = torch.empty(len(texts), model.config.hidden_size, dtype=torch.float64)
    for start in range(0, len(texts), batch_size):
        chosen = order[start : start + batch_size]
        some = [{name: column[row] for name, column in encoded.items()} for row in chosen]
        batch = tokenizer.pad(some, return_tensors="pt").to(model.device)
        states = model(**inputs_of(model, batch)).last_hidden_state.double()
        real = batch["attention_mask"].unsqueeze(-1)
        means[chosen] = ((states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)).cpu()
    return means, sum(map(len, encoded["input_ids"]))
