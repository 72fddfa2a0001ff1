import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distilkit.data.batches import DistillationDataModule, MicroBatches, StepSampler, split_step
from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError
from distilkit.language_model import LM, Batch
from distilkit.losses import IGNORE_INDEX
from streams import CLS, MASKING, PAD, SEP, MakeBlocks, causal_or_not, originals, stream_of
from tiny import SPECIAL, WORDS, Texts, make_documents


def sampler_of(num_blocks: int, batch: int, *, rank: int = 0, ranks: int = 1, seed: int = 0) -> StepSampler:
    return StepSampler(num_blocks=num_blocks, global_batch_size=batch, rank=rank, world_size=ranks, seed=seed)


def drawn(sampler: StepSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    draws = list(sampler)
    assert all(draw_epoch == epoch for draw_epoch, _ in draws)
    return [blocks.tolist() for _, blocks in draws]


@pytest.mark.parametrize(("num_blocks", "batch"), [(1, 1), (12, 4), (13, 4), (15, 4), (4, 4), (7, 1)])
def test_each_epoch_is_a_permutation_cut_into_steps(num_blocks: int, batch: int) -> None:
    sampler = sampler_of(num_blocks, batch)
    steps = drawn(sampler)
    assert sorted(itertools.chain(*steps)) == list(range(num_blocks))
    rest = num_blocks % batch
    assert [len(step) for step in steps] == [batch] * (num_blocks // batch) + [rest] * (rest > 0)
    assert len(sampler) == len(steps)


@pytest.mark.parametrize(("num_blocks", "batch", "ranks"), [(48, 8, 2), (51, 8, 4), (50, 12, 3), (9, 8, 8), (8, 8, 8)])
def test_ranks_share_each_global_batch_of_one_process(num_blocks: int, batch: int, ranks: int) -> None:
    shares = [drawn(sampler_of(num_blocks, batch, rank=rank, ranks=ranks)) for rank in range(ranks)]
    whole = drawn(sampler_of(num_blocks, batch))
    for step, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert len({len(part) for part in parts}) == 1
        assert sorted(block for part in parts for block in part if block >= 0) == sorted(step)
        filling = [~block for part in parts for block in part if block < 0]
        assert len(filling) == -len(step) % ranks
        assert set(filling) <= {step[-1]}


def test_the_order_depends_on_epoch_and_seed_only() -> None:
    orders = [drawn(sampler_of(500, 10, seed=seed), epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    again = drawn(sampler_of(500, 10, seed=1), 2)
    assert again == orders[5]
    flat = np.array([list(itertools.chain(*order)) for order in orders])
    for first, second in itertools.combinations(flat, 2):
        assert (first == second).sum() < 8  # one in 500 agrees by chance, so one in all


def test_every_block_is_as_likely_at_every_place() -> None:
    sampler = sampler_of(10, 10)
    places = np.array([np.argsort(drawn(sampler, epoch)[0]) for epoch in range(3000)])
    found = np.stack([np.bincount(places[:, block], minlength=10) for block in range(10)])
    assert abs(found - 300).max() < 5 * np.sqrt(3000 * 0.1 * 0.9)


@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_a_sampler_may_start_at_any_step(step: int) -> None:
    sampler = sampler_of(13, 4)
    rest = [blocks.tolist() for _, blocks in sampler.starting_at(step)]
    assert rest == drawn(sampler)[step:]


def test_each_step_has_the_progress_of_its_place() -> None:
    sampler = StepSampler(
        num_blocks=13,
        global_batch_size=4,
        rank=1,
        world_size=2,
        seed=0,
        progress=lambda epoch, step: epoch + step / 10,
    )
    sampler.set_epoch(2)
    plain = sampler_of(13, 4, rank=1, ranks=2)
    plain.set_epoch(2)
    for start in (0, 1):
        draws = list(sampler.starting_at(start))
        assert [(epoch, progress) for epoch, _, progress in draws] == [(2, 2 + step / 10) for step in range(start, 4)]
        assert [blocks.tolist() for _, blocks, _ in draws] == [
            blocks.tolist() for _, blocks in plain.starting_at(start)
        ]


LENGTHS = np.random.default_rng(3).integers(3, 129, 5000).astype(np.int32)


def sampler_by_length(batch: int, *, num_blocks: int = 5000, rank: int = 0, ranks: int = 1) -> StepSampler:
    lengths = LENGTHS[:num_blocks]
    return StepSampler(
        num_blocks=num_blocks, global_batch_size=batch, rank=rank, world_size=ranks, seed=0, lengths=lengths
    )


@pytest.mark.parametrize(("num_blocks", "batch"), [(5000, 32), (5000, 30), (4999, 256), (700, 8), (5000, 4096), (5, 4)])
def test_an_order_by_length_is_a_permutation_that_depends_on_the_epoch(num_blocks: int, batch: int) -> None:
    steps = drawn(sampler_by_length(batch, num_blocks=num_blocks))
    assert sorted(itertools.chain(*steps)) == list(range(num_blocks))
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
    assert drawn(sampler_by_length(batch, num_blocks=num_blocks)) == steps
    assert num_blocks < 10 or drawn(sampler_by_length(batch, num_blocks=num_blocks), 1) != steps
    for start in (1, len(steps) // 2, len(steps) - 1):
        sampler = sampler_by_length(batch, num_blocks=num_blocks)
        assert [blocks.tolist() for _, blocks in sampler.starting_at(start)] == steps[start:]


@pytest.mark.parametrize(("batch", "micro"), [(32, 32), (256, 32), (8, 8), (4096, 32), (100, 20)])
def test_blocks_of_like_length_are_in_one_micro_batch(batch: int, micro: int) -> None:
    real = padded = 0
    for step in drawn(sampler_by_length(batch)):
        for begin in range(0, len(step), micro):
            lengths = LENGTHS[step[begin : begin + micro]]
            real, padded = real + int(lengths.sum()), padded + int(lengths.max()) * len(lengths)
    assert padded / real < 1.12  # in random order: 1.9


def test_the_steps_of_an_order_by_length_are_like_each_other_if_they_are_large() -> None:
    means = [LENGTHS[step].mean() for step in drawn(sampler_by_length(256))]
    assert np.std(means[:-1]) < 10  # of single bunches it is 37


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_a_step_by_length_evenly(ranks: int) -> None:
    whole = drawn(sampler_by_length(64, num_blocks=4999))
    shares = [drawn(sampler_by_length(64, num_blocks=4999, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for step, *parts in zip(whole[:-1], *(share[:-1] for share in shares), strict=True):
        assert sorted(itertools.chain(*parts)) == sorted(step)
        assert len({len(part) for part in parts}) == 1


@dataclass(frozen=True)
class Sizes:
    blocks: int
    batch: int
    micro: int
    ranks: int = 1


SIZES = [
    Sizes(blocks=24, batch=8, micro=4),
    Sizes(blocks=24, batch=8, micro=3),
    Sizes(blocks=29, batch=8, micro=3),
    Sizes(blocks=25, batch=8, micro=8),
    Sizes(blocks=8, batch=8, micro=100),
    Sizes(blocks=9, batch=4, micro=1),
    Sizes(blocks=32, batch=8, micro=4, ranks=2),
    Sizes(blocks=29, batch=8, micro=3, ranks=2),
    Sizes(blocks=27, batch=8, micro=3, ranks=2),
    Sizes(blocks=9, batch=8, micro=1, ranks=2),
]
all_sizes = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, vars(sizes).values())))

MakeLoader = Callable[..., MicroBatches]


@pytest.fixture
def make_loader(make_blocks: MakeBlocks) -> MakeLoader:
    def make(sizes: Sizes, *, rank: int = 0, epoch: int = 0, num_workers: int = 0) -> MicroBatches:
        blocks = make_blocks(stream_of(14 * sizes.blocks - 5))  # the last block has padding
        assert len(blocks) == sizes.blocks
        sampler = sampler_of(sizes.blocks, sizes.batch, rank=rank, ranks=sizes.ranks)
        sampler.set_epoch(epoch)
        return MicroBatches(
            blocks, sampler=sampler, micro_batch_size=sizes.micro, num_workers=num_workers, pin_memory=False
        )

    return make


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        one.keys() == two.keys()
        and all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])) for name in one)
        for one, two in zip(first, second, strict=True)
    )


