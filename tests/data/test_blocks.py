import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distilkit.data.blocks import Blocks, special_tokens_around
from distilkit.errors import UserError
from distilkit.losses import IGNORE_INDEX
from streams import CLS, PAD, SEP, MakeBlocks, causal_or_not, originals, stream_of
from tiny import SPECIAL

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
    ids, _ = blocks.input_ids(np.arange(len(blocks)))
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


def numbered(interior: list[int], *, opening: int, closing: int) -> list[int]:
    """Number the documents of one block with a plain loop."""
    number, numbers = 0, [0] * opening
    for position, token in enumerate(interior):
        numbers.append(number)
        if token == SEP and position + 1 < len(interior):
            number += 1
    numbers += [number] * closing
    return numbers + [-1] * (16 - len(numbers))


@causal_or_not
@pytest.mark.parametrize("separators", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 14, 16, 222, 333])
def test_documents_are_numbered_within_each_block(
    make_blocks: MakeBlocks, causal: bool, separators: float, num_tokens: int
) -> None:
    tokens = stream_of(num_tokens, separators=separators)
    blocks = make_blocks(tokens, causal=causal, attend_across_documents=False)
    around = 0 if causal else 1
    stretches = [tokens[begin : begin + blocks.stride].tolist() for begin in range(0, num_tokens, blocks.stride)]
    expected = [numbered(stretch, opening=around, closing=around) for stretch in stretches]
    assert blocks[(0, np.arange(len(blocks)))]["document_ids"].tolist() == expected


@pytest.mark.parametrize("around", [([SEP], []), ([SEP], [SEP]), ([CLS, SEP], [SEP, CLS]), ([], [SEP, SEP])])
def test_special_tokens_around_a_block_begin_no_document(
    tokenizer: PreTrainedTokenizerBase, around: tuple[list[int], list[int]]
) -> None:
    opening, closing = around
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    names = [*(SPECIAL[token] for token in opening), "$A", *(SPECIAL[token] for token in closing)]
    backend.post_processor = processors.TemplateProcessing(
        single=names, special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    other = PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]", pad_token="[PAD]")
    assert special_tokens_around(other) == around
    tokens = stream_of(100, separators=0.3)
    blocks = Blocks(tokens, tokenizer=other, block_size=16, masker=None, attend_across_documents=False)
    stretches = [tokens[begin : begin + blocks.stride].tolist() for begin in range(0, 100, blocks.stride)]
    expected = [numbered(stretch, opening=len(opening), closing=len(closing)) for stretch in stretches]
    assert blocks[(0, np.arange(len(blocks)))]["document_ids"].tolist() == expected


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


def test_a_tokenizer_that_drops_all_of_its_words_is_an_error() -> None:
    with pytest.raises(UserError, match="turns none of its 9 words into tokens, .*; check its normalizer and vocab"):
        special_tokens_around(without_unknown("ACGT", keeps="z"))
