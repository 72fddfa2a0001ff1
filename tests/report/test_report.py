"""The report: whom it takes for the teacher, and files that a person can open anywhere."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from hydra import compose, initialize_config_module

from distilkit.errors import UserError
from distilkit.records import Result, find_runs
from distilkit.report import __main__ as report
from distilkit.report import ablation, published, quality, retention, runs
from distilkit.report.frame import gather
from distilkit.report.speed import speed_tables
from distilkit.watch import tracking
from jobs import call
from scores import every_kind, glue, result, run, speed, write_training

OPTIONS: dict[str, Any] = {"teacher": None, "baseline": None, "title": "our report", "wandb": None}
TABLES = [
    "ablation",
    "cost",
    "each_metric",
    "finetuning",
    "published",
    "published_speed",
    "quality",
    "retention",
    "speed",
    "summary",
    "training",
]
PLOTS = ["held_out_loss", "quality_latency", "quality_parameters", "retention"]


@pytest.fixture(scope="module")
def written(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report over all of it."""
    out = tmp_path_factory.mktemp("written") / "report"
    folders = f"runs=[{outputs}/evaluate,{outputs}/ablation]"
    done = call(
        report.main, folders, f"out={out}", "teacher=bert", "baseline=baseline", cwd=tmp_path_factory.mktemp("cwd")
    )
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"report": str(out / "report.md"), "models": 9, "training_runs": 5}
    return out


