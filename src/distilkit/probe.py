"""Try both models on a few tokens before training, where a mistake would go unseen: cut, masks, documents, padding.

Architectures differ in what they read from their config, their layers' numbers and their masks. Instead of knowing them
all, this compares outputs that must be equal. It takes some ten forwards of 40 tokens, on either model.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.language_model import last_hidden_state, lm_head, lm_of_model, max_positions, num_embeddings
from distilkit.layers import without_layers
from distilkit.teacher import Teacher

_LENGTH, _TOLERANCE = 40, 1e-4  # tokens; share of the largest value
_WINDOWS = ("window", "local_attention", "chunk")  # in the names of settings that limit how far a token sees


@torch.no_grad()
def probe(
    *,
    student: PreTrainedModel,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    apart: bool,
    max_length: int,
) -> None:
    """Raise a ``UserError`` where a model does not do what training assumes.

    1. A cut student equals its teacher without the layers that it lacks, so one of all layers equals the teacher.
    2. No later token changes an earlier one of a causal model.
    3. Padding changes nothing, and neither does another document if documents are kept ``apart``.

    ``max_length`` is that of the run's sequences: windows that are longer do not matter. The models come back as they
    were. Models without values, on the meta device, are not tried.
    """
    models = [(student, "the student"), *([(teacher.model, teacher.name)] if teacher else [])]
    if any(parameter.is_meta for model, _ in models for parameter in model.parameters()):
        return
    ids = _sequence([model for model, _ in models], tokenizer, max_length=max_length)
    with ExitStack() as stack:
        for model, _ in models:
            stack.enter_context(_as_scored(model))
        layers: Sequence[int] | None = getattr(student.config, "distilkit_layers", None)
        if teacher is not None and layers is not None:
            _check_cut(student, teacher, layers, ids)
        for model, name in models:
            _check_masks(model, ids, name=name, apart=apart)


def _sequence(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Tensor:
    """Return ids (1, length) of the whole vocabulary, special ones among them, longer than a window that is reached."""
    windows = [
        value
        for model in models
        for key, found in model.config.to_dict().items()
        if any(word in key for word in _WINDOWS)
        for value in (found if isinstance(found, list) else [found])
        if isinstance(value, int) and value < max_length
    ]
    limits = [
        max_positions(model) for model in models if (getattr(model.config, "max_position_embeddings", 0) or 0) > 0
    ]
    length = min([max([0, *windows]) + _LENGTH, *limits])
    rows = min(num_embeddings(model) for model in models)
    ids = torch.randint(rows, (1, length), generator=torch.Generator().manual_seed(0))
    special = {*tokenizer.all_special_ids, *(getattr(model.config, "pad_token_id", None) for model in models)}
    known = sorted(each for each in special if isinstance(each, int) and 0 <= each < rows)[: length // 4]
    ids[0, 1 : 1 + 2 * len(known) : 2] = torch.tensor(known, dtype=torch.long)  # in the first document, not at its ends
    return ids.to(models[0].device)


@contextmanager
def _as_scored(model: PreTrainedModel) -> Iterator[None]:
    """Set eval mode and full float32 products for a while."""
    modes, precision = {module: module.training for module in model.modules()}, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for module, mode in modes.items():
            module.training = mode


def _check_cut(student: PreTrainedModel, teacher: Teacher, layers: Sequence[int], ids: Tensor) -> None:
    def logits(model: PreTrainedModel) -> Tensor:
        return nn.functional.linear(*lm_head(model, last_hidden_state(model, ids)[0]))

    with _refusing(
        f"a student of layers {list(layers)} of {teacher.name} (model type {teacher.model.config.model_type!r}) "
        "is not the teacher without its other layers",
        cure="choose another teacher, or set student=new with a shape of your own",
    ):
        whole = len(layers) == teacher.model.config.num_hidden_layers
        with nullcontext() if whole else without_layers(teacher.model, layers):
            expected = logits(teacher.model)
        _compare(logits(student), expected)


def _check_masks(model: PreTrainedModel, ids: Tensor, *, name: str, apart: bool) -> None:
    kind, cut, last = f"{name} (model type {model.config.model_type!r})", ids.shape[1] * 2 // 5, ids.shape[1] * 3 // 4
    first, second = ids[:, :cut], ids[:, cut:]
    documents = torch.ones_like(ids)
    documents[:, :cut] = 0
    padding = max(getattr(model.config, "pad_token_id", None) or 0, 0)
    rows = torch.cat([ids, nn.functional.pad(second, (0, cut), value=padding)])  # (2, length)
    real = torch.ones_like(rows)
    real[1, second.shape[1] :] = 0
    other = ids.clone()
    other[:, last:] = (other[:, last:] + 1) % num_embeddings(model)
    with _refusing(f"padding changes the states of {kind}", cure="choose another model"):
        whole, alone = last_hidden_state(model, ids), last_hidden_state(model, second)
        padded = last_hidden_state(model, rows, attention_mask=real)
        _compare(padded[:1], whole)
        _compare(padded[1:, : second.shape[1]], alone)
    causal, changed = lm_of_model(model) == "clm", last_hidden_state(model, other)[:, :last]
    if causal:
        cure = "choose a model of causal attention (a BERT needs is_decoder=true in its config)"
        with _refusing(f"later tokens change earlier states of {kind}", cure=cure):
            _compare(changed, whole[:, :last])
    elif torch.equal(changed, whole[:, :last]):
        found = f"no token of {kind} sees a later one (is_decoder=true in its config, or MRA without its CUDA kernel)"
        raise UserError(f"{found}; choose another model, or set teacher.lm=clm")
    if apart:
        with _refusing(
            f"data.attend_across_documents=false, but {kind} cannot keep packed documents apart",
            cure="set data.attend_across_documents=true",
        ):
            packed = last_hidden_state(model, ids, document_ids=documents)
            _compare(packed[:, :cut], last_hidden_state(model, first))
            _compare(packed[:, cut:], alone)
            if causal:
                _compare(last_hidden_state(model, other, document_ids=documents)[:, :last], packed[:, :last])


class _DifferenceError(Exception):
    """Say how far two tensors are apart."""


def _compare(ours: Tensor, theirs: Tensor) -> None:
    """Compare two tensors by the largest difference, as a share of the largest value; a NaN is a difference."""
    found = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
    if not found <= _TOLERANCE:
        raise _DifferenceError(f"outputs differ by {found:.2g} of their largest value")


@contextmanager
def _refusing(found: str, *, cure: str) -> Iterator[None]:
    """Turn a difference, or any error of an architecture that does not support it, into a ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        kind = "" if isinstance(error, _DifferenceError) else f"{type(error).__name__}: "
        raise UserError(f"{found} ({kind}{reason}); {cure}") from error
