"""Load a teacher in float32 and eval mode, without gradients, and with its trained head."""

import logging
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from distilkit.errors import UserError
from distilkit.language_model import LM, check_split, load_language_model, weight_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen language model and its origin; a resumed run compares ``sha256``, the hash of the weights.

    With ``dtype="auto"`` it runs in bfloat16 if the trainer's precision is bfloat16; with ``float32``, as loaded.
    """

    model: PreTrainedModel
    name: str
    revision: str
    lm: LM
    sha256: str
    dtype: Literal["auto", "float32"] = "auto"
    has_head: bool = True  # false: its head is random, since no term of the objective reads it


def load_teacher(
    *,
    name: str | None,
    revision: str = "main",
    lm: LM | None = None,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32"] = "auto",
    needs_head: bool = True,
) -> Teacher | None:
    """Load the teacher, or return None for ``name=None`` (training without distillation).

    ``needs_head`` is false when no term of the objective reads the teacher's logits. A model that cannot be loaded from
    safetensors, or that lacks the head it needs, raises a ``UserError``.
    """
    if name is None:
        return None
    if dtype not in ("auto", "float32"):
        raise UserError(f"teacher.dtype is {dtype!r}; it takes auto or float32")
    model, lm, has_head = load_language_model(
        name, revision=revision, lm=lm, trust_remote_code=trust_remote_code, needs_head=needs_head
    )
    model.eval().requires_grad_(False)
    check_split(model)
    commit = getattr(model.config, "_commit_hash", None) or revision
    if not has_head:
        log.warning(
            "%s has no trained head: it is not scored, and the head of a student that is cut from it is random", name
        )
    sha256 = weight_hash(model if has_head else model.base_model)
    return Teacher(model=model, name=name, revision=commit, lm=lm, sha256=sha256, dtype=dtype, has_head=has_head)
