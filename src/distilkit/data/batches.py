"""From the token cache to batches: blocks, masks, optimizer steps and micro-batches."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from distilkit.data.blocks import Blocks, Draw, special_tokens_around
from distilkit.data.cache import TokenCache, open_cache, prepare
from distilkit.data.corpus import Corpus
from distilkit.data.masking import VALIDATION_EPOCH, Masker, Masking, mix
from distilkit.errors import UserError
from distilkit.language_model import LM, Batch
from distilkit.losses import IGNORE_INDEX

log = logging.getLogger(__name__)


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
                    pinned = {
                        name: value.pin_memory() if isinstance(value, Tensor) else value
                        for name, value in micro_batch.items()
                    }
                    micro_batch = cast(Batch, pinned)
                yield micro_batch

    def state_dict(self) -> dict[str, int]:
        """Return how many micro-batches of this epoch were handed out."""
        return {"position": self.position, "per_step": self.per_step, "num_blocks": self.sampler.num_blocks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the optimizer step where the state was taken."""
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
    """Split one optimizer step into micro-batches that know where their labelled and real tokens are.

    Each gets ``labelled`` (rows,), the sorted indices of its labelled tokens among its micro_batch * block_size. Where
    there is padding it also gets ``real`` (tokens,). ``num_tokens`` and ``num_labels`` count over the whole step.
    All are found here, on the host, so that a device need not report how many there are.
    """
    size, block_size = step["input_ids"].shape
    found = {"labelled": np.flatnonzero(step["labels"].numpy() != IGNORE_INDEX)}
    if "attention_mask" in step:
        found["real"] = np.flatnonzero(step["attention_mask"].numpy())
    counts = {
        "num_tokens": torch.tensor(len(found["real"]) if "real" in found else size * block_size),
        "num_labels": torch.tensor(len(found["labelled"])),
    }
    begins = range(0, size, micro_batch_size)
    pieces = {name: cast(Tensor, tensor).split(micro_batch_size) for name, tensor in step.items()}
    for name, indices in found.items():
        cuts = np.searchsorted(indices, [begin * block_size for begin in begins[1:]])
        pieces[name] = tuple(
            torch.from_numpy(piece - begin * block_size)  # from the start of the micro-batch
            for begin, piece in zip(begins, np.split(indices, cuts), strict=True)
        )
    last = len(begins) - 1
    micro_batches = (
        {name: piece[index] for name, piece in pieces.items()}
        | counts
        | {"is_first": index == 0, "is_last": index == last}
        for index in range(len(begins))
    )
    return [cast(Batch, micro_batch) for micro_batch in micro_batches]


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
        lm: LM,
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
        self.corpus, self.tokenizer, self.lm, self.masking = corpus, tokenizer, lm, masking
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
        if self.lm == "mlm":
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
