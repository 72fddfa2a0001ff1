"""The published figures as tables: their rows beside ours where the task is the same, and its timings."""

from collections.abc import Sequence

from distilkit.records import Result
from distilkit.report.medians import Score, mean
from distilkit.report.page import Table
from distilkit.report.published import GLUE_TASKS, LANGUAGES, MODELS, SPEED
from distilkit.report.tables import LABELS, Roles, figure, limit_notes, ordered_rows

_FIGURES = {  # the columns of published figures, and what ours is called: the score of a task, or one of its metrics
    "glue": ("GLUE average", ()),
    **{task: (LABELS[task], ()) for task in GLUE_TASKS},
    "imdb": (LABELS["imdb"], ()),
    "squad/em": ("SQuAD EM", ("exact_match",)),
    "squad/f1": ("SQuAD F1", ("f1",)),
    **{f"xnli/{language}": (f"XNLI {language}", (language,)) for language in LANGUAGES},
    "wikitext103": ("WikiText-103 perplexity", ()),
}


def _ours(scores: Sequence[Score], row: str, key: str) -> float | None:
    """Return our figure for a published one, in its unit."""
    names = _FIGURES[key][1]
    if key == "glue":
        value = mean(scores, row, GLUE_TASKS)
        return None if value is None else 100 * value
    task = key.partition("/")[0]
    score = next((score for score in scores if score.row == row and score.published_task == task), None)
    if score is None:
        return None
    value = score.metric(*names) if names else score.median
    return value if value is None or not score.higher_is_better else 100 * value


def beside_published(scores: Sequence[Score], roles: Roles) -> Table | None:
    """Lay out the published figures beside ours, for the tasks that were scored here."""
    ours = {
        row: {key: value for key in _FIGURES if (value := _ours(scores, row, key)) is not None}
        for row in ordered_rows(scores, roles)
    }
    keys = [key for key in _FIGURES if any(key in figures for figures in ours.values())]
    lines = [(roles.label(row), "measured here", figures) for row, figures in ours.items() if figures]
    lines += [
        (model.name, f"published, {model.source}", model.figures)
        for model in MODELS
        if any(key in model.figures for key in keys if key != "glue")
    ]
    if not keys:
        return None
    tasks = {key.partition("/")[0] for key in keys}
    notes = limit_notes([score for score in scores if score.published_task in tasks])
    if "wikitext103" in keys:
        notes.append(
            "WikiText-103: the published models were fine-tuned on it, ours were not; windows differ too. Per token, so that "
            "only models with GPT-2's tokenizer compare."
        )
    records = [
        {"model": name, "source": source} | {key: values.get(key) for key in keys} for name, source, values in lines
    ]
    return Table(
        name="published",
        title="Beside the published figures",
        header=["model", "source", *(_FIGURES[key][0] for key in keys)],
        rows=[
            [name, source, *(figure(values.get(key), "{:.2f}" if key == "imdb" else "{:.1f}") for key in keys)]
            for name, source, values in lines
        ],
        records=records,
        notes=[
            "Published rows were not measured here: GLUE by medians of 5 seeds on the full training sets. MNLI is the figure "
            "of the scripts' README, 84.7 and 82.1, which fits the averages; the paper's table prints 86.7 and 82.2.",
            *notes,
        ],
    )


def published_speed(results: Sequence[Result]) -> Table | None:
    """Repeat the paper's table 3, where something was timed here."""
    if not any(result.kind == "speed" for result in results):
        return None
    bert = next(each for each in SPEED if each.name == "BERT-base")
    records = [
        {
            "model": each.name,
            "parameters": each.parameters,
            "seconds": each.seconds,
            "times_faster_than_bert_base": bert.seconds / each.seconds,
        }
        for each in SPEED
    ]
    return Table(
        name="published_speed",
        title="Size and speed, published",
        header=["model", "parameters", "seconds", "times as fast as BERT-base"],
        rows=[
            [each.name, f"{each.parameters:,}", f"{each.seconds:.0f}", f"{bert.seconds / each.seconds:.2f}"]
            for each in SPEED
        ],
        records=records,
        notes=[
            "The paper's table 3, not measured here: one pass over STS-B's development set at batch 1 on a CPU. "
            "On a phone the paper found DistilBERT 71 % faster than BERT-base, in 207 MB."
        ],
    )
