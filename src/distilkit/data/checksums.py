"""The checksums of a token cache: written with it, and verified once on each machine that opens it."""

import hashlib
import json
import logging
import os
import socket
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from distilkit.errors import UserError

log = logging.getLogger(__name__)


def checksum(file: Path) -> str:
    """Return the CRC-32 of a file, as .gz and .zip have it, in eight hexadecimal digits."""
    value = 0
    with file.open("rb") as stream:
        while part := stream.read(2**22):
            value = zlib.crc32(part, value)
    return f"{value:08x}"


def verify(folder: Path, sums: Mapping[str, str], *, again: bool) -> None:
    """Compare the files of a cache with their checksums, ``sums`` by name.

    A cache that passed once on this machine passes unread as long as its files have the same size and times, unless
    ``again`` is set. What passed is remembered in $XDG_STATE_HOME/distilkit, because the cache may be read-only, or be
    copied to another machine with all it holds.

    Raises:
        UserError: a file is damaged, or another one.
    """
    stats = [(folder / name).stat() for name in sums]
    times = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
    state = json.dumps([socket.gethostname(), str(folder.resolve()), times, dict(sums)])
    marker = _state_folder() / hashlib.sha256(state.encode()).hexdigest()[:32]
    if marker.is_file() and not again:
        return
    with suppress(OSError):  # damage that is found now must not pass at the next start
        marker.unlink()
    for name, wanted in sums.items():
        if (found := checksum(folder / name)) != wanted:
            raise UserError(
                f"{folder / name} is damaged, or of another cache: its CRC-32 is {found}, but meta.json says {wanted}; "
                f"delete {folder} to prepare it again, or copy it again from where it is whole"
            )
    log.info("%s has the checksums that it was written with", folder)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(state, "utf-8")
    except OSError as error:
        log.info("%s is verified at each start, because %s cannot be written: %s", folder, marker.parent, error)


def _state_folder() -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    home = os.path.expanduser("~/.local/state")  # noqa: PTH111 - Path.expanduser fails where a user has no home
    return Path(given if os.path.isabs(given) else home) / "distilkit" / "verified"  # noqa: PTH117
