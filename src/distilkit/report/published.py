"""The published figures of published.yaml, and the tables of them. None was measured here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from distilkit.report.frame import GLUE_TASKS, Scores
from distilkit.report.page import Table, tabulate
from distilkit.report.speed import speeds


class Published(NamedTuple):
    """A published model: its figures by task or task/metric, and the published model that it was distilled from."""

    name: str
    source: str
    figures: dict[str, float]
    teacher: str | None = None


_DATA: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
_COLUMNS, _NOTES = _DATA["columns"], _DATA["notes"]
MODELS = tuple(Published(**model) for model in _DATA["models"])
SPEED: dict[str, tuple[int, float]] = {name: (size, seconds) for name, (size, seconds) in _DATA["speed"].items()}
ABLATION: dict[str, float] = _DATA["ablation"]


def published_task(line: Any) -> str:
    """Return the task of a score in ``MODELS``: wikitext103 for a perplexity on all of WikiText-103's test split."""
    node, text = line.details.get("task", {}), line.settings.get("text")  # the text was a setting in format 1
    hub = node.get("dataset") if node.get("paths") is None else None
    hub = hub or (text.get("hub", {}) if isinstance(text, Mapping) else {})
    whole = hub.get("split") == "test" and line.settings.get("max_tokens") is None
    found = whole and str(hub.get("name")).startswith("wikitext-103") and line.task == "perplexity"
    return "wikitext103" if found else str(line.task)


def _measured(scores: Scores, row: str) -> dict[str, float]:
    """Return a row's figures by the keys of the published ones, in their units."""
    lines = {published_task(line): line for line in scores.of(row).values()}
    average = scores.mean(row, GLUE_TASKS)
    found = {} if average is None else {"glue": 100 * average}
    for key, (_, metric) in _COLUMNS.items():
        if key != "glue" and (line := lines.get(key.partition("/")[0])):
            value = scores.metric(row, line.task, metric) if metric else line.median
            found |= {} if value is None else {key: 100 * value if line.share else value}
    return found


def published_table(scores: Scores) -> Table | None:
    """Build the table of the published figures next to ours, for the tasks that were scored here."""
    ours = {row: _measured(scores, row) for row in scores.rows}
    keys = [key for key in _COLUMNS if any(key in figures for figures in ours.values())]
    mine = [{"model": scores.label(row), "source": "measured here"} | own for row, own in ours.items() if own]
    others = [each for each in MODELS if each.figures.keys() & set(keys) - {"glue"}]
    theirs = [{"model": each.name, "source": f"published, {each.source}"} | each.figures for each in others]
    notes = [_NOTES["published"], *([_NOTES["wikitext103"]] if "wikitext103" in keys else [])]
    columns = {"model": "{}", "source": "{}"}
    columns |= {key: _COLUMNS[key][0] + (" {:.2f}" if key == "imdb" else " {:.1f}") for key in keys}
    records = [{key: record.get(key) for key in columns} for record in mine + theirs]
    return tabulate("published", "Next to the published figures", records, columns, *notes)


def published_speed(scores: Scores) -> Table | None:
    """Build the paper's table 3 below our passes over the same rows, if something was timed here."""
    if "speed" not in set(scores.results["kind"]):
        return None
    columns = {"model": "{}", "source": "{}", "parameters": "{:,}", "seconds": "{:,.0f}"}
    columns |= {"times_as_fast": "times as fast as the teacher, or BERT-base {:.2f}"}
    passes = {(each["run"], each["model"]): each for each in speeds(scores) if "pass_seconds" in each}
    lines = []
    for (run, row), each in passes.items():
        source, teacher = f"measured here, {each['pass_sentences']:,} sentences", passes.get((run, scores.teacher))
        ratio = teacher["pass_seconds"] / each["pass_seconds"] if teacher else None
        lines.append((scores.label(row), source, each["parameters"], each["pass_seconds"], ratio))
    for name, (size, seconds) in SPEED.items():
        lines.append((name, "published", size, seconds, SPEED["BERT-base"][1] / seconds))
    records = [dict(zip(columns, line, strict=True)) for line in lines]
    title = "One pass over STS-B, next to the published"
    return tabulate("published_speed", title, records, columns, _NOTES["speed"], folded=not passes)
