"""Properties of packing, masking, sharding and resuming, for random texts and sizes: each token once, none lost."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from distilkit.data.batches import MicroBatches, StepSampler
from distilkit.data.blocks import Blocks
from distilkit.data.masking import Ids, Masker, Masking
from distilkit.language_model import Batch
from distilkit.losses import IGNORE_INDEX
from streams import MASKING, SEP
from tiny import SPECIAL, VOCABULARY

quick = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

WORDS = st.integers(len(SPECIAL), len(VOCABULARY) - 1)
DOCUMENTS = st.lists(st.lists(WORDS, max_size=40), min_size=1, max_size=12).filter(any)
FORMS = st.sampled_from([("blocks", True), ("blocks", False), ("documents", True)])


def stream_of(documents: list[list[int]], *, last: bool) -> Ids:
    """Join documents as the cache does: a separator between two, and perhaps after the last one."""
    tokens = [token for document in documents for token in [*document, SEP]]
    return np.array(tokens if last else tokens[:-1], dtype=np.uint16)


def blocks_of(stream: Ids, tokenizer: PreTrainedTokenizerBase, form: tuple[Any, bool], **settings: Any) -> Blocks:
    """Make blocks of a stream, masked where the tokenizer has a mask token."""
    masker, counts = None, np.ones(len(VOCABULARY), dtype=np.int64)
    if tokenizer.mask_token_id is not None:
        masker = Masker(MASKING, tokenizer=tokenizer, token_counts=counts, seed=0)
    packing, across = form
    given: dict[str, Any] = {"masker": masker, "packing": packing, "attend_across_documents": across, **settings}
    return Blocks(stream, tokenizer=tokenizer, **given)


def words_of(batch: Batch) -> list[list[int]]:
    """List the words of each row of a batch without masks: no special tokens, no padding."""
    rows = batch["input_ids"].tolist()
    real = batch["attention_mask"].tolist() if "attention_mask" in batch else [[1] * len(row) for row in rows]
    return [
        [token for token, kept in zip(row, mask, strict=True) if kept and token >= len(SPECIAL)]
        for row, mask in zip(rows, real, strict=True)
    ]


@quick
@given(documents=DOCUMENTS, last=st.booleans(), block_size=st.integers(4, 24), form=FORMS, causal=st.booleans())
def test_blocks_hold_each_token_of_a_corpus_once_and_in_order(
    documents: list[list[int]],
    last: bool,
    block_size: int,
    form: Any,
    causal: bool,
    tokenizer: PreTrainedTokenizerBase,
    causal_tokenizer: PreTrainedTokenizerBase,
) -> None:
    masking = {} if causal else {"masker": None}
    blocks = blocks_of(
        stream_of(documents, last=last),
        causal_tokenizer if causal else tokenizer,
        form,
        block_size=block_size,
        **masking,
    )
    batches = [blocks[(0, np.array([index]))] for index in range(len(blocks))]
    assert list(itertools.chain(*(words_of(batch)[0] for batch in batches))) == list(itertools.chain(*documents))
    for batch in batches:
        assert 1 <= batch["input_ids"].shape[1] <= block_size
    if form[0] == "documents":  # no sequence has words of two documents
        per_stride = block_size - (0 if causal else 2)
        assert sum(bool(words_of(batch)[0]) for batch in batches) == sum(
            math.ceil(len(document) / per_stride) for document in documents
        )
    whole = blocks[(0, np.arange(len(blocks)))]  # a batch of all has the same rows
    assert words_of(whole) == [words_of(batch)[0] for batch in batches]


@quick
@given(
    rows=st.lists(st.lists(st.integers(0, len(VOCABULARY) - 1), min_size=3, max_size=20), min_size=1, max_size=6),
    rate=st.floats(0.05, 0.95),
    whole_word=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.7]),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_masks_have_their_exact_number_and_depend_on_the_sample_alone(
    rows: list[list[int]],
    rate: float,
    whole_word: bool,
    smoothing: float,
    epoch: int,
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    masking = Masking(
        mlm_probability=rate, mask_share=0.8, random_share=0.1, smoothing=smoothing, whole_word=whole_word
    )
    counts = np.arange(len(VOCABULARY), dtype=np.int64)
    masker = Masker(masking, tokenizer=tokenizer, token_counts=counts, seed=3)
    lengths = np.array([len(row) for row in rows])
    ids = np.array([row + [0] * (lengths.max() - len(row)) for row in rows])
    samples = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=len(rows), max_size=len(rows), unique=True)))
    masked, labels = masker(ids, epoch=epoch, samples=samples, lengths=lengths)
    for row, given_ids, out, wanted in zip(rows, ids, masked, labels, strict=True):
        chosen = np.flatnonzero(wanted != IGNORE_INDEX)
        assert (wanted[chosen] == given_ids[chosen]).all()
        assert (np.delete(out, chosen) == np.delete(given_ids, chosen)).all()
        words = [place for place, token in enumerate(row) if token >= len(SPECIAL)]
        budget = max(1, round(rate * len(row)))
        assert set(chosen) <= set(words)
        if not whole_word:
            assert len(chosen) == min(budget, len(words))
        else:
            assert len(chosen) <= budget
            for place in chosen:  # with all pieces that belong to it
                after = place + 1
                if after in words and VOCABULARY[row[after]].startswith("##"):
                    assert after in chosen
                if VOCABULARY[row[place]].startswith("##") and place - 1 in words:
                    assert place - 1 in chosen
    order = np.array(data.draw(st.permutations(range(len(rows)))))[: max(1, len(rows) - 1)]
    longest = int(lengths[order].max())
    again = masker(ids[order, :longest], epoch=epoch, samples=samples[order], lengths=lengths[order])
    assert (again[0] == masked[order, :longest]).all() and (again[1] == labels[order, :longest]).all()


SIZES = st.tuples(st.integers(1, 90), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))


def sampler_of(blocks: int, ranks: int, per_rank: int, rank: int, lengths: Any = None) -> StepSampler:
    return StepSampler(
        num_blocks=blocks, global_batch_size=ranks * per_rank, rank=rank, world_size=ranks, seed=7, lengths=lengths
    )


@quick
@given(sizes=SIZES, epoch=st.integers(0, 3), sort=st.booleans())
def test_ranks_share_each_step_and_see_each_block_once(sizes: tuple[int, ...], epoch: int, sort: bool) -> None:
    blocks, ranks, per_rank, _ = sizes
    lengths = np.random.default_rng(blocks).integers(1, 50, blocks).astype(np.int32) if sort else None
    shares = []
    for rank in range(ranks):
        sampler = sampler_of(blocks, ranks, per_rank, rank, lengths)
        sampler.set_epoch(epoch)
        shares.append([draw[1].tolist() for draw in sampler])
    seen = sorted(itertools.chain(*itertools.chain(*shares)))
    assert [block for block in seen if block >= 0] == list(range(blocks))  # others fill up the last step
    for step in zip(*shares, strict=True):
        assert len({len(part) for part in step}) == 1
    alone = StepSampler(
        num_blocks=blocks, global_batch_size=ranks * per_rank, rank=0, world_size=1, seed=7, lengths=lengths
    )
    alone.set_epoch(epoch)
    for step, whole in zip(zip(*shares, strict=True), (draw[1].tolist() for draw in alone), strict=False):
        if len(whole) == ranks * per_rank:
            assert sorted(itertools.chain(*step)) == sorted(whole)


def loaders_of(
    stream: Ids,
    tokenizer: PreTrainedTokenizerBase,
    form: Any,
    *,
    ranks: int,
    batch: int,
    micro: int,
    workers: int = 0,
    masked: bool = False,
) -> list[MicroBatches]:
    """Build the loaders of all ranks."""
    blocks = blocks_of(stream, tokenizer, form, block_size=8, **({} if masked else {"masker": None}))
    lengths = blocks.sizes if form[0] == "documents" else None
    return [
        MicroBatches(
            blocks,
            sampler=StepSampler(
                num_blocks=len(blocks), global_batch_size=batch, rank=rank, world_size=ranks, seed=1, lengths=lengths
            ),
            micro_batch_size=micro,
            num_workers=workers,
            pin_memory=False,
        )
        for rank in range(ranks)
    ]


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    counted = [batch.get("left_out", torch.zeros(len(batch["labels"]))).tolist() for batch in batches]
    rows = (zip(words_of(batch), left, strict=True) for batch, left in zip(batches, counted, strict=True))
    return sorted(tuple(row) for batch in rows for row, left in batch if not left)


@quick
@given(
    documents=DOCUMENTS,
    form=FORMS,
    was=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    now=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch=st.sampled_from([2, 4, 12]),
    stopped=st.integers(0, 30),
)
def test_a_run_that_goes_on_also_with_other_ranks_reads_each_token_once(
    documents: list[list[int]],
    form: Any,
    was: tuple[int, int],
    now: tuple[int, int],
    batch: int,
    stopped: int,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    if batch % was[0] or batch % now[0]:  # refused by the data module
        return
    stream = stream_of(documents, last=False)
    before = loaders_of(stream, tokenizer, form, ranks=was[0], batch=batch, micro=was[1])
    whole = [list(copy.copy(loader)) for loader in before]
    per_step, steps = before[0].per_step, stopped % max(1, len(whole[0]) // before[0].per_step)
    done = [list(itertools.islice(loader, steps * per_step)) for loader in before]
    for step in range(len(whole[0]) // per_step):  # each rank counts the tokens of its whole step
        for batches in (loader[step * per_step : (step + 1) * per_step] for loader in whole):
            masks = [each.get("attention_mask", each["input_ids"] * 0 + 1) for each in batches]
            left = [each.get("left_out", torch.zeros(len(each["labels"])))[:, None].bool() for each in batches]
            tokens = sum(int(mask.masked_fill(out, 0).sum()) for mask, out in zip(masks, left, strict=True))
            assert {int(each["num_tokens"]) for each in batches} == {tokens}
    after = loaders_of(stream, tokenizer, form, ranks=now[0], batch=batch, micro=now[1])
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
    rest = [list(loader) for loader in after]
    read = rows_of([*itertools.chain(*done), *itertools.chain(*rest)])
    blocks = before[0].blocks
    corpus = rows_of([blocks[(0, np.arange(len(blocks)))]])
    assert read == corpus


@pytest.mark.parametrize("form", [("blocks", True), ("blocks", False), ("documents", True)])
def test_workers_change_nothing(form: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [[len(SPECIAL) + (size * place) % 50 for place in range(size)] for size in range(1, 24)]
    stream = stream_of(documents, last=False)
    sizes: dict[str, int] = {"ranks": 2, "batch": 4, "micro": 1}
    alone, several = (
        [list(loader) for loader in loaders_of(stream, tokenizer, form, workers=workers, masked=True, **sizes)]
        for workers in (0, 2)
    )
    for one, other in zip(itertools.chain(*alone), itertools.chain(*several), strict=True):
        assert one.keys() == other.keys()
        assert all((np.asarray(one[name]) == np.asarray(other[name])).all() for name in one)
