"""Load a teacher: in float32, in eval mode, without gradient, and with the head it was trained with."""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from distilkit.errors import UserError
from distilkit.language_model import LM, check_split, load_language_model, weight_hash


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen language model and where it came from.

    ``sha256`` is the hash of its weights, by which a resumed run knows that it still has the same teacher. ``dtype`` is
    what it runs in: ``auto`` for bfloat16 where the trainer's precision is that, ``float32`` to leave it as loaded.
    """

    model: PreTrainedModel
    name: str
    revision: str
    lm: LM
    sha256: str
    dtype: Literal["auto", "float32"] = "auto"


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

    ``needs_head`` is false when no term of the objective reads the teacher's logits.

    Raises:
        UserError: as ``load_language_model``, or the architecture cannot be split into backbone and head, or there is no
            such ``dtype``.
    """
    if name is None:
        return None
    if dtype not in ("auto", "float32"):
        raise UserError(f"teacher.dtype is {dtype!r}; it takes auto or float32")
    model, lm = load_language_model(
        name, revision=revision, lm=lm, trust_remote_code=trust_remote_code, needs_head=needs_head
    )
    model.eval().requires_grad_(False)
    check_split(model)
    commit = getattr(model.config, "_commit_hash", None) or revision
    return Teacher(model=model, name=name, revision=commit, lm=lm, sha256=weight_hash(model), dtype=dtype)
