import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertForMaskedLM,
    DistilBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ZambaConfig,
    ZambaForCausalLM,
)

from distilkit.errors import UserError
from distilkit.language_model import num_parameters
from distilkit.student import choose_layers, cut_student, keep_layers, new_student, pretrained_student
from distilkit.teacher import Teacher
from families import build_family
from tiny import ARCHITECTURES, VOCABULARY, build_model, build_teacher

LAYERS = {  # where each architecture keeps its layers
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "xlm-roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "electra": "electra.encoder.layer",
    "modernbert": "model.layers",
    "gpt2": "transformer.h",
}


def prune_by_hand(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """Remove layers from a copy of the model itself: an oracle that shares no code with the library."""
    pruned = copy.deepcopy(model)
    parent_name, _, name = LAYERS[model.config.model_type].rpartition(".")
    parent = pruned.get_submodule(parent_name)
    setattr(parent, name, nn.ModuleList([getattr(parent, name)[layer] for layer in layers]))
    pruned.config.num_hidden_layers = len(layers)
    pruned.config.use_cache = False  # its layers still carry their old numbers
    return pruned


_CAUSAL = {"vocab_size": len(VOCABULARY), "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_DECODER = {
    **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
    **{"max_position_embeddings": 64, "num_hidden_layers": 6, "initializer_range": 0.2},
}
_MOE = {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_positions": 64, "n_layer": 6, "initializer_range": 0.2}
BY_LAYER: dict[str, tuple[str, dict[str, Any]]] = {  # configs that say something layer by layer, each in its own way
    "scale by index": ("gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "scale by index, upcast": (
        "gpt2",
        {**_GPT2, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "config of single layers": (
        "gemma4_text",
        {
            **{**_DECODER, "head_dim": 8, "global_head_dim": 16, "sliding_window": 4, "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 126},
            "layer_types": [*["sliding_attention", "full_attention"] * 3],
        },
    ),
    "run lengths": (
        "gpt_neo",
        {
            **{"hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64},
            **{"num_layers": 6, "window_size": 4, "initializer_range": 0.2},
            "attention_types": [[["global", "local"], 2], [["local"], 2]],
        },
    ),
    "ones and zeros": ("smollm3", {**_DECODER, "no_rope_layers": [1, 0, 0, 1, 1, 0]}),
    "window from a layer on": (
        "qwen2",
        {**_DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "window by a pattern": ("gemma3_text", {**_DECODER, "head_dim": 8, "sliding_window": 4}),
    "window by a list": ("cohere2", {**_DECODER, "sliding_window": 4, "layer_types": None}),
    "list of dense layers": (
        "qwen2_moe",
        {**_MOE, "mlp_only_layers": [0, 2, 3], "shared_expert_intermediate_size": 16},
    ),
    "every second layer sparse": (
        "qwen3_moe",
        {**_MOE, "decoder_sparse_step": 2, "head_dim": 8, "mlp_only_layers": [5]},
    ),
    "first layers dense": (
        "dots1",
        {
            **{**_DECODER, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
            **{"topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, "head_dim": 8},
        },
    ),
}


def build_by_layer(model_type: str, fields: dict[str, Any]) -> Teacher:
    """Build a teacher whose norms and biases differ between layers, too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **_CAUSAL, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim < 2:
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return Teacher(model=model, name=f"tiny-{model_type}", revision="main", lm="clm", sha256="0")


def prune_lists_by_hand(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """Remove layers from a copy of the model itself, wherever a list holds one entry for each of its layers."""
    pruned, depth = copy.deepcopy(model), model.config.num_hidden_layers
    for module in list(pruned.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                setattr(module, name, nn.ModuleList([child[layer] for layer in layers]))
    if getattr(pruned.config, "layer_types", None):  # it chooses the masks, outside the layers
        pruned.config.layer_types = [pruned.config.layer_types[layer] for layer in layers]
    pruned.config.num_hidden_layers = len(layers)
    if single := pruned.config.to_dict().get("per_layer_config"):
        kept = {new: single[str(old)] for new, old in enumerate(layers) if str(old) in single}
        pruned.config.per_layer_config = kept
    return pruned


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(5, 120, shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=sorted(ARCHITECTURES))
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return build_teacher(request.param)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 4, 5], [0, 2, 5], [0], [0, 1, 4]])
def test_a_student_is_its_teacher_pruned_by_hand(
    teacher: Teacher, layers: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers=layers)
    expected = prune_by_hand(teacher.model, layers)(input_ids=ids_of(2, 24)).logits
    assert student.config.num_hidden_layers == len(layers)
    torch.testing.assert_close(student.eval()(input_ids=ids_of(2, 24)).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [1, 5], [3]])
@pytest.mark.parametrize("kind", BY_LAYER)
def test_what_a_config_says_by_layer_is_cut_with_the_layers(
    kind: str, layers: list[int], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    teacher = build_by_layer(*BY_LAYER[kind])
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers=layers).eval()
    expected = prune_lists_by_hand(teacher.model, layers)(input_ids=ids_of(2, 24), use_cache=False).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(student(input_ids=ids_of(2, 24)).logits, expected, rtol=1e-5, atol=1e-5)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids_of(2, 24)).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_config_that_its_class_changes_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_by_layer(*BY_LAYER["config of single layers"])
    message = r"the config of tiny-gemma4_text cannot be cut to layers \[1, 4\]: layer_types would be .*sliding"
    with pytest.raises(UserError, match=message):
        cut_student(teacher=teacher, tokenizer=tokenizer, layers=[1, 4])


@pytest.mark.parametrize(
    "model_type, fields, message",
    [
        (
            "diffllama",
            {},
            r"layer 1 of the student would differ from layer 2 of tiny-diffllama in self_attn.lambda_init",
        ),
        (
            "ernie4_5_moe",
            {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_interval": 2},
            r"student.layers=\[0, 2, 4\] breaks the pattern moe_layer_interval=2 of tiny-ernie4_5_moe; keep layers whose",
        ),
    ],
)
def test_what_depends_on_the_number_of_a_layer_and_cannot_be_cut_is_refused(
    model_type: str, fields: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = build_by_layer(model_type, {**_DECODER, **fields})
    cut_student(teacher=teacher, tokenizer=tokenizer, layers=list(range(6)))
    with pytest.raises(UserError, match=message):
        cut_student(teacher=teacher, tokenizer=tokenizer, layers=[0, 2, 4])


@torch.no_grad()
def test_a_student_with_all_layers_is_its_teacher(teacher: Teacher, tokenizer: PreTrainedTokenizerBase) -> None:
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers=list(range(6))).eval()
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 15:] = 0
    ours, theirs = (model(input_ids=ids_of(2, 24), attention_mask=mask).logits for model in (student, teacher.model))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-5, atol=1e-5)


def test_a_bert_becomes_a_distilbert_and_others_keep_their_class(
    teacher: Teacher, tokenizer: PreTrainedTokenizerBase
) -> None:
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
    kept = DistilBertForMaskedLM if teacher.model.config.model_type == "bert" else type(teacher.model)
    assert type(student) is kept
    assert student.config.architectures == [kept.__name__]
    if kept is DistilBertForMaskedLM:
        assert not [name for name in student.state_dict() if "token_type" in name or "pooler" in name]


class MyBert(BertForMaskedLM):
    """A BERT whose layers do something else."""


@pytest.mark.parametrize(
    "fields, found",
    [
        ({"hidden_act": "silu"}, "'silu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05, and DistilBERT has 1e-12"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type=relative_key, and DistilBERT has absolute",
        ),
        ({"is_decoder": True}, "is_decoder=True, and DistilBERT has False"),
        ({}, "MyBert, which is not transformers' own BERT"),
    ],
)
def test_a_bert_that_no_distilbert_equals_keeps_its_class_or_is_refused(
    fields: dict[str, Any], found: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = build_teacher("bert", **fields)
    if not fields:
        teacher.model.__class__ = MyBert
    with pytest.raises(UserError, match=f"but the teacher has {found}; set student.bert_class=same to keep"):
        cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half", bert_class="same")
    assert type(student) is type(teacher.model)


def test_layers_that_make_no_student_of_the_class_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("bert")
    teacher.model.bert.encoder.layer[2].gate = nn.Linear(2, 2)  # as remote code may add
    with pytest.raises(UserError, match=r"layers \[0, 2\] of tiny-bert make no DistilBertForMaskedLM: .*gate"):
        cut_student(teacher=teacher, tokenizer=tokenizer, layers=[0, 2])


def test_a_class_that_cannot_be_built_with_these_layers_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    mamba = {"attn_layer_period": 3, "attn_layer_offset": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4}
    model = ZambaForCausalLM(ZambaConfig(vocab_size=len(VOCABULARY), pad_token_id=0, **sizes, **mamba))
    teacher = Teacher(model=model, name="tiny", revision="main", lm="clm", sha256="0" * 64)
    with pytest.raises(UserError, match=r"layers \[0, 2, 4\] of tiny make no ZambaForCausalLM: .*choose other layers"):
        cut_student(teacher=teacher, tokenizer=tokenizer, layers=[0, 2, 4])


@pytest.mark.parametrize("layers", [5, None, {"0": 1}])
def test_layers_that_are_no_list_are_an_error(layers: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="student.layers is .*; it takes half, third, first, .* or a list"):
        cut_student(teacher=build_teacher("bert"), tokenizer=tokenizer, layers=layers)


def test_another_class_for_a_bert_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    wrong: Any = "Same"
    with pytest.raises(UserError, match="student.bert_class is 'Same'; it takes distilbert or same"):
        cut_student(teacher=build_teacher("bert"), tokenizer=tokenizer, layers="half", bert_class=wrong)


@torch.no_grad()
def test_a_bert_with_an_output_layer_of_its_own_becomes_a_distilbert_with_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    teacher = build_teacher("bert", tie_word_embeddings=False, chunk_size_feed_forward=4)
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers=list(range(6))).eval()
    expected = teacher.model(input_ids=ids_of(2, 24)).logits
    torch.testing.assert_close(student(input_ids=ids_of(2, 24)).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_bert_keeps_its_class_when_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("bert")
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half", bert_class="same")
    assert type(student) is type(teacher.model)


def test_students_train_with_dropout_on_and_leave_the_teacher_alone(
    teacher: Teacher, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = copy.deepcopy(teacher.model.state_dict())
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
    assert student.training
    assert all(module.training for module in student.modules())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} is shared with the student"


def test_dropout_of_the_teacher_is_carried_over(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
    assert (student.config.dropout, student.config.attention_dropout) == (0.3, 0.2)


@pytest.mark.parametrize(
    "teacher_layers, student_layers, expected",
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),
        (12, 4, [0, 4, 7, 11]),
        (12, 12, list(range(12))),
        (6, 3, [0, 2, 5]),
        (4, 2, [0, 3]),
        (5, 1, [0]),
        (24, 12, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
    ],
)
def test_layers_are_spread_from_the_first_to_the_last(
    teacher_layers: int, student_layers: int, expected: list[int]
) -> None:
    assert choose_layers(teacher_layers, student_layers) == expected


def test_every_depth_gives_increasing_layers() -> None:
    for depth in range(1, 49):
        for kept in range(1, depth + 1):
            layers = choose_layers(depth, kept)
            assert layers == sorted(set(layers))
            assert layers[0] == 0
            assert kept == 1 or layers[-1] == depth - 1


@pytest.mark.parametrize("name, depth, expected", [("half", 12, 6), ("half", 1, 1), ("half", 7, 3), ("third", 12, 4)])
def test_named_depths(name: str, depth: int, expected: int, tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("bert", num_layers=depth)
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers=name)  # type: ignore[arg-type]
    assert student.config.num_hidden_layers == expected


def test_two_digit_layers_are_renumbered_as_numbers() -> None:
    state = {f"h.{layer}.weight": torch.tensor(layer) for layer in range(12)} | {"ln.weight": torch.tensor(-1)}
    kept = keep_layers(state, [0, 2, 10, 11])
    assert {name: int(tensor) for name, tensor in kept.items()} == {
        "h.0.weight": 0,
        "h.1.weight": 2,
        "h.2.weight": 10,
        "h.3.weight": 11,
        "ln.weight": -1,
    }


@torch.no_grad()
def test_a_random_student_has_the_shape_and_none_of_the_weights(
    teacher: Teacher, tokenizer: PreTrainedTokenizerBase
) -> None:
    cut = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
    fresh = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half", init="random")
    assert type(fresh) is type(cut)
    shapes = {name: tensor.shape for name, tensor in cut.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == shapes
    for name, tensor in fresh.state_dict().items():
        if tensor.ndim == 2:
            assert not torch.allclose(tensor, cut.state_dict()[name], atol=1e-3), name
    assert fresh.config.distilkit_layers is None


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "gpt2", "electra"])
def test_the_position_table_can_be_frozen(model_type: str, tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher(model_type)
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half", train_position_embeddings=False)
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 1
    assert "position_embeddings" in frozen[0] or "wpe" in frozen[0]


@pytest.mark.parametrize(
    "layers, message",
    [
        ([0, 12], r"student keeps layer 12, but tiny-bert has layers 0 to 5; set student.layers within that range"),
        ([-1, 2], r"student keeps layer -1, but tiny-bert has layers 0 to 5"),
        ([0, 2, 2], r"student.layers=\[0, 2, 2\] repeats a layer or is not increasing; give each layer once"),
        ([3, 1], r"student.layers=\[3, 1\] repeats a layer or is not increasing"),
        ([], r"student.layers is empty, but a student keeps at least one of layers 0 to 5 of tiny-bert"),
        (["a"], r"student keeps layer a, but tiny-bert has layers 0 to 5"),
        ("quarter", r"student.layers is 'quarter'; it takes half, third, first, last, greedy, influence or a list"),
    ],
)
def test_wrong_layers_are_an_error(layers: Any, message: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=message):
        cut_student(teacher=build_teacher("bert"), tokenizer=tokenizer, layers=layers)


def test_other_wrong_students_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="cannot be cut from teacher=none; set student=new, or choose a teacher"):
        cut_student(teacher=None, tokenizer=tokenizer, layers="half")
    with pytest.raises(UserError, match=r"differ from layer 1 of tiny-modernbert in attn_norm.type, .*other layers"):
        cut_student(teacher=build_teacher("modernbert"), tokenizer=tokenizer, layers=[1, 3])
    with pytest.raises(UserError, match="student.init is 'zeros'; it takes teacher or random"):
        cut_student(teacher=build_teacher("bert"), tokenizer=tokenizer, layers="half", init="zeros")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the tokenizer has 126 ids, but tiny-bert embeds 100; use the tokenizer"):
        cut_student(teacher=build_teacher("bert", vocab_size=100), tokenizer=tokenizer, layers="half")


def test_a_new_model_takes_its_vocabulary_and_special_ids_from_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    student = new_student(teacher=None, tokenizer=tokenizer, model_type="roberta", config=fields)
    assert student.get_output_embeddings().weight.shape == (len(tokenizer), 16)
    assert student.config.pad_token_id == tokenizer.pad_token_id
    assert student.training
    assert num_parameters(student) > 0


def test_a_new_model_has_no_special_id_outside_its_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    student = new_student(teacher=None, tokenizer=tokenizer, model_type="modernbert", config=fields)
    ids = {name: value for name, value in student.config.to_dict().items() if name.endswith("_token_id")}
    assert ids["sep_token_id"] == tokenizer.sep_token_id
    assert all(value is None or value < len(tokenizer) for value in ids.values()), ids


@pytest.mark.parametrize(
    "model_type, config, message",
    [
        ("bart-large", {}, r"student.model_type='bart-large' is unknown to transformers; try bert, roberta or gpt2"),
        ("bert", {"hiden_size": 16}, r"student.config has hiden_size, but a bert config does not; remove it"),
        ("gpt_neo", {"num_layers": 4}, r"makes no gpt_neo: .*attention_layers.*; change student.config"),
        ("bert", {"hidden_size": "wide"}, r"student.config={'hidden_size': 'wide'} makes no bert: .*; change"),
        ("bert", {"hidden_size": 30, "num_attention_heads": 4}, r"makes no bert: .*30.*4.*; change student.config"),
    ],
)
def test_a_wrong_new_model_is_an_error(
    model_type: str, config: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=message):
        new_student(teacher=None, tokenizer=tokenizer, model_type=model_type, config=config)


@pytest.mark.parametrize(
    ("teacher", "model_type", "message"),
    [
        (
            "bert",
            "gpt2",
            r"student.model_type='gpt2' does not make a masked language model, as tiny-bert is one; try bert",
        ),
        (
            "gpt2",
            "bert",
            r"student.model_type='bert' does not make a causal language model, as tiny-gpt2 is one; try gpt2",
        ),
    ],
)
def test_a_new_model_is_masked_or_causal_as_its_teacher(
    teacher: str, model_type: str, message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=message):
        new_student(teacher=build_teacher(teacher), tokenizer=tokenizer, model_type=model_type)


def test_a_new_model_has_a_row_for_the_highest_id_of_a_tokenizer_that_skips_ids() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "b": 40}, unk_token="[UNK]"))
    skipping = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert len(skipping) == 3
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    student = new_student(teacher=None, tokenizer=skipping, model_type="bert", config=fields)
    assert student.config.vocab_size == 41
    with pytest.raises(UserError, match="the tokenizer has 41 ids, but tiny-bert embeds 40"):
        cut_student(teacher=build_teacher("bert", vocab_size=40), tokenizer=skipping, layers="half")


def test_an_existing_student_needs_the_vocabulary_of_its_teacher_but_for_padding(
    tmp_path: Any, tokenizer: PreTrainedTokenizerBase, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    def load(teacher_size: int) -> PreTrainedModel:
        teacher = build_teacher("bert", vocab_size=teacher_size)
        return pretrained_student(teacher=teacher, tokenizer=tokenizer, name=str(tmp_path))

    build_model("distilbert", num_layers=2).save_pretrained(tmp_path)
    assert load(126).training
    with pytest.raises(UserError, match="has no tokenizer"):
        load(128)
    tokenizer.save_pretrained(tmp_path)
    assert load(128).training
    with pytest.raises(UserError, match="the tokenizer has 126 ids, but tiny-bert embeds 100"):
        load(100)
    other = copy.deepcopy(causal_tokenizer)
    other.add_tokens(["other"])
    other.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="has 126 words and the teacher 128, and their tokenizers differ; give a student"
    ):
        load(128)


def test_a_list_of_kinds_of_attention_is_not_by_layer_though_as_long(tokenizer: PreTrainedTokenizerBase) -> None:
    kinds = ["p2c", "c2p"]
    model = build_family("deberta-v2", num_hidden_layers=2)
    teacher = Teacher(model=model.requires_grad_(False), name="m", revision="main", lm="mlm", sha256="0" * 64)
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
    assert (student.config.num_hidden_layers, student.config.pos_att_type) == (1, kinds)
