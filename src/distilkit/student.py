"""Cut a student out of a teacher: choose layers, cut the config, carry the weights.

In each language model's state dict the first integer in a key is the index of the layer, so one rule keeps and renumbers
the layers of every architecture; strict loading is the guard.
"""

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distilkit.data.tokenizer import load_tokenizer
from distilkit.errors import UserError
from distilkit.language_model import check_split, lm_of, load_language_model
from distilkit.teacher import Teacher

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
_LAYER_INDEX = re.compile(r"\.(\d+)\.")

_BERT_TO_DISTILBERT = (  # applied in this order, to keys whose layers are renumbered already
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
    """Spread the student's layers evenly from the first to the last of the teacher's.

    12 -> 6 gives [0, 2, 4, 7, 9, 11], the layers of the original extraction (DistilBERT, section 3).
    """
    if num_student_layers == 1:
        return [0]
    step = (num_teacher_layers - 1) / (num_student_layers - 1)
    return [round(i * step) for i in range(num_student_layers)]


def resolve_layers(
    layers: Literal["half", "third"] | Sequence[int], *, num_teacher_layers: int, name: str
) -> list[int]:
    """Turn ``half``, ``third`` or an explicit list into checked layer indices."""
    if isinstance(layers, str):
        if layers not in ("half", "third"):
            raise UserError(f"student.layers is {layers!r}; it takes half, third or a list such as [0,2,4]")
        return choose_layers(num_teacher_layers, max(1, num_teacher_layers // {"half": 2, "third": 3}[layers]))
    chosen = list(layers)
    last = num_teacher_layers - 1
    if not chosen:
        raise UserError(f"student.layers is empty, but a student keeps at least one of layers 0 to {last} of {name}")
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
            raise UserError(
                f"student keeps layer {layer}, but {name} has layers 0 to {last}; set student.layers within that range"
            )
    if chosen != sorted(set(chosen)):
        raise UserError(
            f"student.layers={chosen} repeats a layer or is not increasing; give each layer once, in the teacher's order"
        )
    return chosen


def keep_layers(state: Mapping[str, Tensor], layers: Sequence[int]) -> StateDict:
    """Keep the chosen layers of a state dict and renumber them from 0; everything else is kept as it is."""
    new_index = {old: new for new, old in enumerate(layers)}
    kept: StateDict = {}
    for key, tensor in state.items():
        found = _LAYER_INDEX.search(key)
        if found is None:
            kept[key] = tensor
        elif int(found[1]) in new_index:
            kept[f"{key[: found.start(1)]}{new_index[int(found[1])]}{key[found.end(1) :]}"] = tensor
    return kept


def bert_to_distilbert(state: Mapping[str, Tensor]) -> StateDict:
    """Rename BERT's weights to DistilBERT's, without token types and pooler.

    DistilBERT has no token types, and every sequence here is segment 0: its row is added to each position, so that the
    embedding sum stays the same (the original dropped it).
    """
    renamed: StateDict = {}
    for key, tensor in state.items():
        if "token_type_embeddings" in key or key.startswith("bert.pooler.") or key == "cls.predictions.bias":
            continue  # the decoder's bias is the tied cls.predictions.bias, and is carried
        if key == "bert.embeddings.position_embeddings.weight":
            tensor = tensor + state["bert.embeddings.token_type_embeddings.weight"][0]
        for old, new in _BERT_TO_DISTILBERT:
            key = key.replace(old, new)
        renamed[key] = tensor
    return renamed


def _distilbert_config(config: PretrainedConfig) -> DistilBertConfig:
    if config.hidden_act not in ("gelu", "relu"):
        raise UserError(
            f"DistilBERT knows the activations gelu and relu, but the teacher has {config.hidden_act!r}; "
            "set student.bert_class=same to keep the teacher's class"
        )
    return DistilBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        sinusoidal_pos_embds=False,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        activation=config.hidden_act,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def cut_student(
    *,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    layers: Literal["half", "third"] | Sequence[int],
    init: Literal["teacher", "random"] = "teacher",
    bert_class: Literal["distilbert", "same"] = "distilbert",
    train_position_embeddings: bool = True,
) -> PreTrainedModel:
    """Build a student of the teacher's width from some of its layers, in train mode.

    A BERT teacher gives a DistilBERT unless ``bert_class`` is ``same``; every other teacher keeps its class.
    ``init=random`` gives the same shape with fresh weights (the ablation of DistilBERT, table 4).

    Raises:
        UserError: there is no teacher, or the layers or the tokenizer do not fit it.
    """
    if teacher is None:
        raise UserError("a student cannot be cut from teacher=none; set student=new, or choose a teacher")
    source = teacher.model
    check_vocabulary(source, tokenizer, name=teacher.name)
    chosen = resolve_layers(layers, num_teacher_layers=source.config.num_hidden_layers, name=teacher.name)
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = len(chosen)
    if config.model_type == "modernbert" and chosen[0] != 0 and init == "teacher":
        raise UserError(
            f"student.layers={chosen} drops layer 0, but ModernBERT's first layer is the one without an attention "
            "norm; keep layer 0"
        )
    if getattr(source.config, "layer_types", None):  # full or sliding attention, layer by layer
        config.layer_types = [source.config.layer_types[layer] for layer in chosen]
    to_distilbert = config.model_type == "bert" and teacher.lm == "mlm" and bert_class == "distilbert"
    if to_distilbert:
        student: PreTrainedModel = DistilBertForMaskedLM(_distilbert_config(config))
    else:
        student = type(source)(config)
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
    """Build a model with fresh weights from ``model_type`` and the fields of its config, sized for the tokenizer.

    This is how a teacher is made with ``teacher=none``; with a teacher it is a student of any other shape.

    Raises:
        UserError: the type or a field of its config is unknown.
    """
    special = {name: value for name in _SPECIAL_IDS if (value := getattr(tokenizer, name, None)) is not None}
    try:
        built = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UserError(
            f"student.model_type={model_type!r} is unknown to transformers; try bert, roberta or gpt2"
        ) from error
    unknown = sorted(key for key in config or {} if not hasattr(built, key))
    if unknown:
        raise UserError(f"student.config has {', '.join(unknown)}, which a {model_type} config does not have")
    size = len(tokenizer) if teacher is None else teacher.model.config.vocab_size
    # What the tokenizer has not must not stay at the type's own id, which lies outside a smaller vocabulary.
    absent = {name: None for name in _SPECIAL_IDS if name not in special and (getattr(built, name, None) or 0) >= size}
    fields = {"vocab_size": size, **absent, **special, **(config or {})}
    built = AutoConfig.for_model(model_type, **fields)
    auto = AutoModelForCausalLM if lm_of(model_type) == "clm" else AutoModelForMaskedLM
    student: PreTrainedModel = auto.from_config(built)
    student.config.architectures = [type(student).__name__]
    student.config.distilkit_layers = None
    check_vocabulary(student, tokenizer, name="the student")
    check_split(student)
    return cast(PreTrainedModel, student.float().train())


def pretrained_student(
    *,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load an existing model as the student, to distil it further or to train it on new text.

    Where the two vocabularies have different sizes, by padding, the student's tokenizer must be the run's: words that only
    one of them has carry no mass.

    Raises:
        UserError: it cannot be loaded, or its vocabulary is not the teacher's.
    """
    student, _ = load_language_model(
        name, revision=revision, trust_remote_code=trust_remote_code, lm=teacher.lm if teacher else None
    )
    if teacher is not None and student.config.vocab_size != teacher.model.config.vocab_size:
        own = load_tokenizer(name=name, revision=revision, trust_remote_code=trust_remote_code)
        if own.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"student {name!r} has {student.config.vocab_size} words and the teacher {teacher.model.config.vocab_size}, and "
                "their tokenizers differ; soft targets need one vocabulary: give a student that was trained with the "
                "teacher's tokenizer"
            )
        check_vocabulary(teacher.model, tokenizer, name=teacher.name)
    check_vocabulary(student, tokenizer, name=name)
    check_split(student)
    student.config.distilkit_layers = None
    return cast(PreTrainedModel, student.train())


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Make sure that every id of the tokenizer has an embedding."""
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} ids, but {name} embeds {rows}; use the tokenizer the model was trained with"
        )
