"""Export a checkpoint as a Hugging Face folder: config, safetensors, tokenizer and model card."""

import json
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from omegaconf import DictConfig
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distilkit.cli import report_errors
from distilkit.errors import UserError
from distilkit.language_model import lm_of, num_parameters
from distilkit.model_card import student_card


def student_files(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the files of config and tokenizer by name; a folder needs these and the weights."""
    with tempfile.TemporaryDirectory() as folder:
        student.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_text("utf-8") for file in sorted(Path(folder).iterdir())}


def write_student(
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    files: Mapping[str, str],
    record: Mapping[str, Any],
    results: Mapping[str, float],
    tokens_seen: int,
) -> PreTrainedModel:
    """Write a folder that ``from_pretrained`` loads, whole or not at all, and return the model.

    ``state`` holds the student's weights by the names of its own class. ``files`` comes from ``student_files``.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp", dir=folder.parent))
    try:
        for name, content in files.items():
            (temporary / name).write_text(content, "utf-8")
        config = AutoConfig.from_pretrained(temporary)
        lm = lm_of(config.model_type, config.architectures)
        auto = AutoModelForCausalLM if lm == "clm" else AutoModelForMaskedLM
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
        model.load_state_dict(state, strict=True)
        model.eval().save_pretrained(temporary)
        mask_token = json.loads(files.get("tokenizer_config.json", "{}")).get("mask_token")
        card = student_card(
            record,
            results=results,
            tokens_seen=tokens_seen,
            num_params=num_parameters(model),
            lm=lm,
            mask_token=mask_token["content"] if isinstance(mask_token, dict) else mask_token or "[MASK]",
        )
        card.save(temporary / "README.md")
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return model


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Map a checkpoint of a distilkit run into memory."""
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["distilkit"]
    except (RuntimeError, KeyError, TypeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{file} is not a checkpoint of distilkit.train, or it is cut short; give another one of the run, best.ckpt or "
            "last.ckpt"
        ) from error
    return checkpoint


def export_checkpoint(ckpt: str | Path, out: str | Path) -> PreTrainedModel:
    """Export a checkpoint of a distilkit run as a Hugging Face folder.

    Raises:
        UserError: the file is no such checkpoint, or the folder exists.
    """
    file = Path(ckpt).expanduser()
    if not file.is_file():
        raise UserError(f"ckpt={str(ckpt)!r} is no file; give the path of a .ckpt below outputs/.../checkpoints")
    checkpoint = read_checkpoint(file)
    saved = checkpoint["distilkit"]
    state = {name.removeprefix("student."): tensor for name, tensor in checkpoint["state_dict"].items()}
    return write_student(
        Path(out).expanduser(),
        state=state,
        files=saved["files"],
        record=saved["record"],
        results={},
        tokens_seen=saved["tokens_seen"],
    )


@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="export")
@report_errors
def main(cfg: DictConfig) -> None:
    """Export ``ckpt`` to the folder ``out``."""
    transformers.utils.logging.disable_progress_bar()
    for name in ("ckpt", "out"):
        if cfg[name] is None:
            raise UserError(f"{name} is not set: python -m distilkit.export ckpt=<file> out=<folder>")
    model = export_checkpoint(cfg.ckpt, cfg.out)
    print(json.dumps({"out": str(Path(cfg.out).resolve()), "parameters": num_parameters(model)}))


if __name__ == "__main__":
    main()
