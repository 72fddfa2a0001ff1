"""The model card of a student: its origin, its training and its scores, with the hub's metadata."""

import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

log = logging.getLogger(__name__)

_TAGS = ["knowledge-distillation", "distilkit"]
_METRICS = {  # of the hub's model-index, with their names there
    "nll": "cross-entropy, nats per token",
    "perplexity": "perplexity",
    "accuracy": "accuracy on labelled tokens",
}
_PIPELINES = {"mlm": "fill-mask", "clm": "text-generation"}
_BEGIN, _END = "<!-- scores of distilkit.evaluate -->", "<!-- end of scores -->"
_OLD_SCORES = re.compile(r"\A\s*## Scores\n+[^\n|]*\n+(\|[^\n]*\n)*")  # heading, introduction, table
# An absolute path, with spaces only in quotes; no part of a relative path or a URL is one.
_ROOT = r"(?:~/|/|[A-Za-z]:\\)"
_PATH = re.compile(rf"(?<='){_ROOT}[^']*|(?<=\"){_ROOT}[^\"]*|(?<![\w./:~-]){_ROOT}[^\s'\",;)\]]+")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_UNREADABLE = (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError)  # of a card
_TEMPLATE = Path(__file__).with_name("card.md.j2")


def teacher_metadata(name: str) -> dict[str, Any]:
    """Return ``license`` and ``language`` from a teacher's model card, if it has them as text."""
    file = Path(name) / "README.md"
    if Path(name).is_dir() and not file.is_file():
        return {}
    try:
        data = ModelCard.load(file if file.is_file() else name).data.to_dict()
    except (*_UNREADABLE, HfHubHTTPError, OfflineModeIsEnabled) as error:  # no card, damaged metadata, no network
        log.info("no licence and language from the card of %s: %s", name, error)
        return {}
    if isinstance(data.get("language"), list):  # YAML reads the Norwegian code ``no`` as false
        data["language"] = ["no" if each is False else each for each in data["language"]]
    return {key: data[key] for key in ("license", "language") if data.get(key) and is_text(data[key])}


def is_text(value: Any) -> bool:
    """Return whether a value is a text or a list of texts, as ``license`` and ``language`` are."""
    return all(isinstance(each, str) and each for each in (value if isinstance(value, list) else [value]))


