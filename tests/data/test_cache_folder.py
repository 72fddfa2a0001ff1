import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from distilkit.data.cache import open_cache, prepare
from distilkit.data.cache_folder import make_once
from distilkit.data.text_files import TextFiles
from tiny import make_documents

# Each attempt is a forked process that kills itself before a chosen line of the files that write a cache. What it leaves
# is read by the parent, and is what the next attempt finds.
KILLED = """
import json, os, random, signal, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from distilkit.data import cache, cache_folder, checksums
from distilkit.data.text_files import TextFiles
from distilkit.runs import storage

folder, attempts = Path(sys.argv[1]), int(sys.argv[2])
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
corpus = TextFiles(paths=str(folder / "corpus.txt"))
key = cache.cache_key(corpus, tokenizer, val_share=0.3)
traced = {module.__file__ for module in (cache, cache_folder, checksums, storage)}


def attempt(line, cache_dir):
    def count(frame, event, argument):
        nonlocal line
        if event == "line":
            line -= 1
            if not line:
                os.kill(os.getpid(), signal.SIGKILL)
        return count

    child = os.fork()
    if not child:
        sys.settrace(lambda frame, *_: count if frame.f_code.co_filename in traced else None)
        made = cache.prepare(corpus, tokenizer, cache_dir=cache_dir, val_share=0.3, batch_documents=4)
        cache.open_cache(made, tokenizer)
        sys.settrace(None)
        (folder / "left").write_text(str(line))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(made):
    return {file.name: file.read_bytes() for file in made.iterdir()}


assert attempt(10**9, folder / "whole") == 0
lines = 10**9 - int((folder / "left").read_text())
whole = content(folder / "whole" / key)
draw = random.Random(0)
moments = [*draw.sample(range(1, lines), attempts), *range(lines - attempts, lines + 2)]
outcomes = {"absent": 0, "whole": 0, "status": []}
for number, line in enumerate(moments):
    cache_dir = folder / f"cache-{number // 3}"  # two of three find what another has left
    status = attempt(line, cache_dir)
    made = cache_dir / key
    assert not made.exists() or content(made) == whole, (line, status)
    outcomes["whole" if made.exists() else "absent"] += 1
    assert status in (0, -signal.SIGKILL), (line, status)
for cache_dir in sorted(folder.glob("cache-*")):
    assert content(cache.prepare(corpus, tokenizer, cache_dir=cache_dir, val_share=0.3)) == whole
    assert [each.name for each in cache_dir.iterdir() if each.is_dir()] == [key]
print(json.dumps({**outcomes, "lines": lines}))
"""


def test_a_preparation_that_is_killed_before_any_line_leaves_a_whole_cache_or_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus.txt").write_text("\n\n".join(make_documents(20)), "utf-8")
    command = [sys.executable, "-c", KILLED, str(tmp_path), "40"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes["lines"] > 150
    assert outcomes["absent"] > 10
    assert outcomes["whole"] > 10


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the process's umask."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    files = (folder, *folder.rglob("*"))
    return {str(file.relative_to(folder.parent)): stat.S_IMODE(file.stat().st_mode) for file in files}


def test_files_of_a_cache_have_the_permissions_that_the_umask_leaves(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, mask: int
) -> None:
    (tmp_path / "corpus.txt").write_text("\n\n".join(make_documents(20)), "utf-8")
    corpus = TextFiles(paths=str(tmp_path / "corpus.txt"))
    folder = prepare(corpus, tokenizer, cache_dir=tmp_path / "cache", val_share=0.3)
    make_once(tmp_path / "cache", "tokenizers/one", lambda folder: (tokenizer.save_pretrained(folder), None)[1])
    found = modes(folder.parent)
    assert {f"cache/{folder.name}/{name}" for name in ("train.bin", "meta.json")} < found.keys()
    for name, mode in found.items():
        if not name.endswith(".lock"):  # of the library
            assert mode == (0o777 if (tmp_path / name).is_dir() else 0o666) & ~mask, name


def test_a_finished_cache_and_its_tokenizer_are_read_where_nothing_can_be_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.txt").write_text("\n\n".join(make_documents(20)), "utf-8")
    corpus = TextFiles(paths=str(tmp_path / "corpus.txt"))
    folder = prepare(corpus, tokenizer, cache_dir=tmp_path / "cache", val_share=0.3)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # this machine has not verified it
    refused: list[str] = []

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        """Refuse every change of a file system, as a read-only one does."""
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.link")
        if active and (writes or changes):
            refused.append(event)
            raise OSError(30, "Read-only file system", arguments[0])

    active = True
    sys.addaudithook(refuse)
    try:
        assert prepare(corpus, tokenizer, cache_dir=tmp_path / "cache", val_share=0.3) == folder
        cache = open_cache(folder, tokenizer)
        again = open_cache(folder, tokenizer)
    finally:
        active = False
    assert sum(map(len, cache.tokens.values())) == sum(cache.meta["tokens"].values())
    assert again.meta == cache.meta
    assert set(refused) == {"os.mkdir", "os.remove"}  # of the file in which the machine would remember it
