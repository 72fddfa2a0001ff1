"""Build a student: from layers of a teacher, with fresh weights, or from a pretrained model.

In every architecture, the first integer in a key of the state dict is the index of the layer. So one rule selects
and renumbers layers, and strict loading checks the result.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import AutoConfig, DistilBertConfig, DistilBertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PretrainedConfig

from distilkit.data.tokenizer import load_tokenizer, num_ids
from distilkit.errors import UserError
from distilkit.language_model import build_from_config, check_split, load_language_model
from distilkit.teacher import Teacher

Layers = Literal["half", "third"] | Sequence[int]
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
_LAYER_INDEX = re.compile(r"\.(\d+)\.")

_BERT_TO_DISTILBERT = (  # in this order: a pattern follows the longer ones that contain it
    ("bert.embeddings.", "distilbert.embeddings."),
    ("bert.encoder.layer.", "distilbert.transformer.layer."),
    (".attention.self.query.", ".attention.q_lin."),
    (".attention.self.key.", ".attention.k_lin."),
    (".attention.self.value.", ".attention.v_lin."),
    (".attention.output.dense.", ".attention.out_lin."),
    (".attention.output.LayerNorm.", ".sa_layer_norm."),
    (".intermediate.dense.", ".ffn.lin1."),
    (".output.dense.", ".ffn.lin2."),
    (".output.LayerNorm.", ".output_layer_norm."),
    ("cls.predictions.transform.dense.", "vocab_transform."),
    ("cls.predictions.transform.LayerNorm.", "vocab_layer_norm."),
    ("cls.predictions.decoder.", "vocab_projector."),
)


def choose_layers(num_teacher_layers: int, num_student_layers: int) -> list[int]:
    """Choose layers at equal distances: 12 -> 6 gives DistilBERT's [0, 2, 4, 7, 9, 11] (its original extraction)."""
    if num_student_layers == 1:
        return [0]
    step = (num_teacher_layers - 1) / (num_student_layers - 1)
    return [round(i * step) for i in range(num_student_layers)]


