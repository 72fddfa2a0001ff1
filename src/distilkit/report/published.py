"""The figures that the DistilBERT paper and its scripts publish; ours stand beside them, and none was measured here.

Sources: Sanh et al. 2019, arXiv 1910.01108 v4, tables 1 to 4 and section 4.1; the README of the original scripts
(huggingface/transformers-research-projects, distillation) for the RoBERTa, GPT-2 and multilingual models.
"""

from dataclasses import dataclass

GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
LANGUAGES = ("en", "es", "zh", "de", "ar", "ur")  # of XNLI, those that are published
PAPER, SCRIPTS = "arXiv 1910.01108", "the original scripts' README"


@dataclass(frozen=True, kw_only=True)
class Published:
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


def _squad(exact_match: float, f1: float) -> dict[str, float]:
    return {"squad/em": exact_match, "squad/f1": f1}


# GLUE: medians of 5 runs on the development sets. MNLI as in the scripts' README, which fits the averages; table 1 of the
# paper prints 86.7 for BERT-base and 82.2 for DistilBERT.
MODELS = (
    Published(name="ELMo", source=PAPER, figures=_glue(68.7, 44.1, 68.6, 76.6, 71.1, 86.2, 53.4, 91.5, 70.4, 56.3)),
    Published(
        name="BERT-base",
        source=PAPER,
        figures=_glue(79.5, 56.3, 84.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0, 53.5)
        | {"imdb": 93.46}
        | _squad(81.2, 88.5),
    ),
    Published(
        name="DistilBERT",
        source=PAPER,
        teacher="BERT-base",
        figures=_glue(77.0, 51.3, 82.1, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9, 56.3)
        | {"imdb": 92.82}
        | _squad(77.7, 85.8),
    ),
    Published(name="DistilBERT + 2nd distillation", source=PAPER, teacher="BERT-base", figures=_squad(79.1, 86.9)),
    Published(
        name="RoBERTa-base", source=SCRIPTS, figures=_glue(83.2, 63.6, 87.6, 90.2, 92.8, 91.9, 78.7, 94.8, 91.2, 57.7)
    ),
    Published(
        name="DistilRoBERTa",
        source=SCRIPTS,
        teacher="RoBERTa-base",
        figures=_glue(79.0, 59.3, 84.0, 86.6, 90.8, 89.4, 67.9, 92.5, 88.3, 52.1),
    ),
    Published(name="mBERT", source=SCRIPTS, figures=_xnli(82.1, 74.6, 69.1, 72.3, 66.4, 58.5)),
    Published(name="DistilmBERT", source=SCRIPTS, teacher="mBERT", figures=_xnli(78.2, 69.1, 64.0, 66.3, 59.1, 54.7)),
    Published(name="GPT-2", source=SCRIPTS, figures={"wikitext103": 16.3}),
    Published(name="DistilGPT2", source=SCRIPTS, teacher="GPT-2", figures={"wikitext103": 21.1}),
)

PERPLEXITIES = ("wikitext103",)  # the figures of which lower is better


@dataclass(frozen=True, kw_only=True)
class PublishedSpeed:
    """Table 3: one pass over STS-B's development set on a CPU at batch 1."""

    name: str
    parameters: int
    seconds: float


SPEED = (
    PublishedSpeed(name="ELMo", parameters=180_000_000, seconds=895),
    PublishedSpeed(name="BERT-base", parameters=110_000_000, seconds=668),
    PublishedSpeed(name="DistilBERT", parameters=66_000_000, seconds=410),
)

# Table 4: change of the GLUE average against the full objective, in points.
ABLATION = {"no_ce": -2.96, "no_mlm": -0.31, "no_cos": -1.46, "random_init": -3.69}


def published_retention(task: str) -> tuple[str, float] | None:
    """Return the published student that has this task, and the percentage of its teacher's score that it keeps.

    Of several it is the first. A task of several figures counts with their mean; of perplexities it is the teacher's over
    the student's.
    """
    by_name = {model.name: model for model in MODELS}
    for student in MODELS:
        keys = [key for key in student.figures if key.partition("/")[0] == task]
        if keys and student.teacher:
            teacher = by_name[student.teacher]
            kept = sum(student.figures[key] for key in keys) / sum(teacher.figures[key] for key in keys)
            return student.name, 100 * (1 / kept if task in PERPLEXITIES else kept)
    return None
