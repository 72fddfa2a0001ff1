"""Keep the rows of a model that belong to the words of a trimmed tokenizer."""

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.language_model import last_hidden_state, matrix_flops, num_embeddings, num_parameters
from distilkit.runs.signals import first_rank
from distilkit.teacher import Teacher
from distilkit.trim.tokenizer import trimming_of

log = logging.getLogger(__name__)

_TOLERANCE = 1e-4  # share of the largest state


def trim_model(model: PreTrainedModel, ids: Sequence[int], *, name: str) -> PreTrainedModel:
    """Build a model of the words ``ids`` alone, numbered by their places, with the weights of ``model``.

    Embeddings, head and its bias keep the rows of these words. Rows of no word, which pad a vocabulary, are left out. All
    other weights stay, so states and logits of these words do; a model whose states change is refused.
    """
    rows = num_embeddings(model)
    if max(ids) >= rows:
        found = f"the tokenizer has an id {max(ids)}, but {name} embeds {rows}"
        raise UserError(f"{found}; use the tokenizer the model was trained with")
    config = copy.deepcopy(model.config)
    config.vocab_size = len(ids)
    _renumber(config, ids)
    kept, smaller = torch.tensor(ids), type(model)(config)
    state, wanted = model.state_dict(), smaller.state_dict()
    for key in state.keys() & wanted.keys():
        was, now = state[key].shape, wanted[key].shape
        if was != now and was[1:] == now[1:] and was[0] == rows and now[0] == len(ids):
            state[key] = state[key][kept]
    try:
        smaller.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the vocabulary of {name} cannot be trimmed: {reason}; set tokenizer=pretrained") from error
    if model.can_generate() and model.generation_config is not None:
        smaller.generation_config = copy.deepcopy(model.generation_config)
        _renumber(smaller.generation_config, ids)
    smaller.to(model.dtype).train(model.training)  # type: ignore[arg-type]  # transformers hides this form
    _check_states(model, smaller, ids, name=name)
    return smaller


def _renumber(config: Any, ids: Sequence[int]) -> None:
    """Renumber the ids of special tokens that a config names; one that is left out becomes None."""
    new = {old: index for index, old in enumerate(ids)}
    for key, value in list(vars(config).items()):
        if key.endswith("_token_id") and value is not None:
            several = [new[each] for each in value if each in new] if isinstance(value, list) else []
            with suppress(StrictDataclassError):  # EuroBERT's mask must be a number, though no word may have it
                setattr(config, key, several or None if isinstance(value, list) else new.get(value))
        elif key in ("suppress_tokens", "begin_suppress_tokens") and value:
            setattr(config, key, [new[each] for each in value if each in new])


@torch.no_grad()
def _check_states(model: PreTrainedModel, smaller: PreTrainedModel, ids: Sequence[int], *, name: str) -> None:
    """Compare the last hidden states of some kept words, in both numberings."""
    some = torch.arange(len(ids) - 1, -1, -max(1, len(ids) // 16))[None, :16]  # (1, tokens)
    modes = [(each, each.training) for each in (model, smaller)]
    try:
        expected = last_hidden_state(model.eval(), torch.tensor(ids)[some])
        found = last_hidden_state(smaller.eval(), some)
    finally:
        for each, mode in modes:
            each.train(mode)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= _TOLERANCE:
        found_ = f"the states of {name} change by {difference:.2g} of their largest value when its words are renumbered"
        raise UserError(f"{found_}; set tokenizer=pretrained")


def trim_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trim a model of the full vocabulary to a trimmed tokenizer; say what changes, and return it as numbers, too."""
    trimming = trimming_of(tokenizer)
    assert trimming is not None
    smaller = trim_model(model, trimming.ids, name=name)
    sizes = [num_parameters(each) for each in (model, smaller)]
    mflop = [matrix_flops(each.modules()) / 1e6 for each in (model, smaller)]  # with the head, without attention scores
    shown = (
        f"{sizes[0] / 1e6:,.1f}M -> {sizes[1] / 1e6:,.1f}M parameters, {mflop[0]:,.1f} -> {mflop[1]:,.1f} MFLOP a token"
    )
    if first_rank():
        log.info("%s trimmed: %s; %s", name, shown, trimming)
    share = trimming.changed / trimming.held_out if trimming.held_out else None
    numbers: dict[str, Any] = {"words": [trimming.num_words, len(trimming.ids)], "parameters": sizes}
    numbers |= {"mflop_per_token": mflop, "covered": trimming.covered, "held_out_tokens": trimming.held_out}
    return smaller, numbers | {"held_out_changed": share}


def trim_teacher(teacher: Teacher | None, tokenizer: PreTrainedTokenizerBase) -> Teacher | None:
    """Trim a teacher to a trimmed tokenizer; with any other, return it as it is.

    Its hash becomes that of its weights and the words, so that a resumed run notices when either has changed.
    """
    trimming = trimming_of(tokenizer)
    if teacher is None or trimming is None:
        return teacher
    model, _ = trim_to(teacher.model, tokenizer, name=teacher.name)
    sha256 = hashlib.sha256(f"{teacher.sha256} {trimming.ids}".encode()).hexdigest()
    return dataclasses.replace(teacher, model=model.eval().requires_grad_(False), sha256=sha256)


def trim_student(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, own: Mapping[str, int], name: str
) -> PreTrainedModel:
    """Trim a student that was loaded with the full vocabulary ``own``, of words and ids, to a trimmed tokenizer."""
    trimming = trimming_of(tokenizer)
    assert trimming is not None
    if any(own.get(word) != trimming.ids[index] for word, index in tokenizer.get_vocab().items()):
        found = f"student {name!r} has another vocabulary than the one that tokenizer=trimmed is made from"
        raise UserError(f"{found}; give a student that was trained with the teacher's tokenizer")
    return trim_model(student, trimming.ids, name=name)
