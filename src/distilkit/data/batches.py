"""From blocks to optimizer steps and micro-batches, and the data module that serves them."""

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
    """Split each batch over ranks: yield the blocks of one rank for each optimizer step.

    1. Each epoch has a new permutation of the blocks, which is the same on all ranks.
    2. A step takes the next ``global_batch_size`` blocks. The last step of an epoch may be smaller.
    3. Rank r takes blocks r, r + ``world_size``, ... of the step. Up to ``world_size`` - 1 blocks of an epoch are
       dropped, so that all ranks take equally many.
    """

    def __init__(self, *, num_blocks: int, global_batch_size: int, rank: int, world_size: int, seed: int) -> None:
        """Store the sizes and the rank of this process."""
        self.num_blocks = num_blocks - num_blocks % world_size
        self.global_batch_size = global_batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the trainer calls this before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of optimizer steps in an epoch."""
        return math.ceil(self.num_blocks / self.global_batch_size)

    def __iter__(self) -> Iterator[Draw]:
        """Yield this rank's blocks of each step."""
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[Draw]:
        """Yield the steps from ``step`` on, for a resumed run."""
        key = mix(mix(np.array([self.seed % 2**64], dtype=np.uint64)) ^ np.uint64(self.epoch))
        order = np.random.default_rng(int(key[0])).permutation(self.num_blocks)  # (num_blocks,)
        for begin in range(step * self.global_batch_size, self.num_blocks, self.global_batch_size):
            step_blocks = order[begin : begin + self.global_batch_size]
            yield self.epoch, step_blocks[self.rank :: self.world_size]


