"""From the token cache to batches: blocks, masks, optimizer steps and micro-batches."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from distilkit.data.cache import TokenCache, open_cache, prepare, separator_id
from distilkit.data.corpus import Corpus
from distilkit.data.masking import VALIDATION_EPOCH, Ids, Masker, Masking, mix
from distilkit.errors import UserError
from distilkit.language_model import Task
from distilkit.losses import IGNORE_INDEX
from distilkit.objective import Batch

log = logging.getLogger(__name__)

Draw = tuple[int, Ids]  # an epoch and the blocks to take: what a sampler hands to the data set


class Blocks(Dataset[Batch]):
    """Cut a token stream into full blocks and make batches of them, masked or shifted.

    Each block is the tokenizer's opening tokens, a stretch of the stream, and its closing tokens: no token is lost
    and none is repeated; the last block alone may be padded.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        masker: Masker | None,
        attend_across_documents: bool,
    ) -> None:
        """Take a stream (tokens,) and a masker, or None for causal models."""
        self.masker = masker
        self.block_size = block_size
        self.attend_across_documents = attend_across_documents
        self.separator = separator_id(tokenizer)
        self.opening, self.closing = special_tokens_around(tokenizer)
        self.stride = block_size - len(self.opening) - len(self.closing)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.separator
        num_full = len(tokens) // self.stride
        stream = np.asarray(tokens)  # slices of a memory map are slow to make
        self.full = stream[: num_full * self.stride].reshape(num_full, self.stride)
        self.rest = stream[num_full * self.stride :]

    def __len__(self) -> int:
        """Count the blocks, the padded last one included."""
        return len(self.full) + bool(len(self.rest))

    def __getitem__(self, draw: Draw) -> Batch:
        """Make the batch of these blocks in this epoch: tensors of (blocks, block_size)."""
        epoch, blocks = draw
        input_ids, lengths = self.input_ids(blocks)
        real = np.arange(self.block_size) < lengths[:, None]
        if self.masker is not None:
            model_ids, labels = self.masker(input_ids, epoch=epoch, samples=blocks, lengths=lengths)
        else:
            model_ids = input_ids
            labels = np.full_like(input_ids, IGNORE_INDEX)  # position t predicts token t + 1
            labels[:, :-1] = np.where(real[:, 1:], input_ids[:, 1:], IGNORE_INDEX)
        batch: Batch = {"input_ids": torch.from_numpy(model_ids), "labels": torch.from_numpy(labels)}
        if (lengths < self.block_size).any():
            batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        if not self.attend_across_documents:
            batch["document_ids"] = torch.from_numpy(self.document_ids(input_ids, real))
        return batch

    def input_ids(self, blocks: Ids) -> tuple[Ids, Ids]:
        """Gather unmasked blocks: ids (blocks, block_size) and the number of real tokens of each (blocks,)."""
        begin, end = len(self.opening), len(self.opening) + self.stride
        ids = np.empty((len(blocks), self.block_size), dtype=np.int64)
        ids[:, :begin], ids[:, end:] = self.opening, self.closing
        lengths = np.full(len(blocks), self.block_size, dtype=np.int64)
        is_full = blocks < len(self.full)
        if is_full.all():
            ids[:, begin:end] = self.full.take(blocks, axis=0)
        else:
            ids[is_full, begin:end] = self.full[blocks[is_full]]
            last = np.concatenate([self.rest, self.closing]).astype(np.int64)
            lengths[~is_full] = begin + len(last)
            ids[~is_full, begin:] = self.pad_id
            ids[~is_full, begin : begin + len(last)] = last
        return ids, lengths

    def document_ids(self, input_ids: Ids, real: NDArray[np.bool_]) -> Ids:
        """Number the documents within each block from 0; a separator belongs to the one it closes; padding is -1."""
        after_separator = np.zeros_like(input_ids)
        after_separator[:, 1:] = input_ids[:, :-1] == self.separator
        after_separator[:, 1 : len(self.opening) + 1] = 0  # an opening token may be the separator's twin
        ends = real.sum(axis=1, keepdims=True) - len(self.closing)
        after_separator[np.arange(self.block_size) >= ends] = 0  # the closing tokens go with the last document
        return np.where(real, np.cumsum(after_separator, axis=1), -1)


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after one sequence: [CLS] and [SEP], <s> and </s>, or nothing."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]