def steps_of(micro_batches: list[Batch]) -> list[list[Batch]]:
    """Group micro-batches into steps by their marks, which must alternate."""
    steps: list[list[Batch]] = []
    for micro_batch in micro_batches:
        assert micro_batch["is_first"] == (not steps or bool(steps[-1][-1]["is_last"]))
        if micro_batch["is_first"]:
            steps.append([])
        steps[-1].append(micro_batch)
    assert steps[-1][-1]["is_last"]
    return steps


@all_sizes
def test_micro_batches_are_the_samplers_steps_in_pieces(make_loader: MakeLoader, sizes: Sizes) -> None:
    for rank in range(sizes.ranks):
        loader = make_loader(sizes, rank=rank, epoch=1)
        micro_batches = list(loader)
        assert len(loader) == len(micro_batches)
        steps = steps_of(micro_batches)
        assert [len(step) for step in steps[:-1]] == [loader.per_step] * (len(steps) - 1)
        for step, draw in zip(steps, loader.sampler, strict=True):
            whole = loader.blocks[draw]
            assert all(len(part["input_ids"]) <= sizes.micro for part in step)
            for name in whole:
                assert torch.equal(torch.cat([part[name] for part in step]), whole[name])


def left_out(batch: Batch) -> Tensor:
    return batch.get("left_out", torch.zeros(len(batch["labels"]), dtype=torch.bool))


