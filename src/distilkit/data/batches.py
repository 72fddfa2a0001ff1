"""From blocks to optimizer steps and micro-batches, and the data module that serves them."""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from distilkit.data.blocks import Blocks, Draw, Packing, special_tokens_around
from distilkit.data.cache import TokenCache, cache_key, open_cache, prepare
from distilkit.data.corpus import Corpus
from distilkit.data.masking import VALIDATION_EPOCH, Ids, Masker, Masking, mix
from distilkit.data.shards import check_shard, prepare_shard
from distilkit.data.teacher_states import TeacherStates
from distilkit.errors import UserError
from distilkit.language_model import LM, Batch, real_mask
from distilkit.losses import IGNORE_INDEX

log = logging.getLogger(__name__)

_NUM_CHECKED = 512  # blocks of a split in which a token to predict is looked for
_BUNCH, _WINDOW = 32, 1024  # blocks of like length, and blocks among which they are found


class StepSampler(Sampler[Draw]):
    """Split each batch over ranks: yield the blocks of one rank for each optimizer step.

    1. Each epoch has a new permutation of the blocks, which is the same on all ranks.
    2. A step takes the next ``global_batch_size`` blocks. The last step of an epoch may be smaller.
    3. Rank r takes blocks r, r + ``world_size``, ... of the step. Where the last step leaves ranks with one block less,
       they read its last block without counting it, so that all ranks take equally many and none is lost.
    4. With the blocks' ``lengths`` (blocks,), each step is sorted by them, so that a micro-batch has little padding. A
       step of few blocks has them of like length: a window of steps is sorted, and its bunches are shuffled.
    5. With ``progress``, each step has the share of the training that is done before this step of this epoch.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        lengths: NDArray[np.int32] | None = None,
        progress: Callable[[int, int], float] | None = None,
    ) -> None:
        """Store the sizes and the rank of this process."""
        self.progress = progress
        self.num_blocks, self.lengths = num_blocks, lengths
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
        order = np.random.default_rng(int(key[0])).permutation(self.num_blocks)  # (blocks,)
        size = self.global_batch_size
        window, first = size * math.ceil(_WINDOW / size), -1
        for begin in range(step * size, self.num_blocks, size):
            end = min(begin + size, self.num_blocks)
            step_blocks = order[begin:end]
            if self.lengths is not None:
                if first != begin - begin % window:
                    first = begin - begin % window
                    bunched = self._bunched(order[first : first + window], seed=int(key[0]) ^ first)  # (window,)
                step_blocks = bunched[begin - first : end - first]
                step_blocks = step_blocks[np.argsort(self.lengths[step_blocks], kind="stable")]
            filled = np.append(step_blocks, np.full(-len(step_blocks) % self.world_size, ~step_blocks[-1]))
            mine = filled[self.rank :: self.world_size]
            if self.progress is None:
                yield self.epoch, mine
            else:
                yield self.epoch, mine, self.progress(self.epoch, begin // size)

    def _bunched(self, blocks: Ids, *, seed: int) -> Ids:
        """Sort blocks (window,) by length, and shuffle bunches of them; a shorter bunch stays last."""
        assert self.lengths is not None
        bunch = min(_BUNCH, self.global_batch_size)
        number = np.random.default_rng(seed).permutation(len(blocks) // bunch)
        places = np.append(np.repeat(number, bunch), np.full(len(blocks) % bunch, len(number)))
        by_length = blocks[np.argsort(self.lengths[blocks], kind="stable")]
        return by_length[np.argsort(places, kind="stable")]


class MicroBatches:
    """Split the optimizer steps of one rank into micro-batches, with the token counts of the whole step.

    Lightning treats it as a stateful loader: ``len`` counts micro-batches, ``sampler.set_epoch`` receives the epoch.
    The state is the number of micro-batches yielded so far, so that a run can resume within an epoch.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        sampler: StepSampler,
        micro_batch_size: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        """Store the blocks and the sampler that orders them."""
        self.blocks, self.sampler, self.micro_batch_size = blocks, sampler, micro_batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.per_step = math.ceil(sampler.global_batch_size / sampler.world_size / micro_batch_size)
        self.position = self.resume_at = 0
        self.limit = math.inf  # micro-batches after which the trainer ends an epoch

    def __len__(self) -> int:
        """Return the number of micro-batches in an epoch on this rank."""
        full_steps, rest = divmod(self.sampler.num_blocks, self.sampler.global_batch_size)
        return full_steps * self.per_step + math.ceil(rest / self.sampler.world_size / self.micro_batch_size)

    @property
    def num_batches(self) -> int:
        """The number of micro-batches that the trainer takes of an epoch on this rank."""
        return int(min(len(self), self.limit))

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps of an epoch, whatever the ranks and the micro-batches."""
        return math.ceil(self.num_batches / self.per_step)

    def steps_of(self, state: dict[str, Any], position: int) -> int:
        """Return how many whole steps of its epoch a run of another ``state`` had done after so many micro-batches."""
        ended = position >= state.get("num_batches", self.num_batches)
        return self.num_steps if ended else int(position // state["per_step"])

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
            for micro_batch in split_step(step, self.micro_batch_size, trim=self.blocks.packing == "documents"):
                self.position += 1
                if self.pin_memory:  # the tensors that split_step has added; the others are pinned already
                    pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in micro_batch.items()}
                    micro_batch = cast(Batch, pinned)
                yield micro_batch

    def state_dict(self) -> dict[str, Any]:
        """Return the number of micro-batches of this epoch yielded so far, and what its meaning depends on."""
        sizes = {name: getattr(self, name) for name in ("per_step", "num_batches", "num_steps")}
        sizes["num_blocks"] = self.sampler.num_blocks
        return {"position": self.position, **sizes, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        """Return what the order and the content of blocks depend on, by config key."""
        return {
            "seed": self.sampler.seed,
            "data.block_size": self.blocks.block_size,
            "data.packing": self.blocks.packing,
            "data.attend_across_documents": not self.blocks.apart,
            "data.global_batch_size": self.sampler.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the optimizer step began at which the state was saved.

        The ranks and the micro-batch size may be others: a step has the same blocks. States of earlier versions hold no
        settings. Other settings or sizes raise a ``UserError``.
        """
        for name, value in self._settings().items():
            was = state.get(name, value)
            if was != value:
                raise UserError(
                    f"the checkpoint is in an epoch of {name}={was}, but this run has {value}, which orders the text "
                    f"in another way; resume with {name}={was}, or start a new run"
                )
        # Earlier versions left out blocks that were not divisible by the ranks.
        if not 0 <= self.sampler.num_blocks - state["num_blocks"] < self.sampler.world_size:
            found = f"the checkpoint is in an epoch of {state['num_blocks']} blocks, but this run has "
            raise UserError(f"{found}{self.sampler.num_blocks}; resume with the same data")
        was = state.get("num_steps", self.num_steps if state["per_step"] == self.per_step else None)
        if was != self.num_steps:
            sizes = f"{state['per_step']} micro-batches a step" if was is None else f"{was} steps an epoch"
            cure = "the same batch sizes and number of processes"
            if was is not None:
                cure = f"trainer.limit_train_batches={was * self.per_step}"
            now = self.per_step if was is None else self.num_steps
            raise UserError(f"the checkpoint has {sizes}, but this run has {now}; resume with {cure}")
        step = state.get("step", self.steps_of(state, state["position"]))
        self.resume_at = step * self.per_step if step < self.num_steps else 0


