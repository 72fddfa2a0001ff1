import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distilkit.data.blocks import Blocks, special_tokens_around
from distilkit.data.masking import Ids, Masker
from distilkit.errors import UserError
from distilkit.losses import IGNORE_INDEX
from streams import CLS, MASKING, PAD, SEP, MakeBlocks, causal_or_not, originals, stream_of
from tiny import SPECIAL, VOCABULARY

STREAM_LENGTHS = [1, 13, 14, 15, 16, 17, 224, 225, 333]  # a block takes 14 or 16 of the stream


@causal_or_not
@pytest.mark.parametrize("num_tokens", STREAM_LENGTHS)
def test_packing_loses_no_token_and_repeats_none(make_blocks: MakeBlocks, causal: bool, num_tokens: int) -> None:
    tokens = stream_of(num_tokens)
    blocks = make_blocks(tokens, causal=causal)
    batch = blocks[(0, np.arange(len(blocks)))]
    rows = batch["input_ids"].numpy() if causal else originals(batch)
    real = batch["attention_mask"].numpy() if "attention_mask" in batch else np.ones_like(rows)
    lengths = real.sum(axis=1)
    assert rows.shape == (len(blocks), 16)
    assert (lengths[:-1] == 16).all()
    assert (real == (np.arange(16) < lengths[:, None])).all()
    around = 0 if causal else 1
    if not causal:
        assert (rows[:, 0] == CLS).all()
        assert (rows[np.arange(len(rows)), lengths - 1] == SEP).all()
        assert (rows[real == 0] == PAD).all()
    interiors = [row[around : length - around] for row, length in zip(rows, lengths, strict=True)]
    assert np.concatenate(interiors).tolist() == tokens.tolist()


@causal_or_not
def test_only_a_batch_with_padding_has_an_attention_mask(make_blocks: MakeBlocks, causal: bool) -> None:
    blocks = make_blocks(stream_of(49), causal=causal)
    assert len(blocks) == 4
    assert "attention_mask" not in blocks[(0, np.array([2, 0, 1]))]
    mask = blocks[(0, np.array([3, 0]))]["attention_mask"]
    assert mask.tolist() == [[1] * (1 if causal else 9) + [0] * (15 if causal else 7), [1] * 16]


def test_a_batch_has_the_blocks_asked_for_whatever_stands_beside_them(make_blocks: MakeBlocks) -> None:
    blocks = make_blocks(stream_of(140))
    whole = blocks[(2, np.arange(10))]
    some = blocks[(2, np.array([7, 3]))]
    for name in ("input_ids", "labels"):
        assert torch.equal(some[name], whole[name][[7, 3]])
    assert not torch.equal(blocks[(3, np.array([7, 3]))]["labels"], some["labels"])


@pytest.mark.parametrize("num_tokens", STREAM_LENGTHS)
def test_masked_labels_are_on_real_words_only(make_blocks: MakeBlocks, num_tokens: int) -> None:
    blocks = make_blocks(stream_of(num_tokens))
    batch = blocks[(0, np.arange(len(blocks)))]
    ids, _, _ = blocks.sequences(np.arange(len(blocks)))
    chosen = batch["labels"].numpy() != IGNORE_INDEX
    assert (ids[chosen] >= len(SPECIAL)).all()
    assert (batch["labels"].numpy()[chosen] == ids[chosen]).all()
    assert chosen.any()


@pytest.mark.parametrize("num_tokens", STREAM_LENGTHS)
def test_causal_labels_are_the_next_tokens(make_blocks: MakeBlocks, num_tokens: int) -> None:
    tokens = stream_of(num_tokens)
    blocks = make_blocks(tokens, causal=True)
    labels = blocks[(0, np.arange(len(blocks)))]["labels"].tolist()
    for block, row in enumerate(labels):
        stretch = tokens[block * 16 : (block + 1) * 16].tolist()
        assert row == stretch[1:] + [IGNORE_INDEX] * (17 - len(stretch))


def documents_of(tokens: Ids) -> list[list[int]]:
    """Split a stream at its separators with a plain loop."""
    documents: list[list[int]] = [[]]
    for token in tokens.tolist():
        if token == SEP:
            documents.append([])
        else:
            documents[-1].append(token)
    return [document for document in documents if document]


def stream_without_empty_documents(num_tokens: int, separators: float) -> Ids:
    tokens = stream_of(num_tokens, separators=separators)
    tokens[1:][(tokens[1:] == SEP) & (tokens[:-1] == SEP)] = SEP + 2
    tokens[0] = SEP + 2
    return tokens


TemplateTokenizer = Callable[[list[int], list[int]], PreTrainedTokenizerFast]