@all_sizes
def test_counts_are_those_of_the_whole_step(make_loader: MakeLoader, sizes: Sizes) -> None:
    for rank in range(sizes.ranks):
        for step in steps_of(list(make_loader(sizes, rank=rank))):
            num_tokens = sum(int((originals(part) != PAD)[~left_out(part).numpy()].sum()) for part in step)
            num_labels = sum(int((part["labels"] != IGNORE_INDEX).sum()) for part in step)
            assert {int(part["num_tokens"]) for part in step} == {num_tokens}
            assert {int(part["num_labels"]) for part in step} == {num_labels}


def places(chosen: Tensor) -> list[int]:
    """Find the true places of a flattened batch with a plain loop."""
    return [place for place, value in enumerate(chosen.flatten().tolist()) if value]


def check_places(batch: Batch) -> None:
    assert batch["labelled"].dtype == torch.int64
    assert batch["labelled"].tolist() == places(batch["labels"] != IGNORE_INDEX)
    assert ("real" in batch) == ("attention_mask" in batch or "left_out" in batch)
    if "real" in batch:
        read = batch.get("attention_mask", torch.ones_like(batch["labels"]))
        assert batch["real"].tolist() == places(read * ~left_out(batch)[:, None])


@causal_or_not
@all_sizes
def test_micro_batches_know_where_their_labelled_and_their_real_tokens_are(
    make_blocks: MakeBlocks, sizes: Sizes, causal: bool
) -> None:
    blocks = make_blocks(stream_of((16 if causal else 14) * sizes.blocks - 5), causal=causal)  # the last has padding
    padded = 0
    for first in range(0, sizes.blocks, sizes.batch):
        step = blocks[(0, np.arange(first, min(first + sizes.batch, sizes.blocks)))]
        for micro_batch in split_step(step, sizes.micro):
            check_places(micro_batch)
            padded += "real" in micro_batch
    assert padded


def test_a_micro_batch_without_labels_has_no_labelled_tokens() -> None:
    labels = torch.full((4, 3), IGNORE_INDEX)
    labels[3, 1] = 7
    parts = split_step({"input_ids": torch.zeros(4, 3, dtype=torch.int64), "labels": labels}, 2)
    assert [part["labelled"].tolist() for part in parts] == [[], [4]]
    assert [int(part["num_labels"]) for part in parts] == [1, 1]
    assert [int(part["num_tokens"]) for part in parts] == [12, 12]


def test_ranks_take_equally_many_micro_batches_of_different_blocks(make_loader: MakeLoader) -> None:
    sizes = Sizes(blocks=30, batch=8, micro=3, ranks=2)
    both = [list(make_loader(sizes, rank=rank)) for rank in range(2)]
    assert [len(part["input_ids"]) for part in both[0]] == [len(part["input_ids"]) for part in both[1]]
    rows = [tuple(row.tolist()) for batch in itertools.chain(*both) for row in torch.from_numpy(originals(batch))]
    assert len(set(rows)) == len(rows) == 30


def test_another_epoch_brings_another_order_and_other_masks(make_loader: MakeLoader) -> None:
    loader = make_loader(Sizes(blocks=24, batch=8, micro=4))
    first = list(loader)
    assert same(list(loader), first)
    loader.sampler.set_epoch(1)
    assert not same(list(loader), first)


