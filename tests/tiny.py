"""Tiny models and texts, built in memory; nothing is downloaded."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distilkit.export.folder import student_files
from distilkit.language_model import Batch, lm_of, weight_hash
from distilkit.losses import IGNORE_INDEX
from distilkit.objective import Objective
from distilkit.teacher import Teacher

_STARTS, _ENDS = "b d f g k l m n p r s t", "a e i o u al en or"
WORDS = [f"{start}{end}" for start in _STARTS.split() for end in _ENDS.split()]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *WORDS, *(f"##{word}" for word in WORDS[:24]), "."]

_COMMON = {"vocab_size": len(VOCABULARY), "pad_token_id": 0}
_WIDE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
_NO_IDS = {"bos_token_id": None, "eos_token_id": None}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {**_WIDE},
    "roberta": {**_WIDE, **_NO_IDS},
    "xlm-roberta": {**_WIDE, **_NO_IDS},
    "distilbert": {"dim": 32, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "electra": {**_WIDE, "embedding_size": 16},
    "modernbert": {**_WIDE, **_NO_IDS, "cls_token_id": None, "sep_token_id": None, "local_attention": 8},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64, **_NO_IDS},
}

RECORD: dict[str, Any] = {  # of a run, for the card of its student
    "name": "demo",
    "version": "1.2.3",
    "teacher": {"name": "google-bert/bert-base-uncased", "revision": "abc", "sha256": "x", "parameters": 110_000_000},
    "objective": {"alpha_ce": 5.0, "temperature": 2.0},
    "architecture": "DistilBertForMaskedLM",
    "layers": [0, 2, 4],
    "data": "docstrings",
    "block_size": 64,
    "global_batch_size": 16,
    "metadata": {"license": "apache-2.0", "language": "en", "datasets": ["wikimedia/wikipedia"]},
}


def build_model(model_type: str, *, num_layers: int = 6, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Build a language model with random weights in eval mode, wide enough in scale for differences to show."""
    torch.manual_seed(seed)
    settings = {**_COMMON, **ARCHITECTURES[model_type], "initializer_range": 0.2, **fields}
    config = AutoConfig.for_model(model_type, **settings)
    if model_type != "modernbert":
        config.num_hidden_layers = num_layers
    else:
        config = AutoConfig.for_model(model_type, **settings, num_hidden_layers=num_layers)
    auto = AutoModelForCausalLM if lm_of(model_type) == "clm" else AutoModelForMaskedLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.config.architectures = [type(model).__name__]
    return model


def build_teacher(model_type: str, *, num_layers: int = 6, seed: int = 0, **fields: Any) -> Teacher:
    model = build_model(model_type, num_layers=num_layers, seed=seed, **fields).requires_grad_(False)
    return Teacher(
        model=model, name=f"tiny-{model_type}", revision="main", lm=lm_of(model_type), sha256=weight_hash(model)
    )


def make_documents(num_documents: int, *, seed: int = 0) -> list[str]:
    """Write documents of 5 to 60 words with some structure to learn: each word suggests the next."""
    rng = random.Random(seed)
    documents = []
    for _ in range(num_documents):
        position = rng.randrange(len(WORDS))
        words = []
        for _ in range(rng.randint(5, 60)):
            words.append(WORDS[position % len(WORDS)])
            position += rng.choice([1, 1, 1, 5, 17])
        documents.append(" ".join(words) + ".")
    return documents


class Texts:
    """A corpus of so many documents."""

    def __init__(self, num_documents: int) -> None:
        self.num_documents = num_documents

    def fingerprint(self) -> dict[str, Any]:
        return {"documents": self.num_documents}

    def documents(self) -> Iterator[str]:
        yield from make_documents(self.num_documents)


def build_objective(lm: str, implementation: Any, soft_targets: Any = "all") -> Objective:
    hard = {"alpha_mlm": 2.0 * (lm == "mlm"), "alpha_clm": 2.0 * (lm == "clm")}
    return Objective(
        alpha_ce=5.0,
        alpha_cos=1.0,
        alpha_mse=0.0,
        temperature=2.0,
        soft_targets=soft_targets,
        implementation=implementation,
        **hard,
    )


def full_batch(*, lm: str, blocks: int = 16, length: int = 16, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 120, (blocks, length), generator=generator)
    labels = torch.full_like(ids, IGNORE_INDEX)
    if lm == "mlm":
        labels[:, 2::6] = ids[:, 2::6]
    else:
        labels[:, :-1] = ids[:, 1:]
    labelled = (labels.flatten() >= 0).nonzero().squeeze(1)
    return {"input_ids": ids, "labels": labels, "labelled": labelled}


def save_student(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    model_type: str = "distilbert",
    *,
    num_layers: int = 1,
    **record: Any,
) -> Path:
    """Write what a run leaves of its student: a checkpoint with its files and the record of ``RECORD``."""
    student = build_model(model_type, num_layers=num_layers)
    state = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    saved = {"record": {**RECORD, **record}, "tokens_seen": 1000, "files": student_files(student, tokenizer)}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "distilkit": saved}, file)
    return file