class StepSampler(Sampler[Draw]):
    """Draw, for each optimizer step, the blocks of one rank: a fresh permutation each epoch, the same on all ranks.

    A step takes ``global_batch_size`` blocks over all ranks. The last step of an epoch is smaller, not dropped; of
    its blocks at most ``world_size`` - 1 are left out, so that all ranks take the same number.
    """

    def __init__(self, *, num_blocks: int, global_batch_size: int, rank: int, world_size: int, seed: int) -> None:
        """Take this process's rank among ``world_size``."""
        self.num_blocks = num_blocks - num_blocks % world_size
        self.global_batch_size = global_batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Follow the trainer, which calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the optimizer steps of an epoch."""
        return math.ceil(self.num_blocks / self.global_batch_size)

    def __iter__(self) -> Iterator[Draw]:
        """Yield this rank's share of each step."""
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[Draw]:
        """Yield the steps from ``step`` on, as after a resume."""
        key = mix(mix(np.array([self.seed % 2**64], dtype=np.uint64)) ^ np.uint64(self.epoch))
        order = np.random.default_rng(int(key[0])).permutation(self.num_blocks)
        for begin in range(step * self.global_batch_size, self.num_blocks, self.global_batch_size):
            chunk = order[begin : begin + self.global_batch_size]
            yield self.epoch, chunk[self.rank :: self.world_size]


