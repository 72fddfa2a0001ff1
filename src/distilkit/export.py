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
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.cli import check_added, report_errors
from distilkit.errors import UserError
from distilkit.language_model import build_from_config, lm_of, num_parameters
from distilkit.model_card import student_card


def student_files(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the contents of the config and tokenizer files by name."""
    with tempfile.TemporaryDirectory() as folder:
        student.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_text("utf-8") for file in sorted(Path(folder).iterdir())}


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint of a distilkit run, with memory-mapped tensors."""
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["distilkit"]
    except (RuntimeError, KeyError, TypeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{file} is not a checkpoint of distilkit.train, or it is cut short; "
            "give another one of the run, best.ckpt or last.ckpt"
        ) from error
    return checkpoint


def export_checkpoint(
    ckpt: str | Path, out: str | Path, *, results: Mapping[str, float] | None = None
) -> PreTrainedModel:
    """Export a checkpoint of a distilkit run as a folder that ``from_pretrained`` loads, and return the model.

    The folder is written completely or not at all. The model card shows ``results``, metrics on held-out documents.
    """
    file, folder = Path(ckpt).expanduser(), Path(out).expanduser()
    if not file.is_file():
        raise UserError(f"ckpt={str(ckpt)!r} is no file; give the path of a .ckpt below outputs/.../checkpoints")
    checkpoint = read_checkpoint(file)
    saved = checkpoint["distilkit"]
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp", dir=folder.parent))
    try:
        for name, content in saved["files"].items():
            (temporary / name).write_text(content, "utf-8")
        model = build_from_config(AutoConfig.from_pretrained(temporary))
        state = {name.removeprefix("student."): tensor for name, tensor in checkpoint["state_dict"].items()}
        model.load_state_dict(state, strict=True)
        model.eval().save_pretrained(temporary)
        mask_token = json.loads(saved["files"].get("tokenizer_config.json", "{}")).get("mask_token")
        card = student_card(
            saved["record"],
            results=results or {},
            tokens_seen=saved["tokens_seen"],
            num_params=num_parameters(model),
            lm=lm_of(model.config.model_type, model.config.architectures),
            mask_token=mask_token["content"] if isinstance(mask_token, dict) else mask_token or "[MASK]",
        )
        card.save(temporary / "README.md")
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return model


@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="export")
@report_errors
def main(cfg: DictConfig) -> None:
    """Export ``ckpt`` to the folder ``out``."""
    check_added(cfg, config="train/export.yaml")
    transformers.utils.logging.disable_progress_bar()
    for name in ("ckpt", "out"):
        if cfg[name] is None:
            raise UserError(f"{name} is not set: python -m distilkit.export ckpt=<file> out=<folder>")
    model = export_checkpoint(cfg.ckpt, cfg.out)
    print(json.dumps({"out": str(Path(cfg.out).resolve()), "parameters": num_parameters(model)}))


if __name__ == "__main__":
    main()
