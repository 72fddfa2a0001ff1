"""Build a student: from layers of a teacher, with fresh weights, or from a pretrained model.

In every architecture, the first integer in a key of the state dict is the index of the layer. So one rule selects
and renumbers layers, and strict loading checks the result.
"""

import copy
import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import PretrainedConfig

from distilkit.data.tokenizer import load_tokenizer, num_ids
from distilkit.errors import UserError
from distilkit.language_model import Batch, build_from_config, check_split, lm_of, load_language_model, num_embeddings
from distilkit.layers import METHODS, Choice, Method, measure
from distilkit.teacher import Teacher
from distilkit.trim.model import trim_student
from distilkit.trim.tokenizer import trimming_of

Layers = Literal["half", "third", "first", "last"] | Method | Sequence[int]
Draw = Callable[[int], Sequence[Batch]]  # DistillationDataModule.draw
_NAMES = ("half", "third", "first", "last", *METHODS)
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
_SCALE_BY_INDEX = "scale_attn_by_inverse_layer_idx"
_LAYER_INDEX = re.compile(r"\.(\d+)\.")

# What a config says layer by layer, by the names of its fields.
_NOT_BY_LAYER = re.compile(
    r"token|label|architectures|_limit|rope_(scaling|parameters)|quantization|att_type|languages"
)
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
_EVERY_FEW_LAYERS = re.compile(r"every|interval|_period|_pattern|layer_freq|sparse_step")
_NUMBERS_OF_LAYERS = re.compile(r"only_layers$|_(ids|idxs?|indices)$")

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


_DISTILBERT_HAS = {  # where a BERT may have something else
    **{"layer_norm_eps": 1e-12, "position_embedding_type": "absolute", "is_decoder": False},
    **{"add_cross_attention": False},
}


def choose_layers(num_teacher_layers: int, num_student_layers: int) -> list[int]:
    """Choose layers at equal distances: 12 -> 6 gives DistilBERT's [0, 2, 4, 7, 9, 11] (its original extraction)."""
    if num_student_layers == 1:
        return [0]
    step = (num_teacher_layers - 1) / (num_student_layers - 1)
    return [round(i * step) for i in range(num_student_layers)]


def _depth_of(teacher: Teacher | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Teacher, int]:
    """Check that layers can be taken of a teacher, and return it with the number of its layers."""
    if teacher is None:
        raise UserError("a student cannot be cut from teacher=none; set student=new, or choose a teacher")
    check_vocabulary(teacher.model, tokenizer, name=teacher.name)
    depth = getattr(teacher.model.config, "num_hidden_layers", None)
    if depth is None:
        found = f"the config of {teacher.name} ({teacher.model.config.model_type}) has no num_hidden_layers"
        raise UserError(f"{found}; choose a teacher whose config has it, as a model of text alone")
    return teacher, depth


