"""The memory that a container leaves free."""

from pathlib import Path

import pytest
import torch

from distilkit.watch import memory

STAT = {
    "memory.max": "anon 1000\ninactive_file 3000\nactive_file 500\n",
    "memory.limit_in_bytes": "cache 9000\ninactive_file 0\ntotal_inactive_file 3000\n",
}


@pytest.mark.parametrize(("limit", "used"), [("memory.max", "memory.current"), memory._GROUPS[1]])
def test_files_that_were_read_leave_memory_free_in_a_container(
    limit: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / Path(name).name for name in (limit, used)]
    monkeypatch.setattr(memory, "_GROUPS", (tuple(map(str, files)),))
    for file, text in zip(files, ("10000\n", "8000\n"), strict=True):
        file.write_text(text, "utf-8")
    assert memory.free_bytes(torch.device("cpu")) == 2000
    (tmp_path / "memory.stat").write_text(STAT[files[0].name], "utf-8")
    assert memory.free_bytes(torch.device("cpu")) == 5000
    files[0].write_text("max\n", "utf-8")
    assert memory.free_bytes(torch.device("cpu")) > 10000