@pytest.mark.parametrize("sizes", [SIZES[2], SIZES[7]], ids=["one rank", "two ranks"])
def test_workers_make_the_same_batches(make_loader: MakeLoader, sizes: Sizes) -> None:
    assert same(list(make_loader(sizes, num_workers=2)), list(make_loader(sizes)))


@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[2], SIZES[7], SIZES[4]])
def test_a_loader_goes_on_at_the_start_of_the_step_in_which_it_was_interrupted(
    make_loader: MakeLoader, sizes: Sizes
) -> None:
    whole = list(make_loader(sizes, epoch=3))
    for position in range(1, len(whole)):
        interrupted = make_loader(sizes, epoch=3)
        list(itertools.islice(interrupted, position))
        resumed = make_loader(sizes, epoch=3)
        resumed.load_state_dict(interrupted.state_dict())
        assert len(resumed) == len(whole)  # of the epoch, not of the rest: so Lightning counts
        start = max(index for index in range(position + 1) if whole[index]["is_first"])
        assert same(list(resumed), whole[start:])
        assert same(list(resumed), whole)


def test_a_state_of_a_resumed_epoch_counts_from_its_start(make_loader: MakeLoader) -> None:
    sizes = SIZES[2]
    first, second, third = (make_loader(sizes) for _ in range(3))
    list(itertools.islice(first, 3))
    second.load_state_dict(first.state_dict())
    list(itertools.islice(second, 3))
    third.load_state_dict(second.state_dict())
    assert same(list(third), list(make_loader(sizes))[6:])


def test_a_state_from_the_end_of_an_epoch_begins_the_next(make_loader: MakeLoader) -> None:
    sizes = SIZES[2]
    finished = make_loader(sizes)
    list(finished)
    resumed = make_loader(sizes, epoch=1)
    resumed.load_state_dict(finished.state_dict())
    assert same(list(resumed), list(make_loader(sizes, epoch=1)))


def test_a_state_from_before_an_epoch_begins_it(make_loader: MakeLoader) -> None:
    resumed = make_loader(SIZES[2])
    resumed.load_state_dict(make_loader(SIZES[2]).state_dict())
    assert same(list(resumed), list(make_loader(SIZES[2])))


LAYOUTS = [(1, 4), (1, 8), (1, 3), (2, 4), (2, 1), (4, 2)]  # ranks, and blocks of a micro-batch


@pytest.mark.parametrize("num_blocks", [24, 29, 25])
@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_a_state_goes_on_with_other_ranks_and_micro_batches(
    make_loader: MakeLoader, num_blocks: int, ranks: int, micro: int
) -> None:
    def tokens(micro_batches: list[Batch]) -> collections.Counter[tuple[int, ...]]:
        rows = (originals(batch)[~left_out(batch).numpy()].tolist() for batch in micro_batches)
        return collections.Counter(tuple(row) for batch in rows for row in batch)

    whole = make_loader(Sizes(blocks=num_blocks, batch=8, micro=8))
    expected = [tokens(step) for step in steps_of(list(whole))]
    for steps in range(len(expected) + 1):
        saved = make_loader(Sizes(blocks=num_blocks, batch=8, micro=micro, ranks=ranks))
        taken = [batch for step in steps_of(list(saved))[:steps] for batch in step]
        list(itertools.islice(iter(saved), len(taken)))
        state = {**saved.state_dict(), "position": len(taken)}
        for other_ranks, other_micro in LAYOUTS:
            found: list[list[Batch]] = [[] for _ in expected[steps:]] or [[] for _ in expected]
            for rank in range(other_ranks):
                sizes = Sizes(blocks=num_blocks, batch=8, micro=other_micro, ranks=other_ranks)
                loader = make_loader(sizes, rank=rank)
                loader.load_state_dict(state)
                for step, part in zip(found, steps_of(list(loader)), strict=True):
                    step += part
            assert [tokens(step) for step in found] == (expected[steps:] or expected)


