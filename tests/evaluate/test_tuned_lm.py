"""A causal model fine-tuned on a text: its blocks, its losses against transformers', and its perplexity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import distilkit.evaluate.__main__
from distilkit.errors import UserError
from distilkit.evaluate.tuned_lm import TunedLanguageScore
from distilkit.records import Result, read_results
from jobs import Outcome, call, only
from tiny import make_documents


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, count, seed in (("train", 120, 0), ("test", 20, 1)):
        (folder / f"{name}.txt").write_text("\n\n".join(make_documents(count, seed=seed)), "utf-8")
    return folder


def build(texts: Path, *overrides: str) -> TunedLanguageScore:
    given = ["model=m", "task=wikitext103", "task.device=cpu", "task.max_length=32"]
    given += [f"task.train.paths={texts}/train.txt", f"task.scored.paths={texts}/test.txt"]
    with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
        built = instantiate(compose("evaluate", [*given, *overrides]).task)
    assert isinstance(built, TunedLanguageScore)
    return built


def test_the_data_are_wikitexts_train_and_test_splits(texts: Path) -> None:
    task = build(texts, "task.train.paths=null", "task.scored.paths=null")
    for part, split in ((task.train, "train"), (task.scored, "test")):
        hub: Any = part.corpus.fingerprint()["hub"]
        assert (hub["path"], hub["name"], hub["split"]) == ("Salesforce/wikitext", "wikitext-103-raw-v1", split)
    hashes = build(texts).check_data()
    assert hashes.keys() == {"train_data", "scored_data"} and len(set(hashes.values())) == 2


def test_blocks_are_the_stream_of_all_documents(texts: Path, causal_tokenizer: PreTrainedTokenizerBase) -> None:
    stream = [token for text in make_documents(120) for token in causal_tokenizer(text)["input_ids"]]
    blocks = build(texts).blocks(causal_tokenizer)
    assert np.concatenate([block["input_ids"] for block in blocks]).tolist() == stream
    assert {len(block["input_ids"]) for block in blocks[:-1]} == {32} == {len(block["target"]) for block in blocks}
    for block in blocks:
        length = len(block["input_ids"])
        assert block["attention_mask"].tolist() == [1] * length
        assert block["target"].tolist() == [*block["input_ids"].tolist(), *[-100] * (32 - length)]
    few = build(texts, "task.train.max_tokens=65").blocks(causal_tokenizer)
    assert [len(block["input_ids"]) for block in few] == [32, 32]  # one token has nothing to predict
    with pytest.raises(UserError, match=r"is one token; check task.train.paths"):
        one = build(texts)
        one.train.max_tokens = 1
        one.blocks(causal_tokenizer)


def test_losses_are_transformers_own_and_the_kl_of_real_tokens(texts: Path, save_teacher: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_teacher("gpt2", num_layers=1)).eval()
    ids = torch.randint(5, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    targets = torch.nn.functional.pad(labels, (0, 20), value=-100).int()
    task = build(texts)
    with torch.inference_mode():
        outputs = model(input_ids=ids, attention_mask=mask, labels=labels)
        logits = task.logits(outputs, mask)
        assert task.hard_loss(logits, targets).item() == pytest.approx(outputs.loss.item(), rel=1e-5)
        theirs = logits[0].flip(-1), logits[1]
        kls = [
            4 * torch.nn.functional.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="sum").item()
            for s, t in zip(logits[0][mask > 0], theirs[0][mask > 0], strict=True)
        ]
        assert task.soft_loss(logits, theirs, temperature=2.0).item() == pytest.approx(np.mean(kls), rel=1e-4)


@pytest.fixture
def score(texts: Path, save_teacher: Callable[..., Path], tmp_path: Path) -> Callable[..., Outcome]:
    def run(*overrides: str, model: Path | None = None, task: str = "wikitext103") -> Outcome:
        own = ["task.max_length=32", f"task.train.paths={texts}/train.txt", f"task.scored.paths={texts}/test.txt"]
        given = [f"model={model or save_teacher('gpt2', num_layers=2)}", f"task={task}", "trainer=cpu"]
        given += own if task == "wikitext103" else [f"task.paths={texts}/test.txt"]
        fast = ("trainer.enable_progress_bar=false", "finetune.lr=5e-3", "finetune.batch_size=8")
        return call(distilkit.evaluate.__main__.main, *given, *fast, *overrides, cwd=tmp_path)

    return run


def named(folder: Path, name: str) -> Result:
    (found,) = read_results([folder / "outputs/evaluate" / name])
    return found


def test_training_lowers_the_perplexity_that_the_saved_model_has(
    score: Callable[..., Outcome], save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    done = score("name=tuned", "save_model=true", "finetune.epochs=3")
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    assert score("name=before", "finetune.epochs=0").code == 0
    assert score("name=plain", task="lm").code == 0
    folder = only(tmp_path, "outputs/evaluate/tuned/wikitext103/*/model")
    assert score("name=saved", task="lm", model=folder).code == 0
    tuned, before, plain, saved = (named(tmp_path, name) for name in ("tuned", "before", "plain", "saved"))
    assert before.scores == pytest.approx(plain.scores)
    assert tuned.scores == pytest.approx(saved.scores)
    assert tuned.scores["perplexity"] < before.scores["perplexity"] / 2
    assert (tuned.task, tuned.kind, tuned.seed) == ("tuned_perplexity", "language_model", 42)  # not of WikiText
    assert not tuned.higher_is_better
    assert (tuned.settings["epochs"], tuned.settings["max_length"]) == (3, 32)
    assert {"train_data", "scored_data"} <= tuned.settings.keys()
    assert tuned.cost["tokens"] == 3 * tuned.settings["train_tokens"] + plain.cost["tokens"]


@pytest.mark.parametrize(
    ("change", "task"),
    [
        ("task.device=cpu", "wikitext103"),
        ("task.scored.dataset.name=wikitext-2-raw-v1", "tuned_perplexity"),
        ("task.train.dataset.split=validation", "tuned_perplexity"),
        ("task.scored.max_tokens=500", "tuned_perplexity"),
    ],
)
def test_only_all_of_wikitext_is_named_like_the_published_figure(
    change: str, task: str, score: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distilkit.data.hub.HubDataset.documents", lambda self: iter(make_documents(9)))
    done = score("task.train.paths=null", "task.scored.paths=null", "name=m", "finetune.epochs=0", change)
    assert done.code == 0, done.err
    assert named(tmp_path, "m").task == task


def test_a_teacher_and_what_it_takes_are_recorded(score: Callable[..., Outcome], tmp_path: Path) -> None:
    assert score("name=teacher", "save_model=true", "finetune.epochs=1").code == 0
    folder = only(tmp_path, "outputs/evaluate/teacher/wikitext103/*/model")
    done = score("name=student", f"teacher={folder}", "finetune.epochs=1")
    assert done.code == 0, done.err
    found = named(tmp_path, "student").teacher
    assert found is not None and found["name"] == str(folder)


def test_masked_models_and_what_is_not_there_are_refused(
    score: Callable[..., Outcome], save_teacher: Callable[..., Path]
) -> None:
    for overrides, model, message in (
        ((), save_teacher("bert", num_layers=1), "is a masked bert, but task wikitext103 is for causal models"),
        (("finetune.held_out=0.1",), None, "finetune.held_out=0.1, but task wikitext103 has none"),
        (("backends=[bf16]",), None, "backends=['bf16'], but task wikitext103 has none; set backends=[]"),
        (("task.max_length=1",), None, "task.max_length=1, but it must be at least 2"),
        (("task.max_length=100",), None, "task.max_length=100"),
    ):
        done = score(*overrides, model=model)
        assert (done.code, message in done.err) == (1, True), done.err