def _resolve_layers(layers: Layers, *, num_teacher_layers: int, name: str) -> list[int]:
    """Convert ``half``, ``third`` or an explicit list to valid layer indices."""
    if isinstance(layers, str):
        if layers not in ("half", "third"):
            raise UserError(f"student.layers is {layers!r}; it takes half, third or a list such as [0,2,4]")
        return choose_layers(num_teacher_layers, max(1, num_teacher_layers // {"half": 2, "third": 3}[layers]))
    chosen, last = list(layers), num_teacher_layers - 1
    if not chosen:
        raise UserError(f"student.layers is empty, but a student keeps at least one of layers 0 to {last} of {name}")
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
            found = f"student keeps layer {layer}, but {name} has layers 0 to {last}"
            raise UserError(f"{found}; set student.layers within that range")
    if chosen != sorted(set(chosen)):
        found = f"student.layers={chosen} repeats a layer or is not increasing"
        raise UserError(f"{found}; give each layer once, in the teacher's order")
    return chosen


def keep_layers(state: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """Select layers of a state dict and renumber them from 0; all other tensors stay the same."""
    new_index = {old: new for new, old in enumerate(layers)}
    kept: dict[str, Tensor] = {}
    for key, tensor in state.items():
        found = _LAYER_INDEX.search(key)
        if found is None:
            kept[key] = tensor
        elif int(found[1]) in new_index:
            kept[f"{key[: found.start(1)]}{new_index[int(found[1])]}{key[found.end(1) :]}"] = tensor
    return kept


def bert_to_distilbert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename BERT's weights to DistilBERT's, without token types and pooler.

    DistilBERT has no token types, and every sequence here is segment 0. Its embedding is added to each position, so
    that the sum of embeddings does not change (the original extraction dropped it).
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if "token_type_embeddings" in key or key.startswith("bert.pooler.") or key == "cls.predictions.bias":
            continue  # tied to cls.predictions.decoder.bias, which is renamed
        if key == "bert.embeddings.position_embeddings.weight":
            tensor = tensor + state["bert.embeddings.token_type_embeddings.weight"][0]  # (positions, width) + (width,)
        for old, new in _BERT_TO_DISTILBERT:
            key = key.replace(old, new)
        renamed[key] = tensor
    return renamed


def _distilbert_config(config: PretrainedConfig) -> DistilBertConfig:
    if config.hidden_act not in ("gelu", "relu"):
        found = f"DistilBERT supports the activations gelu and relu, but the teacher has {config.hidden_act!r}"
        raise UserError(f"{found}; set student.bert_class=same to keep the teacher's class")
    same = ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id", "tie_word_embeddings")
    return DistilBertConfig(
        **{name: getattr(config, name) for name in same},
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        activation=config.hidden_act,
    )


def cut_student(
    *,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    layers: Layers,
    init: Literal["teacher", "random"] = "teacher",
    bert_class: Literal["distilbert", "same"] = "distilbert",
    train_position_embeddings: bool = True,
) -> PreTrainedModel:
    """Build a student with the teacher's width from some of its layers, in train mode.

    A BERT teacher gives a DistilBERT unless ``bert_class`` is ``same``; every other teacher keeps its class.
    ``init=random`` gives the same shape with fresh weights (the ablation of DistilBERT, table 4). Layers that the
    teacher does not have, and a tokenizer with more ids than the teacher, raise a ``UserError``.
    """
    if teacher is None:
        raise UserError("a student cannot be cut from teacher=none; set student=new, or choose a teacher")
    source = teacher.model
    check_vocabulary(source, tokenizer, name=teacher.name)
    chosen = _resolve_layers(layers, num_teacher_layers=source.config.num_hidden_layers, name=teacher.name)
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = len(chosen)
    if config.model_type == "modernbert" and chosen[0] != 0 and init == "teacher":
        found = f"student.layers={chosen} drops layer 0, but ModernBERT's first layer"
        raise UserError(f"{found} is the one without an attention norm; keep layer 0")
    if getattr(source.config, "layer_types", None):  # full or sliding attention, layer by layer
        config.layer_types = [source.config.layer_types[layer] for layer in chosen]
    to_distilbert = config.model_type == "bert" and teacher.lm == "mlm" and bert_class == "distilbert"
    student = DistilBertForMaskedLM(_distilbert_config(config)) if to_distilbert else type(source)(config)
    if init == "teacher":
        state = keep_layers(source.state_dict(), chosen)
        student.load_state_dict(bert_to_distilbert(state) if to_distilbert else state, strict=True)
    elif init != "random":
        raise UserError(f"student.init is {init!r}; it takes teacher or random")
    student.config.architectures = [type(student).__name__]
    student.config.distilkit_layers = chosen if init == "teacher" else None
    for name, parameter in student.named_parameters():
        if re.search(r"position_embeddings|\.wpe\.", name):
            parameter.requires_grad_(train_position_embeddings)
    return cast(PreTrainedModel, student.float().train())


def new_student(
    *,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    model_type: str,
    config: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Build a model of any shape with fresh weights: ``model_type``, config fields, and the tokenizer's vocabulary."""
    special = {name: value for name in _SPECIAL_IDS if (value := getattr(tokenizer, name, None)) is not None}
    try:
        built = AutoConfig.for_model(model_type)
    except ValueError as error:
        found = f"student.{model_type=} is unknown to transformers"
        raise UserError(f"{found}; try bert, roberta or gpt2") from error
    unknown = sorted(key for key in config or {} if not hasattr(built, key))
    if unknown:
        raise UserError(f"student.config has {', '.join(unknown)}, but a {model_type} config does not; remove it")
    size = num_ids(tokenizer) if teacher is None else teacher.model.config.vocab_size
    # An id that the tokenizer does not define keeps the type's default, which may lie outside the vocabulary.
    absent = {name: None for name in _SPECIAL_IDS if name not in special and (getattr(built, name, None) or 0) >= size}
    fields = {"vocab_size": size, **absent, **special, **(config or {})}
    student = build_from_config(AutoConfig.for_model(model_type, **fields))
    student.config.architectures = [type(student).__name__]
    return _checked(student, tokenizer, name="the student")


def pretrained_student(
    *,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load an existing model as the student, to distil it further or to train it on new text.

    Padding may give the two vocabularies different sizes if the student's tokenizer is the run's. Words that only one
    vocabulary has then get no probability mass.
    """
    student, _ = load_language_model(
        name, revision=revision, trust_remote_code=trust_remote_code, lm=teacher.lm if teacher else None
    )
    if teacher is not None and student.config.vocab_size != teacher.model.config.vocab_size:
        own = load_tokenizer(name=name, revision=revision, trust_remote_code=trust_remote_code)
        if own.get_vocab() != tokenizer.get_vocab():
            words = f"{student.config.vocab_size} words and the teacher {teacher.model.config.vocab_size}"
            cure = "give a student that was trained with the teacher's tokenizer"
            raise UserError(f"student {name!r} has {words}, and their tokenizers differ; {cure}")
        check_vocabulary(teacher.model, tokenizer, name=teacher.name)
    return _checked(student, tokenizer, name=name)


def _checked(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> PreTrainedModel:
    check_vocabulary(student, tokenizer, name=name)
    check_split(student)
    student.config.distilkit_layers = None
    return cast(PreTrainedModel, student.float().train())


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Check that every id of the tokenizer has an embedding."""
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if (needed := num_ids(tokenizer)) > rows:
        found = f"the tokenizer has {needed} ids, but {name} embeds {rows}"
        raise UserError(f"{found}; use the tokenizer the model was trained with")
