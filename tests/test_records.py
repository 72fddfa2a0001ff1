"""The files that runs and scores leave: read back, found below folders, and labelled."""

import json
from pathlib import Path

import numpy as np
import pytest

from distilkit.errors import UserError
from distilkit.records import (
    Rows,
    distinct,
    find_runs,
    model_name,
    read_file,
    read_results,
    read_rows,
    read_runs,
    run_label,
    write_results,
    write_rows,
)
from scores import ABLATED, AFTER, glue, perplexity, speed, write_run, write_training


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    results = [*glue(seeds=[1]), speed("bert", 33.0), perplexity("bert", 16.3)]
    write_results(tmp_path / "a", results)
    assert read_results([tmp_path]) == results
    assert json.loads((tmp_path / "a" / "results.json").read_text("utf-8"))["format"] == 2


def test_results_of_the_first_format_are_read_and_later_ones_refused(tmp_path: Path) -> None:
    write_results(tmp_path, [speed("bert", 33.0)])
    file = tmp_path / "results.json"
    content = json.loads(file.read_text("utf-8"))
    assert "folder" not in content["results"][0]
    for version in (1, 3):
        file.write_text(json.dumps(content | {"format": version}), "utf-8")
        if version == 1:
            (old,) = read_file(file)
            assert (old.name, old.folder, read_rows(tmp_path, "dev")) == ("bert", str(tmp_path), None)
        else:
            with pytest.raises(UserError, match="has format 3, this distilkit reads 1 and 2; score the model again"):
                read_file(file)


def some_rows() -> Rows:
    return Rows(
        ids=np.array(["q1", "q2", "q3"]),
        gold=np.array([0, 1, 1]),
        said=np.array([0, 0, 1]),
        logits=np.array([[1.5, 0], [2, -1], [0, 1]], dtype=np.float16),
        sums={"f1": np.array([1.0, 0.25, 0.5]), "exact_match": np.array([1.0, 0.0, 0.0])},
    )


def assert_equal_rows(one: Rows | None, other: Rows) -> None:
    assert one is not None
    for name in ("ids", "gold", "said", "logits"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == theirs.dtype and np.array_equal(mine, theirs))
    assert {name: part.tolist() for name, part in one.sums.items()} == {
        name: part.tolist() for name, part in other.sums.items()
    }


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    bare = Rows(ids=np.arange(2), gold=np.array([0.5, 2.0]), said=np.array([0.25, 1.0]))
    write_rows(tmp_path / "new", "dev", some_rows())
    write_rows(tmp_path / "new", "test", bare)
    assert_equal_rows(read_rows(tmp_path / "new", "dev"), some_rows())
    assert_equal_rows(read_rows(tmp_path / "new", "test"), bare)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["rows-dev.npz", "rows-test.npz"]


def test_rows_are_taken_by_their_places_as_often_as_each_is_given() -> None:
    taken = some_rows().take(np.array([2, 2, 0]))
    assert (len(taken), taken.ids.tolist(), taken.gold.tolist()) == (3, ["q3", "q3", "q1"], [1, 1, 0])
    assert taken.logits.tolist() == [[0, 1], [0, 1], [1.5, 0]]
    assert taken.sums["f1"].tolist() == [0.5, 0.5, 1.0]


def test_rows_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    write_rows(tmp_path, "dev", some_rows())
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_rows(tmp_path, "dev", Rows(ids=np.array([{}, []], dtype=object)))
    assert_equal_rows(read_rows(tmp_path, "dev"), some_rows())


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other"])
def test_damaged_rows_are_named(damage: str, tmp_path: Path) -> None:
    write_rows(tmp_path, "dev", some_rows())
    file = tmp_path / "rows-dev.npz"
    content = file.read_bytes()
    if damage == "other":
        with file.open("wb") as stream:
            np.savez(stream, something=np.arange(3))
    else:
        flipped = content[:60] + bytes(255 - byte for byte in content[60:70]) + content[70:]  # of compressed bytes
        cut = content[: len(content) // 2]
        file.write_bytes({"cut": cut, "flipped": flipped, "empty": b"", "text": b"no archive"}[damage])
    with pytest.raises(UserError, match=r"rows-dev\.npz is damaged \(.*\); delete it and score the model again"):
        read_rows(tmp_path, "dev")


def test_runs_are_read_by_number_then_in_the_order_they_ended_and_unfinished_ones_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, "distilled", ["x=d"], order=1)
    write_run(tmp_path, "10", ["x=b"], order=2)
    write_run(tmp_path, "baseline", ["x=e"], order=3)
    write_run(tmp_path, "2", ["x=c"], order=4)
    (tmp_path / "3" / "checkpoints").mkdir(parents=True)
    runs = read_runs(tmp_path)
    assert [run["folder"] for run in runs] == [str(tmp_path / job) for job in ("2", "10", "distilled", "baseline")]
    assert [run["label"] for run in runs] == ["x=c", "x=b", "x=d", "x=e"]
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


def test_an_override_may_refer_to_the_config_of_its_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "only", ["seed=1", "a=${output_dir}/x"])
    assert run_label(folder, {"seed=1"}) == "a=${output_dir}/x"


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


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("2026-11-25_21-49-13-801972", "student"),
        ("0", "student-0"),
        ("half_depth", "half_depth"),
        ("2026", "student-2026"),
    ],
)
def test_a_model_goes_by_the_name_of_its_run_where_the_folder_is_called_by_a_date_or_a_number(
    folder: str, name: str, tmp_path: Path
) -> None:
    write_run(tmp_path, folder, ["seed=1"], name="student")
    (tmp_path / folder / "student").mkdir()
    assert model_name(str(tmp_path / folder / "student")) == name
    (tmp_path / folder / "summary.json").unlink()
    assert model_name(str(tmp_path / folder / "student")) == folder


@pytest.mark.parametrize("overrides", [["seed=1", "x=a"], []])
def test_a_run_alone_in_a_folder_with_a_date_goes_by_its_name(overrides: list[str], tmp_path: Path) -> None:
    write_run(tmp_path, "2026-11-25_21-49-13-801972", overrides, name="student")
    assert [run["label"] for run in find_runs([tmp_path])] == ["student"]


def test_a_run_whose_neighbours_failed_goes_by_what_it_does_not_share_with_them(tmp_path: Path) -> None:
    write_run(tmp_path, "0", ["name=a", "objective.temperature=1"])
    (write_run(tmp_path, "1", ["name=a", "objective.temperature=-2"]) / "summary.json").unlink()
    assert [run["label"] for run in read_runs(tmp_path)] == ["objective.temperature=1"]
