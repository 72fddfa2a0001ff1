"""A trimmed tokenizer gives text of kept words the same tokens, renumbered, whatever words are kept."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distilkit.data.tokenizer import num_ids
from distilkit.errors import UserError
from distilkit.trim.pieces import characters, check_kind, in_order, needed_ids, vocabulary, with_words, word_parts
from distilkit.trim.tokenizer import save_with_words, spec_of
from vocabularies import KINDS, build, random_strings, sentences


def closed(spec: dict[str, Any], words: list[str]) -> set[int]:
    """Return the ids of words with all that stays with them."""
    ids, parts = vocabulary(spec), word_parts(spec)
    return needed_ids(spec) | {ids[each] for word in words for each in (word, *parts(word))}


def kept_at_random(spec: dict[str, Any], *, share: float, seed: int) -> set[int]:
    words = sorted(vocabulary(spec))
    return closed(spec, random.Random(seed).sample(words, int(share * len(words))))


def backend_of(spec: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(spec))


def compare(full: Tokenizer, trimmed: Tokenizer, ids: list[int], texts: list[str]) -> tuple[int, int]:
    """Compare all texts of kept words; return how many there are, and how many have other words."""
    kept, equal = set(ids), 0
    for text in texts:
        before = full.encode(text).ids
        if kept.issuperset(before):
            assert [ids[each] for each in trimmed.encode(text).ids] == before, repr(text)
            equal += 1
    return equal, len(texts) - equal


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_random_strings_of_kept_words_have_the_same_tokens(kind: str) -> None:
    tokenizer = build(kind)
    spec = spec_of(tokenizer, name=kind)
    full, texts = backend_of(spec), random_strings(10_000)
    ids = in_order(spec, kept_at_random(spec, share=0.6, seed=1), pad_id=tokenizer.pad_token_id)
    assert len(ids) < 0.9 * num_ids(tokenizer)
    equal, other = compare(full, backend_of(with_words(spec, ids)), ids, texts)
    assert min(equal, other) > 500


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.02, 0.95),
    texts=st.lists(st.text("abelnostuz .éß#x▁中\n12"), max_size=30),
)
def test_any_words_may_be_kept(kind: str, seed: int, share: float, texts: list[str]) -> None:
    spec = spec_of(build(kind), name=kind)
    kept = kept_at_random(spec, share=share, seed=seed)
    ids = in_order(spec, kept, pad_id=build(kind).pad_token_id)
    assert sorted(ids) == sorted(kept)
    compare(backend_of(spec), backend_of(with_words(spec, ids)), ids, [*texts, *sentences(2)[seed % 500 :][:20]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_same_tokenizer_again(kind: str, tmp_path: Path) -> None:
    full = build(kind)
    spec = spec_of(full, name=kind)
    ids = in_order(spec, kept_at_random(spec, share=0.5, seed=2), pad_id=full.pad_token_id)
    trimmed = save_with_words(full, spec, ids, tmp_path / "one")
    trimmed.save_pretrained(tmp_path / "two")
    again: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "two")
    names = {word: ids.index(old) for word, old in full.get_vocab().items() if old in set(ids)}
    assert again.get_vocab() == trimmed.get_vocab() == names
    assert len(again) == len(ids) == num_ids(again)
    assert {name: ids[each] for name, each in special_ids(again).items()} == special_ids(full)
    assert again.model_max_length == full.model_max_length
    text = f"{sentences(1)[0]} {full.eos_token or full.sep_token}{full.mask_token or ''} tail"
    kept = set(ids)
    for sample in (text, *sentences(1)[:50]):
        before = full(sample)["input_ids"]
        if kept.issuperset(before):
            assert [ids[each] for each in again(sample)["input_ids"]] == before
    assert again.num_special_tokens_to_add(pair=True) == full.num_special_tokens_to_add(pair=True)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    return {name: each for name, each in found.items() if each is not None}


def test_padding_keeps_its_id_if_it_can() -> None:
    spec = spec_of(build("wordpiece"), name="")
    assert in_order(spec, {4, 9, 30, 6}, pad_id=None) == [4, 6, 9, 30]
    assert in_order(spec, {4, 9, 30, 3}, pad_id=3) == [4, 9, 30, 3]
    assert in_order(spec, {4, 9, 30, 2, 0}, pad_id=2) == [0, 4, 2, 9, 30]
    assert in_order(spec, {4, 9}, pad_id=9) == [4, 9]


def test_the_lowest_score_of_a_unigram_stays_since_unknown_characters_count_by_it() -> None:
    words = [("<unk>", 0.0), ("Xc", -40.0), ("d", -40.0), ("cd", -1.0), ("zz", -100.0), ("yy", -3.0)]
    full = Tokenizer(models.Unigram(words, unk_id=0))
    spec = json.loads(full.to_str())
    assert needed_ids(spec) == {0, 4}
    ids = sorted(closed(spec, ["Xc", "d", "cd"]))
    assert full.encode("Xcd").tokens == backend_of(with_words(spec, ids)).encode("Xcd").tokens == ["Xc", "d"]
    without = with_words(spec, [each for each in ids if each != 4])
    assert backend_of(without).encode("Xcd").tokens == ["X", "cd"]  # what the piece is kept for


def test_the_parts_of_a_word_are_those_of_the_merges_that_make_it() -> None:
    words = {word: index for index, word in enumerate(["a", "b", "c", "ab", "bc", "abc", "abcabc", "q"])}
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("abc", "abc")]
    spec = json.loads(Tokenizer(models.BPE(words, merges)).to_str())
    parts = word_parts(spec)
    assert parts("abc") == ["a", "b", "c", "bc"]  # not ab: the merge of b and c comes first
    assert parts("abcabc") == ["a", "b", "c", "bc", "abc"]
    assert parts("a") == parts("q") == []
    kept = with_words(spec, sorted(words[each] for each in ("a", "b", "c", "bc", "abc")))
    assert kept["model"]["merges"] == [["b", "c"], ["a", "bc"]]
    assert backend_of(kept).encode("abcabc").tokens == ["abc", "abc"]
    without = with_words(spec, sorted(words[each] for each in ("a", "b", "c", "abc")))
    assert backend_of(without).encode("abc").tokens == ["a", "b", "c"]  # what bc is kept for


def test_single_characters_stand_in_for_words() -> None:
    assert list(characters(spec_of(build("wordpiece"), name=""))("##abc")) == ["##a", "##b", "##c"]
    assert list(characters(spec_of(build("wordpiece"), name=""))("abc")) == ["a", "##b", "##c"]
    assert list(characters(spec_of(build("unigram"), name=""))("▁ab")) == ["▁", "a", "b"]


def test_bytes_and_the_unknown_stay() -> None:
    for kind, name in (
        ("byte_bpe", "Ġ"),
        ("causal_bpe", "Ġ"),
        ("unigram_bytes", "<0x0A>"),
        ("character_bpe", "<0xFF>"),
    ):
        spec = spec_of(build(kind), name=kind)
        assert vocabulary(spec)[name] in needed_ids(spec)
        assert len(needed_ids(spec)) > 256
    spec = spec_of(build("wordpiece"), name="")
    assert needed_ids(spec) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("model", "fact"),
    [
        (models.WordLevel({"a": 0, "b": 1}, unk_token="a"), "is of kind WordLevel"),
        (models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
    ],
)
def test_other_kinds_are_refused(model: models.Model, fact: str) -> None:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=fact):
        check_kind(json.loads(backend.to_str()), name="mine")
