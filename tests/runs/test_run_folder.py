"""Two processes do not train into one folder: the second is refused before it writes anything."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distilkit.train
from distilkit.api import distill
from distilkit.errors import UserError
from distilkit.runs import run_folder
from jobs import call
from tiny import make_documents

HOLD = """
import sys
from pathlib import Path
from distilkit.runs.run_folder import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Path]:
    """A folder into which another process trains."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield folder
        other.communicate()


def test_a_second_run_in_the_same_folder_is_refused_at_its_start(taken: Path, tmp_path: Path) -> None:
    (taken / ".hydra").mkdir()
    (taken / ".hydra" / "overrides.yaml").write_text("of the first")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = call(
        distilkit.train.main, "teacher=none", "data=text", "data.corpus.paths=x", "hydra.run.dir=run", cwd=tmp_path
    )
    assert done.code == 1
    assert done.err == (
        "error: another process trains into run; wait for its end, or choose another hydra.run.dir (from Python: out)\n"
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_distill_is_refused_too(taken: Path, tmp_path: Path, save_teacher: object) -> None:
    overrides = ["objective=mlm", "tokenizer=wordpiece", "tokenizer.vocab_size=120", f"cache_dir={tmp_path / 'cache'}"]
    overrides += [
        "data.block_size=16",
        "data.global_batch_size=2",
        "data.val_share=0.2",
        "trainer=cpu",
        "trainer.precision=32-true",
    ]
    small = "student.config={hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1, intermediate_size: 8}"
    with pytest.raises(UserError, match="another process trains into .*run; wait for its end"):
        distill(None, student="new", text=make_documents(30), out=taken, max_steps=1, overrides=[*overrides, small])
    assert [path.name for path in taken.iterdir()] == [".lock"]


def test_a_process_may_hold_a_folder_again_and_leave_it_to_others(tmp_path: Path) -> None:
    run_folder.hold(tmp_path / "a")
    run_folder.hold(tmp_path / "a")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a")]
    refused = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert "another process trains into" in refused.stderr
    run_folder.release()
    assert subprocess.run(command, input="", capture_output=True, text=True, check=False).stdout == "held\n"


def test_only_the_first_rank_holds_the_folder(taken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    run_folder.hold(taken)  # the first rank of this run holds it
    monkeypatch.setenv("LOCAL_RANK", "of something else")
    with pytest.raises(UserError, match="another process trains"):
        run_folder.hold(taken)