def _resolve_layers(layers: Layers, *, num_layers: int | None, depth: int, name: str) -> list[int]:
    """Convert a name or an explicit list to valid layer indices; a measured name gives layers at equal distances."""
    named = isinstance(layers, str)
    if (named and layers not in _NAMES) or not isinstance(layers, Sequence):
        raise UserError(f"student.layers is {layers!r}; it takes {', '.join(_NAMES)} or a list such as [0,2,4]")
    count = max(1, depth // (3 if layers == "third" else 2)) if named else len(layers)
    if num_layers is not None and (type(num_layers) is not int or not 1 <= num_layers <= depth):
        raise UserError(f"student.num_layers={num_layers}, but it must be from 1 to {depth}, the layers of {name}")
    if num_layers not in (None, count) and (layers in ("half", "third") or not named):
        found = f"student.num_layers={num_layers}, but student.layers={layers} keeps {count}"
        raise UserError(
            f"{found}; leave student.num_layers out, or set student.layers=first, last, greedy or influence"
        )
    if named:
        count = num_layers or count
        ends = {"first": list(range(count)), "last": list(range(depth - count, depth))}
        return ends.get(str(layers)) or choose_layers(depth, count)
    chosen: list[Any] = list(layers)
    last = depth - 1
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


def measure_layers(
    *,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    layers: Method,
    num_layers: int | None,
    num_blocks: int,
    draw: Draw | None,
    init: str = "teacher",
) -> Choice:
    """Choose a student's layers by measuring the teacher on ``draw(num_blocks)``, batches of its training text.

    ``greedy`` drops one at a time the layer whose absence raises the loss least, and is never worse there than layers
    at equal distances. ``influence`` keeps the layers that change their input most. Layers that ``cut_student`` refuses
    are no choice. ``num_layers=None`` is half of the teacher's. A student of fresh weights has nothing to choose.
    """
    teacher, depth = _depth_of(teacher, tokenizer)
    even = _resolve_layers(layers, num_layers=num_layers, depth=depth, name=teacher.name)
    if type(num_blocks) is not int or num_blocks < 1:
        raise UserError(f"student.num_blocks={num_blocks}, but it must be a whole number of at least 1")
    if init == "random":
        found = f"student.init=random copies no layer, so that student.layers={layers} has nothing to choose"
        raise UserError(f"{found}; set student.layers=half")
    if layers == "greedy" and not teacher.has_head:
        found = f"student.layers=greedy reads the loss of {teacher.name}, which has no trained language-model head"
        raise UserError(f"{found}; set student.layers=influence, or choose a teacher with its head")
    if draw is None:
        found = f"student.layers={layers} measures the teacher on blocks of text, and none are given"
        raise UserError(f"{found}; call cut_student with draw=DistillationDataModule(...).draw, or distilkit.distill")
    check = functools.partial(cut_student, teacher=teacher, tokenizer=tokenizer, bert_class="same")
    return measure(teacher.model, draw(num_blocks), method=layers, even=even, check=check)


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


def _cut_value(key: str, value: Any, *, depth: int, layers: Sequence[int]) -> Any:
    """Cut one value of a config with its layers; a value that does not speak of layers stays the same."""
    if _NOT_BY_LAYER.search(key):
        return value
    if isinstance(value, dict):
        if value and all(str(name).isdigit() and int(name) < depth for name in value):  # by the number of a layer
            numbered = {int(name): each for name, each in value.items()}
            return {new: numbered[old] for new, old in enumerate(layers) if old in numbered}
        return {name: _cut_value(str(name), each, depth=depth, layers=layers) for name, each in value.items()}
    if key in _FIRST_LAYERS and isinstance(value, int):
        return sum(layer < value for layer in layers)
    if isinstance(value, str) and "pattern" in key and len(value) == depth:
        return "".join(value[layer] for layer in layers)
    if not isinstance(value, list | tuple):
        return value
    listed = list(value)
    if listed and all(isinstance(each, list | tuple) and len(each) == 2 and type(each[1]) is int for each in listed):
        repeated = [kind for kinds, times in listed for kind in list(kinds) * times]  # GPT-Neo's run lengths
        return [[[repeated[layer] for layer in layers], 1]] if len(repeated) == depth else value
    ordered = all(type(each) is int and 0 <= each < depth for each in listed) and listed == sorted(set(listed))
    numbers = len(listed) != depth or listed == list(range(depth)) != [0, 1]
    if ordered and (_NUMBERS_OF_LAYERS.search(key) or ("layer" in key and numbers)):
        return [new for new, old in enumerate(layers) if old in listed]
    return [listed[layer] for layer in layers] if len(listed) == depth else value


def _cut_config(config: PretrainedConfig, layers: Sequence[int], *, name: str) -> PretrainedConfig:
    """Return the config of some layers, with all that it says layer by layer, as it will be read from its file."""
    depth, fields = config.num_hidden_layers, config.to_dict()
    cut = {key: _cut_value(key, value, depth=depth, layers=layers) for key, value in fields.items()}
    cut[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    if (step := fields.get("decoder_sparse_step") or 1) > 1 and "mlp_only_layers" in fields:
        dense = [old in (fields["mlp_only_layers"] or ()) or (old + 1) % step != 0 for old in layers]
        cut |= {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, each in enumerate(dense) if each]}
    elif not any(isinstance(each, list) and len(each) == depth for each in fields.values()):  # a list comes first
        for key, every in fields.items():
            repeats = _EVERY_FEW_LAYERS.search(key) and type(every) is int and 1 < every <= depth
            if repeats and any((old - new) % every for new, old in enumerate(layers)):
                found = f"student.layers={list(layers)} breaks the pattern {key}={every} of {name}"
                raise UserError(f"{found}; keep layers whose numbers, modulo {every}, are 0, 1, ... in turn")
    try:
        made = type(config).from_dict(copy.deepcopy(cut))
        said = made.to_dict()
        for key, value in cut.items():  # Gemma 4 makes the last layer one of full attention
            if value != fields[key] and json.dumps(said.get(key)) != json.dumps(value):
                raise ValueError(f"{key} would be {value}, but its class makes it {said.get(key)}")
    except (ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the config of {name} cannot be cut to layers {list(layers)}: {reason}") from error
    made.name_or_path, made._commit_hash = config.name_or_path, getattr(config, "_commit_hash", None)
    return made


def _facts(model: nn.Module) -> dict[tuple[str, str], dict[int, Any]]:
    """Return what makes each layer act as it does, besides its weights: by place and name, for each number of a layer.

    These are the types of its modules, their plain attributes and their buffers.
    """
    facts: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for path, module in model.named_modules():
        if found := _LAYER_INDEX.search(f"{path}."):
            said = {key: each for key, each in vars(module).items() if isinstance(each, int | float | str | tuple)}
            said |= {**dict(module.named_buffers(recurse=False)), "type": type(module).__name__}
            for key in said.keys() - {"training"}:
                facts[f"{path[: found.start(1)]}*{path[found.end(1) :]}.", key][int(found[1])] = said[key]
    return facts


def _says_one(values: Mapping[int, Any]) -> bool:
    """Return whether all layers have one value, as BigBird's, which switches all of its layers when it is called."""
    return not any(isinstance(each, Tensor) for each in values.values()) and len(set(values.values())) <= 1


def _check_layers(student: nn.Module, source: nn.Module, layers: Sequence[int], *, name: str, folded: bool) -> None:
    """Check that each layer is built as the teacher's that it copies; its number and the depth may differ."""
    ours, theirs = _facts(student), _facts(source)
    depths = (student.config.num_hidden_layers, source.config.num_hidden_layers)  # type: ignore[union-attr]
    stacks = {place.partition("*")[0] for (place, _), values in theirs.items() if len(values) == depths[1]}
    for place, key in ours | theirs:
        kept, all_of_it = ours[place, key], theirs[place, key]
        if place.partition("*")[0] not in stacks:  # two rotary embeddings, one for each kind of layer
            continue
        if (key == "scaling" and folded) or (_says_one(kept) and _says_one(all_of_it)) or not kept or not all_of_it:
            continue
        for new, old in enumerate(layers):
            one, two = kept.get(new), all_of_it.get(old)
            if isinstance(one, Tensor) or isinstance(two, Tensor):
                same = isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two)
            else:
                same = one is two or one == two or (one, two) in ((new, old), (new + 1, old + 1), depths)
            if not same:
                where = f"{place.partition('*.')[2]}{key}"
                found = f"layer {new} of the student would differ from layer {old} of {name} in {where}"
                raise UserError(f"{found}, and its config cannot say so; choose other layers, or another teacher")


def _fold_scales(state: dict[str, Tensor], layers: Sequence[int], *, name: str) -> None:
    """Put the scale of attention that GPT-2 takes from a layer's number, 1 / (number + 1), into the queries."""
    for new, old in enumerate(layers):
        for part in ("weight", "bias"):  # (width, 3 * width) and (3 * width,): queries, keys, values
            key = f"transformer.h.{new}.attn.c_attn.{part}"
            if key not in state:
                found = f"{name} has {_SCALE_BY_INDEX}=true, but no {key} as GPT-2 has"
                raise UserError(f"{found}; keep all layers, or choose another teacher")
            state[key] = state[key].clone()
            state[key][..., : state[key].shape[-1] // 3] *= (new + 1) / (old + 1)


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


def _distilbert_config(config: PretrainedConfig, source: PreTrainedModel) -> DistilBertConfig:
    """Return the config of a BERT's layers as a DistilBERT, which has no words for some of what a BERT may be."""
    found = None if type(source) is BertForMaskedLM else f"{type(source).__name__}, which is not transformers' own BERT"
    if config.hidden_act not in ("gelu", "relu"):
        found = f"{config.hidden_act!r}"
    for key, only in _DISTILBERT_HAS.items():
        if (value := getattr(config, key, only)) != only:
            found = f"{key}={value}, and DistilBERT has {only}"
    if found is not None:
        limit = "a DistilBERT has the layers of transformers' BERT with the activations gelu and relu"
        raise UserError(
            f"{limit}, but the teacher has {found}; set student.bert_class=same to keep the teacher's class"
        )
    same = ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id", "tie_word_embeddings")
    return DistilBertConfig(
        **{name: getattr(config, name) for name in (*same, "chunk_size_feed_forward")},
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
    num_layers: int | None = None,
    num_blocks: int = 256,
    draw: Draw | None = None,
    init: Literal["teacher", "random"] = "teacher",
    bert_class: Literal["distilbert", "same"] = "distilbert",
    train_position_embeddings: bool = True,
) -> PreTrainedModel:
    """Build a student with the teacher's width from some of its layers, in train mode.

    ``layers`` is a list, or a name: ``half`` and ``third`` are spread from the first to the last layer, ``first`` and
    ``last`` are ``num_layers`` of them, or half, and ``greedy`` and ``influence`` are those of ``measure_layers``. A
    BERT teacher gives a DistilBERT unless ``bert_class`` is ``same``; every other teacher keeps its class.
    ``init=random`` gives the same shape with fresh weights (the ablation of DistilBERT, table 4). Layers that the
    teacher does not have, and a tokenizer with more ids than the teacher, raise a ``UserError``.
    """
    teacher, depth = _depth_of(teacher, tokenizer)
    if bert_class not in ("distilbert", "same"):
        raise UserError(f"student.bert_class is {bert_class!r}; it takes distilbert or same")
    chosen, source = _resolve_layers(layers, num_layers=num_layers, depth=depth, name=teacher.name), teacher.model
    if isinstance(layers, str) and layers in METHODS:
        given: Any = {"num_layers": num_layers, "num_blocks": num_blocks, "draw": draw, "init": init}
        chosen = measure_layers(teacher=teacher, tokenizer=tokenizer, layers=layers, **given).layers
    config = _cut_config(source.config, chosen, name=teacher.name)
    to_distilbert = config.model_type == "bert" and teacher.lm == "mlm" and bert_class == "distilbert"
    try:
        student = DistilBertForMaskedLM(_distilbert_config(config, source)) if to_distilbert else type(source)(config)
    except UserError:
        raise
    except Exception as error:  # Zamba's weights are tied by the numbers of layers
        reason = " ".join(str(error).split())[:300]
        found = f"layers {chosen} of {teacher.name} make no {type(source).__name__}: {reason}"
        raise UserError(f"{found}; choose other layers, or another teacher") from error
    if init == "teacher":
        state, folded = keep_layers(source.state_dict(), chosen), getattr(config, _SCALE_BY_INDEX, False)
        if not to_distilbert:
            _check_layers(student, source, chosen, name=teacher.name, folded=folded)
        if folded:
            _fold_scales(state, chosen, name=teacher.name)
        for key in [key for key in state if key.endswith("contact_head.regression.weight")]:  # ESM's, over all layers
            state[key] = state[key].unflatten(1, (depth, -1))[:, chosen].flatten(1)  # (1, layers * heads)
        try:
            student.load_state_dict(bert_to_distilbert(state) if to_distilbert else state, strict=True)
        except RuntimeError as error:  # weights of other names or shapes
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"layers {chosen} of {teacher.name} make no {type(student).__name__}: {reason}") from error
    elif init != "random":
        raise UserError(f"student.init is {init!r}; it takes teacher or random")
    student.config.architectures = [type(student).__name__]
    student.config.distilkit_layers = chosen if init == "teacher" else None
    if type(student) is type(source) and source.can_generate():
        student.generation_config = copy.deepcopy(source.generation_config)
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
    try:
        student = build_from_config(AutoConfig.for_model(model_type, **fields))
    except (ValueError, TypeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:  # of transformers
        found = f"student.config={dict(config or {})} makes no {model_type}: {' '.join(str(error).split())}"
        raise UserError(f"{found}; change student.config") from error
    if teacher is not None and lm_of(model_type) != teacher.lm:
        kind, types = ("masked", "bert or roberta") if teacher.lm == "mlm" else ("causal", "gpt2")
        found = f"student.{model_type=} does not make a {kind} language model, as {teacher.name} is one"
        raise UserError(f"{found}; try {types}")
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
    student, *_ = load_language_model(
        name, revision=revision, trust_remote_code=trust_remote_code, lm=teacher.lm if teacher else None
    )
    trimming = trimming_of(tokenizer)
    if trimming is not None and num_embeddings(student) != len(trimming.ids):
        full = load_tokenizer(name=name, revision=revision, trust_remote_code=trust_remote_code)
        student = trim_student(student, tokenizer, own=full.get_vocab(), name=name)
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
    rows = num_embeddings(model)
    if (needed := num_ids(tokenizer)) > rows:
        found = f"the tokenizer has {needed} ids, but {name} embeds {rows}"
        raise UserError(f"{found}; use the tokenizer the model was trained with")
