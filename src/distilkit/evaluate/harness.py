"""The tasks of lm-evaluation-harness, for causal language models."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from distilkit.data.tokenizer import load_tokenizer
from distilkit.errors import UserError
from distilkit.evaluate.job import Job
from distilkit.evaluate.models import described
from distilkit.evaluate.perplexity import choose_device
from distilkit.evaluate.rows import rows_hash
from distilkit.language_model import load_language_model
from distilkit.metrics import measure
from distilkit.records import Result, Rows, cost, write_rows

_MAIN = ("acc_norm", "acc")  # the score of a task that has one of them


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f"task=harness needs lm_eval ({error}): pip install 'distilkit[harness]'") from error
    return lm_eval


@dataclass(kw_only=True)
class Harness:
    """Score a causal model on ``tasks`` of the harness, each as a result of its own, without training."""

    trains: ClassVar[bool] = False

    name: str
    tasks: Sequence[str]
    num_fewshot: int | None
    limit: int | None
    batch_size: int
    device: str
    data_dir: str | None

    def __post_init__(self) -> None:
        """Check the values; no task is read yet."""
        if isinstance(self.tasks, str) or not self.tasks:
            raise UserError(
                f"task.tasks={self.tasks}, but it takes a list of names: task.tasks=[lambada_openai,hellaswag]"
            )
        for key, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"task.{key}={value}, but it must be at least {least}")
        self.tasks, self.place = list(self.tasks), choose_device(self.device)
        self.manager = _harness().tasks.TaskManager(include_path=self.data_dir)

    def _load(self, name: str) -> dict[str, Any]:
        """Load a task, or those of a group, by name."""
        try:
            found: dict[str, Any] = self.manager.load([name])["tasks"]
        except Exception as error:  # whatever its files and data sets raise
            reason = (str(error) or repr(error)).splitlines()[0]
            raise UserError(
                f"the harness cannot load task {name!r}: {reason}; check task.tasks, or the network"
            ) from error
        return found

    def check_data(self, *, train: bool = True) -> dict[str, str]:
        """Read the tasks, and return the hash of their rows."""
        tasks = {name: task for given in self.tasks for name, task in self._load(given).items()}
        return {"scored_data": rows_hash((name, str(row)) for name, task in tasks.items() for row in task.eval_docs)}

    def measure(self, job: Job) -> list[Result]:
        """Score one model on each task; of a group, on the group."""
        harness = _harness()
        model, kind, *_ = load_language_model(job.model, revision=job.revision)
        if kind != "clm":
            raise UserError(f"{job.model} is a masked language model, but task=harness is for causal ones; use task=lm")
        tokenizer = load_tokenizer(name=job.tokenizer or job.model, revision="main" if job.tokenizer else job.revision)
        start = time.perf_counter()
        wrapped = harness.models.huggingface.HFLM(
            pretrained=model.eval().to(self.place), tokenizer=tokenizer, batch_size=self.batch_size
        )
        seeds = {f"{name}random_seed": job.seed for name in ("", "numpy_", "torch_", "fewshot_")}
        said = harness.simple_evaluate(
            model=wrapped,
            tasks=self.tasks,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            bootstrap_iters=0,
            task_manager=self.manager,
            **seeds,
        )
        seconds, results = time.perf_counter() - start, []
        whole = said["results"]  # of tasks and of those groups that have a score of their own
        for name in [each for one in self.tasks for each in ([one] if one in whole else self._load(one))]:
            scores = scores_of(whole[name])
            main = next((metric for metric in _MAIN if metric in scores), next(iter(scores)))
            samples = said["samples"].get(name, [])
            rows = rows_of(samples, scores)
            if rows is not None:
                write_rows(job.folder, name, rows)
            higher, shots = said["higher_is_better"].get(name, {}), said["n-shot"].get(name)
            own = {"scored_data": rows_hash(sample["doc_hash"] for sample in samples)} if samples else {}
            settings = {**own, "num_fewshot": shots, "limit": self.limit, "task_version": said["versions"].get(name)}
            results.append(
                Result(
                    name=job.name,
                    model=job.model,
                    sha256=job.sha256,
                    **described(model),
                    task=name,
                    kind="zero_shot",
                    seed=job.seed if shots else None,  # which examples are shown
                    settings={**settings, "vocabulary": len(tokenizer), "lm_eval": version("lm_eval")},
                    scores=scores,
                    score=scores[main],
                    higher_is_better=higher.get(main.partition(",")[0]) is not False,
                    details={} if rows is None else {"rows": {name: len(rows)}},
                    cost=cost(seconds=seconds, tokens=0, device=str(self.place)),
                )
            )
        return results


def scores_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Take the metrics of a task from ``metric,filter`` and their errors; the filter ``none`` is left out."""
    found = {key.removesuffix(",none"): value for key, value in results.items() if "," in key and "_stderr," not in key}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def rows_of(samples: Sequence[Mapping[str, Any]], scores: Mapping[str, float]) -> Rows | None:
    """Return what each row adds to the scores, or None if they are not means over rows."""
    sums: dict[str, Any] = {}
    for key in scores:
        metric, _, chosen = key.partition(",")
        values = [sample.get(metric) for sample in samples if sample["filter"] == (chosen or "none")]
        if not values or not all(isinstance(value, int | float) for value in values):
            return None
        sums[key] = np.array(values, dtype=np.float64)
    if "perplexity" in sums:  # of the whole answer of a row, whose log-likelihood stands there
        sums |= {"nll": -sums.pop("perplexity"), "tokens": np.ones(len(samples))}
    if len({len(part) for part in sums.values()}) != 1:
        return None
    ids = list(dict.fromkeys(int(sample["doc_id"]) for sample in samples))
    rows = Rows(ids=np.array(ids), sums=sums)
    found = measure(list(scores), rows) if len(ids) == len(next(iter(sums.values()))) else {}
    return rows if all(np.isclose(found.get(key, np.nan), value) for key, value in scores.items()) else None
