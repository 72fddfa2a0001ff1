"""GLUE's test sets and the files of its leaderboard, for all eleven names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import distilkit.evaluate.__main__
from distilkit.errors import UserError
from distilkit.evaluate.leaderboard import write_submission
from jobs import call, only, write_rows

PAIR = "index\tsentence1\tsentence2"
LAYOUTS = {  # the task, the file, its header, a row, and what the leaderboard takes for the second class
    "CoLA": ("cola", "CoLA/test.tsv", "index\tsentence", '{i}\tone "two', "1"),
    "SST-2": ("sst2", "SST-2/test.tsv", "index\tsentence", "{i}\tone", "1"),
    "MRPC": ("mrpc", "MRPC/test.tsv", "index\t#1 ID\t#2 ID\t#1 String\t#2 String", "{i}\t7\t8\tone\ttwo", "1"),
    "STS-B": (
        "stsb",
        "STS-B/test.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
        "{i}\tm\tf\t2012\t1\tn\tn\tone\ttwo",
        "3.142",
    ),
    "QQP": ("qqp", "QQP/test.tsv", "id\tquestion1\tquestion2", "{i}\tone\ttwo", "1"),
    "MNLI-m": ("mnli", "MNLI/test_matched.tsv", PAIR, "{i}\tone\ttwo", "neutral"),
    "MNLI-mm": ("mnli", "MNLI/test_mismatched.tsv", PAIR, "{i}\tone\ttwo", "neutral"),
    "QNLI": ("qnli", "QNLI/test.tsv", "index\tquestion\tsentence", "{i}\tone\ttwo", "not_entailment"),
    "RTE": ("rte", "RTE/test.tsv", PAIR, "{i}\tone\ttwo", "not_entailment"),
    "WNLI": ("wnli", "WNLI/test.tsv", PAIR, "{i}\tone\ttwo", "1"),
    "AX": ("mnli", "AX/AX.tsv", PAIR, "{i}\tone\ttwo", "neutral"),
}


def built(task: str, *overrides: str) -> Any:
    with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
        cfg = compose("evaluate", ["model=m", f"task={task}", "task.submission=true", *overrides])
    return instantiate(cfg.task)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    for _, file, header, row, _ in LAYOUTS.values():
        (folder / file).parent.mkdir(exist_ok=True)
        lines = [header, *(row.format(i=index) for index in range(3))]
        (folder / file).write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_test_set_is_read_and_answered_as_the_leaderboard_says(name: str, glue: Path, tmp_path: Path) -> None:
    task_name, *_, answer = LAYOUTS[name]
    task = built(task_name, f"task.data_dir={glue}")
    found = task.unlabelled_examples()
    assert set(found) == {each for each, (theirs, *_) in LAYOUTS.items() if theirs == task_name}
    examples = found[name]
    assert len(examples) == 3
    assert len(examples[0].texts) == (1 if name in ("CoLA", "SST-2") else 2)
    number = torch.tensor([3.14159]) if task_name == "stsb" else torch.eye(len(task.labels or []))[1]
    said = task.predictions([(number,)] * 3, [], examples)
    write_submission(tmp_path, name, said, ids=task.head.get("label2id"))
    expected = ["index\tprediction", *(f"{index}\t{answer}" for index in range(3)), ""]
    assert (tmp_path / f"{name}.tsv").read_text("utf-8").split("\n") == expected


def test_the_hub_has_the_same_test_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        import datasets

        asked.append((names[1], settings["split"]))
        columns = ("sentence", "sentence1", "sentence2", "question", "question1", "question2", "premise", "hypothesis")
        return datasets.Dataset.from_dict({column: ["one"] for column in columns})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tasks = dict.fromkeys(task for task, *_ in LAYOUTS.values())
    found = [name for task in tasks for name in built(task).unlabelled_examples()]
    assert sorted(found) == sorted(LAYOUTS)
    matched = [("mnli", "test_matched"), ("mnli", "test_mismatched"), ("ax", "test")]
    assert sorted(asked) == sorted([(task, "test") for task in tasks if task != "mnli"] + matched)


def test_numbers_are_clipped_to_those_of_stsb(tmp_path: Path) -> None:
    write_submission(tmp_path / "new", "STS-B", [-0.2, 5.7, 2.0, 1.23456], ids=None)
    lines = (tmp_path / "new" / "STS-B.tsv").read_text("utf-8").splitlines()
    assert lines[1:] == ["0\t0.000", "1\t5.000", "2\t2.000", "3\t1.235"]


def test_a_row_that_cannot_be_read_is_never_left_out(glue: Path, tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tone\n1\n", "utf-8")
    with pytest.raises(UserError, match=r"1 of 2 rows cannot be used; the first: line 3.*Fix the file; a leaderboard"):
        built("sst2", f"task.data_dir={tmp_path}", "task.skip_malformed=true").unlabelled_examples()
    with pytest.raises(UserError, match="task xnli names no test set; set task.submission=false"):
        built("xnli", f"task.data_dir={tmp_path}").unlabelled_examples()
    alone = built("mnli", f"task.data_dir={glue}", "task.files.tests.AX=null").unlabelled_examples()
    assert set(alone) == {"MNLI-m", "MNLI-mm"}


def test_the_command_writes_the_file_next_to_the_scores(save_teacher: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "glue" / "SST-2")
    given = [f"model={save_teacher('distilbert', num_layers=1)}", "name=mine", "task=sst2", "task.max_length=60"]
    given += [f"task.data_dir={folder.parent}", "trainer=cpu", "trainer.enable_progress_bar=false", "finetune.epochs=1"]
    assert call(distilkit.evaluate.__main__.main, *given, cwd=tmp_path).code == 0
    missing = call(distilkit.evaluate.__main__.main, *given, "task.submission=true", cwd=tmp_path)
    assert (missing.code, "has 0 files 'test.tsv'" in missing.err) == (1, True), missing.err
    (folder / "test.tsv").write_text("index\tsentence\n" + "".join(f"{i}\tba be\n" for i in range(5)), "utf-8")
    for again in (False, True):  # it is written for a job that was recorded without it
        done = call(distilkit.evaluate.__main__.main, *given, "task.submission=true", cwd=tmp_path)
        assert done.code == 0, done.err
        assert ("already scored" in done.out + done.err) == again
    lines = only(tmp_path, "outputs/**/submission/SST-2.tsv").read_text("utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", *map(str, range(5))]
    assert {line.split("\t")[1] for line in lines[1:]} < {"0", "1"}
