"""The figures that the DistilBERT paper and its scripts publish, and the tables of them. None was measured here.

Sources: Sanh et al. 2019, arXiv 1910.01108 v4, tables 1 to 4 and section 4.1; the README of the original scripts
(huggingface/transformers-research-projects, distillation) for the RoBERTa, GPT-2 and multilingual models.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distilkit.report.frame import GLUE_TASKS, LABELS, Scores
from distilkit.report.page import Table, formatted
from distilkit.report.quality import limit_notes

LANGUAGES = ("en", "es", "zh", "de", "ar", "ur")  # the published ones of XNLI
PAPER, SCRIPTS = "arXiv 1910.01108", "the original scripts' README"


class Published(NamedTuple):
    """A published model: its figures by ``task`` or ``task/metric``, in percent, perplexities as they are.

    ``teacher`` names the published model that it was distilled from.
    """

    name: str
    source: str
    figures: dict[str, float]
    teacher: str | None = None


def _glue(average: float, *scores: float) -> dict[str, float]:
    return {"glue": average, **dict(zip(GLUE_TASKS, scores, strict=True))}


def _xnli(*scores: float) -> dict[str, float]:
    return {f"xnli/{language}": score for language, score in zip(LANGUAGES, scores, strict=True)}


# GLUE: medians of 5 runs on the development sets. MNLI as in the scripts' README, which fits the averages; table 1 of the
# paper prints 86.7 for BERT-base and 82.2 for DistilBERT.
_BERT = _glue(79.5, 56.3, 84.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0, 53.5)
_DISTILBERT = _glue(77.0, 51.3, 82.1, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9, 56.3)
_ROBERTA = _glue(83.2, 63.6, 87.6, 90.2, 92.8, 91.9, 78.7, 94.8, 91.2, 57.7)
_DISTILROBERTA = _glue(79.0, 59.3, 84.0, 86.6, 90.8, 89.4, 67.9, 92.5, 88.3, 52.1)
MODELS = (
    Published("ELMo", PAPER, _glue(68.7, 44.1, 68.6, 76.6, 71.1, 86.2, 53.4, 91.5, 70.4, 56.3)),
    Published("BERT-base", PAPER, _BERT | {"imdb": 93.46, "squad/em": 81.2, "squad/f1": 88.5}),
    Published("DistilBERT", PAPER, _DISTILBERT | {"imdb": 92.82, "squad/em": 77.7, "squad/f1": 85.8}, "BERT-base"),
    Published("DistilBERT + 2nd distillation", PAPER, {"squad/em": 79.1, "squad/f1": 86.9}, "BERT-base"),
    Published("RoBERTa-base", SCRIPTS, _ROBERTA),
    Published("DistilRoBERTa", SCRIPTS, _DISTILROBERTA, "RoBERTa-base"),
    Published("mBERT", SCRIPTS, _xnli(82.1, 74.6, 69.1, 72.3, 66.4, 58.5)),
    Published("DistilmBERT", SCRIPTS, _xnli(78.2, 69.1, 64.0, 66.3, 59.1, 54.7), "mBERT"),
    Published("GPT-2", SCRIPTS, {"wikitext103": 16.3}),
    Published("DistilGPT2", SCRIPTS, {"wikitext103": 21.1}, "GPT-2"),
)
PERPLEXITIES = ("wikitext103",)  # figures that are better if they are lower

# Table 3: parameters, and seconds for one pass over STS-B's development set on a CPU at batch 1.
SPEED = {"ELMo": (180_000_000, 895.0), "BERT-base": (110_000_000, 668.0), "DistilBERT": (66_000_000, 410.0)}

# Table 4: change of the GLUE average against the full objective, in points.
ABLATION = {"no_ce": -2.96, "no_mlm": -0.31, "no_cos": -1.46, "random_init": -3.69}

_FIGURES = {  # headings of published figures, and the names of our metrics; without one it is the task's score
    "glue": ("GLUE average", ""),
    **{task: (LABELS[task], "") for task in (*GLUE_TASKS, "imdb")},
    "squad/em": ("SQuAD EM", "exact_match"),
    "squad/f1": ("SQuAD F1", "f1"),
    **{f"xnli/{language}": (f"XNLI {language}", language) for language in LANGUAGES},
    "wikitext103": ("WikiText-103 perplexity", ""),
}


def published_task(line: Any) -> str:
    """Return the task of a score in ``MODELS``: wikitext103 for a perplexity on all of WikiText-103's test split."""
    text = line.settings.get("text")
    hub = text.get("hub", {}) if isinstance(text, Mapping) else {}
    whole = hub.get("split") == "test" and line.settings.get("max_tokens") is None
    found = whole and str(hub.get("name")).startswith("wikitext-103") and line.task == "perplexity"
    return "wikitext103" if found else str(line.task)