def write(results: list[Result], out: Path, *, runs: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return report.write_report(results, runs or [], out=out, **{**OPTIONS, **options}).read_text("utf-8")


def test_the_report_has_all_its_files(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == sorted(
        [f"{name}.csv" for name in TABLES] + [f"{name}.png" for name in PLOTS] + ["report.html", "report.md"]
    )


def test_the_tables_of_the_report_hold_the_numbers(written: Path) -> None:
    text = (written / "report.md").read_text("utf-8")
    assert re.search(r"^\| student \| 66,000,000 \| 76\.6 \|", text, re.MULTILINE)
    assert "student keeps 96.9 % of bert, and baseline, which was trained without a teacher, 89.2 %: no verdict" in text
    assert "| no_ce | 66.0 | -4.00 | 4.200 | +0.200 | -2.96 | no interval |" in text
    for name in PLOTS:
        assert f"]({name}.png)" in text
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert line.endswith("|")


def test_csv_files_read_back(written: Path) -> None:
    read = {name: list(csv.DictReader((written / f"{name}.csv").open(encoding="utf-8"))) for name in TABLES}
    assert all(read.values())
    kept = {(row["model"], row["task"]): float(row["percent"]) for row in read["retention"]}
    assert kept["student", "GLUE average"] == pytest.approx(100 * 6.89 / 7.11)
    assert kept["student", "perplexity"] == pytest.approx(100 * 16.3 / 21.1)
    scores = {(row["model"], row["task"]): row for row in read["quality"]}
    assert scores["student", "rte"]["seeds"] == "3"
    assert float(scores["student", "rte"]["lowest"]) == pytest.approx(0.57)
    assert scores["student", "rte"]["settings"] == "lr=2e-05, batch_size=32"


class Links(HTMLParser):
    """Collect the tags of a page, and what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cells: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.cells.append(0)
        elif tag in ("td", "th"):
            self.cells[-1] += 1


def test_the_page_needs_no_other_file(written: Path) -> None:
    text = (written / "report.html").read_text("utf-8")
    page = Links()
    page.feed(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(page.links) == len(PLOTS)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"@import|url\(", text)
    assert page.tags.count("table") == len(TABLES)


@pytest.mark.parametrize("name", PLOTS)
def test_plots_are_pictures_of_a_readable_size(name: str, written: Path) -> None:
    height, width = matplotlib.image.imread(written / f"{name}.png").shape[:2]
    assert 700 < width < 2500
    assert 300 < height < 2500


@pytest.mark.parametrize(
    "name", ["_a_ ~b~", "a|b", "<script>alert(1)</script>", "$x_1", "_hidden", "a & b", "x](http://y)", "a\\|b", "é\n2"]
)
def test_a_name_of_any_letters_does_no_harm(name: str, tmp_path: Path) -> None:
    results = [result("bert", task, 0.8) for task in ("rte", "cola")]
    results += [result(name, task, 0.7) for task in ("rte", "cola")]
    results += [speed("bert", 30.0), speed(name, 20.0)]
    folder = write_training(tmp_path / "sweep", "full", [9.0, 4.0])
    runs = [{**read, "label": name} for read in find_runs([folder])]
    text = write(results, tmp_path / "out", runs=runs, teacher="bert", title=name)
    assert "<" not in text
    assert not re.search(r"(?<!\\)\]\(http", text)
    assert not re.search(r"(?<!\\)~|(?<![\w\\])_", text)
    widths: dict[bool, set[int]] = {True: set(), False: set()}
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines}) <= 1, block
        widths[bool(lines)].add(len(lines))
    page = Links()
    page.feed((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert "script" not in page.tags
    assert len(page.links) == text.count(".png)")
    (row,) = (
        row
        for row in csv.DictReader((tmp_path / "out" / "retention.csv").open(newline="", encoding="utf-8"))
        if row["task"] == "rte"
    )
    assert row["model"] == name
    assert (tmp_path / "out" / "quality_latency.png").stat().st_size > 1000


def test_a_later_report_leaves_nothing_of_the_earlier_one_but_a_users_own_files(tmp_path: Path) -> None:
    write(every_kind(), tmp_path / "out", teacher="bert")
    (tmp_path / "out" / "notes.txt").write_text("mine", "utf-8")
    write([result("m", "rte", 0.7)], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("notes.txt", "report.md", "report.html", "quality.csv", "published.csv", "each_metric.csv", "cost.csv"),
        "finetuning.csv",
    }


def test_the_page_begins_with_the_command_the_date_the_version_and_the_machine(written: Path) -> None:
    for name in ("report.md", "report.html"):
        first = (written / name).read_text("utf-8").partition("Summary")[0]
        assert re.search(r"python .+ · 20\d\d-\d\d-\d\d \d\d:\d\d\+00:00 · distilkit \d\S* · .+ cores", first)


def test_details_are_folded_and_the_result_comes_first(written: Path) -> None:
    text = (written / "report.html").read_text("utf-8")
    titles = re.findall(r"<(h2|details><summary)>([^<]+)<", text)
    assert [title for _, title in titles][:3] == ["Summary", "What is kept of the teacher", "Quality"]
    folded = [title for tag, title in titles if tag != "h2"]
    assert folded[0] == "One pass over STS-B, next to the published"
    assert folded[1:] == ["How it was fine-tuned", "Each metric", "Cost of fine-tuning and scoring"]


def test_training_runs_alone_make_a_report_too(outputs: Path, tmp_path: Path) -> None:
    text = write([], tmp_path / "out", runs=find_runs([outputs]))
    assert "## Training runs" in text
    assert "## Ablation" in text
    assert "## Quality" not in text
    assert "teacher=" not in text


def test_the_folder_of_a_training_run_is_no_place_for_a_report(tmp_path: Path) -> None:
    folder = write_training(tmp_path, "full", [9.0, 4.0])
    files = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with pytest.raises(
        UserError, match=r"out='.*full' is the folder of a training run; give another one, such as .*report"
    ):
        write([result("m", "rte", 0.7)], folder)
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == files


def test_timings_under_another_name_are_of_the_row_of_their_weights(tmp_path: Path) -> None:
    timed = [speed("my-bert", 33.0, sha256="bert0000123456789"), speed("student", 20.0)]
    text = write([*glue(seeds=[1]), *timed], tmp_path / "out", teacher="bert")
    assert "my-bert" not in text
    assert "| bert (teacher) | cpu |" in text


def test_why_nothing_is_kept_of_a_known_teacher_is_said(tmp_path: Path) -> None:
    text = write([result("bert", "rte", 0.7), result("student", "cola", 0.6)], tmp_path / "out", teacher="bert")
    assert "What is kept of bert is left out. No other row has a score on a task" in text


def roles(results: list[Result], runs: list[dict[str, Any]], **names: str) -> tuple[str | None, list[str]]:
    given, notes = report.assign_roles(gather(results), runs, **{"teacher": None, "baseline": None, **names})
    return given.teacher, notes


@pytest.mark.parametrize(
    ("said", "row"),
    [
        ({"name": "someone/bert"}, "someone/bert"),  # the hub id is the row
        ({"name": "outputs/bert/student"}, "bert"),  # the folder that was scored
        ({"name": "elsewhere", "sha256": "bert0000123456789"}, "bert"),  # the same weights
        ({"name": "elsewhere", "sha256": "tensors of bert"}, "bert"),  # the same, loaded
        ({"name": "outputs/demo/now/bert/student"}, "bert"),  # the stage that made it
        ({"name": "outputs/evaluate/bert/squad/seed1-abc/model"}, "bert"),  # fine-tuned for a second distillation
    ],
)
def test_the_teacher_is_the_row_that_a_training_run_names(said: dict[str, str], row: str) -> None:
    loaded = {"weights_sha256": f"tensors of {row}"}
    results = [result("student", "rte", 0.5), result(row, "rte", 0.6, details=loaded)]
    assert roles(results, [run("full", 4.0, teacher=said)]) == (row, [])


def test_the_teacher_of_a_second_distillation_is_one_too_and_a_row_of_that_name() -> None:
    second = result("student", "rte", 0.5, teacher={"name": "bert"})
    assert roles([second, result("bert", "rte", 0.6)], [])[0] == "bert"
    assert roles([result("student", "rte", 0.5), result("teacher", "rte", 0.6)], [])[0] == "teacher"


def test_without_one_teacher_the_report_says_how_to_set_it(tmp_path: Path) -> None:
    results = [result("a", "rte", 0.5), result("b", "rte", 0.6)]
    assert roles(results, [])[1] == [
        "What is kept of the teacher is left out: no row is known as the teacher; set teacher=<one of a, b>."
    ]
    both = [run(name, 4.0, teacher={"name": name}) for name in "ab"]
    given, (line,) = roles(results, both)
    assert given is None
    assert "2 rows may be the teacher (a, b)" in line
    text = write(results, tmp_path / "out")
    assert "set teacher=&lt;one of a, b&gt;." in text
    assert "## What is kept" not in text


def test_the_options_of_the_command_are_those_of_a_report() -> None:
    with initialize_config_module(config_module="distilkit.conf.evaluate", version_base="1.3"):
        options = compose("report")
    assert options == {"runs": None, "out": "report", **OPTIONS, "title": "distilkit report"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"runs is not set: python -m distilkit\.report 'runs=\[outputs/evaluate,outputs/demo\]'"),
        (["runs=[]"], r"runs is not set"),
        (["runs=[nowhere]"], r"nowhere does not exist; give the folder of a run"),
        (
            ["runs=empty"],
            r"there is nothing to report; score a model with python -m distilkit\.evaluate model=<folder> task",
        ),
        (
            ["runs=[{}]", "teacher=berd"],
            r"teacher='berd' is no row of the report; its rows are student, bert, baseline",
        ),
        (["runs={}", "baseline=berd"], r"baseline='berd' is no row of the report"),
        (["runs={}", "teacher=bert", "baseline=bert"], r"teacher and baseline are both 'bert'"),
        (["runs={}", "out=file"], r"out='file' is a file; give the name of a folder"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(
    arguments: list[str], message: str, outputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("", "utf-8")
    done = call(report.main, *(argument.format(outputs) for argument in arguments), cwd=tmp_path)
    assert done.code == 1
    assert re.match(f"error: .*{message}", done.err)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}


def test_tables_and_plots_go_to_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: dict[str, Any] = {}
    build: Callable[..., Any] = tracking.wandb_logger

    def watched(**settings: Any) -> Any:
        logger = build(**settings)
        log = logger.experiment.log
        monkeypatch.setattr(
            logger.experiment, "log", lambda data, *args, **kw: (logged.update(data), log(data, *args, **kw))
        )
        return logger

    monkeypatch.setattr(tracking, "wandb_logger", watched)
    out = tmp_path / "out"
    write(every_kind(), out, teacher="bert", wandb="distilkit-tests")
    kinds = {name: type(value[0] if isinstance(value, list) else value).__name__ for name, value in logged.items()}
    assert {name: kind for name, kind in kinds.items() if name.startswith("tables/")} == {
        f"tables/{name}": "Table" for name in TABLES if name != "training"
    }
    assert {name: kind for name, kind in kinds.items() if name.startswith("plots/")} == {
        f"plots/{name}": "Image" for name in PLOTS if name != "held_out_loss"
    }
    table = logged["tables/quality"]
    assert table.columns[:3] == ["model", "parameters", "GLUE average"]
    assert table.data[0][0] == "bert (teacher)"
    assert list((out / "wandb").glob("offline-run-*"))


def test_tables_without_anything_to_show_are_left_out() -> None:
    none = gather([])
    made = [quality.quality_table(none), retention.retention_table(none), quality.metrics_table(none)]
    made += [published.published_table(none), *speed_tables(none)]
    made += [ablation.ablation_table(none, []), runs.training_table([], none), runs.cost_table(none)]
    assert made == [None] * len(made)


def test_the_report_imports_neither_torch_nor_what_trains() -> None:
    code = (
        "import sys, distilkit.report.__main__\n"
        "heavy = {'torch', 'transformers', 'pytorch_lightning', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
