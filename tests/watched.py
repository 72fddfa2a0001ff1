"""Read what an offline run of Weights & Biases has written."""

import json
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from jobs import only


def records(folder: Path) -> list[Any]:
    """Read all records of a run's offline file."""
    store, found = DataStore(), []
    store.open_for_scan(str(only(folder, "wandb/offline-run-*/run-*.wandb")))
    while (data := store.scan_data()) is not None:
        found.append(wandb_internal_pb2.Record())
        found[-1].ParseFromString(data)
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """Return what was logged, a dictionary for each call."""
    rows = [record.history.item for record in records(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]
