"""The verdict at the end of a run: where it stands, what it is compared with, and what it warns of."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import distilkit.summary
import distilkit.train
from distilkit.errors import UserError
from distilkit.records import read_rows
from jobs import QUIET, SMALL, Outcome, call
from tiny import WORDS

Go = Callable[..., Outcome]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, save_teacher: Callable[..., Path]) -> Path:
    """A tiny BERT that predicts the word that is half of the text."""
    folder = tmp_path_factory.mktemp("knows") / "teacher"
    plain = save_teacher("bert", num_layers=4, initializer_range=0.02)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    with torch.no_grad():
        model.cls.predictions.bias[tokenizer.convert_tokens_to_ids(WORDS[0])] += 5.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text; the runs of this file go here."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("runs")
    documents = [
        " ".join(rng.choices([WORDS[0], *WORDS], k=rng.randint(9, 29), weights=[83, *[1] * len(WORDS)]))
        for _ in range(200)
    ]
    (path / "text.txt").write_text("\n\n".join(documents), "utf-8")
    return path


@pytest.fixture(scope="module")
def go(teacher: Path, folder: Path) -> Go:
    """Train in this process, in a folder by its name."""

    def train(name: str, *overrides: str) -> Outcome:
        given = [*SMALL, *QUIET, f"data.corpus.paths={folder}/text.txt", f"cache_dir={folder}/cache"]
        given += ["data.val_share=0.3", "data.max_val_blocks=30", "teacher=hf", f"teacher.name={teacher}"]
        given += ["trainer.max_steps=4", "optimizer.lr=0.002", f"hydra.run.dir={name}"]
        return call(distilkit.train.main, *given, *overrides, cwd=folder)

    return train


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return content


@pytest.fixture(scope="module")
def base(go: Go, folder: Path) -> Path:
    """A run without soft targets, to compare with."""
    done = go("base", "objective=mlm", "logger=tensorboard")
    assert done.code == 0, done.err
    return folder / "base"


def test_a_run_ends_in_its_verdict_which_its_files_repeat(go: Go, folder: Path, base: Path) -> None:
    done = go("run", f"baseline={base}")
    assert done.code == 0, done.err
    said, before, after = (summary(folder / "run")[name] for name in ("verdict", "before", "after"))
    assert done.out.splitlines()[-1] == f"verdict on held-out text: {said['line']}"
    assert said["line"].startswith(f"kept {100 * said['kept']:.1f} ± ")
    assert said["kept"] == pytest.approx(after["val/accuracy"] / after["val/teacher_accuracy"])
    assert said["by"] == "masked accuracy"
    assert said["better_than_cut"] == pytest.approx(before["val/nll"] - after["val/nll"])
    assert abs(said["better_than_cut"]) > 0.001
    assert said["better_than_baseline"] == pytest.approx(summary(base)["after"]["val/nll"] - after["val/nll"])
    assert abs(said["better_than_baseline"]) > 0.001
    assert (said["baseline"], summary(base)["verdict"]["warnings"]) == (str(base), [])
    assert set(said["margins"]) == {"kept", "better_than_cut", "better_than_baseline"}
    assert said["line"] in (folder / "run" / "student" / "README.md").read_text("utf-8")
    assert str(folder) not in said["line"]  # the card is published


def test_tensorboard_shows_the_verdict(base: Path) -> None:
    events = b"".join(file.read_bytes() for file in base.rglob("events.out.tfevents*"))
    assert summary(base)["verdict"]["line"].encode() in events


def test_a_baseline_on_the_same_text_compares_in_batches_of_any_size(go: Go, folder: Path, base: Path) -> None:
    assert go("smaller", "data.micro_batch_size=4", f"baseline={base}/summary.json", "trainer.max_steps=1").code == 0
    said, nll = summary(folder / "smaller")["verdict"], summary(folder / "smaller")["after"]["val/nll"]
    assert said["better_than_baseline"] == pytest.approx(summary(base)["after"]["val/nll"] - nll)
    assert said["baseline"] == str(base)


@pytest.mark.parametrize("other", ["data.max_val_blocks=20", "data.masking.mlm_probability=0.3", "seed=7"])
def test_a_baseline_on_other_held_out_text_is_not_compared(other: str, go: Go, folder: Path, base: Path) -> None:
    name = f"other-{other.partition('=')[0]}"
    assert go(name, f"baseline={base}", other, "trainer.max_steps=1").code == 0
    said = summary(folder / name)["verdict"]
    assert said["better_than_baseline"] is None
    assert said["line"].endswith("; not compared with the baseline, whose held-out text is another")


def test_documents_are_known_whatever_their_padding(go: Go, folder: Path) -> None:
    few = "data.packing=documents", "trainer.max_steps=1", "validate_first=false"
    for name, size in (("docs-8", 8), ("docs-3", 3)):
        assert go(name, *few, f"data.micro_batch_size={size}").code == 0
    one, two = (read_rows(folder / name, "val") for name in ("docs-8", "docs-3"))
    assert one is not None and two is not None
    assert one.ids.tolist() == two.ids.tolist()
    assert len(one) == 30
    assert one.sums["tokens"].sum() == two.sums["tokens"].sum() > 60


@pytest.mark.parametrize(
    ("made", "missing"),
    [
        ((), "no summary.json"),
        (("config.yaml",), "no summary.json"),
        (("config.yaml", "summary.json"), "no rows-val.npz"),
    ],
)
def test_a_baseline_that_is_no_finished_run_is_refused_before_training(
    made: tuple[str, ...], missing: str, go: Go, tmp_path: Path
) -> None:
    for file in made:
        (tmp_path / file).write_text("{}", "utf-8")
    done = go(f"{tmp_path}/refused", f"baseline={tmp_path}")
    assert done.code == 1
    expected = f"error: baseline={tmp_path} has {missing}; give the folder of a finished run of this version, or "
    assert expected + "baseline=null" in done.err
    assert not (tmp_path / "refused" / "config.yaml").exists()


def test_a_baseline_with_damaged_scores_is_refused_before_training(go: Go, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "rows-val.npz"
    file.write_bytes(file.read_bytes()[:99])
    done = go(f"{tmp_path}/refused", f"baseline={tmp_path}/base")
    assert done.code == 1
    assert f"error: {file} is damaged (" in done.err
    assert not (tmp_path / "refused" / "config.yaml").exists()


def test_a_number_as_a_path_is_the_name_of_a_folder(go: Go) -> None:
    for key, found in (("baseline", "has no summary.json"), ("ckpt_path", "is no file")):
        done = go("number", f"{key}=2026")
        assert done.code == 1
        assert f"error: {key}=2026 {found}" in done.err


def test_a_sweep_goes_on_without_the_baseline_of_a_failed_job(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    find = distilkit.train.find_baseline
    assert find(f"{tmp_path}/baseline", tmp_path / "run", in_sweep=True) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"baseline={tmp_path}/baseline has no summary.json, and is not compared with: its job failed, or comes later"
    ]
    assert find(str(base), tmp_path / "run", in_sweep=True) == str(base)
    assert find(str(base), base) is None  # the job that is the baseline
    assert find(None, tmp_path) is None
    with pytest.raises(UserError, match="has no summary.json"):
        find(f"{tmp_path}/baseline", tmp_path / "run")


def test_warnings_are_logged_at_the_end_and_written(go: Go, folder: Path, teacher: Path) -> None:
    """A student of all layers, of a class of its own, and an existing one begin as their teacher."""
    same = "teacher and student had the same weights before training, so that soft targets teach nothing"
    still = "the student hardly moved: its weights changed by 0 of their size; raise optimizer.lr, or train longer"
    students = {
        "all": ("student=layers", "student.layers=[0,1,2,3]"),
        "hf": ("student=hf", f"student.name={teacher}"),
    }
    for name, student in students.items():
        done = go(name, *student, "optimizer.lr=0", "trainer.max_steps=1")
        assert done.code == 0, done.err
        warned = summary(folder / name)["verdict"]["warnings"]
        assert [warning.partition(";")[0] for warning in warned] == [same, still.partition(";")[0]]
        assert all(f"[WARNING] - {warning}" in done.out for warning in warned)
        line = summary(folder / name)["verdict"]["line"]
        assert line.startswith("kept 100.0 ± 0.0 % of the teacher's masked accuracy (0.")
        assert line.endswith("; cross-entropy 0.000 ± 0.000 nats below the cut student (no clear difference)") is (
            name == "all"
        )


def test_a_teacher_that_is_worse_than_its_student_is_named(
    go: Go, folder: Path, save_teacher: Callable[..., Path]
) -> None:
    random_one = f"teacher.name={save_teacher('bert', num_layers=4)}"
    done = go("worse", random_one, "optimizer.lr=0.02", "trainer.max_steps=30", "objective.alpha_mlm=50")
    assert done.code == 0, done.err
    (warned,) = summary(folder / "worse")["verdict"]["warnings"]
    assert "nats above its student's, so that soft targets teach little; set objective=mlm, data.packing" in warned


def test_a_run_that_is_not_scored_has_no_numbers(go: Go, folder: Path) -> None:
    done = go("blind", "trainer.max_steps=1", "+trainer.limit_val_batches=0")
    assert done.out.splitlines()[-1] == "verdict on held-out text: not scored"
    said = summary(folder / "blind")["verdict"]
    assert {name for name, value in said.items() if value} == {"line"}
    assert read_rows(folder / "blind", "val") is None


@pytest.mark.parametrize(("rate", "read"), [("0.15", True), ("[[0,0.3],[1,0.15]]", False)])
def test_training_losses_under_a_masking_rate_that_changes_are_no_curve(
    rate: str, read: bool, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def spy(**given: Any) -> list[str]:
        seen.append({name for name, curve in given["curves"].items() if curve})
        return []

    monkeypatch.setattr(distilkit.summary, "find_faults", spy)
    done = go(f"rate-{read}", f"data.masking.mlm_probability={rate}", "logger=csv", "trainer.max_steps=1")
    assert done.code == 0, done.err
    assert [("train/loss_ce" in names, "val/nll" in names) for names in seen] == [(read, True)]


def test_blocks_that_ranks_share_count_once() -> None:
    """With fewer blocks than ranks, each rank scores all of them."""
    blocks = {"ids": torch.tensor([7, 3, 7, 3]), "nll": torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64)}
    rows = distilkit.summary._rows(blocks)
    assert rows is not None
    assert (rows.ids.tolist(), rows.sums["nll"].tolist()) == ([3, 7], [2.0, 1.0])