@pytest.fixture
def with_template(tokenizer: PreTrainedTokenizerBase) -> TemplateTokenizer:
    """Give the words other opening and closing tokens."""

    def make(opening: list[int], closing: list[int]) -> PreTrainedTokenizerFast:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        names = [*(SPECIAL[token] for token in opening), "$A", *(SPECIAL[token] for token in closing)]
        backend.post_processor = processors.TemplateProcessing(
            single=names, special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]", pad_token="[PAD]")

    return make


AROUND = [
    ([CLS], [SEP]),
    ([CLS], []),
    ([], [SEP]),
    ([SEP], [SEP]),
    ([CLS, CLS], [SEP, CLS]),
    ([CLS, CLS], []),
    ([], []),
]
around = pytest.mark.parametrize(("opening", "closing"), AROUND)


@around
@pytest.mark.parametrize("separators", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("num_tokens", [1, 12, 14, 16, 222, 2000])
@pytest.mark.parametrize("scanned", [7, 2**24])
def test_documents_that_are_kept_apart_have_opening_and_closing_tokens_of_their_own(
    with_template: TemplateTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    opening: list[int],
    closing: list[int],
    separators: float,
    num_tokens: int,
    scanned: int,
) -> None:
    monkeypatch.setattr("distilkit.data.blocks._SCANNED", scanned)
    tokens = stream_without_empty_documents(num_tokens, separators)
    other = with_template(opening, closing)
    assert special_tokens_around(other) == (opening, closing)
    blocks = Blocks(
        tokens, tokenizer=other, block_size=16, masker=None, attend_across_documents=False, packing="blocks"
    )
    batch = blocks[(0, np.arange(len(blocks)))]
    ids, numbers = batch["input_ids"].tolist(), batch["document_ids"].tolist()
    assert {len(row) for row in ids} == {16}
    pieces: list[list[int]] = []
    for row, places in zip(ids, numbers, strict=True):
        real = [place for place in places if place >= 0]
        assert places == sorted(real) + [-1] * (16 - len(real))
        assert len(real) + 2 * (len(opening) + max(1, len(closing))) >= 16 or row is ids[-1]
        for document in range(real[-1] + 1):
            piece = [token for token, place in zip(row, places, strict=True) if place == document]
            assert piece[: len(opening)] == opening
            assert piece[len(piece) - len(closing) :] == closing
            pieces.append(piece[len(opening) : len(piece) - len(closing)])
            if document < real[-1] and not closing:
                assert pieces[-1].pop() == SEP
    left = documents_of(tokens)
    for piece in pieces:
        words = [token for token in piece if token != SEP]
        assert words == left[0][: len(words)]
        left[0] = left[0][len(words) :]
        if not left[0]:
            left.pop(0)
    assert left == []


@pytest.mark.parametrize("opening", [[CLS], []])
def test_no_model_predicts_the_opening_of_the_next_document(
    with_template: TemplateTokenizer, opening: list[int]
) -> None:
    tokens = stream_without_empty_documents(500, 0.1)
    other = with_template(opening, [])
    blocks = Blocks(
        tokens, tokenizer=other, block_size=16, masker=None, attend_across_documents=False, packing="blocks"
    )
    batch = blocks[(0, np.arange(len(blocks)))]
    real, labels = batch["document_ids"] >= 0, batch["labels"]
    after = batch["input_ids"][:, 1:]
    expected = torch.where(real[:, 1:] & (after != CLS), after, IGNORE_INDEX)
    assert torch.equal(labels[:, :-1], expected)


@around
@causal_or_not
@pytest.mark.parametrize("scanned", [7, 2**24])
def test_each_document_is_a_sequence_or_several_of_the_block_size(
    with_template: TemplateTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    opening: list[int],
    closing: list[int],
    causal: bool,
    scanned: int,
) -> None:
    monkeypatch.setattr("distilkit.data.blocks._SCANNED", scanned)
    tokens = stream_without_empty_documents(1500, 0.06)
    other = with_template(opening, closing)
    masker: Any = None if causal else (lambda ids, **_: (ids, np.full_like(ids, IGNORE_INDEX)))
    blocks = Blocks(
        tokens, tokenizer=other, block_size=16, masker=masker, attend_across_documents=True, packing="documents"
    )
    expected, stride = [], blocks.stride
    for document in documents_of(tokens):
        parts = [document[begin : begin + stride] for begin in range(0, len(document), stride)]
        if causal and not closing and len(parts[-1]) < stride:
            parts[-1] = [*parts[-1], SEP]
        expected += [[*opening, *part, *closing] for part in parts]
    if causal and not closing and expected[-1][-1] == SEP and tokens[-1] != SEP:
        expected[-1].pop()  # no separator follows the last document
    assert len(blocks) == len(expected)
    rng = np.random.default_rng(0)
    for chosen in (np.arange(len(blocks)), rng.permutation(len(blocks))[:9], np.array([3])):
        batch = blocks[(0, chosen)]
        longest = max(len(expected[block]) for block in chosen)
        assert batch["input_ids"].shape == (len(chosen), longest)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for row, real, block in zip(batch["input_ids"].tolist(), mask.tolist(), chosen, strict=True):
            size = len(expected[block])
            assert row == expected[block] + [blocks.pad_id] * (longest - size)
            assert real == [1] * size + [0] * (longest - size)
        assert ("attention_mask" in batch) == (len({len(expected[block]) for block in chosen}) > 1)
        assert "document_ids" not in batch
        if causal:
            after = torch.where(mask[:, 1:] == 1, batch["input_ids"][:, 1:], IGNORE_INDEX)
            assert torch.equal(batch["labels"][:, :-1], after)


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_a_documents_mask_does_not_depend_on_its_neighbours(
    tokenizer: PreTrainedTokenizerBase, whole_word: bool, smoothing: float
) -> None:
    tokens = stream_without_empty_documents(3000, 0.06)
    masking = dataclasses.replace(MASKING, whole_word=whole_word, smoothing=smoothing)
    counts = np.arange(len(VOCABULARY), dtype=np.int64)
    blocks = Blocks(
        tokens,
        tokenizer=tokenizer,
        block_size=64,
        masker=Masker(masking, tokenizer=tokenizer, token_counts=counts, seed=1),
        attend_across_documents=True,
        packing="documents",
    )
    whole = blocks[(5, np.arange(len(blocks)))]
    unmasked, lengths, _ = blocks.sequences(np.arange(len(blocks)))
    for block, length in enumerate(lengths):
        alone = blocks[(5, np.array([block]))]
        for name in ("input_ids", "labels"):
            assert torch.equal(alone[name][0], whole[name][block, :length])
        targets = whole["labels"][block] != IGNORE_INDEX
        assert whole["labels"][block][targets].tolist() == unmasked[block][targets.numpy()].tolist()
        assert not set(unmasked[block][targets.numpy()]) & set(range(len(SPECIAL)))
        if length > 3:
            assert int(not whole_word) <= int(targets.sum()) <= max(1, round(0.15 * length))


@pytest.mark.parametrize(("packing", "attend"), [("blocks", True), ("blocks", False), ("documents", True)])
def test_pickled_blocks_hold_no_tokens_and_read_the_same_file(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, packing: Any, attend: bool
) -> None:
    stream_without_empty_documents(3_000_000, 0.1).tofile(tmp_path / "tokens.bin")
    blocks = Blocks(
        np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r"),
        tokenizer=tokenizer,
        block_size=64,
        masker=Masker(MASKING, tokenizer=tokenizer, token_counts=np.ones(len(VOCABULARY), np.int64), seed=0),
        attend_across_documents=attend,
        packing=packing,
    )
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 100_000
    again = pickle.loads(pickled)
    draw = 3, np.array([0, len(blocks) // 2, len(blocks) - 1])
    assert len(again) == len(blocks)
    assert all(torch.equal(tensor, blocks[draw][name]) for name, tensor in again[draw].items())


def test_documents_are_not_numbered_where_they_see_each_other(make_blocks: MakeBlocks) -> None:
    assert "document_ids" not in make_blocks(stream_of(50))[(0, np.arange(3))]


def test_a_tokenizers_opening_and_closing_tokens_are_found(
    tokenizer: PreTrainedTokenizerBase, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert special_tokens_around(tokenizer) == ([CLS], [SEP])
    assert special_tokens_around(causal_tokenizer) == ([], [])


def without_unknown(alphabet: str, *, keeps: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer that drops every character which is not in ``keeps``."""
    ids = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(ids, []))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"[^{keeps}]"), "removed")
    backend.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("alphabet", ["ACGT", "0123456789", "나는학교", "a"])
def test_opening_tokens_are_found_whatever_the_alphabet_is(alphabet: str) -> None:
    tokenizer = without_unknown(alphabet, keeps=alphabet[-1])
    assert tokenizer("xyz")["input_ids"] == [CLS, SEP]
    assert special_tokens_around(tokenizer) == ([CLS], [SEP])


def test_an_opening_token_that_has_no_name_is_no_word_to_look_for() -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, "<unk>"))
    backend.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 0))
    nameless = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert nameless("a")["input_ids"] == [0, 3, 1]
    assert special_tokens_around(nameless) == ([0], [1])


def test_a_tokenizer_that_drops_all_of_its_words_is_an_error() -> None:
    with pytest.raises(UserError, match="turns none of its 9 words into tokens, .*; check its normalizer and vocab"):
        special_tokens_around(without_unknown("ACGT", keeps="z"))
