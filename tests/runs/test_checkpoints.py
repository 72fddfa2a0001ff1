"""Checkpoints that are damaged in many ways, and the one that a run goes on from."""

import logging
import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from distilkit.errors import UserError
from distilkit.runs.checkpoints import checkpoints_of, find_checkpoint, is_finished, read_checkpoint

CONFIG = {"name": "mine", "budget": None, "trainer": {"max_steps": 9, "max_epochs": -1}, "seed": 1}


def make(file: Path, *, step: int = 1, size: int = 40, config: Mapping[str, Any] = CONFIG) -> Path:
    """Write a small checkpoint whose weights tell its step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {"a": torch.arange(float(size)) + step, "b": torch.ones(3, dtype=torch.int64)}
    content = {
        "state_dict": weights,
        "global_step": step,
        "optimizer_states": [],
        "distilkit": {"record": {"name": config["name"], "config": dict(config)}},
    }
    torch.save(content, file)
    return file


def make_run(
    folder: Path, *, age: int = 0, finished: bool = False, config: Mapping[str, Any] = CONFIG, step: int = 3
) -> Path:
    """Write a run's folder with last.ckpt and the one before; the older a run, the higher its age."""
    for name, at in (("last-1", step - 1), ("last", step)):
        file = make(folder / "checkpoints" / f"{name}.ckpt", step=at, config=config)
        os.utime(file, (1e9 - age, 1e9 - age))
    if finished:
        (folder / "student").mkdir()
        (folder / "summary.json").touch()
    return folder


def flip(file: Path, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def same(one: Any, two: Any) -> bool:
    """Compare nested dictionaries with tensors."""
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return bool(one == two)


# ------------------------------------------------------------------------------------ damage


def test_a_flip_of_any_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    good = make(tmp_path / "good.ckpt")
    expected, content = read_checkpoint(good), good.read_bytes()
    refused = 0
    for place in range(0, len(content), 3):
        file = tmp_path / f"{place}.ckpt"
        shutil.copy(good, file)
        flip(file, place, bit=place % 8)
        try:
            assert same(read_checkpoint(file), expected), place
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{file} "), error
        file.unlink()
    assert refused > len(content) / 20  # the rest are dates, padding and the like


def _inside(content: bytes, part: str, share: float) -> int:
    """Return a place in the data of a part of the zip file."""
    import io

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (info,) = (each for each in archive.infolist() if each.filename.endswith(part))
        with archive.open(info) as stream:
            data = stream.read()
    begin = content.index(data, info.header_offset)
    return begin + int(share * (len(data) - 1))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda content: 0, "is not a checkpoint, or its beginning is damaged"),
        (lambda content: _inside(content, "data.pkl", 0.0), "the checksum of its part good/data.pkl differs"),
        (lambda content: _inside(content, "data.pkl", 0.7), "the checksum of its part good/data.pkl differs"),
        (lambda content: _inside(content, "data/0", 0.0), "the checksum of its part good/data/0 differs"),
        (lambda content: _inside(content, "data/0", 0.5), "the checksum of its part good/data/0 differs"),
        (lambda content: _inside(content, "data/1", 1.0), "the checksum of its part good/data/1 differs"),
        (lambda content: content.rindex(b"PK\x01\x02"), "is cut short or damaged (Bad magic number for central"),
        (lambda content: content.rindex(b"PK\x05\x06"), "is cut short or damaged (File is not a zip file)"),
    ],
)
def test_a_flipped_bit_is_refused_by_name(place: Callable[[bytes], int], said: str, tmp_path: Path) -> None:
    file = make(tmp_path / "good.ckpt")
    flip(file, place(file.read_bytes()), bit=3)
    with pytest.raises(UserError) as refusal:
        read_checkpoint(file)
    assert str(refusal.value).startswith(f"{file} is ")
    assert said in str(refusal.value)
    assert "; give another checkpoint of the run" in str(refusal.value)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_file_that_was_cut_is_refused(share: float, tmp_path: Path) -> None:
    file = make(tmp_path / "last.ckpt", size=4000)
    os.truncate(file, max(5, int(file.stat().st_size * share)))
    with pytest.raises(UserError, match="last.ckpt is cut short or damaged"):
        read_checkpoint(file)


