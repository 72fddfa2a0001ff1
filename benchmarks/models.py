"""Teachers and students with random weights, and random batches."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from distilkit.data.batches import split_step
from distilkit.language_model import LM, Batch
from distilkit.losses import IGNORE_INDEX

Family = Literal["bert", "roberta", "gpt2"]

MASKED_SHARE = 0.15
_FIRST_WORD = 5  # lower ids are special; RoBERTa's position ids skip padding


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of a teacher and its student, which share ``width``."""

    name: str
    width: int
    heads: int
    teacher_layers: int
    student_layers: int
    vocabulary: int | None  # None: the size of the family's vocabulary

    def vocabulary_of(self, family: Family) -> int:
        """Return the vocabulary size of a family."""
        return self.vocabulary or {"bert": 30522, "roberta": 50265, "gpt2": 50257}[family]


SIZES = {
    size.name: size
    for size in (
        Size(name="toy", width=32, heads=2, teacher_layers=2, student_layers=1, vocabulary=200),
        Size(name="small", width=256, heads=4, teacher_layers=4, student_layers=2, vocabulary=None),
        Size(name="base", width=768, heads=12, teacher_layers=12, student_layers=6, vocabulary=None),
    )
}


def lm_of_family(family: Family) -> LM:
    """Return the kind of language model of a family."""
    return "clm" if family == "gpt2" else "mlm"


def build_models(
    family: Family, size: Size, *, dropout: float, seed: int = 0, initializer_range: float = 0.02
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Build (student, teacher): the student in train mode, the teacher frozen in eval mode.

    The student of a BERT is a DistilBERT, as in training; the other families keep their class.
    """
    torch.manual_seed(seed)
    shape = {"vocab_size": size.vocabulary_of(family), "initializer_range": initializer_range}
    teacher = _model(family, size, size.teacher_layers, dropout, shape).eval().requires_grad_(False)
    student_type = "distilbert" if family == "bert" else family
    return _model(student_type, size, size.student_layers, dropout, shape).train(), teacher


def _model(model_type: str, size: Size, layers: int, dropout: float, shape: dict[str, Any]) -> PreTrainedModel:
    wide = {"hidden_size": size.width, "num_attention_heads": size.heads, "intermediate_size": 4 * size.width}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    fields: dict[str, dict[str, Any]] = {
        "bert": {**wide, **dropouts},
        "roberta": {**wide, **dropouts, "max_position_embeddings": 514},
        "distilbert": {
            "dim": size.width,
            "n_heads": size.heads,
            "hidden_dim": 4 * size.width,
            "dropout": dropout,
            "attention_dropout": dropout,
        },
        "gpt2": {
            "n_embd": size.width,
            "n_head": size.heads,
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
            "attn_pdrop": dropout,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    }
    config = AutoConfig.for_model(model_type, num_hidden_layers=layers, **fields[model_type], **shape)
    auto = AutoModelForCausalLM if model_type == "gpt2" else AutoModelForMaskedLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def build_batch(lm: LM, *, vocabulary: int, batch_size: int, length: int, device: str = "cpu", seed: int = 0) -> Batch:
    """Draw a random batch of full blocks as the data module returns it; a fixed share of each block is labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(_FIRST_WORD, vocabulary, (batch_size, length), generator=generator)
    labels = torch.full_like(ids, IGNORE_INDEX)
    if lm == "clm":
        labels[:, :-1] = ids[:, 1:]
    else:
        draws = torch.rand(batch_size, length, generator=generator)
        chosen = draws.topk(max(1, round(MASKED_SHARE * length)), dim=1).indices
        labels.scatter_(1, chosen, ids.gather(1, chosen))
    (batch,) = split_step({"input_ids": ids, "labels": labels}, batch_size)
    on_device = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return cast(Batch, on_device)