class MicroBatches:
    """Split the optimizer steps of one rank into micro-batches, with the token counts of the whole step.

    Lightning treats it as a stateful loader: ``len`` counts micro-batches, ``sampler.set_epoch`` receives the epoch.
    The state is the number of micro-batches yielded so far, so that a run can resume within an epoch.
    """

    def __init__(
        self, blocks: Blocks, *, sampler: StepSampler, micro_batch_size: int, num_workers: int, pin_memory: bool
    ) -> None:
        """Store the blocks and the sampler that orders them."""
        self.blocks, self.sampler, self.micro_batch_size = blocks, sampler, micro_batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.per_step = math.ceil(sampler.global_batch_size / sampler.world_size / micro_batch_size)
        self.position = 0
        self.resume_at = 0

    def __len__(self) -> int:
        """Return the number of micro-batches in an epoch on this rank."""
        full_steps, rest = divmod(self.sampler.num_blocks, self.sampler.global_batch_size)
        return full_steps * self.per_step + math.ceil(rest / self.sampler.world_size / self.micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches: tensors of (micro-batch, block_size), and what ``split_step`` adds."""
        self.position, self.resume_at = self.resume_at, 0
        # This body runs when the first batch is requested, after Lightning has called sampler.set_epoch.
        loader = DataLoader(
            self.blocks,
            sampler=self.sampler.starting_at(self.position // self.per_step),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        for step in loader:
            for micro_batch in split_step(step, self.micro_batch_size):
                self.position += 1
                if self.pin_memory:  # the tensors that split_step has added; the others are pinned already
                    pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in micro_batch.items()}
                    micro_batch = cast(Batch, pinned)
                yield micro_batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of micro-batches of this epoch yielded so far, and the sizes it depends on."""
        return {"position": self.position, "per_step": self.per_step, "num_blocks": self.sampler.num_blocks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the optimizer step at which the state was saved."""
        now = self.state_dict()
        if any(state[name] != now[name] for name in ("per_step", "num_blocks")):
            raise UserError(
                f"the checkpoint is in an epoch of {state['num_blocks']} blocks and {state['per_step']} micro-batches "
                f"per step, but this run has {now['num_blocks']} and {now['per_step']}; resume with the same data, "
                "batch sizes and number of processes"
            )
        if state["position"] < len(self) and state["position"] % self.per_step:
            raise UserError(
                f"the checkpoint was saved after micro-batch {state['position'] % self.per_step} of {self.per_step} of "
                "an optimizer step, but without the gradient; resume from best.ckpt or last.ckpt of the run"
            )
        self.resume_at = state["position"] if state["position"] < len(self) else 0


def split_step(step: Batch, micro_batch_size: int) -> list[Batch]:
    """Split one optimizer step of one rank, tensors of (blocks, block_size), into micro-batches.

    1. Find ``labelled`` (rows,), the flat indices of tokens with a label, and with padding also ``real`` (tokens,).
       This happens on the host, so that a device need not report how many there are.
    2. Count both over the whole step, before the split: ``num_labels`` and ``num_tokens``.
    3. Split the tensors, and the indices at the same blocks. Indices count from the start of their micro-batch.
    """
    num_blocks, block_size = step["input_ids"].shape
    found = {"labelled": np.flatnonzero(step["labels"].numpy() != IGNORE_INDEX)}
    if "attention_mask" in step:
        found["real"] = np.flatnonzero(step["attention_mask"].numpy())
    counts = {
        "num_tokens": torch.tensor(len(found["real"]) if "real" in found else num_blocks * block_size),
        "num_labels": torch.tensor(len(found["labelled"])),
    }
    pieces = {name: cast(Tensor, tensor).split(micro_batch_size) for name, tensor in step.items()}
    begins = np.arange(0, num_blocks, micro_batch_size) * block_size  # (micro-batches,), flat indices
    for name, indices in found.items():
        parts = np.split(indices, np.searchsorted(indices, begins[1:]))
        pieces[name] = tuple(torch.from_numpy(part - begin) for part, begin in zip(parts, begins, strict=True))
    last = len(begins) - 1
    micro_batches = (
        {name: piece[index] for name, piece in pieces.items()}
        | counts
        | {"is_first": index == 0, "is_last": index == last}
        for index in range(len(begins))
    )
    return [cast(Batch, micro_batch) for micro_batch in micro_batches]


def _whole_step(batch: Any) -> Batch:
    """Make a step of one micro-batch, for validation."""
    return split_step(batch, len(batch["input_ids"]))[0]


class DistillationDataModule(LightningDataModule):
    """Serve a corpus as packed blocks with dynamic masks.

    An optimizer step takes ``global_batch_size`` blocks over all processes and nodes. A forward pass takes
    ``micro_batch_size`` blocks, which sets the trainer's gradient accumulation. A share ``val_share`` of the documents
    is held out, of which at most ``max_val_blocks`` blocks are used. A size out of range, or a corpus smaller than one
    batch, raises a ``UserError``.
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
        """Check and store the settings. Nothing is read before ``prepare_data``; ``description`` is for the records."""
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
        """Tokenize the corpus into the cache, unless it is cached already, and return the cache's folder."""
        return prepare(self.corpus, self.tokenizer, cache_dir=self.cache_dir, val_share=self.val_share)

    def setup(self, stage: str | None = None) -> None:
        """Open the cache, and set the trainer's gradient accumulation from the batch sizes."""
        if self.cache is None:
            self.cache = open_cache(self.prepare(), self.tokenizer)  # cached by prepare_data
            self.train_blocks, self.val_blocks = self._blocks("train"), self._blocks("val")
            self._check_sizes(len(self.train_blocks), len(self.val_blocks))
            if self.trainer is not None and self.trainer.global_rank == 0:
                log.info("a training block: %.300s", self.decoded_sample())
        if self.trainer is not None:
            world_size = self.trainer.world_size
            if self.global_batch_size % world_size:
                raise UserError(
                    f"data.global_batch_size={self.global_batch_size} is not divisible by the {world_size} processes; "
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
                f"the corpus has {num_train} training blocks of {self.block_size} tokens, fewer than one batch of "
                f"data.global_batch_size={self.global_batch_size}; add more text or set a smaller batch"
            )
        if num_val == 0:
            raise UserError(f"data.val_share={self.val_share} held out no document; add text or set a larger share")

    def decoded_sample(self) -> str:
        """Decode the first training block with its masks, for inspection."""
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
        """Return the position of the training loader in its epoch.

        The loader's own state would not be restored: Lightning creates the loader before it reads the checkpoint,
        because the schedule needs the number of steps.
        """
        return self.train_loader.state_dict() if self.train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue within the epoch of the state. Depending on the strategy, the loader is created before or after."""
        self.resume_state = state_dict
        if self.train_loader is not None and state_dict:
            self.train_loader.load_state_dict(state_dict)
            self.resume_state = {}

    def val_dataloader(self) -> DataLoader[Batch]:
        """Serve the held-out blocks of this rank in order, with the same masks at each validation."""
        assert self.val_blocks is not None
        rank, world_size, _ = self._process()
        count = min(len(self.val_blocks), self.max_val_blocks)
        # Spread over all held-out documents. With fewer blocks than ranks, each rank takes all: none may idle.
        mine = np.linspace(0, len(self.val_blocks) - 1, count).round().astype(np.int64)
        if count >= world_size:
            mine = mine[: count - count % world_size][rank::world_size]
        begins = range(0, len(mine), self.micro_batch_size)
        draws = [(VALIDATION_EPOCH, mine[begin : begin + self.micro_batch_size]) for begin in begins]
        return DataLoader(self.val_blocks, sampler=draws, batch_size=None, collate_fn=_whole_step)

    def _process(self) -> tuple[int, int, bool]:
        if self.trainer is None:
            return 0, 1, False
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.strategy.root_device.type == "cuda"
