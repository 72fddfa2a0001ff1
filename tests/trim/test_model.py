"""States of kept words are equal after trimming, and so are their logits."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, GenerationConfig, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.language_model import matrix_flops, num_embeddings, num_parameters, weight_hash
from distilkit.student import cut_student
from distilkit.trim.model import trim_model, trim_student, trim_teacher
from distilkit.trim.tokenizer import Trimming
from families import FAMILIES, build_family
from tiny import ARCHITECTURES, build_model, build_teacher


def some_ids(*, pad: int = 0) -> list[int]:
    ids = random.Random(0).sample(range(5, 120), 60)
    return sorted({pad, 2, 3, *ids})


@pytest.mark.parametrize("rows", [130, 200])  # 130 words; a vocabulary that is padded
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_states_and_logits_of_kept_words_are_equal(model_type: str, rows: int) -> None:
    model, ids = build_model(model_type, num_layers=2, vocab_size=rows), some_ids()
    smaller = trim_model(model, ids, name="it")
    assert type(smaller) is type(model)
    assert num_embeddings(smaller) == smaller.config.vocab_size == len(ids)
    new = torch.randint(3, len(ids), (2, 16), generator=torch.Generator().manual_seed(1))
    old = torch.tensor(ids)[new]
    with torch.no_grad():
        ours = smaller(input_ids=new, output_hidden_states=True)
        theirs = model(input_ids=old, output_hidden_states=True)
    for one, two in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(one, two)
    torch.testing.assert_close(ours.logits, theirs.logits[..., ids], rtol=0, atol=1e-6)
    assert ours.logits.shape[-1] == len(ids)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight) == tied
    table: Any = model.get_input_embeddings().weight
    lost = (rows - len(ids)) * table.shape[1]
    assert num_parameters(model) - num_parameters(smaller) in (lost, lost + rows - len(ids))  # with or without a bias
    assert matrix_flops(smaller.modules()) < matrix_flops(model.modules())


@pytest.mark.parametrize("name", [name for name, (outcome, _) in FAMILIES.items() if outcome != "refused"])
def test_each_family_is_trimmed(name: str) -> None:
    model, ids = build_family(name), [*range(5), *range(9, 60, 3)]
    smaller = trim_model(model, ids, name=name)
    new = torch.tensor([[*range(5, 21), 3]])
    with torch.no_grad():
        ours, theirs = smaller(input_ids=new).logits, model(input_ids=torch.tensor(ids)[new]).logits
    torch.testing.assert_close(ours, theirs[..., ids], rtol=1e-6, atol=1e-6)


def test_special_ids_of_configs_are_renumbered(tmp_path: Path) -> None:
    model = build_model("gpt2", num_layers=1, bos_token_id=100, eos_token_id=[100, 110, 4], pad_token_id=7)
    model.generation_config = GenerationConfig(bos_token_id=100, eos_token_id=[110], suppress_tokens=[4, 110])
    smaller = trim_model(model, [3, 5, 8, 100, 110], name="it")
    config, generation = smaller.config, smaller.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, [3, 4], None)
    assert (generation.bos_token_id, generation.eos_token_id, generation.suppress_tokens) == (3, [4], [4])
    assert model.config.bos_token_id == 100
    bert = build_model("bert", num_layers=1)
    trim_model(bert, [0, 2, 3, 50], name="it").save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.get_input_embeddings().padding_idx == 0
    assert again.config.vocab_size == 4


def test_positions_that_follow_padding_are_refused_if_padding_moves() -> None:
    model = build_model("roberta", num_layers=1, pad_token_id=9)
    with pytest.raises(UserError, match=r"the states of it change by .* when its words are renumbered"):
        trim_model(model, [3, 4, 9, 50, 60], name="it")
    model = build_model("roberta", num_layers=1, pad_token_id=1)
    trim_model(model, [0, 1, 9, 50, 60], name="it")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer has an id 130, but it embeds 126"):
        trim_model(build_model("bert", num_layers=1), [0, 1, 130], name="it")


def trimmed_as(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> PreTrainedTokenizerBase:
    """Mark a tokenizer as one of these ids of a full one."""
    own: Any = copy.copy(tokenizer)
    own.distilkit_trimming = Trimming(ids=ids, num_words=len(tokenizer), covered=1.0, held_out=10, changed=1)
    return own  # type: ignore[no-any-return]


def test_a_student_is_cut_from_the_trimmed_teacher(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = list(range(len(tokenizer)))
    teacher = build_teacher("bert", num_layers=4, vocab_size=150)
    trimmed = trim_teacher(teacher, trimmed_as(tokenizer, ids))
    assert trimmed is not None
    assert not any(each.requires_grad for each in trimmed.model.parameters())
    assert not trimmed.model.training
    student = cut_student(teacher=trimmed, tokenizer=tokenizer, layers="half")
    assert student.config.vocab_size == len(ids)
    assert trim_teacher(teacher, tokenizer) is teacher
    assert trim_teacher(None, trimmed_as(tokenizer, ids)) is None


def test_the_hash_of_a_trimmed_teacher_tells_weights_and_words(tokenizer: PreTrainedTokenizerBase) -> None:
    def hashed(ids: list[int], seed: int) -> str:
        trimmed = trim_teacher(build_teacher("bert", num_layers=1, seed=seed), trimmed_as(tokenizer, ids))
        assert trimmed is not None
        return trimmed.sha256

    assert hashed([0, 1, 2, 50], 0) == hashed([0, 1, 2, 50], 0)
    assert len({hashed([0, 1, 2, 50], 0), hashed([0, 1, 2, 51], 0), hashed([0, 1, 2, 50], 1)}) == 3
    assert weight_hash(build_model("bert", num_layers=1)) == build_teacher("bert", num_layers=1).sha256


def test_a_student_of_another_vocabulary_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    own = tokenizer.get_vocab()
    student = build_model("distilbert", num_layers=1, vocab_size=150)
    ids = list(range(len(own)))
    assert num_embeddings(trim_student(student, trimmed_as(tokenizer, ids), own=own, name="it")) == len(own)
    with pytest.raises(UserError, match="student 'it' has another vocabulary"):
        trim_student(student, trimmed_as(tokenizer, ids), own={**own, "ba": 3}, name="it")