def test_a_state_of_other_sizes_is_an_error(make_loader: MakeLoader) -> None:
    sizes = Sizes(blocks=24, batch=8, micro=4)
    state = make_loader(sizes).state_dict()
    with pytest.raises(UserError, match="an epoch of 24 blocks, but this run has 32; resume with the same data"):
        make_loader(Sizes(blocks=32, batch=8, micro=4)).load_state_dict(state)
    shorter = make_loader(Sizes(blocks=24, batch=8, micro=2))
    shorter.limit = 8  # two steps of four micro-batches
    with pytest.raises(
        UserError, match=r"has 3 steps an epoch, but this run has 2; resume with trainer\.limit_train_batches=12"
    ):
        shorter.load_state_dict(state)
    earlier = {name: value for name, value in state.items() if name in ("position", "per_step", "num_blocks")}
    make_loader(sizes).load_state_dict(earlier)
    with pytest.raises(UserError, match="has 2 micro-batches a step, but this run has 4; resume with the same batch"):
        make_loader(Sizes(blocks=24, batch=8, micro=2)).load_state_dict(earlier)


def test_a_step_is_split_without_copying_or_losing_a_row() -> None:
    step: dict[str, Tensor] = {"input_ids": torch.arange(10).view(5, 2), "labels": torch.full((5, 2), IGNORE_INDEX)}
    step["labels"][4, 1] = 7
    parts = split_step(step, 2)
    assert [part["input_ids"].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert [(part["is_first"], part["is_last"]) for part in parts] == [(True, False), (False, False), (False, True)]
    assert [(int(part["num_tokens"]), int(part["num_labels"])) for part in parts] == [(10, 1)] * 3


MakeModule = Callable[..., DistillationDataModule]


@pytest.fixture
def make_module(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> MakeModule:
    def make(
        *, num_documents: int = 100, ranks: int = 0, rank: int = 0, trainer: Any = None, **fields: Any
    ) -> DistillationDataModule:
        sizes = {"block_size": 16, "global_batch_size": 8, "micro_batch_size": 4, "val_share": 0.2}
        options = {
            "max_val_blocks": 1000,
            "attend_across_documents": True,
            "packing": "blocks",
            "num_workers": 0,
            "seed": 0,
            "lm": "mlm",
        }
        module = DistillationDataModule(
            **{"corpus": Texts(num_documents), "tokenizer": tokenizer, "masking": MASKING, "cache_dir": str(tmp_path)}
            | sizes
            | options
            | fields,
        )
        if ranks:
            strategy = SimpleNamespace(root_device=torch.device("cpu"))
            module.trainer = SimpleNamespace(
                world_size=ranks,
                global_rank=rank,
                strategy=strategy,
                accumulate_grad_batches=1,
                limit_train_batches=1.0,
                fast_dev_run=False,
                callbacks=[],
            )
            vars(module.trainer).update(trainer or {})
        return module

    return make


def ready(module: DistillationDataModule) -> DistillationDataModule:
    module.prepare_data()
    module.setup()
    return module


@pytest.mark.parametrize("packing", ["blocks", "documents"])
@pytest.mark.parametrize("lm", ["mlm", "clm"])
def test_blocks_are_drawn_from_the_training_split_by_the_seed_alone(
    make_module: MakeModule, lm: LM, packing: str
) -> None:
    def drawn_rows(count: int, **fields: Any) -> list[tuple[list[int], list[int]]]:
        batches = make_module(lm=lm, packing=packing, **fields).draw(count)
        assert all(len(batch["input_ids"]) == 4 for batch in batches[:-1])
        return [
            (ids[real].tolist(), labels[real].tolist())
            for batch in batches
            for ids, labels, real in zip(
                batch["input_ids"],
                batch["labels"],
                batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool(),
                strict=True,
            )
        ]

    rows = drawn_rows(10)
    assert len(rows) == 10
    assert rows == drawn_rows(10) == drawn_rows(10, num_workers=1, max_val_blocks=3)
    assert rows != drawn_rows(10, seed=1)
    few = drawn_rows(6)
    assert all(row in rows for row in few)  # more blocks contain the fewer
    module = ready(make_module(lm=lm, packing=packing))
    assert module.train_blocks is not None
    every, _, _ = module.train_blocks.sequences(np.arange(len(module.train_blocks)))
    whole = sorted(str([token for token in row if token != PAD]) for row in every.tolist())
    restored = [
        str([ids if label == IGNORE_INDEX or lm == "clm" else label for ids, label in zip(*row, strict=True)])
        for row in drawn_rows(10**6)
    ]
    assert sorted(restored) == whole  # all of the training split, each once, and nothing held out
    hits = sum(label != IGNORE_INDEX for _, labels in rows for label in labels)
    assert hits > 10


def test_a_corpus_that_is_too_small_is_refused_at_the_draw(make_module: MakeModule) -> None:
    with pytest.raises(UserError, match="fewer than one batch of data.global_batch_size=5000"):
        make_module(global_batch_size=5000).draw(4)


def test_both_splits_together_hold_the_corpus(make_module: MakeModule) -> None:
    module = ready(make_module(micro_batch_size=3))
    found = sum(int((originals(part) >= len(SPECIAL)).sum()) for part in module.train_dataloader())
    found += sum(int((originals(part) >= len(SPECIAL)).sum()) for part in module.val_dataloader())
    assert found == sum(len(document.split()) + 1 for document in make_documents(100))


def test_a_causal_module_shifts_and_a_masked_one_masks(
    make_module: MakeModule, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    causal = next(iter(ready(make_module(lm="clm", tokenizer=causal_tokenizer)).train_dataloader()))
    assert torch.equal(causal["labels"][:, :-1], causal["input_ids"][:, 1:])
    masked = next(iter(ready(make_module()).train_dataloader()))
    assert (masked["labels"] != IGNORE_INDEX).sum(dim=1).tolist() == [2] * 4


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "accumulation"),
    [(8, 4, 1, 2), (8, 3, 1, 3), (8, 100, 1, 1), (8, 1, 2, 4), (8, 3, 2, 2)],
)
def test_the_trainers_accumulation_follows_from_the_batch_sizes(
    make_module: MakeModule, batch: int, micro: int, ranks: int, accumulation: int
) -> None:
    module = ready(make_module(global_batch_size=batch, micro_batch_size=micro, ranks=ranks))
    assert module.trainer.accumulate_grad_batches == accumulation
    steps = steps_of(list(module.train_dataloader()))
    assert {len(step) for step in steps[:-1]} == {accumulation}


@pytest.mark.parametrize("loader_first", [False, True])
def test_the_place_in_an_epoch_travels_with_the_module(make_module: MakeModule, loader_first: bool) -> None:
    interrupted = ready(make_module())
    assert interrupted.state_dict() == {}
    whole = list(ready(make_module()).train_dataloader())
    list(itertools.islice(interrupted.train_dataloader(), 4))
    resumed = ready(make_module())
    if loader_first:
        loader = resumed.train_dataloader()
        resumed.load_state_dict(interrupted.state_dict())
    else:
        resumed.load_state_dict(interrupted.state_dict())
        loader = resumed.train_dataloader()
    assert same(list(loader), whole[4:])
    assert same(list(loader), whole)
    assert same(list(resumed.train_dataloader()), whole)  # another loader begins anew


def test_validation_batches_are_the_same_on_every_pass_and_in_every_run(make_module: MakeModule) -> None:
    module = ready(make_module())
    first = list(module.val_dataloader())
    module.train_dataloader().sampler.set_epoch(5)
    assert same(list(module.val_dataloader()), first)
    assert same(list(ready(make_module()).val_dataloader()), first)
    assert sum(len(batch["input_ids"]) for batch in first) == len(module.val_blocks)
    assert {len(batch["input_ids"]) for batch in first[:-1]} == {4}


def test_a_validation_batch_is_a_step_of_its_own(make_module: MakeModule) -> None:
    batches = list(ready(make_module()).val_dataloader())
    assert any("real" in batch for batch in batches)
    for batch in batches:
        check_places(batch)
        assert int(batch["num_labels"]) == len(batch["labelled"])
        assert int(batch["num_tokens"]) == int((originals(batch) != PAD).sum())
        assert batch["is_first"] and batch["is_last"]


def test_validation_masks_are_not_those_of_a_training_epoch(make_module: MakeModule) -> None:
    module = ready(make_module())
    (first, *_) = module.val_dataloader()
    for epoch in range(3):
        assert not torch.equal(module.val_blocks[(epoch, np.arange(4))]["labels"], first["labels"])


def rows_of(batches: Iterable[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch["labels"].tolist()]


@pytest.mark.parametrize("count", [1, 2, 5, 31, 45])
def test_no_more_validation_blocks_are_used_than_asked_for_and_they_are_spread(
    make_module: MakeModule, count: int
) -> None:
    every = rows_of(ready(make_module()).val_dataloader())
    few = rows_of(ready(make_module(max_val_blocks=count)).val_dataloader())
    places = [every.index(row) for row in few]
    assert len(set(places)) == count
    assert places == sorted(places)
    ideal = [part * (len(every) - 1) / max(1, count - 1) for part in range(count)]
    assert max(abs(place - wanted) for place, wanted in zip(places, ideal, strict=True)) <= 0.5


@pytest.mark.parametrize(("count", "ranks"), [(12, 2), (13, 4), (4, 4)])
def test_ranks_share_the_validation_blocks_evenly(make_module: MakeModule, count: int, ranks: int) -> None:
    whole = rows_of(ready(make_module(max_val_blocks=count)).val_dataloader())
    shares = [
        list(ready(make_module(max_val_blocks=count, ranks=ranks, rank=rank)).val_dataloader()) for rank in range(ranks)
    ]
    assert len({tuple(len(batch["input_ids"]) for batch in share) for share in shares}) == 1
    assert sorted(itertools.chain(*map(rows_of, shares))) == sorted(whole[: count - count % ranks])


def test_with_fewer_validation_blocks_than_ranks_none_goes_without(make_module: MakeModule) -> None:
    whole = list(ready(make_module(max_val_blocks=3)).val_dataloader())
    for rank in range(8):
        assert same(list(ready(make_module(max_val_blocks=3, ranks=8, rank=rank)).val_dataloader()), whole)


def test_a_sample_can_be_looked_at(make_module: MakeModule) -> None:
    sample = ready(make_module()).decoded_sample()
    assert re.fullmatch(r"\[CLS\] .*\[MASK\].* \[SEP\]", sample)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("block_size", 2, 3),
        ("global_batch_size", 0, 1),
        ("micro_batch_size", 0, 1),
        ("max_val_blocks", 0, 1),
        ("block_size", -1, 3),
    ],
)
def test_a_size_out_of_range_is_an_error(make_module: MakeModule, name: str, value: int, least: int) -> None:
    with pytest.raises(UserError, match=rf"data\.{name}={value}, but it must be at least {least}"):
        make_module(**{name: value})


