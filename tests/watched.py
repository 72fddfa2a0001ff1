"""Read what an offline run of Weights & Biases has written."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from jobs import only

_BLOCK, _HEADER = 2**15, 7  # bytes
_FULL, _FIRST, _LAST = 1, 2, 4


def _read(content: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format, of which wandb has no reader in Python since 0.31.

    A file begins with 7 bytes of its own. A record is in parts, none of which crosses a block: a checksum (4 bytes), the
    length (2), the kind (1) and the data.
    """
    if not content:  # nothing is flushed yet
        return
    assert content[:4] == b":W&B"
    at, parts = _HEADER, b""
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:  # the rest of a block is empty
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        data = content[at + _HEADER : at + _HEADER + size]
        parts = data if kind in (_FULL, _FIRST) else parts + data
        if kind in (_FULL, _LAST):
            yield parts
        at += _HEADER + size


def records(folder: Path) -> list[Any]:
    """Read all records of a finished run's offline file, which a process of W&B may still be writing."""
    file, end = only(folder, "wandb/offline-run-*/run-*.wandb"), time.monotonic() + 20
    while True:
        found = [wandb_internal_pb2.Record.FromString(data) for data in _read(file.read_bytes())]
        if time.monotonic() > end or any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)


def history(folder: Path) -> list[dict[str, Any]]:
    """Return what was logged, a dictionary for each call."""
    rows = [record.history.item for record in records(folder) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]
