"""The adapter to lm-evaluation-harness, which a small module with its interface stands in for."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import PreTrainedModel

import distilkit.evaluate.__main__
import distilkit.evaluate.harness
from distilkit.evaluate.harness import rows_of, scores_of
from distilkit.metrics import score
from distilkit.records import read_results, read_rows
from jobs import call

CONFIG = Path(__file__).parents[2] / "conf/evaluate/task/harness.yaml"
RIGHT, LIKELIHOODS = [1.0, 0.0, 1.0, 1.0], [-1.5, -0.25, -3.0, -2.0]


def sample(row: int, **metrics: Any) -> dict[str, Any]:
    return {"doc_id": row, "filter": "none", "doc_hash": f"hash {row}", **metrics}


SAID = {  # as simple_evaluate of lm_eval 0.4.13 returns it
    "results": {
        "lambada": {
            "alias": "lambada",
            "sample_len": 4,
            "perplexity,none": float(np.exp(-np.mean(LIKELIHOODS))),
            "perplexity_stderr,none": "N/A",
            "acc,none": 0.75,
            "acc_stderr,none": "N/A",
        },
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.75, "acc_norm,none": 0.25, "acc_stderr,none": 0.1},
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 37.5},
    },
    "samples": {
        "lambada": [
            sample(row, perplexity=nll, acc=right)
            for row, (nll, right) in enumerate(zip(LIKELIHOODS, RIGHT, strict=True))
        ],
        "hellaswag": [sample(row, acc=right, acc_norm=1 - right) for row, right in enumerate(RIGHT)],
        "wikitext": [sample(row, word_perplexity=(-9.0, 3)) for row in range(4)],
    },
    "higher_is_better": {
        "lambada": {"perplexity": False, "acc": True},
        "hellaswag": {"acc": True, "acc_norm": True},
        "wikitext": {"word_perplexity": False},
    },
    "n-shot": {"lambada": 0, "hellaswag": 5, "wikitext": 0},
    "versions": {"lambada": 1.0, "hellaswag": 1.0, "wikitext": 2.0},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a module in the place of lm_eval, and return what it is asked for."""
    asked: list[dict[str, Any]] = []

    class TaskManager:
        def __init__(self, *, include_path: str | None) -> None:
            asked.append({"include_path": include_path})

        def load(self, names: list[str]) -> dict[str, Any]:
            leaves = {"of_texts": ["lambada", "wikitext"]}.get(names[0], names)
            if any(leaf not in SAID["results"] for leaf in leaves):
                raise KeyError(f"Spec {names[0]!r} is not a registered task")
            return {"tasks": {leaf: SimpleNamespace(eval_docs=[{"text": leaf}]) for leaf in leaves}, "groups": {}}

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        asked.append(given)
        return SAID

    tree = {"lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.tasks": {"TaskManager": TaskManager}}
    tree |= {"lm_eval.models": {}, "lm_eval.models.huggingface": {"HFLM": lambda **given: SimpleNamespace(**given)}}
    for name, content in tree.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    monkeypatch.setattr(distilkit.evaluate.harness, "version", lambda _: "0.4.13")
    return asked


def test_each_task_is_a_result_with_the_rows_that_give_its_scores(
    asked: list[dict[str, Any]], save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    given = ["name=mine", "task=harness", "task.tasks=[of_texts,hellaswag]", "task.limit=4", "seed=3", "trainer=cpu"]
    given += [f"model={save_teacher('gpt2', num_layers=1)}", "task.data_dir=my_tasks"]
    done = call(distilkit.evaluate.__main__.main, *given, cwd=tmp_path)
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    assert asked[0] == {"include_path": "my_tasks"}
    assert asked[1]["tasks"] == ["of_texts", "hellaswag"] and asked[1]["limit"] == 4
    assert asked[1]["fewshot_random_seed"] == asked[1]["random_seed"] == 3
    assert isinstance(asked[1]["model"].pretrained, PreTrainedModel) and asked[1]["model"].batch_size == 16
    lambada, wikitext, hellaswag = read_results([tmp_path / "outputs"])
    assert [each.task for each in (lambada, wikitext, hellaswag)] == ["lambada", "wikitext", "hellaswag"]
    assert {each.kind for each in (lambada, wikitext, hellaswag)} == {"zero_shot"}
    assert (lambada.score, hellaswag.score, wikitext.score) == (0.75, 0.25, 37.5)
    assert "scored_data" in lambada.settings
    alone = call(distilkit.evaluate.__main__.main, *[*given, "name=alone", "task.tasks=[hellaswag]"], cwd=tmp_path)
    assert alone.code == 0, alone.err
    (other,) = read_results([tmp_path / "outputs/evaluate/alone"])
    assert other.settings == hellaswag.settings  # whatever else was scored next to it
    assert (lambada.higher_is_better, wikitext.higher_is_better) == (True, False)
    assert (lambada.seed, hellaswag.seed, hellaswag.settings["num_fewshot"]) == (None, 3, 5)
    for result in (lambada, hellaswag):
        rows = read_rows(str(result.folder), result.task)
        assert rows is not None and result.details["rows"] == {result.task: 4}
        assert {metric: score(metric, rows) for metric in result.scores} == pytest.approx(result.scores)
    assert "rows" not in wikitext.details  # its sums are pairs
    assert all(task in done.out for task in ("lambada", "wikitext", "hellaswag"))


def test_filters_and_errors_are_told_apart() -> None:
    given = {"alias": "x", "exact_match,strict": 0.5, "exact_match,flexible": 1, "exact_match_stderr,strict": 0.1}
    scores = scores_of(given)
    assert scores == {"exact_match,strict": 0.5, "exact_match,flexible": 1.0}
    samples = [
        {"doc_id": row, "filter": name, "exact_match": float(name == "flexible" or row == 0)}
        for name in ("strict", "flexible")
        for row in range(2)
    ]
    rows = rows_of(samples, scores)
    assert rows is not None and rows.ids.tolist() == [0, 1]
    assert {metric: score(metric, rows) for metric in scores} == scores
    assert rows_of(samples, scores | {"exact_match,strict": 0.6}) is None  # not a mean over rows
    assert rows_of([], {"acc": 0.5}) is None


def test_what_the_harness_does_not_know_or_have_is_named(
    asked: list[dict[str, Any]], save_teacher: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_teacher("bert", num_layers=1)
    for overrides, message in (
        (["task.tasks=[nothing]"], "the harness cannot load task 'nothing': \"Spec 'nothing' is not a registered task"),
        (["task.tasks=hellaswag"], "task.tasks=hellaswag, but it takes list[str]"),
        (["task.tasks=[hellaswag]"], "is a masked language model, but task=harness is for causal ones; use task=lm"),
        (["task.limit=0"], "task.limit=0, but it must be at least 1"),
    ):
        done = call(
            distilkit.evaluate.__main__.main, f"model={model}", "task=harness", "trainer=cpu", *overrides, cwd=tmp_path
        )
        assert (done.code, message in done.err) == (1, True), done.err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(Exception) as raised:
        instantiate(OmegaConf.load(CONFIG))
    assert "pip install 'distilkit[harness]'" in str(raised.value.__cause__)
