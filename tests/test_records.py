"""The files that runs and scores leave: read back, found below folders, and labelled."""

import json
from pathlib import Path

import pytest

from distilkit.errors import UserError
from distilkit.records import distinct, find_runs, read_results, read_runs, run_label, write_results
from scores import ABLATED, AFTER, glue, perplexity, speed, write_run, write_training


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    results = [*glue(seeds=[1]), speed("bert", 33.0), perplexity("bert", 16.3)]
    write_results(tmp_path / "a", results)
    assert read_results([tmp_path]) == results
    assert json.loads((tmp_path / "a" / "results.json").read_text("utf-8"))["format"] == 2


def test_runs_are_read_in_the_order_they_ended_and_unfinished_ones_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, "2", ["x=c"], order=1)
    write_run(tmp_path, "0", ["x=a"], order=2)
    write_run(tmp_path, "10", ["x=b"], order=3)
    (tmp_path / "3" / "checkpoints").mkdir(parents=True)
    runs = read_runs(tmp_path)
    assert [run["folder"] for run in runs] == [str(tmp_path / job) for job in ("2", "0", "10")]
    assert [run["label"] for run in runs] == ["x=c", "x=a", "x=b"]
    assert runs[0]["after"] == AFTER
    assert runs[0]["tokens_seen"] == 4096


def test_a_summary_that_is_not_asked_for_is_not_read_and_names_runs_all_the_same(tmp_path: Path) -> None:
    one = write_run(tmp_path, "0", ["seed=1", "x=a"])
    (write_run(tmp_path, "1", ["seed=1", "x=b"]) / "summary.json").write_text("{", "utf-8")
    assert [run["label"] for run in read_runs(tmp_path, only=[str(one)])] == ["x=a"]


def test_an_empty_sweep_has_no_runs(tmp_path: Path) -> None:
    assert read_runs(tmp_path) == []


def test_a_run_is_named_by_what_not_all_runs_share(tmp_path: Path) -> None:
    shared = ["teacher=hf", "teacher.name=/models/bert", "trainer=cpu"]
    write_run(tmp_path, "0", [*shared, "objective.temperature=1", "seed=1"], order=0)
    write_run(tmp_path, "1", [*shared, "objective.temperature=2", "seed=1"], order=1)
    write_run(tmp_path, "2", [*shared, "objective.temperature=2", "seed=2"], order=2)
    assert [run["label"] for run in read_runs(tmp_path)] == [
        "objective.temperature=1, seed=1",
        "objective.temperature=2, seed=1",
        "objective.temperature=2, seed=2",
    ]


@pytest.mark.parametrize(
    ("override", "label"),
    [
        ("+experiment/demo=teacher", "teacher"),  # a stage
        ("+sweep/ablation=no_ce", "no_ce"),  # a row
        ("+trainer.deterministic=true", "trainer.deterministic=true"),
        ("objective.temperature=4", "objective.temperature=4"),
        ("data.corpus.paths=/texts/en.txt", "data.corpus.paths=/texts/en.txt"),
        ("+data.corpus.extra=/texts/en.txt", "data.corpus.extra=/texts/en.txt"),
        ("teacher=roberta-base", "teacher=roberta-base"),
    ],
)
def test_a_label_is_the_override_and_a_stage_is_its_name_alone(override: str, label: str, tmp_path: Path) -> None:
    assert run_label(write_run(tmp_path, "0", ["seed=1", override]), {"seed=1"}) == label


@pytest.mark.parametrize("overrides", [None, [], ["seed=1"]])
def test_a_run_without_overrides_of_its_own_is_named_by_its_folder(overrides: list[str] | None, tmp_path: Path) -> None:
    assert run_label(write_run(tmp_path, "only", overrides), {"seed=1"}) == "only"


def test_runs_are_found_below_folders_and_named_by_their_sweep(outputs: Path) -> None:
    runs = find_runs([outputs])
    assert sorted(run["label"] for run in runs) == sorted(ABLATED)
    (one,) = find_runs([outputs / "ablation" / "now" / "no_ce"])
    assert one["label"] == "no_ce"


def test_a_run_by_itself_is_not_named_by_all_its_overrides(tmp_path: Path) -> None:
    folder = write_training(tmp_path, "now", [9.0, 4.0])
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text("- teacher=hf\n- trainer.max_steps=3\n", "utf-8")
    (one,) = find_runs([folder])
    assert one["label"] == f"{one['name']}/now"


def test_folders_within_each_other_count_once(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outputs)
    given = [Path("evaluate"), outputs / "evaluate", outputs / "evaluate" / "0", outputs / "ablation"]
    assert distinct(given) == [(outputs / name).resolve() for name in ("evaluate", "ablation")]


def test_a_damaged_summary_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = write_training(tmp_path, "full", [9.0, 4.0])
    (folder / "summary.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match=r"a summary\.json below .* is damaged \(Expecting .*\); delete it"):
        find_runs([tmp_path])
    (folder / "summary.json").write_text('{"accuracy": 1}', "utf-8")
    with pytest.raises(
        UserError, match=r"full/summary\.json has no before, after, .* and was not written by distilkit\.train"
    ):
        find_runs([tmp_path])


def test_a_damaged_summary_beside_what_was_given_stops_nothing(tmp_path: Path) -> None:
    write_training(tmp_path, "full", [9.0, 4.0])
    damaged = write_training(tmp_path, "no_ce", [9.0, 4.0])
    (damaged / "summary.json").write_text("{", "utf-8")
    assert [run["label"] for run in find_runs([tmp_path / "full"])] == ["full"]
