"""A teacher's last hidden states at the labelled tokens, computed once and read by all later epochs and runs.

A mask is a function of seed, epoch and sample. So the labelled tokens of an epoch are known before training, and later
epochs take their masks in turn (``Masking.epochs``). The states are kept in bfloat16, in parts of whole blocks. Logits are
made of them by the teacher's head: exact at every temperature, without the bias of top-k targets (arXiv 2503.16870).
"""

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distilkit.data.cache_folder import make_once, usable
from distilkit.data.masking import Ids, Masking
from distilkit.errors import UserError
from distilkit.records import write_json

log = logging.getLogger(__name__)

FORMAT = 1  # increase it when the meaning of the files changes
BLOCKS_PER_PART = 2048
_FILE, _META = "states.safetensors", "meta.json"

Compute = Callable[[int, Ids], list[Tensor]]  # an epoch and blocks (blocks,) -> (labelled tokens, width) of each block


@dataclass(frozen=True, kw_only=True)
class TeacherStates:
    """Read cached states. A process opens the files of its own; pickling keeps their folder."""

    folder: Path
    epochs: int
    num_blocks: int
    blocks_per_part: int = BLOCKS_PER_PART
    _open: dict[int, tuple[Any, Ids]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out open files."""
        return {**vars(self), "_open": {}}

    @property
    def parts_per_epoch(self) -> int:
        """The number of parts of one epoch."""
        return -(-self.num_blocks // self.blocks_per_part)

    @property
    def num_parts(self) -> int:
        """The number of parts of all epochs."""
        return self.epochs * self.parts_per_epoch

    def missing(self) -> list[int]:
        """List the parts that are not filled yet."""
        return [part for part in range(self.num_parts) if not (self.place(part) / _FILE).is_file()]

    def place(self, part: int) -> Path:
        """Return the folder of a part."""
        return self.folder / f"part-{part:06d}"

    def blocks_of(self, part: int) -> tuple[int, Ids]:
        """Return the epoch and the blocks (blocks,) of a part."""
        epoch, begin = divmod(part, self.parts_per_epoch)
        return epoch, np.arange(begin * self.blocks_per_part, min((begin + 1) * self.blocks_per_part, self.num_blocks))

    def rows(self, epoch: int, blocks: Ids) -> Tensor:
        """Return the states of the labelled tokens of blocks (blocks,), in their order: (rows, width), bfloat16."""
        found = []
        for block in blocks.tolist():
            states, offsets = self._opened(epoch % self.epochs * self.parts_per_epoch + block // self.blocks_per_part)
            within = block % self.blocks_per_part
            found.append(states[int(offsets[within]) : int(offsets[within + 1])])
        return torch.cat(found)

    def _opened(self, part: int) -> tuple[Any, Ids]:
        if part not in self._open:
            file = self.place(part) / _FILE
            try:
                states = safe_open(file, framework="pt")
                self._open[part] = states.get_slice("states"), states.get_tensor("offsets").numpy()
            except (OSError, SafetensorError) as error:
                cure = f"delete {file.parent} and run python -m distilkit.prepare again"
                raise UserError(f"{file} is damaged ({error}); {cure}") from error
        return self._open[part]


def identity(
    *,
    teacher_sha256: str,
    tokens: str,
    masking: Masking,
    seed: int,
    block_size: int,
    packing: str,
    attend_across_documents: bool,
) -> dict[str, Any]:
    """Return what decides the states, by config key; ``tokens`` is the key of the token cache."""
    return {
        "format": FORMAT,
        "teacher's weights": teacher_sha256,
        "data.corpus, data.val_share or tokenizer": tokens,
        **{f"data.masking.{name}": value for name, value in asdict(masking).items() if name != "epochs"},
        "seed": seed,
        "data.block_size": block_size,
        "data.packing": packing,
        "data.attend_across_documents": attend_across_documents,
        "teacher_cache.epochs": masking.epochs,
    }


def folder_of(wanted: Mapping[str, Any], *, cache_dir: Path) -> Path:
    """Return the folder of the states of an identity, filled or not."""
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir / f"teacher-{key}"


def find(wanted: Mapping[str, Any], *, cache_dir: Path) -> TeacherStates:
    """Open cached states; the error for those that are not there, or not whole, names what differs from others."""
    folder, cure = folder_of(wanted, cache_dir=cache_dir), "run python -m distilkit.prepare with the same overrides"
    if (meta := _meta(folder)) is not None:
        sizes = {name: meta[name] for name in ("num_blocks", "blocks_per_part")}
        states = TeacherStates(folder=folder, epochs=wanted["teacher_cache.epochs"], **sizes)
        if missing := states.missing():
            found = f"{folder} has {states.num_parts - len(missing)} of {states.num_parts} parts"
            raise UserError(f"{found} of the teacher's states; {cure}, which goes on with it")
        return states
    found = f"teacher_cache.epochs={wanted['teacher_cache.epochs']}, but {cache_dir} has no states for this run"
    others: list[list[str]] = []
    for theirs in filter(None, map(_meta, sorted(cache_dir.glob("teacher-*")))):
        ours = json.loads(json.dumps(wanted))
        others.append(
            [f"{key}={theirs.get(key)}, this run has {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
        )
    if others:
        nearest = min(others, key=len)
        found = f"{found}; the nearest were made with {'; '.join(nearest)}"
    raise UserError(f"{found}; {cure} first")


def _meta(folder: Path) -> dict[str, Any] | None:
    """Return what states were made with, or None where there are none."""
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / _META).read_text("utf-8")))
    return None


def fill(
    wanted: Mapping[str, Any],
    compute: Compute,
    *,
    cache_dir: Path,
    num_blocks: int,
    labels_per_block: float,
    width: int,
    blocks_per_part: int = BLOCKS_PER_PART,
) -> TeacherStates:
    """Compute the parts that are missing; several processes fill one folder, and an interrupted fill goes on.

    The size is logged first, and refused where the disk has no room for it.
    """
    folder, epochs = folder_of(wanted, cache_dir=cache_dir), wanted["teacher_cache.epochs"]
    states = TeacherStates(folder=folder, epochs=epochs, num_blocks=num_blocks, blocks_per_part=blocks_per_part)
    missing = states.missing()
    size = int(len(missing) / states.num_parts * states.epochs * states.num_blocks * labels_per_block * width * 2)
    with usable(states.folder.parent):
        states.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(states.folder).free
        if size > free:
            found = f"the teacher's states need about {size / 1e9:.2f} GB, but the disk of {states.folder} has "
            cure = "free some, set cache_dir to another disk, or lower teacher_cache.epochs"
            raise UserError(f"{found}{free / 1e9:.2f} GB free; {cure}")
        sizes = {"num_blocks": num_blocks, "blocks_per_part": blocks_per_part}
        with FileLock(states.folder / f"{_META}.lock"):  # another process may begin, too
            write_json(states.folder / _META, {**wanted, **sizes})
    log.info("the teacher's states: about %.3g GB into %s, %d parts", size / 1e9, states.folder, len(missing))
    random.Random(os.getpid()).shuffle(missing)  # processes side by side seldom meet at a part
    for count, number in enumerate(missing, start=1):

        def write(folder: Path, number: int = number) -> None:
            rows = compute(*states.blocks_of(number))
            offsets = torch.tensor([0, *np.cumsum([len(each) for each in rows])])  # (blocks + 1,)
            save_file({"states": torch.cat(rows).to(torch.bfloat16), "offsets": offsets}, folder / _FILE)

        make_once(states.folder, states.place(number).name, write)
        log.info("the teacher's states: %d of %d parts", count, len(missing))
    return states
