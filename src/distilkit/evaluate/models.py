"""Load a model with a task's head, and the tokenizer that belongs to it."""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.data.tokenizer import load_tokenizer
from distilkit.errors import UserError

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what tokenizers make for these tasks


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back the warnings of other libraries on what is known here: a fresh head, absent torchvision."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def weights_id(model: str, *, revision: str) -> str:
    """Identify a model's weights: the SHA-256 of a folder's files, or a hub id's name and revision.

    Raises:
        UserError: a folder holds no safetensors.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return f"{model}@{revision}"
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise UserError(
            f"{model} is no Hugging Face folder with config.json and .safetensors; give the student/ of a run, or a hub id"
        )
    for file in [folder / "config.json", *files]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_task_model(
    model: str,
    *,
    auto_class: Any,
    head: Mapping[str, Any],
    revision: str,
    trust_remote_code: bool,
    needs_head: bool = False,
) -> PreTrainedModel:
    """Load a backbone, in float32 and from safetensors, with the head that its files hold or a new one.

    ``head`` holds the fields of the config that a new head follows from. With ``needs_head`` the head must be in the
    files, as in those of a model that is fine-tuned already.

    Raises:
        UserError: there is no such model, it has no backbone, or no head where one is needed.
    """
    settings = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config: Any = AutoConfig.from_pretrained(model, **settings)
        theirs = config.num_labels
        if not needs_head:
            for name, value in head.items():
                setattr(config, name, value)
        with quiet():  # a new head is what fine-tuning is for, and what is missing is looked at below
            loaded, info = auto_class.from_pretrained(
                model,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=not needs_head and theirs != head.get("num_labels", theirs),
                **settings,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        where = "folder" if Path(model).is_dir() else "hub id"
        raise UserError(
            f"cannot load {where} {model!r} at revision {revision!r} as a model for this task: "
            f"{(str(error).strip() or repr(error)).splitlines()[0]} A hub id needs the network or a filled Hugging Face "
            "cache; a folder needs config.json and model.safetensors"
        ) from error
    backbone = f"{loaded.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    missing += sorted(str(entry[0]) for entry in info["mismatched_keys"])  # of another shape than the config says
    lacking = [key for key in missing if key.startswith(backbone) and ".pooler." not in key]
    if lacking or (needs_head and missing):
        cure = "fine-tune it first, and give the model/ of its folder" if needs_head else "give a pretrained model"
        raise UserError(f"{model!r} has no weights for {', '.join((lacking or missing)[:3])}; {cure}")
    result: PreTrainedModel = loaded
    return result


def load_task_tokenizer(
    model: str, *, tokenizer: str | None, revision: str, trust_remote_code: bool, vocabulary: int
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, its own unless another is named, with a token to pad with.

    Raises:
        UserError: there is none, or it has more words than the model.
    """
    name = tokenizer or model
    try:
        loaded = load_tokenizer(
            name=name, revision=revision if tokenizer is None else "main", trust_remote_code=trust_remote_code
        )
    except UserError as error:
        raise UserError(f"{error}; or name another with tokenizer=<folder or hub id>") from error
    if len(loaded) > vocabulary:
        raise UserError(
            f"the tokenizer of {name!r} has {len(loaded)} words, but the model {model!r} only {vocabulary}; give the model's "
            "own with tokenizer=<folder or hub id>"
        )
    if loaded.pad_token_id is None:  # GPT-2: padding is never attended to, so that any token will do
        loaded.pad_token = loaded.eos_token
    if loaded.pad_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no token to pad with; set its pad_token and save it")
    loaded.padding_side = "right"  # tokens are counted from the first, and so are positions
    return loaded


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, name: str) -> None:
    """Make sure that a teacher reads the student's ids as its own.

    Raises:
        UserError: it does not.
    """
    if tokenizer.get_vocab() != teacher.get_vocab():
        raise UserError(
            f"teacher {name!r} has another vocabulary ({len(teacher)} words) than the student ({len(tokenizer)}); a second "
            "distillation needs one tokenizer for both"
        )


def inputs_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take out of a batch what a model takes: DistilBERT and GPT-2 tell no segments apart, and RoBERTa knows one only."""
    segments = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return {name: batch[name] for name in INPUTS if name in batch and (segments or name != "token_type_ids")}