def _last(path: str) -> str:
    """Return the last part of a path of any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def student_card(
    record: Mapping[str, Any],
    *,
    summary: Mapping[str, Any],
    tokens_seen: int,
    num_params: int,
    lm: str,
    mask_token: str = "[MASK]",
    own_code: bool = False,
    positions: int | None = None,
    onnx: Mapping[str, Any] | None = None,
    license: str | None = None,
    repo: str | None = None,
) -> ModelCard:
    """Build the card of a student from the record of its run and its ``summary``, as far as that is known.

    The example loads ``repo``, and trusts a student's own code, without which another model would be loaded.
    ``positions`` is the length of a text that the student reads, and ``onnx`` what was measured of its ONNX files.
    """
    teacher, pipeline = dict(record["teacher"] or {}), _PIPELINES[lm]
    # A card is published, where the folders of this machine are of no use.
    config: Mapping[str, Any] = record.get("config", {})
    corpus = config.get("data", {}).get("corpus", {}).get("paths") or ()
    data = " ".join(str(record["data"]).split())
    paths = [corpus] if isinstance(corpus, str) else [str(path) for path in corpus]
    data = data.replace(str(paths), ", ".join(paths))
    for path in sorted(paths, key=len, reverse=True):
        data = data.replace(path, _last(path))  # also with spaces
    name = " ".join(str(record["name"]).split())
    data, name = (_PATH.sub(lambda path: _last(path[0]), text) for text in (data, name))
    verdict = _PATH.sub(lambda path: _last(path[0]), (summary.get("verdict") or {}).get("line", ""))
    base_model = teacher.get("name")
    if base_model and (teacher.get("folder") or not _HUB_ID.fullmatch(base_model) or Path(base_model).exists()):
        teacher["name"], base_model = _last(base_model), None
    given: dict[str, Any] = {**record.get("metadata", {})}
    data_license, energy, inherited = given.pop("data_license", None), given.pop("energy", None), given.get("license")
    given |= {"license": license} if license else {}
    after: Mapping[str, float] = summary.get("after") or {}
    scores = {each: after[f"val/{each}"] for each in _METRICS if f"val/{each}" in after}
    held_out: Any = {"task_type": pipeline, "dataset_type": "held-out", "dataset_name": f"held-out documents: {data}"}
    metadata = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=[*_TAGS, *(["onnx", "transformers.js"] if onnx else [])],
        model_name=(name if record["name"] else str(record["architecture"])) if scores else None,
        eval_results=[
            EvalResult(**held_out, metric_type=each, metric_value=round(value, 4), metric_name=_METRICS[each])
            for each, value in scores.items()
        ]
        or None,
        **given,
    )
    own = (config.get("card") or {}).get("license")
    facts: Any = {
        "summary": summary,
        "record": {**record, "name": name, "data": data, "teacher": teacher},
        "scores": _score_table(summary, lm=lm),
        "verdict": verdict,
        "license": given.get("license"),
        "teacher_license": None if own or not teacher else inherited,
        "data_license": data_license,
        "energy": energy,
        "where": repo or "path/to/this/folder",
        "blank": f" {mask_token}." if lm == "mlm" else "",
    }
    facts |= {"config": config, "onnx": onnx, "positions": positions, "own_code": own_code, "lm": lm}
    facts |= {"tokens_seen": tokens_seen, "num_params": num_params, "base_model": base_model, "pipeline": pipeline}
    card: ModelCard = ModelCard.from_template(metadata, template_path=str(_TEMPLATE), **facts)
    return card


def _score_table(summary: Mapping[str, Any], *, lm: str) -> list[list[str]]:
    """Return the held-out scores as rows, the first a heading; ± is half of a 95 % interval over blocks."""
    if not (after := summary.get("after")):
        return []
    columns = {
        "teacher": {name.replace("teacher_", ""): value for name, value in after.items() if "teacher_" in name},
        "before training": summary.get("before"),
        "baseline": summary.get("baseline_after"),
        "this model": after,
    }
    columns = {name: scores for name, scores in columns.items() if scores}
    labels = {**_METRICS, "accuracy": f"{'masked' if lm == 'mlm' else 'next-token'} accuracy"}
    rows = [["held-out text", *columns]]
    for metric, label in {**labels, "agreement": "agreement with the teacher"}.items():
        if (name := f"val/{metric}") in after:
            rows.append([label, *(f"{scores[name]:.4f}" if name in scores else "" for scores in columns.values())])
            if margin := (summary.get("intervals") or {}).get(metric):
                rows[-1][-1] += f" ± {margin:.4f}"
    return rows


def add_scores(folder: Path, table: str, medians: Mapping[str, Mapping[str, float]]) -> bool:
    """Write a table of task scores into the card of a student, and the medians of each task into its metadata.

    Older ones are replaced. Returns False, and writes nothing, unless distilkit wrote the card.
    """
    file = folder / "README.md"
    if not table or not file.is_file():
        return False
    try:
        card = ModelCard.load(file, ignore_metadata_errors=True)
    except _UNREADABLE as error:
        log.warning("%s cannot be read, and was not updated: %s", file, error)
        return False
    if "distilkit" not in (card.data.to_dict().get("tags") or []):
        return False
    before, begin, rest = card.text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    if _END not in rest:  # somebody took the marker out: what is not distilkit's stays
        after = "\n\n" * bool(begin) + (_OLD_SCORES.sub("", rest).lstrip("\n") or "\n")
    intro = "After fine-tuning on each task; medians over seeds, in percent where they are shares."
    card.text = f"{before.rstrip()}\n\n" + "\n".join([_BEGIN, "## Scores", "", intro, "", table, _END]) + after
    scores = [
        EvalResult(
            task_type="other", dataset_type=task, dataset_name=task, metric_type=name, metric_value=round(value, 4)
        )
        for task, metrics in medians.items()
        for name, value in metrics.items()
    ]
    kept = [result for result in card.data.eval_results or [] if result.dataset_type not in medians]
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