def test_a_causal_block_has_a_token_to_predict(
    make_module: MakeModule, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=r"data\.block_size=1, but it must be at least 2"):
        make_module(lm="clm", tokenizer=causal_tokenizer, block_size=1)
    module = ready(make_module(lm="clm", tokenizer=causal_tokenizer, block_size=2))
    assert all(int(part["num_labels"]) for part in module.train_dataloader())


@pytest.mark.parametrize("block_size", [3, 64])
def test_a_corpus_smaller_than_one_batch_is_an_error(make_module: MakeModule, block_size: int) -> None:
    enough = len(ready(make_module(block_size=block_size)).train_blocks)
    ready(make_module(block_size=block_size, global_batch_size=enough))
    with pytest.raises(UserError) as caught:
        ready(make_module(block_size=block_size, global_batch_size=enough + 1))
    assert str(caught.value) == (
        f"the corpus has {enough} training blocks of {block_size} tokens, fewer than one batch of "
        f"data.global_batch_size={enough + 1}; add more text or set a smaller batch"
    )


def test_a_share_that_holds_out_nothing_is_an_error(make_module: MakeModule) -> None:
    with pytest.raises(UserError, match=r"val_share=1e-09 held out no document; add text or set a larger share"):
        ready(make_module(val_share=1e-9))


