"""What is tried on both models before training: it finds what is broken by hand, and leaves no trace."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerBase

import distilkit.probe
from distilkit.errors import UserError
from distilkit.language_model import last_hidden_state
from distilkit.probe import probe
from distilkit.student import cut_student
from distilkit.teacher import Teacher
from distilkit.train import main
from families import build_family, family_teacher
from jobs import SMALL, call
from tiny import ARCHITECTURES, VOCABULARY, build_teacher


def ids_of(*shape: int) -> Tensor:
    return torch.randint(5, 120, shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=sorted(ARCHITECTURES))
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return build_teacher(request.param, num_layers=4)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [0, 2, 3]])
def test_a_true_student_passes_and_both_models_come_back_as_they_were(
    teacher: Teacher, layers: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers=layers)
    models = student, teacher.model
    before = [copy.deepcopy(model.state_dict()) for model in models]
    torch.set_float32_matmul_precision("medium")
    try:
        probe(student=student, teacher=teacher, tokenizer=tokenizer, apart=True, max_length=64)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for model, weights, training in zip(models, before, (True, False), strict=True):
        assert {module.training for module in model.modules()} == {training}
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_student_of_other_layers_than_it_says_is_refused(
    teacher: Teacher, tokenizer: PreTrainedTokenizerBase
) -> None:
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers=[0, 2])
    student.config.distilkit_layers = [0, 3]
    with pytest.raises(
        UserError,
        match=rf"layers \[0, 3\] of {teacher.name} \(model type '.*'\) is not the teacher without its other layers "
        r"\(outputs differ by [0-9.]+ of their largest value\); choose another teacher",
    ):
        probe(student=student, teacher=teacher, tokenizer=tokenizer, apart=False, max_length=64)


def test_a_student_of_all_layers_that_is_not_its_teacher_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("bert", num_layers=2)
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers=[0, 1])
    for module in student.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-2
    with pytest.raises(UserError, match=r"layers \[0, 1\] of tiny-bert .* is not the teacher"):
        probe(student=student, teacher=teacher, tokenizer=tokenizer, apart=False, max_length=64)


def test_a_fresh_student_is_not_compared_with_its_teacher(tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = build_teacher("roberta", num_layers=2)
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half", init="random")
    probe(student=student, teacher=teacher, tokenizer=tokenizer, apart=True, max_length=64)
    probe(student=student, teacher=None, tokenizer=tokenizer, apart=True, max_length=64)


@pytest.mark.parametrize("name", ["bloom", "falcon (alibi)", "deberta-v2", "esm", "mamba", "rwkv", "openai-gpt"])
def test_models_that_cannot_keep_documents_apart_are_refused_only_where_it_is_asked(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    student = build_family(name)
    probe(student=student, teacher=None, tokenizer=tokenizer, apart=False, max_length=64)
    kind = name.partition(" ")[0]
    with pytest.raises(
        UserError,
        match=rf"data.attend_across_documents=false, but .*model type '{kind}'\)? cannot keep packed "
        r"documents apart[^\n]+; set data.attend_across_documents=true",
    ):
        probe(student=student, teacher=None, tokenizer=tokenizer, apart=True, max_length=64)


def test_a_bert_that_reads_ahead_is_no_causal_model(tokenizer: PreTrainedTokenizerBase) -> None:
    settings = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    for is_decoder in (True, False):
        config = BertConfig(vocab_size=len(VOCABULARY), initializer_range=0.2, is_decoder=is_decoder, **settings)
        student = BertLMHeadModel(config).eval()
        if is_decoder:
            probe(student=student, teacher=None, tokenizer=tokenizer, apart=True, max_length=64)
            continue
        with pytest.raises(UserError, match=r"later tokens change earlier states of .*'bert'.* needs is_decoder=true"):
            probe(student=student, teacher=None, tokenizer=tokenizer, apart=False, max_length=64)


def test_padding_that_is_read_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"padding changes the states of the student \(model type 'fnet'\)"):
        probe(student=build_family("fnet"), teacher=None, tokenizer=tokenizer, apart=False, max_length=64)


def test_attention_that_attends_to_nothing_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"no token of the student \(model type 'mra'\) sees a later one \(is_decoder="):
        probe(student=build_family("mra"), teacher=None, tokenizer=tokenizer, apart=False, max_length=64)


@pytest.mark.parametrize("max_length, expected", [(128, 50 + 40), (50, 40)])
def test_the_sequence_is_longer_than_a_window_that_is_reached_and_holds_all_special_tokens(
    max_length: int, expected: int, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watched(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
        seen.append(ids)
        return last_hidden_state(model, ids, **arguments)

    monkeypatch.setattr(distilkit.probe, "last_hidden_state", watched)
    student = build_family("gpt_neo", window_size=50, max_position_embeddings=128)
    probe(student=student, teacher=None, tokenizer=tokenizer, apart=True, max_length=max_length)
    assert max(ids.shape[1] for ids in seen) == expected
    assert set(tokenizer.all_special_ids) < set(seen[0][0].tolist())


def test_models_without_values_are_not_tried(tokenizer: PreTrainedTokenizerBase) -> None:
    probe(student=build_family("bloom").to("meta"), teacher=None, tokenizer=tokenizer, apart=True, max_length=64)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["gptj", "codegen", "gpt_neo", "mpt", "xglm", "ctrl", "mistral", "qwen2", "gemma3_text"]
)
def test_eager_attention_and_sliding_windows_keep_documents_apart(name: str) -> None:
    model, ids, documents = build_family(name), ids_of(1, 32), torch.tensor([[0] * 12 + [1] * 20])
    packed = last_hidden_state(model, ids, document_ids=documents)
    alone = torch.cat([last_hidden_state(model, part) for part in (ids[:, :12], ids[:, 12:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
    ids[:, 30:] = 7
    changed = last_hidden_state(model, ids, document_ids=documents)
    torch.testing.assert_close(changed[:, :30], packed[:, :30], rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
    assert (changed[:, 30:] - packed[:, 30:]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "data2vec-text", "luke"]
)
def test_padding_ids_inside_a_text_are_numbered_as_the_model_numbers_them(name: str) -> None:
    model, ids, documents = build_family(name, pad_token_id=1), ids_of(1, 24), torch.tensor([[0] * 10 + [1] * 14])
    ids[0, [3, 4, 10, 17]] = 1
    packed = last_hidden_state(model, ids, document_ids=documents)
    alone = torch.cat([last_hidden_state(model, part) for part in (ids[:, :10], ids[:, 10:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_a_run_that_cannot_keep_documents_apart_ends_before_it_begins(
    text_file: Path, causal_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    family_teacher("bloom").model.save_pretrained(tmp_path / "bloom")
    causal_tokenizer.save_pretrained(tmp_path / "bloom")
    done = call(
        main,
        *SMALL,
        "teacher=hf",
        f"teacher.name={tmp_path / 'bloom'}",
        "objective=distilgpt2",
        f"data.corpus.paths=[{text_file}]",
        "data.attend_across_documents=false",
        cwd=tmp_path,
    )
    assert done.code == 1
    assert "(model type 'bloom') cannot keep packed documents apart" in done.err
    assert "set data.attend_across_documents=true" in done.err and "Traceback" not in done.err