def test_a_file_with_a_hole_of_zeros_is_refused(tmp_path: Path) -> None:
    file = make(tmp_path / "last.ckpt", size=4000)
    content = file.read_bytes()
    file.write_bytes(content[:4096] + bytes(4096) + content[8192:])
    with pytest.raises(UserError, match="is damaged: the checksum of its part last/data/0 differs"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "is no file"),
        ("empty", "is empty"),
        ("folder", "is a folder, not a file"),
        ("text", "is not a checkpoint, or its beginning is damaged"),
        ("foreign", "is not a checkpoint of distilkit.train"),
        ("tensor", "is not a checkpoint of distilkit.train"),
        ("zip", "is not a checkpoint of distilkit.train"),
    ],
)
def test_what_is_no_checkpoint_is_named(kind: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "some.ckpt"
    if kind in ("empty", "text"):
        file.write_text("hello" if kind == "text" else "")
    elif kind == "folder":
        file.mkdir()
    elif kind in ("foreign", "tensor"):
        torch.save({"state_dict": {}} if kind == "foreign" else torch.ones(3), file)
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "hello")
    with pytest.raises(UserError, match=f"some.ckpt {said}"):
        read_checkpoint(file)


def test_a_file_is_read_once_in_small_parts_and_again_when_it_was_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = make(tmp_path / "last.ckpt", size=8_000_000), []
    whole = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: read.append(1) or whole(self))
    tracemalloc.start()
    for _ in range(2):
        assert torch.equal(read_checkpoint(file)["state_dict"]["a"], torch.arange(8e6) + 1)
    assert tracemalloc.get_traced_memory()[1] < 6e6  # of 32 MB
    tracemalloc.stop()
    assert len(read) == 1
    make(file, step=2)
    read_checkpoint(file)
    assert len(read) == 2


# --------------------------------------------------------------------------- what to go on from


def other_seed(record: Mapping[str, Any]) -> bool:
    return bool(record["config"]["seed"] != CONFIG["seed"])


def find(given: str | None, out: Path, **more: Any) -> Path | None:
    return find_checkpoint(given, out, **{"config": CONFIG, "differs": other_seed, **more})


def test_the_checkpoints_of_a_run_are_in_order_of_age(tmp_path: Path) -> None:
    for name in ("last-10", "best", "last-2", "last", "last-x", "step=4"):
        make(tmp_path / "run" / "checkpoints" / f"{name}.ckpt")
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        assert [file.stem for file in checkpoints_of(folder)] == ["last", "last-2", "last-10", "best"]
    assert checkpoints_of(tmp_path / "none") == []


@pytest.mark.parametrize("damaged", [("last",), ("last", "last-1")])
@pytest.mark.parametrize("given", ["auto", "last", "the folder", "the file"])
def test_a_damaged_checkpoint_is_named_in_one_line_and_the_one_before_is_taken(
    given: str, damaged: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "old")
    make(run / "checkpoints" / "best.ckpt", step=1)
    for name in damaged:
        os.truncate(run / "checkpoints" / f"{name}.ckpt", 700)
    value = {"the folder": str(run), "the file": str(run / "checkpoints" / "last.ckpt")}.get(given, given)
    with caplog.at_level(logging.WARNING):
        found = find(value, tmp_path / "new")
    expected = run / "checkpoints" / ("best.ckpt" if "last-1" in damaged else "last-1.ckpt")
    assert found == expected
    (line,) = [each.message for each in caplog.records if "going back" in each.message]
    assert all(f"{run}/checkpoints/{name}.ckpt is cut short or damaged" in line for name in damaged)
    assert line.endswith(f"going back to step {1 if 'last-1' in damaged else 2} of {expected}")


def test_a_damaged_file_of_another_name_is_refused_and_so_is_a_run_without_a_sound_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old")
    step = make(run / "checkpoints" / "step=4.ckpt")
    for file in (step, *checkpoints_of(run)):
        os.truncate(file, 700)
    with pytest.raises(UserError, match="step=4.ckpt is cut short or damaged .*; give another checkpoint"):
        find(str(step), tmp_path / "new")
    for given in (str(run), "last", str(run / "checkpoints" / "last.ckpt")):
        with pytest.raises(UserError, match=r"last.ckpt is cut short.*; .*last-1.ckpt is cut short.*; give another"):
            find(given, tmp_path / "new")
    assert find("auto", tmp_path / "new") is None


def test_weights_alone_are_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old")
    content = torch.load(run / "checkpoints" / "last.ckpt")
    del content["optimizer_states"]
    torch.save(content, run / "checkpoints" / "last.ckpt")
    torch.save(content, run / "checkpoints" / "best.ckpt")
    assert find(str(run), tmp_path / "new") == run / "checkpoints" / "last-1.ckpt"
    with pytest.raises(UserError, match="best.ckpt holds weights alone, from which no run can go on; give another"):
        find(str(run / "checkpoints" / "best.ckpt"), tmp_path / "new")