def published_retention(task: str) -> tuple[str, float] | None:
    """Return the published student that has this task, and the percentage of its teacher's score that it keeps.

    Of several students it is the first. A task of several figures counts with their mean; for perplexities it is the
    teacher's divided by the student's.
    """
    by_name = {model.name: model for model in MODELS}
    for student in MODELS:
        keys = [key for key in student.figures if key.partition("/")[0] == task]
        if keys and student.teacher:
            teacher = by_name[student.teacher]
            kept = sum(student.figures[key] for key in keys) / sum(teacher.figures[key] for key in keys)
            return student.name, 100 * (1 / kept if task in PERPLEXITIES else kept)
    return None


def _measured(scores: Scores, row: str) -> dict[str, float]:
    """Return a row's figures by the keys of the published ones, in their units."""
    lines = {published_task(line): line for line in scores.of(row).values()}
    average = scores.mean(row, GLUE_TASKS)
    found = {} if average is None else {"glue": 100 * average}
    for key, (_, metric) in _FIGURES.items():
        line = lines.get(key.partition("/")[0]) if key != "glue" else None
        value = None if line is None else scores.metric(row, line.task, metric) if metric else line.median
        if line is not None and value is not None:
            found[key] = 100 * value if line.share else value
    return found


def published_table(scores: Scores) -> Table | None:
    """Build the table of the published figures next to ours, for the tasks that were scored here."""
    ours = {row: _measured(scores, row) for row in scores.rows}
    keys = [key for key in _FIGURES if any(key in figures for figures in ours.values())]
    if not keys:
        return None
    lines = [(scores.label(row), "measured here", figures) for row, figures in ours.items() if figures]
    wanted = {key for key in keys if key != "glue"}
    lines += [(name, f"published, {by}", found) for name, by, found, _ in MODELS if wanted & found.keys()]
    named = {task: {published_task(line) for row in ours if (line := scores.line(row, task))} for task in scores.tasks}
    tasks = [task for task, names in named.items() if names & {key.partition("/")[0] for key in keys}]
    notes = [
        "Published rows were not measured here. GLUE: medians of 5 seeds on the full training sets. MNLI is the figure of the "
        "scripts' README, 84.7 and 82.1, which fits the averages; the paper's table has 86.7 and 82.2.",
        *limit_notes(scores, tasks),
    ]
    if "wikitext103" in keys:
        notes.append(
            "WikiText-103: the published models were fine-tuned on it, ours were not; windows differ too. Perplexities are "
            "per token and compare only between models with GPT-2's tokenizer."
        )
    records = [{"model": name, "source": by} | {key: values.get(key) for key in keys} for name, by, values in lines]
    forms = {"model": "{}", "source": "{}"} | {key: "{:.2f}" if key == "imdb" else "{:.1f}" for key in keys}
    header, rows = ["model", "source", *(_FIGURES[key][0] for key in keys)], formatted(records, forms)
    title = "Next to the published figures"
    return Table(name="published", title=title, header=header, rows=rows, records=records, notes=notes)


def published_speed(scores: Scores) -> Table | None:
    """Build the paper's table 3, if something was timed here."""
    if "speed" not in set(scores.results["kind"]):
        return None
    forms = {"model": "{}", "parameters": "{:,}", "seconds": "{:.0f}", "times_faster_than_bert_base": "{:.2f}"}
    lines = [(name, size, seconds, SPEED["BERT-base"][1] / seconds) for name, (size, seconds) in SPEED.items()]
    records = [dict(zip(forms, line, strict=True)) for line in lines]
    header, rows = ["model", "parameters", "seconds", "times as fast as BERT-base"], formatted(records, forms)
    note = (
        "The paper's table 3, not measured here: one pass over STS-B's development set at batch 1 on a CPU. On a phone the "
        "paper found DistilBERT 71 % faster than BERT-base, in 207 MB."
    )
    title = "Size and speed, published"
    return Table(name="published_speed", title=title, header=header, rows=rows, records=records, notes=[note])
