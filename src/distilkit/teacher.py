"""Load a teacher: in float32, in eval mode, without gradient, and with the head it was trained with."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from distilkit.errors import UserError
from distilkit.language_model import Task, check_split, task_of

log = logging.getLogger(__name__)

_AUTO_CLASS = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM}


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen language model and where it came from.

    ``sha256`` is the hash of its weights, by which a resumed run knows that it still has the same teacher. ``dtype`` is
    what it runs in: ``auto`` for bfloat16 where the trainer's precision is that, ``float32`` to leave it as loaded.
    """

    model: PreTrainedModel
    name: str
    revision: str
    task: Task
    sha256: str
    dtype: Literal["auto", "float32"] = "auto"


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a frozen model's parameters once, where autocast would cast them at each step.

    Buffers stay as they are: rotary frequencies need their digits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def weight_hash(model: PreTrainedModel) -> str:
    """Return the SHA-256 over names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_language_model(
    name: str,
    *,
    revision: str = "main",
    task: Task | None = None,
    trust_remote_code: bool = False,
    needs_head: bool = True,
) -> tuple[PreTrainedModel, Task]:
    """Load a masked or causal language model from the hub or a folder, from safetensors, in float32.

    ``task`` is read from the config when it is None.

    Raises:
        UserError: the model cannot be found or has no safetensors, or its head was not in its files while
            ``needs_head`` is true.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        task = task or task_of(config.model_type, config.architectures)
        model, info = _AUTO_CLASS[task].from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        where = "folder" if Path(name).is_dir() else "hub id"
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load {where} {name!r} at revision {revision!r}: {reason} "
            "A hub id needs the network or a filled Hugging Face cache; a folder needs config.json and "
            "model.safetensors (remote code only with trust_remote_code=true)"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing and needs_head:
        raise UserError(
            f"{name!r} has no trained language-model head: {', '.join(missing)} were not in its files and would be "
            "random targets; use a checkpoint saved with its head, or set objective.alpha_ce=0 and objective.alpha_mse=0"
        )
    return model, task


def load_teacher(
    *,
    name: str | None,
    revision: str = "main",
    task: Task | None = None,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32"] = "auto",
    needs_head: bool = True,
) -> Teacher | None:
    """Load the teacher, or return None for ``name=None`` (training without distillation).

    ``needs_head`` is false when no term of the objective reads the teacher's logits.

    Raises:
        UserError: as ``load_language_model``, or the architecture cannot be split into backbone and head, or there is no
            such ``dtype``.
    """
    if name is None:
        return None
    if dtype not in ("auto", "float32"):
        raise UserError(f"teacher.dtype is {dtype!r}; it takes auto or float32")
    model, task = load_language_model(
        name, revision=revision, task=task, trust_remote_code=trust_remote_code, needs_head=needs_head
    )
    model.eval().requires_grad_(False)
    check_split(model)
    commit = getattr(model.config, "_commit_hash", None) or revision
    return Teacher(model=model, name=name, revision=commit, task=task, sha256=weight_hash(model), dtype=dtype)
