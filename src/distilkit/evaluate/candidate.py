"""A model that is to be measured: loaded with a head of one number, with its size and its batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.evaluate.models import inputs_of, load_task_model, load_task_tokenizer, weights_id
from distilkit.language_model import max_positions, num_parameters
from distilkit.timing import Batch

Sentences = Sequence[tuple[str, ...]]  # each one text or a pair


@dataclass(kw_only=True)
class Candidate:
    """A model that takes part, its batches for latency and for throughput, and what was found of it so far."""

    name: str
    source: str
    sha256: str
    model: PreTrainedModel
    batches: tuple[list[Batch], list[Batch]]
    num_tokens: int
    scores: dict[str, float]
    details: dict[str, Any]
    onnx_files: dict[str, Path] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0


def file_size(model: str, *, num_params: int) -> tuple[float, str]:
    """Return the megabytes (1e6 bytes) of the weights in float32, and what was measured.

    It is the file's size where a folder holds float32, and 4 bytes a parameter for a hub id or another type.
    """
    files = sorted(Path(model).glob("model*.safetensors"))
    if not files or not all(map(_is_float32, files)):
        return num_params * 4 / 1e6, "parameters x 4 bytes"
    return sum(file.stat().st_size for file in files) / 1e6, ", ".join(file.name for file in files)


def _is_float32(file: Path) -> bool:
    with safe_open(file, framework="pt") as weights:
        return all(weights.get_slice(key).get_dtype() == "F32" for key in weights.keys())  # noqa: SIM118 - no mapping


def encode(
    sentences: Sentences,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    batch_size: int,
    max_length: int,
) -> list[Batch]:
    """Tokenize sentences or pairs in their order, and pad each batch to its longest: (batch, length) of what it takes."""
    if hasattr(model.config, "max_position_embeddings"):
        max_length = min(max_length, max_positions(model))
    batches: list[Batch] = []
    for start in range(0, len(sentences), batch_size):
        texts = [list(column) for column in zip(*sentences[start : start + batch_size], strict=True)]
        encoded = tokenizer(*texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batches.append(inputs_of(model, encoded))
    return batches


def load_candidate(
    source: str,
    *,
    revision: str,
    tokenizer: str | None,
    name: str,
    sentences: Sentences,
    batch_sizes: Sequence[int],
    max_length: int,
    seed: int,
) -> Candidate:
    """Load a folder or hub id, its tokenizer (None: its own) and cut the sentences into batches of both sizes.

    A head that is not in the files is random by ``seed``: neither size nor speed depends on its values.

    Raises:
        UserError: model or tokenizer cannot be loaded or do not fit each other, or there is nothing to pad with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for a head that is not in the files
        network = load_task_model(
            source,
            auto_class=AutoModelForSequenceClassification,
            head={"num_labels": 1},
            revision=revision,
            trust_remote_code=False,
        ).eval()
    words = network.get_input_embeddings().num_embeddings
    vocabulary = load_task_tokenizer(
        source, tokenizer=tokenizer, revision=revision, trust_remote_code=False, vocabulary=words
    )
    if network.config.pad_token_id is None:  # GPT-2 refuses batches without
        network.config.pad_token_id = vocabulary.pad_token_id
    network.config.use_cache = False  # nothing is generated
    cut = partial(encode, sentences, vocabulary, network, max_length=max_length)
    batches = (cut(batch_size=batch_sizes[0]), cut(batch_size=batch_sizes[1]))
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches[0])
    megabytes, file = file_size(source, num_params=num_parameters(network))
    return Candidate(
        name=name,
        source=source,
        model=network,
        batches=batches,
        num_tokens=num_tokens,
        scores={"file_mb": megabytes},
        sha256=weights_id(source, revision=revision),
        details={"file": file, "tokens_per_sentence": num_tokens / len(sentences)},
    )