class WholeSteps(Callback):
    """Let a run stop at the end of an optimizer step only, and resume at the start of one.

    Weights and optimizer within a step are those of its start. So a checkpoint from within a step, by the clock or a
    signal, goes back to the start, and repeats the micro-batches before it.
    """

    def __init__(self) -> None:
        """Start without a request."""
        self.stop = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the request of an earlier run."""
        self.stop = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold back a request to stop until the step ends."""
        self.stop |= trainer.should_stop
        trainer.should_stop = self.stop and batch["is_last"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the trainer's counts to the place where the data goes on, before the trainer reads them.

        1. Within a step, count the micro-batches before it only.
        2. Count in micro-batches of this run, whose size and ranks may be others.
        3. A run that ended within an epoch has counted it as done; it is not.
        4. At the end of an epoch no micro-batch of the next is done.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by one of its connectors
        state = checkpoint.get(type(data).__qualname__, {})
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is None or "position" not in state:
            return
        batches, epochs, loader = loops["epoch_loop.batch_progress"], loops["epoch_progress"], data.loader()
        now, finished = batches["current"], epochs["current"]["processed"] == epochs["current"]["ready"]
        processed, step = now["processed"], loader.steps_of(state, now["processed"])
        within = step < loader.num_steps
        whole = now["ready"] == processed and not (within and processed % state["per_step"])
        shift = (step * loader.per_step if within else loader.num_batches) - processed
        if shift or not whole:
            for count in (batches["total"], now):
                count.update({name: (count[name] if whole else count["processed"]) + shift for name in count})
            data.load_state_dict({**state, "step": step})
        if finished and within:
            for count in (epochs["total"], epochs["current"]):
                count["processed"] = count["completed"] = count["ready"] - 1
        elif finished:
            now.update(dict.fromkeys(now, 0))
            batches["is_last_batch"] = False


def split_step(step: Batch, micro_batch_size: int, *, trim: bool = False) -> list[Batch]:
    """Split one optimizer step of one rank, tensors of (blocks, length), into micro-batches.

    1. Split the tensors at the same blocks. With ``trim``, cut the padding that none of its blocks needs.
    2. Find ``labelled`` (rows,), the flat indices of tokens with a label, and with padding also ``real`` (tokens,).
       This happens on the host, so that a device need not report how many there are.
    3. Count both over the whole step: ``num_labels`` and ``num_tokens``.
    """
    tensors = dict(cast(dict[str, Tensor], step))
    states = tensors.pop("teacher_states", None)  # (rows of all blocks, width)
    micro_batches: list[dict[str, Any]] = []
    num_tokens = num_labels = 0
    for begin in range(0, len(step["input_ids"]), micro_batch_size):
        part: dict[str, Any] = {name: tensor[begin : begin + micro_batch_size] for name, tensor in tensors.items()}
        if trim and "attention_mask" in part:
            longest = int(part["attention_mask"].sum(dim=1).max())
            part = {name: each[:, :longest].contiguous() if each.ndim > 1 else each for name, each in part.items()}
            if part["attention_mask"].all():
                del part["attention_mask"]
        part["labelled"] = torch.from_numpy(np.flatnonzero(part["labels"].numpy() != IGNORE_INDEX))
        if (mask := real_mask(cast(Batch, part))) is not None:
            part["real"] = torch.from_numpy(np.flatnonzero(mask.numpy()))
        num_tokens += len(part["real"]) if "real" in part else part["input_ids"].numel()
        if states is not None:
            part["teacher_states"] = states[num_labels : num_labels + len(part["labelled"])]
        num_labels += len(part["labelled"])
        micro_batches.append(part)
    counts = {"num_tokens": torch.tensor(num_tokens), "num_labels": torch.tensor(num_labels)}
    for index, part in enumerate(micro_batches):
        part |= counts | {"is_first": index == 0, "is_last": index == len(micro_batches) - 1}
    return cast(list[Batch], micro_batches)


def _whole_step(batch: Any) -> Batch:
    """Make a step of one micro-batch, for validation."""
    return split_step(batch, len(batch["input_ids"]))[0]


class DistillationDataModule(LightningDataModule):
    """Serve a corpus as packed blocks or as documents, with dynamic masks.

    An optimizer step takes ``global_batch_size`` blocks over all processes and nodes. A forward pass takes
    ``micro_batch_size`` blocks, which sets the trainer's gradient accumulation. A share ``val_share`` of the documents
    is held out, of which at most ``max_val_blocks`` blocks are used. With ``packing=documents`` these sizes count
    documents, or parts of at most ``block_size`` tokens. A size out of range, or a corpus smaller than one batch, raises
    a ``UserError``.
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
        packing: Packing,
        num_workers: int,
        seed: int,
        shard: int | None = None,
        num_shards: int | None = None,
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
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UserError(f"data.{name}={value}, but it must be at least {least}")
        if packing not in get_args(Packing):
            raise UserError(f"data.packing={packing}, but it must be blocks or documents")
        self.corpus, self.tokenizer, self.lm, self.masking = corpus, tokenizer, lm, masking
        self.cache_dir, self.block_size = Path(cache_dir).expanduser(), block_size
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.val_share, self.max_val_blocks = val_share, max_val_blocks
        self.attend_across_documents, self.packing = attend_across_documents, packing
        self.num_workers, self.seed, self.description = num_workers, seed, description
        check_shard(shard, num_shards)
        self.shard, self.num_shards = shard, num_shards
        self.teacher_states: TeacherStates | None = None  # of the labelled tokens, to read in place of the teacher
        self.cache: TokenCache | None = None
        self.train_blocks: Blocks | None = None
        self.val_blocks: Blocks | None = None
        self.train_loader: MicroBatches | None = None
        self.resume_state: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Tokenize the corpus into the cache and verify it, on one process of each node."""
        open_cache(self.prepare(), self.tokenizer)

    def prepare(self) -> Path:
        """Tokenize the corpus into the cache, or join its shards, unless it is there; return the cache's folder."""
        if self.num_shards is not None and (missing := self.prepare_shard(None)):
            found = f"{len(missing)} of {self.num_shards} shards are missing, the first is {missing[0]}"
            cure = f"prepare data.shard={missing[0].name.split('-')[1]}, or leave out data.num_shards"
            raise UserError(f"{found}; {cure}")
        return prepare(self.corpus, self.tokenizer, cache_dir=self.cache_dir, val_share=self.val_share)

    def token_key(self) -> str:
        """Return the key of the token cache, which tells text, held-out share and tokenizer."""
        return cache_key(self.corpus, self.tokenizer, val_share=self.val_share)

    def prepare_shard(self, shard: int | None) -> list[Path]:
        """Tokenize a shard of the corpus; return the folders of those that are missing until all can be joined."""
        assert self.num_shards is not None
        place: dict[str, Any] = {"cache_dir": self.cache_dir, "val_share": self.val_share}
        return prepare_shard(self.corpus, self.tokenizer, shard=shard, num_shards=self.num_shards, **place)

    def open(self, *, verify: bool = False) -> TokenCache:
        """Prepare and open the cache, and make blocks of it. Blocks without a token to predict are an error."""
        self.cache = open_cache(self.prepare(), self.tokenizer, verify=verify)
        self.train_blocks, self.val_blocks = self._blocks("train"), self._blocks("val")
        self._check_labels(self.train_blocks, epoch=0, at_once=self.global_batch_size)
        self._check_labels(self.val_blocks, epoch=VALIDATION_EPOCH, at_once=_NUM_CHECKED)
        return self.cache

    def setup(self, stage: str | None = None) -> None:
        """Open the cache, and set the trainer's gradient accumulation from the batch sizes."""
        if self.cache is None:
            self.open()  # cached by prepare_data
            assert self.train_blocks is not None and self.val_blocks is not None
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
            self._set_accumulation(self.trainer, self.global_batch_size // world_size)

    def _set_accumulation(self, trainer: Trainer, per_rank: int) -> None:
        """Set the trainer's accumulation, after checking that it has no other, and that an epoch has whole steps."""
        per_step = math.ceil(per_rank / self.micro_batch_size)
        if (given := trainer.accumulate_grad_batches) not in (1, per_step):
            raise UserError(
                f"trainer.accumulate_grad_batches={given}, but it follows from the batch sizes, and is {per_step} here; "
                f"leave it out, and set data.micro_batch_size={math.ceil(per_rank / given)} to accumulate {given}"
            )
        trainer.accumulate_grad_batches = per_step
        loader = self.loader()
        if loader.limit < len(loader) and loader.limit % per_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            whole = max(1, int(loader.limit) // per_step) * per_step
            raise UserError(
                f"trainer.limit_train_batches={trainer.limit_train_batches} ends an epoch after {loader.limit} "
                f"micro-batches, within an optimizer step of {per_step}; set trainer.limit_train_batches={whole}"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, WholeSteps) for callback in callbacks):
            callbacks.append(WholeSteps())

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
            packing=self.packing,
            teacher_states=self.teacher_states if split == "train" else None,
        )

    def _check_labels(self, blocks: Blocks, *, epoch: int, at_once: int) -> None:
        """Refuse blocks of which mostly no token is predicted, ``at_once`` taken together."""
        count = min(len(blocks), _NUM_CHECKED)
        steps = (blocks[(epoch, np.arange(count))]["labels"] != IGNORE_INDEX).any(dim=1).split(at_once) if count else ()
        without = sum(not step.any() for step in steps)
        if without > len(steps) / 2:
            raise UserError(
                f"of {len(steps)} batches of {min(at_once, count)} blocks {without} have no token to predict: they hold "
                "only special or unknown tokens, or only words of more tokens than data.masking.mlm_probability="
                f"{self.masking.mlm_probability} allows; set whole_word=false or a larger share, or check data.corpus"
            )

    def _check_sizes(self, num_train: int, num_val: int) -> None:
        if num_train < self.global_batch_size:
            raise UserError(
                f"the corpus has {num_train} training {self.packing} of {self.block_size} tokens, fewer than one batch of "
                f"data.global_batch_size={self.global_batch_size}; add more text or set a smaller batch"
            )
        if num_val == 0:
            cure = "add text or set a larger share"
            if getattr(self.corpus, "document", "line") != "line":  # of text files
                cure += ", or data.corpus.document=line if each line is a document"
            raise UserError(f"data.val_share={self.val_share} held out no document; {cure}")

    def draw(self, num_blocks: int) -> list[Batch]:
        """Draw training blocks, or all if there are fewer, as micro-batches: a function of the seed and of ``num_blocks``.

        Their masks are those of an epoch that training never reaches.
        """
        if self.cache is None:
            self.setup()
        assert self.train_blocks is not None
        drawn = np.random.default_rng(self.seed % 2**64).permutation(len(self.train_blocks))[:num_blocks]
        return [_whole_step(self.train_blocks[draw]) for draw in self._in_micro_batches(self.train_blocks, drawn)]

    def replay(
        self, *, epoch: int, step: int, rank: int = 0, world_size: int = 1, progress: float = 0.0
    ) -> list[Batch]:
        """Make the micro-batches again that one rank of ``world_size`` had in a step of an epoch, both counted from 0.

        ``progress`` is the share of the training before it, which a masking rate that changes depends on.
        """
        if self.train_blocks is None:
            self.open()
        sampler = self._sampler(rank, world_size, progress=lambda *_: progress)
        sampler.set_epoch(epoch)
        if not 0 <= step < len(sampler):
            raise UserError(f"step={step}, but an epoch has {len(sampler)} steps; count from 0")
        assert self.train_blocks is not None
        draw = next(sampler.starting_at(step))
        return split_step(self.train_blocks[draw], self.micro_batch_size, trim=self.packing == "documents")

    def _in_micro_batches(self, blocks: Blocks, chosen: Ids) -> list[Draw]:
        """Split blocks (chosen,) that are only scored into micro-batches, with the same masks each time."""
        if self.packing == "documents":  # those of like length in one batch
            chosen = chosen[np.argsort(blocks.sizes[chosen], kind="stable")]
        begins = range(0, len(chosen), self.micro_batch_size)
        return [(VALIDATION_EPOCH, chosen[begin : begin + self.micro_batch_size]) for begin in begins]

    def decoded_sample(self) -> str:
        """Decode the first training block with its masks, for inspection."""
        assert self.train_blocks is not None
        ids = self.train_blocks[(0, np.array([0]))]["input_ids"][0]
        return str(self.tokenizer.decode(ids))

    def train_dataloader(self) -> MicroBatches:
        """Serve micro-batches of the training split."""
        self.train_loader = self.loader()
        self.load_state_dict(self.resume_state)
        return self.train_loader

    def loader(self) -> MicroBatches:
        """Return a new loader of the training split, at its beginning."""
        assert self.train_blocks is not None
        rank, world_size, cuda = self._process()
        loader = MicroBatches(
            self.train_blocks,
            sampler=self._sampler(rank, world_size, progress=self._progress if self.trainer else None),
            micro_batch_size=self.micro_batch_size,
            num_workers=self.num_workers,
            pin_memory=cuda,
        )
        if self.trainer is not None:
            given = self.trainer.limit_train_batches
            loader.limit = given if isinstance(given, int) else int(given * len(loader))
        return loader

    def _sampler(self, rank: int, world_size: int, *, progress: Callable[[int, int], float] | None) -> StepSampler:
        assert self.train_blocks is not None
        return StepSampler(
            num_blocks=len(self.train_blocks),
            global_batch_size=self.global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            lengths=self.train_blocks.sizes if self.packing == "documents" else None,
            progress=progress if isinstance(self.masking.mlm_probability, list) else None,
        )

    def _progress(self, epoch: int, step: int) -> float:
        """Return the share of the training that is done before a step, which workers may prepare early."""
        assert self.train_loader is not None and self.trainer is not None
        module: Any = self.trainer.lightning_module
        return float(module.progress_at(epoch * self.train_loader.num_steps + step))

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the training loader in its epoch, and which tokens it reads.

        The loader's own state would not be restored: Lightning creates the loader before it reads the checkpoint,
        because the schedule needs the number of steps.
        """
        if self.train_loader is None or self.cache is None:
            return {}
        return {**self.train_loader.state_dict(), "cache": self.cache.meta["key"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue within the epoch of the state. Depending on the strategy, the loader is created before or after."""
        self.resume_state = state_dict
        if self.train_loader is not None and self.cache is not None and state_dict:
            was, now = state_dict.get("cache", self.cache.meta["key"]), self.cache.meta["key"]
            if was != now:
                raise UserError(
                    f"the checkpoint was trained on the tokens of cache {was}, but this run reads {now}; resume with "
                    "the same data.corpus, data.val_share and tokenizer, or start a new run"
                )
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
        draws = self._in_micro_batches(self.val_blocks, mine)
        return DataLoader(self.val_blocks, sampler=draws, batch_size=None, collate_fn=_whole_step)

    def _process(self) -> tuple[int, int, bool]:
        if self.trainer is None:
            return 0, 1, False
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.strategy.root_device.type == "cuda"
