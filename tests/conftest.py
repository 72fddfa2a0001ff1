"""Tiny tokenizers, a corpus and saved teachers for all tests; nothing is downloaded."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "true"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a forked rank would wait for its parent's threads for ever

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distilkit.language_model import lm_of
from distilkit.records import write_results
from scores import ABLATED, every_kind, write_training
from tiny import VOCABULARY, build_model, make_documents

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remember verified caches in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


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
            (causal_tokenizer if lm_of(model_type) == "clm" else tokenizer).save_pretrained(folder)
            saved[key] = folder
        return saved[key]

    return save


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results of two jobs and a sweep of training runs."""
    folder = tmp_path_factory.mktemp("outputs")
    results = every_kind()
    write_results(folder / "evaluate" / "0", results[:40])
    write_results(folder / "evaluate" / "1", results[40:])
    for index, label in enumerate(ABLATED):
        write_training(folder / "ablation" / "now", label, [9.0, 6.0 + index / 5, 4.0 + index / 5])
    return folder
