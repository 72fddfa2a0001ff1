"""The ablation, from its command to its report."""

from collections.abc import Callable
from pathlib import Path

import pytest

from distilkit.card import add_scores
from distilkit.results import read_results
from jobs import QUIET, SMALL, only, spawn
from test_evaluate import write_rows
from test_published import results

ROWS = ("full", "no_ce", "no_mlm", "no_cos", "random_init")


@pytest.fixture
def command(save_teacher: Callable[..., Path], text_file: Path, tmp_path: Path) -> list[str]:
    return [
        *("-m", "distilkit.train", "sweep=ablation", "teacher=hf", f"teacher.name={save_teacher('bert')}"),
        *SMALL,
        *QUIET,
        f"data.corpus.paths={text_file}",
        f"cache_dir={tmp_path}/cache",
        "trainer.max_steps=2",
        "ablation.tasks=[sst2,rte]",
    ]


SHORT = 'ablation.overrides=["trainer.enable_progress_bar=false","finetune.epochs=1","finetune.lr=1e-3"]'


@pytest.mark.slow
def test_the_sweep_ends_in_a_report_of_what_each_term_is_worth(command: list[str], tmp_path: Path) -> None:
    data = tmp_path / "glue"
    write_rows(data / "SST-2")
    write_rows(data / "other")
    (data / "RTE").mkdir()
    for name in ("train", "dev"):
        lines = (data / "other" / f"{name}.tsv").read_text("utf-8").splitlines()[1:]
        pairs = [f"{line.split(chr(9))[0]}\tba\t{line[-1]}" for line in lines]
        (data / "RTE" / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *pairs]) + "\n", "utf-8")
    done = spawn(*command, SHORT, f"ablation.data_dir={data}", "hydra.sweep.dir=ablation", cwd=tmp_path)
    assert done.code == 0, done.err
    sweep = tmp_path / "ablation"
    found = read_results([sweep / "scores"])
    assert {(result.name, result.task) for result in found} == {
        (name, task) for name in ("teacher", *ROWS) for task in ("sst2", "rte")
    }
    text = (sweep / "report" / "report.md").read_text("utf-8")
    for name in ROWS:
        assert name in text
    assert "-2.96" in text  # the paper's change without soft targets
    assert "report: " in done.out
    card = (only(sweep, "0/student") / "README.md").read_text("utf-8")
    assert "## Scores" in card and "SST-2" in card


def test_what_is_wrong_with_a_task_is_said_before_anything_is_trained(command: list[str], tmp_path: Path) -> None:
    done = spawn(*command, SHORT, f"ablation.data_dir={tmp_path}/nowhere", cwd=tmp_path)
    assert done.code == 1
    assert "nowhere is no folder" in done.err
    assert not list(tmp_path.glob("outputs/**/checkpoints"))


def test_a_key_that_is_none_of_the_ablations_is_named(command: list[str], tmp_path: Path) -> None:
    done = spawn(*command, "+ablation.task=rte", cwd=tmp_path)
    assert done.code == 1
    assert "ablation.task is unknown; ablation takes tasks, data_dir, seeds, overrides" in done.err


def test_scores_come_into_the_card_once_and_only_into_our_cards(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert not add_scores(tmp_path, results(rte=[0.6]))
    card.write_text("# Someone else's\n", "utf-8")
    assert not add_scores(tmp_path, results(rte=[0.6]))
    assert card.read_text("utf-8") == "# Someone else's\n"
    card.write_text("---\ntags: [knowledge-distillation, distilkit]\n---\n# mine\n\nText.\n", "utf-8")
    assert add_scores(tmp_path, results(rte=[0.6]))
    assert add_scores(tmp_path, results(rte=[0.7, 0.7], sst2=[0.9]))
    text = card.read_text("utf-8")
    assert text.count("## Scores") == 1
    assert "70.0" in text and "90.0" in text and "60.0" not in text
    assert text.startswith("---\ntags") and "Text." in text
