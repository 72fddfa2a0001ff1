"""Load a model with a task's head, and the tokenizer that belongs to it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.cli import silenced
from distilkit.data.tokenizer import load_tokenizer, num_ids
from distilkit.errors import UserError
from distilkit.language_model import num_parameters, num_parameters_without_embeddings

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of the models of all tasks
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")


def resolved(name: str, *, revision: str) -> str:
    """Return the commit that a revision of a hub id names now, on the hub or else in its cache.

    The revision of a folder, or of what cannot be found, is returned as it is: loading says what is wrong.
    """
    if Path(name).expanduser().is_dir():
        return revision
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except (OSError, ValueError):
        return revision


def weights_id(model: str, *, revision: str) -> str:
    """Identify a model: the SHA-256 of a folder's weights, config, code and tokenizer, or the commit of a hub id."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _hub_id(model, revision=revision)
    if not list(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        raise UserError(
            f"{model} has no config.json or no .safetensors; give the student/ folder of a run, or a hub id"
        )
    return _digest(folder, "config.json", "*.safetensors", "*.py", *_TOKENIZER)


def tokenizer_id(name: str) -> str:
    """Identify a tokenizer: the SHA-256 of a folder's files, or the commit of a hub id."""
    folder = Path(name).expanduser()
    return _digest(folder, *_TOKENIZER) if folder.is_dir() else _hub_id(name, revision="main")


def _hub_id(name: str, *, revision: str) -> str:
    commit = resolved(name, revision=revision)
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else f"{name}@{commit}"


def _digest(folder: Path, *patterns: str) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
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
    """Load a backbone in float32 from safetensors, with the head in its files or with a new one.

    ``head`` holds the fields of the config that determine a new head. With ``needs_head`` the files must hold the head,
    as those of a fine-tuned model do.
    """
    settings = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config: Any = AutoConfig.from_pretrained(model, **settings)
        theirs = config.num_labels
        if not needs_head:
            for name, value in head.items():
                setattr(config, name, value)
        with silenced():  # missing weights are checked below
            loaded, info = auto_class.from_pretrained(
                model,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=not needs_head and theirs != head.get("num_labels", theirs),
                **settings,
            )
    except Exception as error:  # of damaged weights, of a config's odd values, of a model's own code
        where = "folder" if Path(model).is_dir() else "hub id"
        raise UserError(
            f"cannot load {where} {model!r} at revision {revision!r} as a model for this task: "
            f"{(str(error).strip() or repr(error)).splitlines()[0]} A hub id needs the network or a filled Hugging "
            "Face cache; a folder needs config.json and model.safetensors"
        ) from error
    backbone = "" if loaded.base_model is loaded else f"{loaded.base_model_prefix}."  # a backbone has no prefix
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    missing += sorted(str(entry[0]) for entry in info["mismatched_keys"])  # of another shape than in the config
    lacking = [key for key in missing if key.startswith(backbone) and "pooler." not in key]
    if lacking or (needs_head and missing):
        cure = "fine-tune it first, and give the model/ folder" if needs_head else "give a pretrained model"
        raise UserError(f"{model!r} has no weights for {', '.join((lacking or missing)[:3])}; {cure}")
    return cast(PreTrainedModel, loaded)


def load_task_tokenizer(
    model: str, *, tokenizer: str | None, revision: str, trust_remote_code: bool, vocabulary: int
) -> PreTrainedTokenizerBase:
    """Load a model's own tokenizer, or another one that is named, with a padding token."""
    name = tokenizer or model
    where = revision if tokenizer is None else "main"
    try:
        loaded = load_tokenizer(name=name, revision=where, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(f"{error}; or name another with tokenizer=<folder or hub id>") from error
    if (needed := num_ids(loaded)) > vocabulary:
        raise UserError(
            f"the tokenizer of {name!r} has {needed} words, but the model {model!r} only {vocabulary}; give the "
            "model's own with tokenizer=<folder or hub id>"
        )
    if loaded.pad_token_id is None:  # GPT-2; padding is never attended to, so any token serves
        loaded.pad_token = loaded.eos_token
    if loaded.pad_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no padding token; set its pad_token and save it")
    loaded.padding_side = "right"  # tokens are counted from the first, and so are positions
    return loaded


def inputs_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the inputs that a model takes: token types only where it has more than one."""
    segments = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return {name: batch[name] for name in INPUTS if name in batch and (segments or name != "token_type_ids")}


def described(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a result records of a model: its type and its numbers of parameters."""
    return {
        "model_type": str(model.config.model_type),
        "parameters": num_parameters(model),
        "parameters_without_embeddings": num_parameters_without_embeddings(model),
    }
