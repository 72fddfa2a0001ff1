"""Language-model scores against loops that mask, slide and count one token at a time with the whole model."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from distilkit import metrics
from distilkit.data.masking import Ids
from distilkit.data.text_files import TextFiles
from distilkit.data.tokenizer import train_tokenizer
from distilkit.errors import UserError
from distilkit.evaluate.perplexity import LanguageScore, masked_batches, masked_windows, pseudo_places, read_text
from distilkit.records import Result, read_file, read_rows, write_results
from jobs import make_job
from tiny import VOCABULARY, build_model, make_documents

CONFIG = Path(__file__).parents[2] / "conf" / "evaluate" / "task" / "lm.yaml"
MASKED = ("bert", "roberta", "distilbert", "modernbert")
SaveTeacher = Callable[..., Path]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # rows are written into the job's folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of 5 to 61 tokens, one with a word that no tokenizer here knows."""
    file = tmp_path_factory.mktemp("held-out") / "text.txt"
    documents = make_documents(6, seed=5)
    file.write_text("\n\n".join([*documents[:5], f"{documents[5]} zzz [MASK]"]), "utf-8")
    return file


def scorer(paths: Any, **fields: Any) -> LanguageScore:
    """Build the task from its config, as the command line does."""
    cfg = OmegaConf.merge(OmegaConf.load(CONFIG), {"paths": str(paths), "device": "cpu", **fields})
    task = instantiate(cfg)
    assert isinstance(task, LanguageScore)
    return task


def measure(paths: Any, folder: Path, *, seed: int = 0, **fields: Any) -> Result:
    task = scorer(paths, **fields)
    [result] = task.measure(make_job(folder, name="tiny", seed=seed))
    return result


def windows_of(file: Path, tokenizer: PreTrainedTokenizerBase, *, room: int) -> list[list[int]]:
    """Cut each document into windows with [CLS] and [SEP], written out by hand."""
    windows = []
    for document in file.read_text("utf-8").split("\n\n"):
        tokens = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(document, split_special_tokens=True))
        pieces = [tokens[start : start + room] for start in range(0, len(tokens), room)]
        windows += [[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id] for piece in pieces]
    return windows


