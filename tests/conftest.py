"""Tiny models, tokenizers and texts, built in memory; nothing is downloaded."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "true"

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from distilkit.language_model import task_of
from distilkit.teacher import Teacher, weight_hash

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

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


def build_model(model_type: str, *, num_layers: int = 6, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Build a language model with random weights in eval mode, wide enough in scale for differences to show."""
    torch.manual_seed(seed)
    settings = {**_COMMON, **ARCHITECTURES[model_type], "initializer_range": 0.2, **fields}
    config = AutoConfig.for_model(model_type, **settings)
    if model_type != "modernbert":
        config.num_hidden_layers = num_layers
    else:
        config = AutoConfig.for_model(model_type, **settings, num_hidden_layers=num_layers)
    auto = AutoModelForCausalLM if task_of(model_type) == "clm" else AutoModelForMaskedLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.config.architectures = [type(model).__name__]
    return model


def build_teacher(model_type: str, *, num_layers: int = 6, seed: int = 0, **fields: Any) -> Teacher:
    model = build_model(model_type, num_layers=num_layers, seed=seed, **fields).requires_grad_(False)
    return Teacher(
        model=model, name=f"tiny-{model_type}", revision="main", task=task_of(model_type), sha256=weight_hash(model)
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer of about 120 words, with BERT's special tokens."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="session")
def causal_tokenizer() -> PreTrainedTokenizerBase:
    """The same words as for GPT-2: no opening or closing tokens, no padding, an end-of-text token."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")


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


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt corpus of 400 documents, separated by blank lines."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text("\n\n".join(make_documents(400)), "utf-8")
    return file


@pytest.fixture(scope="session")
def save_teacher(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    causal_tokenizer: PreTrainedTokenizerBase,
) -> Callable[..., Path]:
    """Save a tiny teacher with its tokenizer, once for each set of arguments, and return its folder."""
    saved: dict[str, Path] = {}

    def save(model_type: str, **fields: Any) -> Path:
        key = f"{model_type}{fields}"
        if key not in saved:
            folder = tmp_path_factory.mktemp(model_type)
            build_model(model_type, **fields).save_pretrained(folder)
            (causal_tokenizer if task_of(model_type) == "clm" else tokenizer).save_pretrained(folder)
            saved[key] = folder
        return saved[key]

    return save
