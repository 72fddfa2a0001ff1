"""Similarity of sentences by mean states, against plain loops and scipy."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

import distilkit.evaluate.__main__
from distilkit.errors import UserError
from distilkit.evaluate.similarity import Similarity
from distilkit.records import read_results, read_rows
from jobs import call, make_job
from tiny import WORDS, build_model

CONFIGS = Path(__file__).parents[2] / "conf/evaluate/task"


def build(name: str = "similarity", **changes: Any) -> Similarity:
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    if name != "similarity":
        del config["defaults"]
        config = OmegaConf.merge(OmegaConf.load(CONFIGS / "similarity.yaml"), config)
    built = instantiate(OmegaConf.merge(config, {"device": "cpu", **changes}))
    assert isinstance(built, Similarity)
    return built


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str, float]]:
    """Pairs whose number is the share of equal words, some of them longer than a model."""
    rng, made = random.Random(0), []
    for index in range(30):
        one = rng.choices(WORDS, k=rng.randint(1, 12) if index else 90)
        other = [word if rng.random() < index / 30 else rng.choice(WORDS) for word in one]
        made.append((" ".join(one), " ".join(other), round(5 * index / 30, 3)))
    return made


@pytest.fixture(scope="module")
def glue(pairs: list[tuple[str, str, float]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    (folder / "STS-B").mkdir()
    lines = ["index\tgenre\tsentence1\tsentence2\tscore"]
    lines += [f"{index}\tnews\t{one}\t{other}\t{number}" for index, (one, other, number) in enumerate(pairs)]
    (folder / "STS-B" / "dev.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "modernbert", "gpt2"])
def test_scores_are_scipys_of_cosines_of_mean_states(
    model_type: str, glue: Path, pairs: list[tuple[str, str, float]], save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_teacher(model_type, num_layers=2)
    job = dataclasses.replace(make_job(folder), folder=tmp_path / "job")
    (found,) = build(data_dir=str(glue), batch_size=7).measure(job)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def state(text: str) -> Any:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=63 if model_type == "roberta" else 64)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state[0].double().numpy()
        return sum(states) / len(states)

    cosines = []
    for one, other, _ in pairs:
        a, b = state(one), state(other)
        cosines.append(round(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b), 6))
    gold = [number for *_, number in pairs]
    expected = {
        "spearman": scipy.stats.spearmanr(gold, cosines).statistic,
        "pearson": scipy.stats.pearsonr(gold, cosines).statistic,
    }
    assert found.scores == pytest.approx(expected, abs=2e-3)
    assert found.score == pytest.approx(sum(expected.values()) / 2, abs=2e-3)
    assert (found.task, found.kind, found.seed, found.model_type) == ("similarity", "zero_shot", None, model_type)
    rows = read_rows(tmp_path / "job", "dev")
    assert rows is not None and rows.said is not None
    np.testing.assert_allclose(rows.said, cosines, atol=1e-5)
    assert rows.ids.tolist() == list(range(30))


def test_a_folder_without_its_backbone_is_refused_and_one_without_a_pooler_is_not(
    glue: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    build_model("bert", num_layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    assert not any("pooler" in name for name in weights)
    job = dataclasses.replace(make_job(tmp_path / "model"), folder=tmp_path / "job")
    assert build(data_dir=str(glue)).measure(job)[0].score is not None
    kept = {name: tensor for name, tensor in weights.items() if "layer.1.attention" not in name}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for encoder.layer.1.attention"):
        build(data_dir=str(glue)).measure(job)


def test_sick_reads_its_test_set_from_its_one_file_and_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = "pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score\tSemEval_set"
    rows = ["1\tone\ttwo\tNEUTRAL\t4.5\tTRAIN", "2\tthree\tfour\tNEUTRAL\t1\tTEST", "3\tfive\tsix\tNEUTRAL\t2.25\tTEST"]
    (tmp_path / "SICK.txt").write_text("\n".join([header, *rows]) + "\n", "utf-8")
    found = build("sick", data_dir=str(tmp_path)).pairs()
    assert [(pair.texts, pair.label) for pair in found] == [(("three", "four"), 1), (("five", "six"), 2.25)]
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        import datasets

        asked.append((*names, settings["split"]))
        label = "score" if names[0] == "mteb/sickr-sts" else "label"
        return datasets.Dataset.from_dict({"sentence1": ["three"], "sentence2": ["four"], label: [1.0]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in ("sick", "similarity"):
        assert [pair.texts for pair in build(name).pairs()] == [("three", "four")]
    assert asked == [("mteb/sickr-sts", None, "test"), ("nyu-mll/glue", "stsb", "validation")]


def test_the_command_scores_a_masked_model_once(glue: Path, save_teacher: Callable[..., Path], tmp_path: Path) -> None:
    given = [f"model={save_teacher('bert', num_layers=1)}", "name=mine", "task=similarity", f"task.data_dir={glue}"]
    for _ in range(2):
        done = call(distilkit.evaluate.__main__.main, *given, "trainer=cpu", cwd=tmp_path)
        assert (done.code, "Traceback" in done.err) == (0, False), done.err
    assert "already scored" in done.out + done.err
    (found,) = read_results([tmp_path])
    assert json.loads(json.dumps(found.scores)).keys() == {"spearman", "pearson"}


@pytest.mark.parametrize(
    ("changes", "message"), [({"batch_size": 0}, "task.batch_size=0"), ({"device": "moon"}, "task.device='moon'")]
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception) as raised:
        build(**changes)
    assert message in str(raised.value.__cause__)
