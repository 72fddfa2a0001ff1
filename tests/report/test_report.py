"""The report: what it reads, whom it takes for the teacher, and files that a person can open anywhere."""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from omegaconf import OmegaConf

from distilkit.errors import UserError
from distilkit.records import Result, write_results
from distilkit.report import __main__ as report
from distilkit.report import medians, plots, speed_tables, tables
from distilkit.report import page as pages
from distilkit.report.tables import Roles
from jobs import call
from scores import ABLATED, ROLES, ablated, glue, perplexity, result, run, speed

HEADER = "epoch,step,train/loss,val/nll,val/teacher_nll\n"
OPTIONS: dict[str, Any] = {"teacher": None, "baseline": None, "title": "our report", "wandb": None}


def write_training(sweep: Path, label: str, nlls: list[float], **fields: Any) -> Path:
    """Write what the report reads of a training run: summary.json, metrics.csv and the overrides that name it."""
    folder = sweep / label
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create([f"+sweep/ablation={label}"]), folder / ".hydra" / "overrides.yaml")
    teacher = {"name": "someone/bert", "revision": "main", "sha256": "0" * 64, "parameters": 110_000_000}
    record = run(label, nlls[-1], teacher=teacher, tokens_seen=90_000, optimizer_steps=90, layers=[0, 2], **fields)
    (folder / "summary.json").write_text(json.dumps(record), "utf-8")
    steps = [90 * index // (len(nlls) - 1) for index in range(len(nlls))]
    rows = [f"{'' if step == 0 else 0},{max(0, step - 1)},,{nll},3.5\n" for step, nll in zip(steps, nlls, strict=True)]
    (folder / "metrics.csv").write_text(HEADER + "0,9,5.0,,\n" + "".join(rows), "utf-8")
    return folder


def every_kind() -> list[Result]:
    """Three models on GLUE, WikiText-103 and SQuAD with a second distillation, timed, and an ablation."""
    squad = [
        result("bert", "squad", 0.85, scores={"exact_match": 0.81, "f1": 0.89}),
        result("student", "squad", 0.81, scores={"exact_match": 0.77, "f1": 0.85}),
        result(
            "student", "squad", 0.83, scores={"exact_match": 0.79, "f1": 0.87}, teacher={"name": "outputs/bert/squad"}
        ),
    ]
    timed = [speed("bert", 33.0), speed("student", 20.0), speed("baseline", 20.2)]
    return [*glue(), *squad, *timed, perplexity("bert", 16.3), perplexity("student", 21.1), *ablated()]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results of two jobs and a sweep of training runs."""
    folder = tmp_path_factory.mktemp("outputs")
    results = every_kind()
    write_results(folder / "evaluate" / "0", results[:40])
    write_results(folder / "evaluate" / "1", results[40:])
    for index, label in enumerate(ABLATED):
        write_training(folder / "ablation" / "now", label, [9.0, 6.0 + index / 5, 4.0 + index / 5])
    return folder


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


# ------------------------------------------------------------------------------ files

TABLES = [
    "ablation",
    "cost",
    "each_metric",
    "published",
    "published_speed",
    "quality",
    "retention",
    "speed",
    "training",
]
PLOTS = ["held_out_loss", "quality_latency", "quality_parameters", "retention"]


def test_the_report_has_all_its_files(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == sorted(
        [f"{name}.csv" for name in TABLES] + [f"{name}.png" for name in PLOTS] + ["report.html", "report.md"]
    )


def test_the_tables_of_the_report_hold_the_numbers(written: Path) -> None:
    text = (written / "report.md").read_text("utf-8")
    assert re.search(r"^\| student \| 66,000,000 \| 76\.6 \|", text, re.MULTILINE)
    assert "student keeps 96.9 % of bert, baseline, which was trained without a teacher, 89.2 %" in text
    assert "| no_ce | 66.0 | -4.00 | 4.200 | +0.200 | -2.96 | yes |" in text
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
    runs = [{**read, "label": name} for read in report.find_runs([folder])]
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
        *("notes.txt", "report.md", "report.html", "quality.csv", "published.csv", "each_metric.csv", "cost.csv")
    }


def test_training_runs_alone_make_a_report_too(outputs: Path, tmp_path: Path) -> None:
    text = write([], tmp_path / "out", runs=report.find_runs([outputs]))
    assert "## Training runs" in text
    assert "## Ablation" in text
    assert "## Quality" not in text
    assert "teacher=" not in text


# ---------------------------------------------------------------------------- reading


def test_runs_are_found_below_folders_and_named_by_their_sweep(outputs: Path) -> None:
    runs = report.find_runs([outputs])
    assert sorted(run["label"] for run in runs) == sorted(ABLATED)
    (one,) = report.find_runs([outputs / "ablation" / "now" / "no_ce"])
    assert one["label"] == "no_ce"


def test_a_run_by_itself_is_not_named_by_all_its_overrides(tmp_path: Path) -> None:
    folder = write_training(tmp_path, "now", [9.0, 4.0])
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text("- teacher=hf\n- trainer.max_steps=3\n", "utf-8")
    (one,) = report.find_runs([folder])
    assert one["label"] == f"{one['name']}/now"


def test_folders_within_each_other_count_once(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outputs)
    given = [Path("evaluate"), outputs / "evaluate", outputs / "evaluate" / "0", outputs / "ablation"]
    assert report.distinct(given) == [(outputs / name).resolve() for name in ("evaluate", "ablation")]


def test_a_damaged_summary_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = write_training(tmp_path, "full", [9.0, 4.0])
    (folder / "summary.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match=r"a summary\.json below .* is damaged \(Expecting .*\); delete it"):
        report.find_runs([tmp_path])
    (folder / "summary.json").write_text('{"accuracy": 1}', "utf-8")
    with pytest.raises(
        UserError, match=r"full/summary\.json has no before, after, .* and is not one of distilkit\.train"
    ):
        report.find_runs([tmp_path])


def test_a_damaged_summary_beside_what_was_given_stops_nothing(tmp_path: Path) -> None:
    write_training(tmp_path, "full", [9.0, 4.0])
    damaged = write_training(tmp_path, "no_ce", [9.0, 4.0])
    (damaged / "summary.json").write_text("{", "utf-8")
    assert [run["label"] for run in report.find_runs([tmp_path / "full"])] == ["full"]


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


# ------------------------------------------------------------------------ the teacher


def roles(results: list[Result], runs: list[dict[str, Any]], **names: str) -> tuple[Roles, list[str]]:
    return report.assign_roles(results, runs, **{"teacher": None, "baseline": None, **names})


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
    assert roles(results, [run("full", 4.0, teacher=said)]) == (Roles(teacher=row, baseline=None), [])


def test_the_teacher_of_a_second_distillation_is_one_too_and_a_row_of_that_name() -> None:
    second = result("student", "rte", 0.5, teacher={"name": "bert"})
    assert roles([second, result("bert", "rte", 0.6)], [])[0].teacher == "bert"
    assert roles([result("student", "rte", 0.5), result("teacher", "rte", 0.6)], [])[0].teacher == "teacher"


def test_without_one_teacher_the_report_says_how_to_set_it(tmp_path: Path) -> None:
    results = [result("a", "rte", 0.5), result("b", "rte", 0.6)]
    assert roles(results, [])[1] == [
        "What is kept of the teacher is left out, for no row is known as the teacher; set teacher=<one of a, b>."
    ]
    both = [run(name, 4.0, teacher={"name": name}) for name in "ab"]
    given, (line,) = roles(results, both)
    assert given.teacher is None
    assert "2 rows may be the teacher (a, b)" in line
    text = write(results, tmp_path / "out")
    assert "set teacher=&lt;one of a, b&gt;." in text
    assert "## What is kept" not in text


# ------------------------------------------------------------------------- the command


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
    build: Callable[..., Any] = report.wandb_logger

    def watched(**settings: Any) -> Any:
        logger = build(**settings)
        log = logger.experiment.log
        monkeypatch.setattr(
            logger.experiment, "log", lambda data, *args, **kw: (logged.update(data), log(data, *args, **kw))
        )
        return logger

    monkeypatch.setattr(report, "wandb_logger", watched)
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


# ------------------------------------------------------------------------------ plots


def overlap(one: Bbox, other: Bbox) -> bool:
    shared = Bbox.intersection(one, other)
    return shared is not None and shared.width > 0 and shared.height > 0


@pytest.mark.parametrize("gap", [1.0, 0.05, 0.0])
def test_names_beside_points_cover_neither_each_other_nor_a_point_nor_a_range(gap: float) -> None:
    points = [
        plots.Point(f"a model {index}", x := 66 + gap * index, 77 + gap * (index % 3), x - 4, x + 4)
        for index in range(8)
    ]
    figure = Figure(figsize=(8, 5))
    axis = figure.subplots()
    plots.draw_points(axis, [*points, plots.Point("bert", 110.0, 80.0)], ROLES)
    figure.draw_without_rendering()
    boxes = plots.place_names(axis, points)
    assert len(boxes) == 8
    assert not any(overlap(one, other) for one, other in itertools.combinations(boxes, 2))
    for box, point in itertools.product(boxes, points):
        (left, y), (right, _) = (axis.transData.transform((x, point.y)) for x in (point.low, point.high))
        assert not overlap(box, Bbox.from_extents(left, y - 1, right, y + 1))


def test_a_panel_shows_each_device_and_backend() -> None:
    scores = medians.choose(every_kind())
    two = plots.quality_latency(scores, speed_tables.speeds(every_kind(), teacher="bert"), ROLES)
    one = plots.quality_latency(
        scores, [each for each in speed_tables.speeds(every_kind(), teacher="bert") if each["backend"] == "cpu"], ROLES
    )
    assert one is not None
    assert two is not None
    widths = [matplotlib.image.imread(io.BytesIO(plot.png)).shape[1] for plot in (one, two)]
    assert widths[1] == 2 * widths[0]
    assert plots.quality_latency(scores, [], ROLES) is None


def test_the_panel_of_int8_has_no_scores_of_float32() -> None:
    scores, timings = medians.choose(every_kind()), speed_tables.speeds(every_kind(), teacher="bert")
    quantized = [{**each, "backend": "cpu/onnx-int8"} for each in timings]
    assert plots.quality_latency(scores, quantized, ROLES) is None
    with_int8 = plots.quality_latency(scores, timings + quantized, ROLES)
    assert with_int8 == plots.quality_latency(scores, timings, ROLES)


def legend_of(results: list[Result], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Any]]:
    """Return labels and colours of the bars of what is kept."""
    found: list[Any] = []
    monkeypatch.setattr(plots, "_png", lambda figure: found.append(figure) or b"")
    assert plots.retention_bars(medians.choose(results), ROLES) is not None
    bars = found[0].axes[0].containers
    return [each.get_label() for each in bars], [each.patches[0].get_facecolor() for each in bars]


def test_the_baseline_has_its_bars_however_many_rows_there_are_and_no_colour_is_used_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = [result(f"student{number}", "rte", 0.6) for number in range(12)]
    labels, colours = legend_of([*glue(seeds=[1]), *many], monkeypatch)
    assert labels == ["student", *(f"student{number}" for number in range(5)), "baseline", "DistilBERT (published)"]
    assert len(set(colours)) == len(colours)


def test_published_bars_have_the_names_of_the_published_students(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [each for name in ("bert", "student") for each in (perplexity(name, 20.0), result(name, "xnli", 0.7))]
    labels, colours = legend_of([*results, *glue(seeds=[1])], monkeypatch)
    assert labels[2:] == ["DistilBERT (published)", "DistilmBERT (published)", "DistilGPT2 (published)"]
    assert len(set(colours)) == len(colours)


def test_plots_and_tables_show_the_same_number_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [result(name, task, 0.6, parameters=n) for name in "ab" for task, n in (("cola", 1_000), ("rte", 9_000))]
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_scatter", lambda panels, roles, **labels: drawn.extend(panels.values()) or b"")
    plots.quality_parameters(medians.choose(results), ROLES)
    assert [point.x for point in drawn[0]] == [1.0, 1.0]  # thousands, of CoLA, which is the table's first task
    table = tables.quality(medians.choose(results), ROLES)
    assert table is not None
    assert table.rows[0][1] == "1,000"


def test_curves_are_drawn_over_tokens(outputs: Path) -> None:
    (one,) = report.find_runs([outputs / "ablation" / "now" / "full"])
    curves = plots._curves(one)
    assert curves["val/nll"] == [(0.0, 9.0), (45_000.0, 6.0), (90_000.0, 4.0)]
    assert plots.loss_curves([run("full", 4.0)]) is None


def test_pictures_do_not_read_names_as_formulas() -> None:
    assert plots.plain("$a$") == r"\$a\$"
    assert plots.plain("_a") == " _a"
    assert len(plots.plain("a" * 99)) == 40


def test_figures_stand_to_the_right_and_text_to_the_left() -> None:
    rows = [["m", "1,234.5", "1.0 (0.9 to 1.1)", "bert", "9%"], ["n", "-", "+2.00", "-", "1.5e+04"]]
    assert [pages.is_figures(rows, column) for column in range(5)] == [False, True, True, False, True]
