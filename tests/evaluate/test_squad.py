"""SQuAD through the command line: learnt, written in the official layout, and distilled a second time."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import distilkit.evaluate.__main__
from distilkit.errors import UserError
from distilkit.evaluate.squad import QuestionTask
from distilkit.records import read_results
from jobs import Outcome, call, only
from tiny import WORDS

SETTINGS: dict[str, Any] = {
    "name": "squad",
    "max_length": 40,
    "doc_stride": 8,
    "n_best": 5,
    "max_answer_length": 4,
    "max_train_rows": None,
    "max_scored_rows": None,
    "data_dir": None,
    "hub": {"path": "nobody/nothing", "train": "train", "scored": "validation"},
    "files": {"train": "train-v1.1.json*", "scored": "dev-v1.1.json*"},
}


def write_squad(folder: Path) -> Path:
    """Write questions whose answer is the one word of the paragraph that ends in -al."""
    rng = random.Random(0)
    wanted = [word for word in WORDS if word.endswith("al")]
    others = [word for word in WORDS if not word.endswith("al")]
    for name, count in (("train", 300), ("dev", 60)):
        paragraphs = []
        for number in range(count):
            before, after = (" ".join(rng.choices(others, k=rng.randint(1, 6))) for _ in range(2))
            word = rng.choice(wanted)
            entry = {
                "id": f"{name}{number}",
                "question": "ba bi",
                "answers": [{"text": word, "answer_start": len(before) + 1}],
            }
            paragraphs.append({"context": f"{before} {word} {after}", "qas": [entry]})
        content = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{name}-v1.1.json").write_text(json.dumps(content), "utf-8")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squad(tmp_path_factory.mktemp("squad"))


@pytest.fixture
def score(files: Path, save_teacher: Callable[..., Path], tmp_path: Path) -> Callable[..., Outcome]:
    def run(*overrides: str, model_type: str = "distilbert") -> Outcome:
        return call(
            distilkit.evaluate.__main__.main,
            f"model={save_teacher(model_type, num_layers=2)}",
            "task=squad",
            f"task.data_dir={files}",
            "task.max_length=40",
            "task.doc_stride=8",
            "trainer=cpu",
            "trainer.enable_progress_bar=false",
            "finetune.lr=2e-3",
            "finetune.batch_size=16",
            "seed=1",
            *overrides,
            cwd=tmp_path,
        )

    return run


def test_answers_are_learnt_and_written_as_the_official_script_reads_them(
    score: Callable[..., Outcome], files: Path, tmp_path: Path
) -> None:
    done = score("finetune.epochs=6", "name=mine")
    assert done.code == 0, done.err
    (found,) = read_results([tmp_path])
    assert list(found.scores) == ["exact_match", "f1"]
    assert found.scores["exact_match"] > 0.8
    said = json.loads(only(tmp_path, "outputs/evaluate/mine/squad/*/predictions-dev.json").read_text("utf-8"))
    paragraphs = json.loads((files / "dev-v1.1.json").read_text("utf-8"))["data"][0]["paragraphs"]
    right = [said[entry["id"]] == entry["answers"][0]["text"] for part in paragraphs for entry in part["qas"]]
    assert len(said) == len(right) == 60
    assert sum(right) / 60 == pytest.approx(found.scores["exact_match"])


def test_a_second_distillation_runs_with_a_teacher_of_another_family(
    score: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert score("finetune.epochs=6", "name=teacher", model_type="bert").code == 0
    folder = only(tmp_path, "outputs/evaluate/teacher/squad/*/model")
    done = score(f"teacher={folder}", "distil.alpha_task=0", "distil.alpha_ce=1", "finetune.epochs=6", "name=student")
    assert done.code == 0, done.err
    (student,) = read_results([tmp_path / "outputs/evaluate/student"])
    assert student.scores["f1"] > 0.6  # from the teacher alone: the labels were given no weight
    assert student.teacher["name"] == str(folder)


def random_logits(*, length: int, width: int) -> tuple[torch.Tensor, ...]:
    """Return logits of a window of ``length`` tokens in a batch that is ``width`` wide, with wild ones on padding."""
    generator = torch.Generator().manual_seed(length)
    raw = torch.randn(2, 2, length, generator=generator)
    padded = torch.full((2, 2, width), 50.0)
    padded[:, :, :length] = raw
    mask = torch.zeros(2, width)
    mask[:, :length] = 1
    outputs = SimpleNamespace(start_logits=padded[0], end_logits=padded[1])
    return QuestionTask(**SETTINGS).logits(outputs, mask)


def test_padding_carries_no_mass() -> None:
    task = QuestionTask(**SETTINGS)
    targets = torch.tensor([[1, 2], [0, 3]])
    alone, padded = (random_logits(length=6, width=width) for width in (6, 11))
    teacher_alone = tuple(logits.roll(1, dims=1) for logits in alone)
    wide = torch.full((2, 5), -1e9)
    teacher_padded = tuple(torch.cat([logits, wide], dim=1) for logits in teacher_alone)
    torch.testing.assert_close(task.hard_loss(padded, targets), task.hard_loss(alone, targets))
    soft = task.soft_loss(padded, teacher_padded, temperature=2.0)
    torch.testing.assert_close(soft, task.soft_loss(alone, teacher_alone, temperature=2.0))
    assert soft > 0.1 and soft.isfinite()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 4.0])
def test_padding_is_finite_at_every_temperature(temperature: float) -> None:
    student, teacher = random_logits(length=6, width=9), random_logits(length=6, width=9)[::-1]
    assert QuestionTask(**SETTINGS).soft_loss(student, teacher, temperature=temperature).isfinite()


def test_the_soft_loss_is_the_mean_of_two_divergences() -> None:
    task = QuestionTask(**SETTINGS)
    student, teacher = random_logits(length=6, width=6), random_logits(length=6, width=6)[::-1]
    expected = 0.0
    for q, p in zip(student, teacher, strict=True):
        q, p = (q / 2).softmax(-1), (p / 2).softmax(-1)
        expected += 4 * float((p * (p.log() - q.log())).sum(-1).mean()) / 2
    assert float(task.soft_loss(student, teacher, temperature=2.0)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("key", ["max_length", "n_best", "max_answer_length", "max_train_rows"])
def test_limits_below_one_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"task.{key}=0, but it must be at least 1"):
        QuestionTask(**SETTINGS | {key: 0})


def test_the_files_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("", "utf-8")
    with pytest.raises(UserError, match="has 0 files 'train-v1.1.json\\*', where one is needed; it holds readme.txt"):
        QuestionTask(**SETTINGS | {"data_dir": str(tmp_path)}).train_examples()


def test_a_model_must_score_starts_and_ends() -> None:
    task = QuestionTask(**SETTINGS)
    task.check_head(SimpleNamespace(config=SimpleNamespace(num_labels=2)), name="mine")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="'mine' has 3 outputs a token, but task squad has 2; fine-tune it on this task"
    ):
        task.check_head(SimpleNamespace(config=SimpleNamespace(num_labels=3)), name="mine")  # type: ignore[arg-type]
