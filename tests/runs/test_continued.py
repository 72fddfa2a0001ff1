"""Records that go on where a run resumes."""

import csv
import errno
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger

from distilkit.runs.continued import continue_records


def rows_of(folder: Path) -> list[tuple[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(stream)]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("torn", ["0,", "0,1e-", "\0\0\0", "0,1e-3,\0\0"])
@pytest.mark.parametrize("disk", ["", "of checkpoints"])
def test_a_torn_row_does_not_keep_a_run_from_going_on(torn: str, disk: str, tmp_path: Path) -> None:
    rows = "epoch,lr,step,train/loss\n0,1e-3,0,5.5\n0,1e-3,1,5.25\n"
    (tmp_path / "metrics.csv").write_text(rows + torn, "utf-8")
    logger = CSVLogger(tmp_path, name="", version="")
    continue_records([logger], checkpoint=tmp_path / disk / "checkpoints" / "last.ckpt", step=2, row={})
    assert rows_of(tmp_path) == [("0", "5.5"), ("1", "5.25")]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_full_disk_at_a_resume_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,0,5.5\n0,1,5.25\n", "utf-8")
    last = tmp_path / "checkpoints" / "last.ckpt"

    def full_disk(logger: CSVLogger) -> None:
        (tmp_path / "metrics.csv").write_text("epoch,st", "utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CSVLogger, "save", full_disk)
        for _ in range(2):
            with pytest.raises(OSError):
                continue_records([CSVLogger(tmp_path, name="", version="")], checkpoint=last, step=2, row={})
    continue_records([CSVLogger(tmp_path, name="", version="")], checkpoint=last, step=2, row={})
    assert rows_of(tmp_path) == [("0", "5.5"), ("1", "5.25")]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
