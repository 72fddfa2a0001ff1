"""The cache of a teacher's states as files: which rows it returns, who fills it, and what it refuses."""

import json
import logging
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distilkit.data import teacher_states
from distilkit.data.masking import Ids, Masking
from distilkit.data.teacher_states import TeacherStates, fill, find, identity
from distilkit.errors import UserError

BLOCKS, WIDTH = 7, 3


def wanted(**changes: Any) -> dict[str, Any]:
    masking: dict[str, Any] = {"mlm_probability": 0.15, "mask_share": 0.8, "random_share": 0.1, "smoothing": 0.0}
    masking |= {"whole_word": False, "epochs": 2}
    masking |= {name: changes.pop(name) for name in masking.keys() & changes.keys()}
    given: dict[str, Any] = {"teacher_sha256": "a", "tokens": "t", "seed": 1, "block_size": 32, "packing": "blocks"}
    return identity(**given | {"attend_across_documents": True, "masking": Masking(**masking)} | changes)


def state(epoch: int, block: int) -> Tensor:
    """Return rows that tell their epoch, block and place; block i has i % 3 labels."""
    return torch.tensor([[epoch, block, row] for row in range(block % 3)], dtype=torch.float32).reshape(-1, WIDTH)


class Teacher:
    """Count the parts that are computed, and fail at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.parts: list[tuple[int, ...]] = []
        self.fails_at = fails_at

    def __call__(self, epoch: int, blocks: Ids) -> list[Tensor]:
        self.parts.append((epoch, *blocks.tolist()))
        if len(self.parts) == self.fails_at:
            raise RuntimeError("the power went out")
        return [state(epoch, block) for block in blocks.tolist()]


def filled(cache_dir: Path, teacher: Teacher, **changes: Any) -> TeacherStates:
    sizes: dict[str, Any] = {"num_blocks": BLOCKS, "labels_per_block": 1.0, "width": WIDTH, "blocks_per_part": 3}
    return fill(wanted(**changes), teacher, cache_dir=cache_dir, **sizes)


def expected(epoch: int, blocks: Sequence[int]) -> Tensor:
    return torch.cat([state(epoch % 2, block) for block in blocks])


@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_rows_are_those_of_the_blocks_in_their_order_and_epochs_take_turns(tmp_path: Path, epoch: int) -> None:
    filled(tmp_path, Teacher())
    states = find(wanted(), cache_dir=tmp_path)
    for blocks in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 5], [4], [0, 3]):
        rows = states.rows(epoch, np.array(blocks))
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows.float(), expected(epoch, blocks))
    again = pickle.loads(pickle.dumps(states))  # in a worker
    assert torch.equal(again.rows(epoch, np.array([5])).float(), expected(epoch, [5]))


def test_a_fill_that_was_interrupted_goes_on_with_the_missing_parts(tmp_path: Path) -> None:
    first = Teacher(fails_at=3)
    with pytest.raises(RuntimeError, match="the power went out"):
        filled(tmp_path, first)
    with pytest.raises(UserError, match=r"has 2 of 6 parts of the teacher's states; run python -m distilkit.prepare"):
        find(wanted(), cache_dir=tmp_path)
    second = Teacher()
    filled(tmp_path, second)
    assert len(second.parts) == 4
    assert set(second.parts).isdisjoint(first.parts[:2])
    third = Teacher()
    filled(tmp_path, third)
    assert third.parts == []


def test_processes_side_by_side_compute_each_part_once(tmp_path: Path) -> None:
    teachers = [Teacher() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda teacher: filled(tmp_path, teacher), teachers))
    parts = [part for teacher in teachers for part in teacher.parts]
    assert len(parts) == len(set(parts)) == 6
    assert find(wanted(), cache_dir=tmp_path).missing() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2}, "seed=1, this run has 2"),
        ({"teacher_sha256": "b"}, "teacher's weights=a, this run has b"),
        ({"tokens": "u"}, "data.corpus, data.val_share or tokenizer=t, this run has u"),
        ({"mlm_probability": 0.3}, "data.masking.mlm_probability=0.15, this run has 0.3"),
        ({"block_size": 64, "seed": 3}, "seed=1, this run has 3; data.block_size=32, this run has 64"),
        ({"epochs": 3}, "teacher_cache.epochs=2, this run has 3"),
    ],
)
def test_states_of_another_run_are_refused_by_what_differs(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    filled(tmp_path, Teacher())
    (tmp_path / "teacher-damaged").mkdir()
    with pytest.raises(UserError) as refused:
        find(wanted(**changes), cache_dir=tmp_path)
    assert f"the nearest were made with {said}; run python -m distilkit.prepare" in str(refused.value)


def test_no_states_at_all_are_an_error_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no states for this run; run python -m distilkit.prepare with the same"):
        find(wanted(), cache_dir=tmp_path)


def test_the_size_is_said_first_and_refused_where_the_disk_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    filled(tmp_path / "some", Teacher())
    assert f"about {2 * BLOCKS * WIDTH * 2 / 1e9:.3g} GB into" in caplog.text
    monkeypatch.setattr(teacher_states.shutil, "disk_usage", lambda _: SimpleNamespace(free=83))  # type: ignore[attr-defined]
    teacher = Teacher()
    with pytest.raises(UserError, match=r"need about 0.00 GB, but the disk of .* has 0.00 GB free; free some"):
        filled(tmp_path / "full", teacher)
    assert teacher.parts == []
    assert list((tmp_path / "full").glob("teacher-*/*")) == []


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    states = filled(tmp_path, Teacher())
    file = states.place(0) / "states.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"part-000000/states.safetensors is damaged .*; delete .*part-000000 and run"):
        states.rows(0, np.array([0]))


def test_the_folder_says_what_it_was_made_with(tmp_path: Path) -> None:
    states = filled(tmp_path, Teacher())
    meta = json.loads((states.folder / "meta.json").read_text("utf-8"))
    assert meta == {**json.loads(json.dumps(wanted())), "num_blocks": BLOCKS, "blocks_per_part": 3}