@torch.no_grad()
def naive_pseudo_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: list[list[int]]
) -> tuple[float, int]:
    losses = []
    for window in windows:
        for place, token in enumerate(window):
            if token in tokenizer.all_special_ids:
                continue
            ids = torch.tensor([window])
            ids[0, place] = tokenizer.mask_token_id
            losses.append(-model(input_ids=ids).logits[0, place].double().log_softmax(dim=-1)[token].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("model_type", MASKED)
def test_pseudo_perplexity_is_that_of_a_loop_that_masks_one_token_at_a_time(
    model_type: str, texts: Path, save_teacher: SaveTeacher, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = save_teacher(model_type)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    windows = windows_of(texts, tokenizer, room=22)
    expected, count = naive_pseudo_perplexity(model, tokenizer, windows)
    result = measure(texts, folder, block_size=24)
    assert result.scores["pseudo_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert result.score == result.scores["pseudo_perplexity"]
    assert result.details["tokens"] == count < sum(len(window) - 2 for window in windows)  # without the unknown word
    assert result.details["windows"] == len(windows) > result.details["documents"] == 6


@pytest.mark.parametrize("model_type", MASKED)
def test_masked_accuracy_and_cross_entropy_are_those_of_a_loop_over_windows(
    model_type: str, texts: Path, save_teacher: SaveTeacher, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = save_teacher(model_type)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    windows = windows_of(texts, tokenizer, room=22)
    losses: list[float] = []
    right, seen = 0, []
    arrays = [(0, np.array(window)) for window in windows]
    for batch in masked_batches(arrays, tokenizer, batch_size=1, masked_share=0.3, seed=7):  # no padding, no neighbours
        hidden = batch.labels[0] >= 0
        assert (batch.input_ids[0, hidden] == tokenizer.mask_token_id).all()
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits[0].double()
        truth = batch.labels[0, hidden].tolist()
        seen.append(np.where(hidden, batch.labels[0], batch.input_ids[0]).tolist())
        for row, token in zip(logits[hidden], truth, strict=True):
            losses.append(-row.log_softmax(dim=-1)[token].item())
            right += int(row.argmax().item() == token)
    assert sorted(seen) == sorted(windows)
    result = measure(texts, folder, block_size=24, masked_share=0.3, seed=7)
    assert result.scores["masked_cross_entropy"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.scores["masked_accuracy"] == pytest.approx(right / len(losses))
    assert result.details["masked_tokens"] == len(losses)


def test_a_share_of_each_window_is_hidden_and_the_draw_follows_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = np.random.default_rng(0)
    windows = [(0, np.array([2, *rng.integers(5, len(VOCABULARY), 98), 3])) for _ in range(6)]

    def hidden(seed: int) -> Ids:
        batches = masked_batches(windows, tokenizer, batch_size=4, masked_share=0.15, seed=seed)
        return np.concatenate([batch.labels for batch in batches])

    labels = hidden(1)
    assert ((labels >= 0).sum(axis=1) == 15).all()
    assert (labels[:, [0, -1]] < 0).all()
    assert (labels == hidden(1)).all()
    assert (labels != hidden(2)).any()


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_each_document_has_a_row_whose_sums_give_the_scores(
    model_type: str, texts: Path, tmp_path: Path, save_teacher: SaveTeacher
) -> None:
    file = tmp_path / "text.txt"
    documents = texts.read_text("utf-8").split("\n\n")
    file.write_text("\n\n".join(documents), "utf-8")
    whole = measure(file, save_teacher(model_type), block_size=16, masked_share=0.3)
    rows = read_rows("nowhere", "text")
    assert rows is not None
    assert rows.ids.tolist() == list(range(6)) and whole.details["rows"] == {"text": 6}
    assert metrics.measure(list(whole.scores), rows) == whole.scores
    assert rows.sums["tokens"].sum() == whole.details["tokens"]
    file.write_text(documents[0], "utf-8")
    first = measure(file, save_teacher(model_type), block_size=16)
    assert metrics.score(first.task, rows.take(np.array([0]))) == pytest.approx(first.score, rel=1e-5)


@pytest.mark.parametrize("model_type", ["roberta", "modernbert", "gpt2"])
def test_the_scores_do_not_depend_on_the_batch(model_type: str, texts: Path, save_teacher: SaveTeacher) -> None:
    one, other = (measure(texts, save_teacher(model_type), block_size=16, batch_size=size) for size in (1, 7))
    assert one.scores == pytest.approx(other.scores, rel=1e-5)
    assert one.details == other.details


def stream(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(file.read_text("utf-8"), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert isinstance(ids, list)
    return ids


@torch.no_grad()
def naive_losses(model: PreTrainedModel, ids: list[int], *, block_size: int, stride: int) -> list[float]:
    """Follow transformers' guide to the perplexity of fixed-length models, one window at a time."""
    losses, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + block_size, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[:, : -(end - previous_end)] = -100
        logits = model(input_ids=window).logits[0, :-1].double()
        losses += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")[
            labels[0, 1:] >= 0
        ].tolist()
        previous_end = end
        if end == len(ids):
            break
    return losses


@pytest.mark.parametrize(("block_size", "stride"), [(16, 8), (16, 5), (16, 16), (64, 1), (2, 1)])
def test_perplexity_is_that_of_a_loop_over_sliding_windows(
    block_size: int, stride: int, texts: Path, save_teacher: SaveTeacher, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = save_teacher("gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = stream(texts, causal_tokenizer)
    losses = naive_losses(model, ids, block_size=block_size, stride=stride)
    result = measure(texts, folder, block_size=block_size, stride=stride)
    assert result.details["tokens"] == len(losses)
    if stride < block_size:
        assert len(losses) == len(ids) - 1
    assert result.score == result.scores["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    words = len(texts.read_text("utf-8").split())
    assert result.scores["word_perplexity"] == pytest.approx(
        math.exp(sum(losses) / len(losses) * (len(ids) - 1) / words), rel=1e-5
    )


def test_perplexity_of_one_window_is_the_model_s_own_loss(
    tmp_path: Path, save_teacher: SaveTeacher, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    file = tmp_path / "short.txt"
    file.write_text(make_documents(1, seed=5)[0], "utf-8")
    folder = save_teacher("gpt2")
    ids = torch.tensor([stream(file, causal_tokenizer)])
    loss = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids, labels=ids).loss.item()
    result = measure(file, folder, block_size=ids.shape[1], stride=ids.shape[1])
    assert result.score == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.details["tokens"] == ids.shape[1] - 1


def test_a_limit_takes_the_first_tokens_and_the_words_they_spell(
    texts: Path, save_teacher: SaveTeacher, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = read_text(TextFiles(paths=str(texts)), causal_tokenizer, max_tokens=50, separator="\n\n")
    whole = texts.read_text("utf-8")
    assert np.concatenate(text.documents).tolist() == stream(texts, causal_tokenizer)[:50]
    assert sum(text.words) == len(causal_tokenizer.decode(np.concatenate(text.documents)).replace(" .", ".").split())
    assert sum(text.words) < len(whole.split())
    result = measure(texts, save_teacher("gpt2"), max_tokens=50, block_size=16)
    assert result.details["tokens"] == 49
    assert result.details["text_tokens"] == 50
    assert result.settings["stride"] == 8


def test_the_stream_of_a_causal_model_is_the_text_with_an_empty_line_between_documents(
    texts: Path, tmp_path: Path
) -> None:
    corpus = TextFiles(paths=str(texts))
    bytewise = train_tokenizer(
        corpus=corpus, cache_dir=str(tmp_path), model="bpe", vocab_size=300, lowercase=False, max_documents=9
    )
    text = read_text(corpus, bytewise, max_tokens=None, separator="\n\n")
    assert np.concatenate(text.documents).tolist() == stream(texts, bytewise)


def test_a_limit_of_pseudo_tokens_spreads_them_over_the_text(texts: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    windows = masked_windows(
        read_text(TextFiles(paths=str(texts)), tokenizer, max_tokens=None), tokenizer, block_size=10
    )
    every = pseudo_places(windows, tokenizer, max_tokens=None)
    some = pseudo_places(windows, tokenizer, max_tokens=len(every) // 5)
    assert len(set(some)) == len(some) == len(every) // 5
    order = {place: number for number, place in enumerate(sorted(every))}
    gaps = np.diff(sorted(order[place] for place in some))
    assert set(gaps) <= {5, 6}


def test_special_tokens_that_the_text_spells_are_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ba [SEP] be", "utf-8")
    [ids] = read_text(TextFiles(paths=str(file)), tokenizer, max_tokens=None).documents
    assert tokenizer.sep_token_id not in ids


def test_the_result_can_be_written_and_read(texts: Path, tmp_path: Path, save_teacher: SaveTeacher) -> None:
    result = measure(texts, save_teacher("bert"), max_tokens=30, seed=3)
    assert (result.name, result.task, result.kind, result.seed) == ("tiny", "pseudo_perplexity", "language_model", 3)
    assert not result.higher_is_better
    model = build_model("bert")
    embeddings = model.base_model.embeddings
    tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
    assert result.parameters == sum(weight.numel() for weight in model.parameters())
    assert result.parameters - result.parameters_without_embeddings == sum(part.weight.numel() for part in tables)
    assert result.settings["block_size"] == 64  # as many as the model has positions
    write_results(tmp_path, [result])
    written = json.loads(json.dumps(asdict(result))) | {"folder": str(tmp_path)}
    assert [asdict(read) for read in read_file(tmp_path / "results.json")] == [written]


def test_the_text_is_wikitext_unless_files_are_given() -> None:
    cfg = OmegaConf.load(CONFIG)
    task = instantiate(cfg)
    expected = {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1", "split": "test"}
    assert expected.items() <= task.corpus.fingerprint()["hub"].items()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 1}, "task.max_tokens=1, but it must be at least 2"),
        ({"max_pseudo_tokens": 0}, "task.max_pseudo_tokens=0, but it must be at least 1"),
        ({"block_size": 1}, "task.block_size=1, but it must be at least 2"),
        ({"stride": 0}, "task.stride=0, but it must be at least 1"),
        ({"batch_size": 0}, "task.batch_size=0, but it must be at least 1"),
        ({"masked_share": 1.0}, "task.masked_share=1.0, but it must be above 0 and below 1"),
        ({"device": "gpu"}, "task.device='gpu' cannot be used .*; set task.device=auto or cpu"),
        ({"device": "cuda:99"}, "task.device='cuda:99' cannot be used .*; set task.device=auto or cpu"),
        ({"paths": "no/such/file"}, "task.paths: 'no/such/file' matches no file"),
    ],
)
def test_a_wrong_value_is_told_before_a_model_is_loaded(fields: dict[str, Any], message: str, texts: Path) -> None:
    with pytest.raises(Exception, match=message) as caught:
        scorer(**{"paths": texts, **fields})
    assert isinstance(caught.value.__cause__, UserError)  # instantiate wraps it; the entry unwraps it


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("gpt2", {"block_size": 65}, "task.block_size=65, but .* has 64 positions; set task.block_size=64 or less"),
        (
            "gpt2",
            {"block_size": 8, "stride": 9},
            "task.stride=9 would skip tokens between windows of 8; set task.stride=8 or less",
        ),
        ("bert", {"block_size": 2}, "task.block_size=2 has no room next to the 2 special .*; set .* to 3 or more"),
    ],
)
def test_a_window_that_does_not_fit_is_an_error(
    model_type: str, fields: dict[str, Any], message: str, texts: Path, save_teacher: SaveTeacher
) -> None:
    with pytest.raises(UserError, match=message):
        measure(texts, save_teacher(model_type), **fields)


@pytest.mark.parametrize(
    ("model_type", "text", "message"),
    [
        ("bert", " \n\n \n", "the text to score is empty; check task.paths"),
        ("gpt2", "ba", "the text to score is one token"),
        ("bert", "zzz zzz", "the tokenizer knows no token of the text; check task.paths"),
    ],
)
def test_text_without_a_token_to_score_is_an_error(
    model_type: str, text: str, message: str, tmp_path: Path, save_teacher: SaveTeacher
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text, "utf-8")
    with pytest.raises(UserError, match=message):
        measure(file, save_teacher(model_type))


def test_a_table_without_the_column_is_told_with_the_key_of_this_task(
    tmp_path: Path, save_teacher: SaveTeacher
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"content": "ba"}\n', "utf-8")
    with pytest.raises(UserError, match="has no column 'text'; it has content: set task.column"):
        measure(file, save_teacher("bert"))
    with pytest.raises(UserError, match="has no column 'text'; it has content: set task.column"):
        scorer(file).check_data()  # without a model


def test_a_tokenizer_that_does_not_fit_the_model_is_an_error(
    texts: Path, tmp_path: Path, save_teacher: SaveTeacher, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    size = len(VOCABULARY)
    small = save_teacher("bert", vocab_size=size - 3)
    with pytest.raises(UserError, match=f"the tokenizer has {size} ids, but .* embeds {size - 3}"):
        measure(texts, small)
    causal_tokenizer.save_pretrained(tmp_path)
    task = scorer(texts)
    with pytest.raises(UserError, match="the tokenizer of a masked bert has no mask token"):
        task.measure(make_job(save_teacher("bert"), tokenizer=str(tmp_path)))
