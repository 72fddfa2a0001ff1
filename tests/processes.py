"""Run a function on several processes that are joined as ranks; they are forked, so that a start costs little."""

import os
import pickle
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def on_ranks(count: int, function: Callable[[], Any]) -> list[Any]:
    """Return what a function returns on each of ``count`` ranks; with one, it runs in this process."""
    if count == 1:
        return [function()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = {rank: _fork(rank, count, port, Path(folder), function) for rank in range(count)}
        left = set(children.values())
        while left:
            child, status = os.wait()
            left -= {child}
            if status:  # the others would wait for it
                for other in left:
                    os.kill(other, signal.SIGKILL)
        files = [Path(folder) / str(rank) for rank in children]
        found = [pickle.loads(file.read_bytes()) for file in files if file.is_file()]
    broken = [each for each in found if isinstance(each, BaseException)]
    if broken or len(found) < count:
        raise broken[0] if broken else AssertionError(f"only {len(found)} of {count} ranks ended")
    return [value for (value,) in found]


def _fork(rank: int, count: int, port: int, folder: Path, function: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(300)  # ends a rank that waits for ever
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        result: Any = (function(),)
    except BaseException as error:  # also SystemExit
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        result = error
    (folder / str(rank)).write_bytes(pickle.dumps(result))
    os._exit(isinstance(result, BaseException))
