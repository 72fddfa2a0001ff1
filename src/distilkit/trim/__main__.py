"""Trim a vocabulary: ``python -m distilkit.trim model=xlm-roberta-base data=text vocab_size=32000 out=small``."""

import json
import os
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import AutoConfig, AutoModel

from distilkit.cli import check_added, check_keys, check_type, explain_keys, quiet_downloads, report_errors
from distilkit.errors import UserError
from distilkit.language_model import cast_parameters, load_language_model
from distilkit.runs.storage import permit_reading, whole_folder
from distilkit.trim.model import trim_to
from distilkit.trim.tokenizer import trimmed_tokenizer

_TYPES: dict[str, Any] = {
    **dict.fromkeys(("model", "out", "tokenizer", "tokenizer_type", "lm"), str | None),
    **{"revision": str, "cache_dir": str, "max_documents": int, "trust_remote_code": bool},
    **{"vocab_size": int | None, "coverage": float | int | None},
}


def trim(cfg: DictConfig) -> dict[str, Any]:
    """Trim ``model`` into the folder ``out``, and return what was made."""
    check_added(cfg, config="train/trim.yaml")
    check_keys(cfg)
    for name, kind in _TYPES.items():
        check_type(cfg[name], kind, name=name)
    for name in ("model", "out"):
        if cfg[name] is None:
            raise UserError(f"{name} is not set: python -m distilkit.trim model=<hub id or folder> out=<folder>")
    folder = Path(cfg.out).expanduser()
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists; choose another folder, or delete it")
    own: dict[str, Any] = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    tokenizer = trimmed_tokenizer(
        corpus=instantiate(cfg.data.corpus),
        cache_dir=cfg.cache_dir,
        name=cfg.tokenizer or cfg.model,
        **(own if cfg.tokenizer is None else {**own, "revision": "main"}),
        tokenizer_type=cfg.tokenizer_type,
        vocab_size=cfg.vocab_size,
        coverage=cfg.coverage,
        max_documents=cfg.max_documents,
        val_share=cfg.data.val_share,
        prefix="",
    )
    model, _, has_head = load_language_model(cfg.model, lm=cfg.lm, needs_head=False, **own)
    config = AutoConfig.from_pretrained(cfg.model, **own)
    if not has_head:  # an encoder or a classifier, which stays what it is
        loader: Any = getattr(transformers, (config.architectures or [""])[0], AutoModel)
        model = loader.from_pretrained(cfg.model, use_safetensors=True, dtype=torch.float32, **own).eval()
    smaller, numbers = trim_to(model, tokenizer, name=cfg.model)
    cast_parameters(smaller, config.dtype or torch.float32)  # in which the files hold them
    with whole_folder(folder, cure="set out to another folder") as temporary:
        smaller.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        permit_reading(temporary)
    return {"out": str(folder.resolve()), **numbers}


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="trim")
@report_errors
def main(cfg: DictConfig) -> None:
    """Trim ``model`` into the folder ``out``."""
    quiet_downloads()
    print(json.dumps(trim(cfg)))


if __name__ == "__main__":
    main()