def test_a_share_out_of_range_is_an_error(make_module: MakeModule) -> None:
    with pytest.raises(UserError, match="val_share=1.0, but it must be above 0 and below 1"):
        ready(make_module(val_share=1.0))


def test_a_batch_that_does_not_divide_over_the_processes_is_an_error(make_module: MakeModule) -> None:
    with pytest.raises(
        UserError, match=r"global_batch_size=8 is not divisible by the 3 processes; set a multiple of 3"
    ):
        ready(make_module(ranks=3))


def texts_by_tokens(
    tokenizer: PreTrainedTokenizerBase, *, block_size: int, causal: bool
) -> collections.Counter[tuple[int, ...]]:
    """Encode each document of the corpus as the tokenizer does, cut at the block size: how often each sequence is."""
    found: collections.Counter[tuple[int, ...]] = collections.Counter()
    for document in make_documents(100):
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        stride = block_size - (0 if causal else 2)
        parts = [ids[begin : begin + stride] for begin in range(0, len(ids), stride)]
        if causal and len(parts[-1]) < stride:
            parts[-1] = [*parts[-1], SEP]
        elif len(parts) == 1 and not causal:
            assert [CLS, *ids, SEP] == tokenizer(document)["input_ids"]
        found.update(tuple(part) if causal else (CLS, *part, SEP) for part in parts)
    return found


