import contextlib
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distilkit import cli
from distilkit.cli import keep_large_buffers, ranks_on_config

# The resident memory after freeing 200 MB, with and without the raised thresholds.
PROBE = """
import resource, sys
from distilkit.cli import keep_large_buffers
if sys.argv[1] == "keep":
    assert keep_large_buffers()
block = bytearray(200_000_000)
del block
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * resource.getpagesize())
"""


def resident_after_freeing(mode: str) -> int:
    output = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True).stdout
    return int(output)


def test_freed_buffers_stay_with_the_process_where_the_library_is_glibc() -> None:
    if platform.libc_ver()[0] == "glibc":
        assert resident_after_freeing("keep") - resident_after_freeing("give back") > 150_000_000
    else:
        assert not keep_large_buffers()


def test_a_failed_job_of_a_sweep_ends_its_ranks_before_lightning_ends_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "in_sweep", lambda: True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    children = [child]
    with (
        contextlib.suppress(ValueError),
        ranks_on_config(tmp_path / "config.yaml", launcher=SimpleNamespace(procs=children)),
    ):
        raise ValueError("the job failed")
    assert child.returncode is not None
    assert children == []  # which Lightning's thread takes for the end of all ranks