class MicroBatches:
    """Split each optimizer step into micro-batches that know the token counts of the whole step.

    Lightning drives it as a stateful loader: ``len`` counts micro-batches, ``sampler`` is told the epoch, and the
    state says how many were handed out, so that a run resumes within an epoch.
    """

    def __init__(
        self, blocks: Blocks, *, sampler: StepSampler, micro_batch_size: int, num_workers: int, pin_memory: bool
    ) -> None:
        """Take the blocks and the order in which to draw them."""
        self.blocks, self.sampler, self.micro_batch_size = blocks, sampler, micro_batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.per_step = math.ceil(sampler.global_batch_size / sampler.world_size / micro_batch_size)
        self.position = 0
        self.resume_at = 0

    def __len__(self) -> int:
        """Count the micro-batches of an epoch on this rank."""
        full_steps, rest = divmod(self.sampler.num_blocks, self.sampler.global_batch_size)
        return full_steps * self.per_step + math.ceil(rest / self.sampler.world_size / self.micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield ``input_ids``, ``labels`` (micro-batch, block_size) and what ``split_step`` adds, on this rank."""
        self.position, self.resume_at = self.resume_at, 0
        # The sampler is read when the first batch is asked for: by then Lightning has told it the epoch.
        loader = DataLoader(
            self.blocks,
            sampler=_Steps(self.sampler, self.position // self.per_step),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        for step in loader:
            for micro_batch in split_step(step, self.micro_batch_size):
                self.position += 1
                if self.pin_memory:  # what the split has added; the rest is pinned already
                    micro_batch = {
                        name: value.pin_memory() if isinstance(value, torch.Tensor) else value
                        for name, value in micro_batch.items()
                    }
                yield micro_batch

    def state_dict(self) -> dict[str, int]:
        """Return how many micro-batches of this epoch were handed out."""
        return {"position": self.position, "per_step": self.per_step, "num_blocks": self.sampler.num_blocks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the optimizer step where the state was taken.

        Raises:
            UserError: the batch sizes, the number of processes or the corpus are not those of the checkpoint, or it
                was taken between the micro-batches of one optimizer step.
        """
        now = self.state_dict()
        if any(state[name] != now[name] for name in ("per_step", "num_blocks")):
            raise UserError(
                f"the checkpoint is in an epoch of {state['num_blocks']} blocks and {state['per_step']} micro-batches a "
                f"step, this run has {now['num_blocks']} and {now['per_step']}; resume with the same data, batch sizes "
                "and number of processes"
            )
        if state["position"] < len(self) and state["position"] % self.per_step:
            raise UserError(
                f"the checkpoint was taken after micro-batch {state['position'] % self.per_step} of {self.per_step} of one "
                "optimizer step, and holds no part of its gradient; give best.ckpt or last.ckpt of the run"
            )
        self.resume_at = state["position"] if state["position"] < len(self) else 0


class _Steps(Sampler[Draw]):
    """The tail of an epoch's steps."""

    def __init__(self, sampler: StepSampler, first: int) -> None:
        self.sampler, self.first = sampler, first

    def __iter__(self) -> Iterator[Draw]:
        return self.sampler.starting_at(self.first)


def split_step(step: Batch, micro_batch_size: int) -> list[Batch]:
    """Split one optimizer step into micro-batches that know where their labelled and their real tokens are.

    Each adds ``labelled`` (rows,), the sorted places of its labelled tokens among its micro_batch * block_size, where it
    has an ``attention_mask`` also ``real`` (tokens,), those of its real ones, and ``num_tokens`` and ``num_labels``, the
    counts of the whole step. They are found here, on the host, so that a device need not report how many there are.
    """
    size, block_size = step["input_ids"].shape
    places = {"labelled": np.flatnonzero(step["labels"].numpy() != IGNORE_INDEX)}
    if "attention_mask" in step:
        places["real"] = np.flatnonzero(step["attention_mask"].numpy())
    counts = {
        "num_tokens": torch.tensor(len(places["real"]) if "real" in places else size * block_size),
        "num_labels": torch.tensor(len(places["labelled"])),
    }
    begins = range(0, size, micro_batch_size)
    pieces = {name: tensor.split(micro_batch_size) for name, tensor in step.items()}
    for name, found in places.items():
        cuts = np.searchsorted(found, [begin * block_size for begin in begins[1:]])
        pieces[name] = tuple(
            torch.from_numpy(piece - begin * block_size)
            for begin, piece in zip(begins, np.split(found, cuts), strict=True)
        )
    return [
        {name: piece[index] for name, piece in pieces.items()}
        | counts
        | {"is_first": index == 0, "is_last": index == len(begins) - 1}
        for index in range(len(begins))
    ]


def whole_step(batch: Any) -> Batch:
    """Take a batch as a step of one micro-batch, as validation does."""
    return split_step(batch, len(batch["input_ids"]))[0]


class DistillationDataModule(LightningDataModule):
    """Serve a corpus as packed blocks with dynamic masks.

    An optimizer step takes ``global_batch_size`` blocks over all processes and nodes; the trainer's accumulation
    follows from it and from ``micro_batch_size``, the blocks that go through the models at once. The share
    ``val_share`` of the documents is held out, at most ``max_val_blocks`` blocks of it are used.

    Raises:
        UserError: a size is out of range, or the corpus is smaller than one batch.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        masking: Masking,
        cache_dir: str,
        block_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        val_share: float,
        max_val_blocks: int,
        attend_across_documents: bool,
        num_workers: int,
        seed: int,
        description: str = "",
    ) -> None:
        """Take the corpus and the sizes (``description`` is for people); nothing is read before ``prepare_data``."""
        super().__init__()
        opening, closing = special_tokens_around(tokenizer)
        smallest = len(opening) + len(closing) + 1
        for name, value, least in (
            ("block_size", block_size, max(smallest, 2)),
            ("global_batch_size", global_batch_size, 1),
            ("micro_batch_size", micro_batch_size, 1),
            ("max_val_blocks", max_val_blocks, 1),
        ):
            if value < least:
                raise UserError(f"data.{name}={value}, but it must be at least {least}")
        self.corpus, self.tokenizer, self.task, self.masking = corpus, tokenizer, task, masking
        self.cache_dir, self.block_size = Path(cache_dir).expanduser(), block_size
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.val_share, self.max_val_blocks = val_share, max_val_blocks
        self.attend_across_documents = attend_across_documents
        self.num_workers, self.seed, self.description = num_workers, seed, description
        self.cache: TokenCache | None = None
        self.train_blocks: Blocks | None = None
        self.val_blocks: Blocks | None = None
        self.train_loader: MicroBatches | None = None
        self.resume_state: dict[str, int] = {}

    def prepare_data(self) -> None:
        """Tokenize the corpus into the cache, on one process of each node."""
        self.prepare()

    def prepare(self) -> Path:
        """Tokenize the corpus into the cache unless it is there, and return its folder."""
        return prepare(self.corpus, self.tokenizer, cache_dir=self.cache_dir, val_share=self.val_share)

    def setup(self, stage: str | None = None) -> None:
        """Open the cache, and set the trainer's accumulation from the global batch size."""
        if self.cache is None:
            self.cache = open_cache(self.prepare(), self.tokenizer)  # the other ranks find it ready
            self.train_blocks, self.val_blocks = self._blocks("train"), self._blocks("val")
            self._check_sizes(len(self.train_blocks), len(self.val_blocks))
            if self.trainer is not None and self.trainer.global_rank == 0:
                log.info("a training block: %.300s", self.decoded_sample())
        if self.trainer is not None:
            world_size = self.trainer.world_size
            if self.global_batch_size % world_size:
                raise UserError(
                    f"data.global_batch_size={self.global_batch_size} does not divide over {world_size} processes; "
                    f"set a multiple of {world_size}"
                )
            per_rank = self.global_batch_size // world_size
            self.trainer.accumulate_grad_batches = math.ceil(per_rank / self.micro_batch_size)

    def _blocks(self, split: str) -> Blocks:
        assert self.cache is not None
        masker = None
        if self.task == "mlm":
            masker = Masker(
                self.masking, tokenizer=self.tokenizer, token_counts=self.cache.token_counts, seed=self.seed
            )
        return Blocks(
            self.cache.tokens[split],
            tokenizer=self.tokenizer,
            block_size=self.block_size,
            masker=masker,
            attend_across_documents=self.attend_across_documents,
        )

    def _check_sizes(self, num_train: int, num_val: int) -> None:
        if num_train < self.global_batch_size:
            raise UserError(
                f"the corpus has {num_train} training blocks of {self.block_size} tokens, less than one batch of "
                f"data.global_batch_size={self.global_batch_size}; give more text or set a smaller batch"
            )
        if num_val == 0:
            raise UserError(
                f"data.val_share={self.val_share} held out no document; give more text or set a larger share"
            )

    def decoded_sample(self) -> str:
        """Decode the first masked training block, to be looked at."""
        assert self.train_blocks is not None
        ids = self.train_blocks[(0, np.array([0]))]["input_ids"][0]
        return str(self.tokenizer.decode(ids))

    def train_dataloader(self) -> MicroBatches:
        """Serve micro-batches of the training split."""
        assert self.train_blocks is not None
        rank, world_size, cuda = self._process()
        sampler = StepSampler(
            num_blocks=len(self.train_blocks),
            global_batch_size=self.global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
        )
        self.train_loader = MicroBatches(
            self.train_blocks,
            sampler=sampler,
            micro_batch_size=self.micro_batch_size,
            num_workers=self.num_workers,
            pin_memory=cuda,
        )
        self.load_state_dict(self.resume_state)
        return self.train_loader

    def state_dict(self) -> dict[str, int]:
        """Return where in its epoch the training loader is.

        Lightning restores a loader's own state only when it makes the loader, which is before it reads a checkpoint's:
        the schedule asks for the number of steps. So the state travels with the data module.
        """
        return self.train_loader.state_dict() if self.train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on within the epoch where the state was taken; the loader is made before or after, as the strategy has it."""
        self.resume_state = state_dict
        if self.train_loader is not None and state_dict:
            self.train_loader.load_state_dict(state_dict)
            self.resume_state = {}

    def val_dataloader(self) -> DataLoader[Batch]:
        """Serve the held-out blocks in order, with the same masks every time."""
        assert self.val_blocks is not None
        rank, world_size, _ = self._process()
        count = min(len(self.val_blocks), self.max_val_blocks)
        # Spread over all held-out documents; too few to share, every rank takes all, for none may stay away.
        mine = np.linspace(0, len(self.val_blocks) - 1, count).round().astype(np.int64)
        if count >= world_size:
            mine = mine[: count - count % world_size][rank::world_size]
        batches = [mine[begin : begin + self.micro_batch_size] for begin in range(0, len(mine), self.micro_batch_size)]
        draws = [(VALIDATION_EPOCH, blocks) for blocks in batches]
        return DataLoader(self.val_blocks, sampler=draws, batch_size=None, collate_fn=whole_step)

    def _process(self) -> tuple[int, int, bool]:
        if self.trainer is None:
            return 0, 1, False
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.strategy.root_device.type == "cuda"
