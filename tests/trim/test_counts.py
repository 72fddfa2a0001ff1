"""Which words stay: the most frequent ones, by size or by coverage, with characters that stand in for the others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from distilkit.data.cache import split_of
from distilkit.errors import UserError
from distilkit.trim.counts import check_size, choose_words, count_words
from distilkit.trim.pieces import in_order, needed_ids, vocabulary
from distilkit.trim.tokenizer import Trimming, num_changed, save_with_words, spec_of, trimmed_tokenizer, trimming_of
from vocabularies import build, sentences


class Sentences:
    """A corpus of sentences."""

    def __init__(self, seed: int = 1, count: int = 600) -> None:
        self.seed, self.count, self.reads = seed, count, 0

    def fingerprint(self) -> dict[str, Any]:
        return {"seed": self.seed, "count": self.count}

    def documents(self) -> Iterator[str]:
        self.reads += 1
        yield from sentences(self.seed, self.count)


GIVEN: dict[str, Any] = {"val_share": 0.2, "max_documents": 10**6}


def test_the_training_split_is_counted_once(tmp_path: Path) -> None:
    full, corpus = build("wordpiece"), Sentences()
    counted = count_words(corpus, full, cache_dir=tmp_path, **GIVEN)
    expected = np.zeros(len(full), dtype=np.int64)
    for text in corpus.documents():
        if split_of(text, val_share=0.2) == "train":
            for each in full(text, add_special_tokens=False)["input_ids"]:
                expected[each] += 1
    assert counted.counts.tolist() == expected.tolist()
    assert counted.held_out == [text for text in sentences(1) if split_of(text, val_share=0.2) == "val"]
    reads = corpus.reads
    assert count_words(corpus, full, cache_dir=tmp_path, **GIVEN).counts.tolist() == expected.tolist()
    assert corpus.reads == reads
    few = count_words(corpus, full, cache_dir=tmp_path, val_share=0.2, max_documents=20)
    assert 0 < few.counts.sum() < expected.sum()


def spec_of_words(words: list[str]) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)})).to_str())
    return spec


def test_the_most_frequent_words_stay_and_common_characters_before_rare_words() -> None:
    words = ["[UNK]", "often", "rare", "seldom", "never", "r", "o", "n", "##a", "##r", "##e", "##n", "##q"]
    spec, counts = spec_of_words(words), np.array([0, 100, 2, 5, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    kept, covered = choose_words(spec, counts, vocab_size=5, coverage=None)
    # o and ##e are in often and stand in for others as often as it, then come ##n and the rest
    assert {words[each] for each in kept} == {"[UNK]", "often", "o", "##e", "##n"}
    assert covered == pytest.approx(100 / 108)
    kept, covered = choose_words(spec, counts, vocab_size=None, coverage=0.97)
    assert "seldom" in {words[each] for each in kept}
    assert "rare" not in {words[each] for each in kept}
    assert covered == pytest.approx(105 / 108)
    kept, covered = choose_words(spec, counts, vocab_size=None, coverage=1.0)
    assert covered == 1
    assert {"never", "n"}.isdisjoint(words[each] for each in kept)


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "unigram"])
def test_a_size_is_met_where_the_text_has_so_many_words(kind: str, tmp_path: Path) -> None:
    spec = spec_of(build(kind), name=kind)
    counted = count_words(Sentences(), build(kind), cache_dir=tmp_path, **GIVEN)
    size = len(needed_ids(spec)) + 100
    kept, covered = choose_words(spec, counted.counts, vocab_size=size, coverage=None)
    assert len(kept) == size
    more, above = choose_words(spec, counted.counts, vocab_size=size + 50, coverage=None)
    assert kept <= more
    assert covered < above <= 1
    _, reached = choose_words(spec, counted.counts, vocab_size=None, coverage=above)
    assert reached >= above


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "unigram"])
def test_no_token_changes_if_all_words_of_the_text_stay(kind: str, tmp_path: Path) -> None:
    full = build(kind)
    spec = spec_of(full, name=kind)
    counted = count_words(Sentences(), full, cache_dir=tmp_path, **GIVEN)
    kept, _ = choose_words(spec, counted.counts, vocab_size=None, coverage=1.0)
    ids = in_order(spec, kept, pad_id=full.pad_token_id)
    trimmed = save_with_words(full, spec, ids, tmp_path / "trimmed")
    train = [text for text in sentences(1) if split_of(text, val_share=0.2) == "train"]
    assert num_changed(train, full, trimmed, ids)[0] == 0
    lost = max(vocabulary(spec), key=lambda word: (counted.counts[vocabulary(spec)[word]], len(word) > 2))
    fewer = [each for each in ids if each != vocabulary(spec)[lost]]
    assert vocabulary(spec)[lost] not in needed_ids(spec)
    changed, total = num_changed(train, full, save_with_words(full, spec, fewer, tmp_path / "fewer"), fewer)
    assert counted.counts[vocabulary(spec)[lost]] <= changed < total / 2


def test_a_trimmed_tokenizer_is_made_once_and_says_what_it_keeps(tmp_path: Path) -> None:
    build("byte_bpe").save_pretrained(tmp_path / "full")
    given: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "name": str(tmp_path / "full"), **GIVEN}
    tokenizer = trimmed_tokenizer(corpus=Sentences(), vocab_size=400, **given)
    trimming = trimming_of(tokenizer)
    assert trimming is not None
    assert len(tokenizer) == len(trimming.ids) == 400
    assert trimming.num_words == len(build("byte_bpe"))
    assert 0 < trimming.changed < trimming.held_out
    assert "words; " in str(trimming)
    corpus = Sentences()
    again = trimmed_tokenizer(corpus=corpus, vocab_size=400, **given)
    assert corpus.reads == 0
    assert again.get_vocab() == tokenizer.get_vocab()
    assert trimming_of(again) == trimming
    whole = trimming_of(trimmed_tokenizer(corpus=corpus, coverage=1, **given))
    assert corpus.reads == 0
    assert whole is not None
    assert whole.covered == 1
    assert trimming_of(build("byte_bpe")) is None


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({}, "tokenizer.vocab_size=null and tokenizer.coverage=null"),
        ({"vocab_size": 300, "coverage": 0.9}, "tokenizer.vocab_size=300 and tokenizer.coverage=0.9"),
        ({"coverage": 0.0}, "tokenizer.coverage=0.0, but it must be above 0 and at most 1"),
        ({"coverage": 1.5}, "tokenizer.coverage=1.5"),
        ({"vocab_size": 261}, "tokenizer.vocab_size=261, but it must be from 262"),
        ({"vocab_size": 652}, "652, but it must be from 262 .* to 651"),
    ],
)
def test_sizes_that_cannot_be_are_refused(given: dict[str, Any], facts: str) -> None:
    values = {"vocab_size": None, "coverage": None, **given}
    with pytest.raises(UserError, match=facts):
        check_size(spec_of(build("byte_bpe"), name=""), **values, prefix="tokenizer.")


def test_no_held_out_text_is_said() -> None:
    assert str(Trimming(ids=[1, 2], num_words=9, covered=1.0, held_out=0, changed=0)) == (
        "9 -> 2 words; no held-out text shows what changes"
    )
    with pytest.raises(UserError, match=r"data\.val_share=1\.5, but it must be above 0 and below 1"):
        count_words(Sentences(), build("wordpiece"), cache_dir="nowhere", val_share=1.5, max_documents=10)


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no word can be counted in it; check data\.corpus"):
        count_words(Sentences(count=0), build("wordpiece"), cache_dir=tmp_path, **GIVEN)
