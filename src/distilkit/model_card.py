"""The model card of a student: its origin, its training and its scores, with the hub's metadata."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

log = logging.getLogger(__name__)

_TAGS = ["knowledge-distillation", "distilkit"]
_PIPELINES = {"mlm": "fill-mask", "clm": "text-generation"}
_BEGIN, _END = "<!-- scores of distilkit.evaluate -->", "<!-- end of scores -->"
_TEMPLATE = """---
{{ card_data }}
---
# {{ name }}

A {{ architecture }} of {{ num_params }} parameters, {{ origin }} with distilkit {{ version }}{{ method }}.

```python
from transformers import pipeline

pipeline("{{ pipeline }}", "path/to/this/folder")("The capital of France is{{ blank }}")
```

| | |
|---|---|
{% for label, value in facts -%}
| {{ label }} | {{ value }} |
{% endfor %}
{%- if results %}
Results on the held-out documents (nats per token, shares of labelled tokens):

| metric | value |
|---|---|
{% for metric, value in results -%}
| {{ metric }} | {{ "%.4f" | format(value) }} |
{% endfor %}
{%- endif %}
"""


def teacher_metadata(name: str) -> dict[str, Any]:
    """Return ``license`` and ``language`` from a teacher's model card, if it has them."""
    try:
        file = Path(name) / "README.md"
        if Path(name).is_dir() and not file.is_file():
            return {}
        data = ModelCard.load(file if file.is_file() else name).data.to_dict()
    except (OSError, ValueError, HfHubHTTPError, OfflineModeIsEnabled):  # no card, no valid metadata, no network
        return {}
    return {key: data[key] for key in ("license", "language") if data.get(key)}


def student_card(
    record: Mapping[str, Any],
    *,
    results: Mapping[str, float],
    tokens_seen: int,
    num_params: int,
    lm: str,
    mask_token: str = "[MASK]",
) -> ModelCard:
    """Build the card of a student from the record of its run, and its ``results`` on held-out documents."""
    teacher = record["teacher"]
    is_local = teacher is not None and Path(teacher["name"]).exists()
    origin, method = "trained without a teacher", ""
    if teacher:
        revision = "" if is_local else f"revision `{teacher['revision']}`, "
        origin = f"distilled from `{teacher['name']}` ({revision}{teacher['parameters']:,} parameters)"
        method = ", by the method of [DistilBERT](https://arxiv.org/abs/1910.01108)"
    scores = [
        EvalResult(
            task_type=_PIPELINES[lm],
            dataset_type="held-out",
            dataset_name=f"held-out documents: {record['data']}",
            metric_type=name,
            metric_value=round(results[f"val/{name}"], 4),
        )
        for name in ("nll", "perplexity", "accuracy")
        if f"val/{name}" in results
    ]
    metadata = ModelCardData(
        base_model=teacher["name"] if teacher and not is_local else None,
        library_name="transformers",
        pipeline_tag=_PIPELINES[lm],
        tags=_TAGS,
        model_name=record["name"],
        eval_results=scores or None,
        **record.get("metadata", {}),
    )
    layers = record["layers"]
    card: ModelCard = ModelCard.from_template(
        metadata,
        template_str=_TEMPLATE,
        name=record["name"],
        architecture=record["architecture"],
        num_params=f"{num_params:,}",
        origin=origin,
        method=method,
        version=record["version"],
        pipeline=_PIPELINES[lm],
        blank=f" {mask_token}." if lm == "mlm" else "",
        facts=[
            ("layers kept", "none: random init" if layers is None else layers),
            ("objective", ", ".join(f"{name} {value}" for name, value in record["objective"].items())),
            ("data", record["data"]),
            ("block size", f"{record['block_size']} tokens, {record['global_batch_size']} blocks a step"),
            ("tokens seen", f"{tokens_seen:,}"),
        ],
        results=sorted(results.items()),
    )
    return card


def add_scores(folder: Path, table: str, scores: Sequence[EvalResult] = ()) -> bool:
    """Write task scores into the card of a student and its metadata, in place of older ones.

    Returns False, and writes nothing, unless distilkit wrote the card.
    """
    file = folder / "README.md"
    if not table or not file.is_file():
        return False
    card = ModelCard.load(file, ignore_metadata_errors=True)
    if "distilkit" not in (card.data.to_dict().get("tags") or []):
        return False
    before, begin, rest = card.text.partition(_BEGIN)
    after = rest.partition(_END)[2] if begin and _END in rest else "\n"
    intro = "After fine-tuning on each task; medians over seeds, in percent where they are shares."
    card.text = f"{before.rstrip()}\n\n" + "\n".join([_BEGIN, "## Scores", "", intro, "", table, _END]) + after
    theirs = {result.dataset_type for result in scores}
    kept = [result for result in card.data.eval_results or [] if result.dataset_type not in theirs]
    card.data.eval_results = [*kept, *scores] or None
    card.data.model_name = card.data.model_name or folder.resolve().name
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".card") as temporary:
            card.save(Path(temporary) / file.name)
            (Path(temporary) / file.name).replace(file)
    except OSError as error:  # a read-only folder; the scores have their own file
        log.warning("%s was not updated: %s", file, error)
        return False
    return True