def test_the_last_checkpoint_is_that_of_the_newest_run(tmp_path: Path) -> None:
    make_run(tmp_path / "2026-01-02", age=9)
    newest = make_run(tmp_path / "2026-01-01", age=1)  # by time, not by name
    (tmp_path / "2026-01-03").mkdir()
    (tmp_path / "2026-01-03" / "last.ckpt").symlink_to("nowhere")
    assert find("last", tmp_path / "new") == newest / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match="ckpt_path=last is not defined in a sweep; give the file, or auto"):
        find("last", tmp_path / "new", in_sweep=True)
    assert find(None, tmp_path / "new") is None


def test_the_last_checkpoint_is_not_that_of_a_finished_run_of_other_settings(tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", age=1, finished=True, config={**CONFIG, "seed": 2})
    with pytest.raises(UserError, match=f"ckpt_path=last, but {other} is finished and has other settings; start with"):
        find("last", tmp_path / "new")
    own = make_run(tmp_path / "own", age=2)
    assert find("last", tmp_path / "new") == own / "checkpoints" / "last.ckpt"
    (other / "summary.json").unlink()  # it broke off: its settings are compared by name, not passed over
    assert find("last", tmp_path / "new") == other / "checkpoints" / "last.ckpt"


def test_a_finished_run_goes_on_only_with_something_left_to_train(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=True)
    cure = f"{run} has finished this training, with {run}/student; set trainer.max_steps, trainer.max_epochs or budget"
    with pytest.raises(UserError, match=cure):
        find("last", tmp_path / "new")
    longer = {**CONFIG, "trainer": {"max_steps": 20, "max_epochs": -1}}
    assert find("last", tmp_path / "new", config=longer) == run / "checkpoints" / "last.ckpt"
    for given in (str(run), str(run / "checkpoints" / "last.ckpt")):  # asked for by name
        assert find(given, tmp_path / "new") == run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(("settings", "step"), [({"seed": 2}, 3), ({"name": "another"}, 3), ({}, 0)])
def test_auto_starts_where_there_is_nothing_to_go_on_from(
    settings: dict[str, Any], step: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert find("auto", tmp_path / "runs" / "new") is None
        make_run(tmp_path / "runs" / "old", config={**CONFIG, **settings}, step=step)
        assert find("auto", tmp_path / "runs" / "new") is None
    lines = [each.message for each in caplog.records]
    assert lines[0] == f"ckpt_path=auto starts: there is nothing to go on from beside {tmp_path}/runs/new"
    assert len(lines) == 2


def test_auto_takes_its_own_folder_first_then_that_of_its_job_then_the_newest_of_its_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "older", age=9)
    make_run(tmp_path / "other", age=2, config={**CONFIG, "seed": 2})
    newest = make_run(tmp_path / "newest", age=3)
    with caplog.at_level(logging.INFO):
        assert find("auto", tmp_path / "new") == newest / "checkpoints" / "last.ckpt"
    assert [each.message for each in caplog.records] == [
        f"ckpt_path=auto goes on from step 3 of {newest}/checkpoints/last.ckpt"
    ]
    job = make_run(tmp_path / "elsewhere" / "job", age=99)
    assert find("auto", tmp_path / "new", requeued=job) == job / "checkpoints" / "last.ckpt"
    own = make_run(tmp_path / "new", age=100)
    assert find("auto", tmp_path / "new", requeued=job) == own / "checkpoints" / "last.ckpt"


def test_checkpoints_that_are_a_link_are_those_of_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    assert find("auto", run) == run / "checkpoints" / "last.ckpt"  # its metrics.csv is in the folder above


def test_auto_does_not_train_again_what_a_newer_run_has_finished(tmp_path: Path) -> None:
    make_run(tmp_path / "broken", age=9)
    make_run(tmp_path / "finished", age=1, finished=True)
    assert find("auto", tmp_path / "new") is None


def test_in_a_sweep_auto_looks_into_the_folder_of_the_job_only(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    assert find("auto", tmp_path / "1", in_sweep=True) is None
    assert find("auto", tmp_path / "0", in_sweep=True) == tmp_path / "0" / "checkpoints" / "last.ckpt"


def test_a_run_that_broke_off_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=f"{run} holds a run that broke off.*; set ckpt_path=auto to go on with it"):
        find(None, run)
    assert find(None, run, in_sweep=True) is None
    monkeypatch.setenv("LOCAL_RANK", "1")  # a rank that the first one has started
    assert find(None, run) is None


def test_what_is_neither_file_nor_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ckpt_path=nowhere is no file; give a .ckpt or the folder of a run, or auto"):
        find("nowhere", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint; give the folder of a run"):
        find(str(tmp_path), tmp_path)


def test_a_run_is_finished_when_its_summary_is_there(tmp_path: Path) -> None:
    assert not is_finished(tmp_path)
    (tmp_path / "student").mkdir()
    assert not is_finished(tmp_path)
    (tmp_path / "summary.json").touch()
    assert is_finished(tmp_path)