@causal_or_not
@pytest.mark.parametrize("ranks", [1, 2])
def test_documents_are_what_the_tokenizer_makes_of_them(
    make_module: MakeModule,
    tokenizer: PreTrainedTokenizerBase,
    causal_tokenizer: PreTrainedTokenizerBase,
    causal: bool,
    ranks: int,
) -> None:
    used: Any = causal_tokenizer if causal else tokenizer
    found: collections.Counter[tuple[int, ...]] = collections.Counter()
    length = {}
    for rank in range(ranks):
        module = ready(
            make_module(
                lm="clm" if causal else "mlm",
                tokenizer=used,
                block_size=32,
                micro_batch_size=3,
                packing="documents",
                ranks=ranks,
                rank=rank,
            )
        )
        micro_batches = list(module.train_dataloader())
        length[rank] = len(micro_batches)
        batches = micro_batches + (list(module.val_dataloader()) if rank == 0 else [])
        for batch in batches:
            check_places(batch)
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            assert (mask.sum(dim=1).max()) == batch["input_ids"].shape[1]  # no padding that no row needs
            rows = batch["input_ids"].numpy() if causal else originals(batch)
            for row, real, left in zip(rows, mask.bool().numpy(), left_out(batch).tolist(), strict=True):
                found[tuple(row[real].tolist())] += not left
        for step in steps_of(micro_batches):
            tokens = sum(len(batch["real"]) if "real" in batch else batch["input_ids"].numel() for batch in step)
            assert {int(batch["num_tokens"]) for batch in step} == {tokens}
            assert {int(batch["num_labels"]) for batch in step} == {sum(len(batch["labelled"]) for batch in step)}
    assert len(set(length.values())) == 1
    expected = texts_by_tokens(used, block_size=32, causal=causal)
    if ranks == 1:
        assert found == expected
    else:
        assert found <= expected


def test_a_packing_that_does_not_exist_is_an_error(make_module: MakeModule) -> None:
    with pytest.raises(UserError, match=r"data\.packing=rows, but it must be blocks or documents"):
        make_module(packing="rows")


@pytest.mark.parametrize(("whole_word", "probability"), [(True, 0.01), (False, 0.15)])
def test_blocks_without_a_token_to_predict_are_an_error(
    make_module: MakeModule, tmp_path: Path, whole_word: bool, probability: float
) -> None:
    masking = dataclasses.replace(MASKING, whole_word=whole_word, mlm_probability=probability)
    if whole_word:  # of a block of 32 one token may be chosen, but each word has two or three
        texts = (f"{WORDS[n]}{WORDS[1]}{WORDS[2]}" + f" {WORDS[3]}{WORDS[n % 24]}" * 13 for n in range(50))
    else:  # seven of eight tokens are unknown, and most blocks hold nothing else
        texts = ("unknown " * 600 + " ".join(WORDS) + f" {WORDS[n]}" for n in range(50))
    (tmp_path / "a.txt").write_text("\n".join(texts), "utf-8")
    corpus = TextFiles(paths=str(tmp_path / "a.txt"), document="line")
    module = make_module(masking=masking, corpus=corpus, block_size=32, global_batch_size=2, val_share=0.5)
    with pytest.raises(UserError, match=r"of \d+ batches of 2 blocks \d+ have no token to predict: .*whole_word=false"):
        module.setup()


def test_a_corpus_of_one_document_names_the_other_way_to_cut_it(make_module: MakeModule, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(make_documents(200)), "utf-8")
    message = "held out no document; add text or set a larger share"
    for document, cure in (("blank_line", ", or data.corpus.document=line if each line is a document"), ("line", "")):
        corpus = TextFiles(paths=str(tmp_path / "a.txt"), document=document)
        module = make_module(corpus=corpus, val_share=1e-6)
        with pytest.raises(UserError, match=f"{message}{cure}$"):
            module.setup()
