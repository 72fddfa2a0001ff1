"""Named entities: files in all tagging schemes, words against their tokens, scores against seqeval."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqeval.metrics
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

import distilkit.evaluate.__main__
from distilkit.data.text_files import TextFiles
from distilkit.data.tokenizer import train_tokenizer
from distilkit.errors import UserError
from distilkit.evaluate.ner import EntityTask, Sentence, entities, first_tokens, read_conll
from distilkit.metrics import agreement, score
from distilkit.records import read_results, read_rows
from jobs import call, only
from tiny import WORDS, make_documents

CONFIG = Path(__file__).parents[2] / "conf/evaluate/task/ner.yaml"
TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def task(**changes: Any) -> EntityTask:
    settings = {"labels": TAGS, "max_length": 16, "doc_stride": 4}
    built = instantiate(OmegaConf.merge(OmegaConf.load(CONFIG), settings | changes))
    assert isinstance(built, EntityTask)
    return built


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """GPT-2's and RoBERTa's kind, whose tokens begin with the space before a word."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text("\n\n".join(make_documents(100)), "utf-8")
    corpus: Any = TextFiles(paths=str(folder / "text.txt"))
    return train_tokenizer(
        corpus=corpus, cache_dir=str(folder), model="bpe", vocab_size=300, lowercase=False, max_documents=100
    )


# -------------------------------------------------------------------------------------------- files

WANTED = Sentence(
    words=("Ada", "Lovelace", "Bo", "met", "Cy", "in", "New", "York"),
    tags=("B-PER", "I-PER", "B-PER", "O", "B-PER", "O", "B-LOC", "I-LOC"),
)
SCHEMES = {
    "IOB1": "I-PER I-PER B-PER O I-PER O I-LOC I-LOC",
    "IOB2": "B-PER I-PER B-PER O B-PER O B-LOC I-LOC",
    "IOBES": "B-PER E-PER S-PER O S-PER O B-LOC E-LOC",
    "BILOU": "B-PER L-PER U-PER O U-PER O B-LOC L-LOC",
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("joint", [" ", "\t", "  "])
def test_every_scheme_and_separator_says_the_same(scheme: str, joint: str, tmp_path: Path) -> None:
    lines = [joint.join((word, "NN", tag)) for word, tag in zip(WANTED.words, SCHEMES[scheme].split(), strict=True)]
    text = ["-DOCSTART- -X- O", "", *lines, "", "", *lines]  # no line end after the last sentence
    (tmp_path / "train.txt").write_text("\n".join(text), "utf-8")
    assert read_conll(tmp_path / "train.txt", word=0, tag=-1) == [WANTED, WANTED]


def test_columns_are_chosen_and_tabs_keep_spaces_in_words(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("1\t0 800 7\tB-TEL\tO\r\n2\t#\tO\tO\r\n\r\n1\tx\tO\tO\r\n", "utf-8")
    first, second = read_conll(file, word=1, tag=2)
    assert first == Sentence(words=("0 800 7", "#"), tags=("B-TEL", "O"))
    assert second.words == ("x",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\nb\n", "line 2 has 1 columns, the first word has 2; .* task.columns.word=0"),
        ("a\nb\n", "line 1 has 1 columns"),
        ("a NN O\nb NN N O\n", "line 2 has 4 columns, the first word has 3"),
        ("a NN\n", "from line 1: tag 'NN' of 'a' is not in IOB1, IOB2, IOBES or BILOU"),
        ("\n-DOCSTART- O\n\n", "has no sentence; it takes a word and its tag a line"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text, "utf-8")
    with pytest.raises(UserError, match=message):
        read_conll(tmp_path / "a.txt", word=0, tag=-1)


def test_a_split_without_an_entity_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a O\n", "utf-8")
    with pytest.raises(UserError, match="the train split of task ner has no entity, every tag is O"):
        task(data_dir=str(tmp_path)).train_examples()


@pytest.mark.parametrize("named", [True, False])
def test_the_hub_gives_names_or_numbers_of_tags(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        import datasets

        asked.append((*names, settings["split"], settings["revision"]))
        columns = {"tokens": [["Ada", "met"], [], ["Bo"]], "ner_tags": [[3, 0], [], [1]]}
        kind = datasets.ClassLabel(names=TAGS) if named else datasets.Value("int64")
        features = {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(kind)}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    expected = [Sentence(words=("Ada", "met"), tags=("B-PER", "O")), Sentence(words=("Bo",), tags=("B-LOC",))]
    assert task().train_examples() == expected
    assert asked == [("eriktks/conll2003", "conll2003", "train", "refs/convert/parquet")]
    if named:
        assert task(labels=None).classes == TAGS
    else:
        with pytest.raises(UserError, match=r"tag 3 without a name; list them in their order: task.labels="):
            task(labels=None).train_examples()


# ------------------------------------------------------------------------------------ words and tokens


def make_sentences(count: int, *, words: int, seed: int = 0) -> list[Sentence]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        tags: list[str] = []
        while len(tags) < words:
            kind = rng.choice(["PER", "LOC"])
            tags += rng.choice([["O"], ["O"], [f"B-{kind}"], [f"B-{kind}", f"I-{kind}"]])
        names = ("".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(words))
        made.append(Sentence(words=tuple(names), tags=tuple(tags[:words])))
    return made


@pytest.mark.parametrize("name", ["tokenizer", "byte_tokenizer", "causal_tokenizer"])
def test_the_first_token_of_a_word_is_the_first_that_touches_it(name: str, request: pytest.FixtureRequest) -> None:
    chosen: PreTrainedTokenizerBase = request.getfixturevalue(name)
    (sentence,) = make_sentences(1, words=30)
    words = [*sentence.words, "[SEP]", "\u200b", "北京", "a b", "é"]
    ids, firsts = first_tokens(words, chosen)
    encoded = chosen(" ".join(words), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    assert ids == encoded["input_ids"]
    for index, word in enumerate(words):
        characters = set(range(len(" ".join([*words[:index], ""])), len(" ".join(words[: index + 1]))))
        touching = [
            place for place, (start, end) in enumerate(encoded["offset_mapping"]) if characters & {*range(start, end)}
        ]
        assert firsts[index] == (touching[0] if touching else -1), word


@pytest.mark.parametrize("name", ["tokenizer", "causal_tokenizer"])
def test_no_word_of_a_long_sentence_is_lost_between_windows(name: str, request: pytest.FixtureRequest) -> None:
    chosen: PreTrainedTokenizerBase = request.getfixturevalue(name)
    examples = make_sentences(3, words=50)
    built = task()
    windows = built.encode(examples, chosen)
    assert len(windows) > 3 * 50 / 16
    assert all(len(window["input_ids"]) <= 16 == len(window["target"]) for window in windows)
    for number, sentence in enumerate(examples):
        ids, firsts = first_tokens(sentence.words, chosen)
        for word, tag in enumerate(sentence.tags):
            holding = [each for each in windows if each["sentence"] == number and word in each["words"]]
            assert holding
            for window in holding:
                place = window["places"][list(window["words"]).index(word)]
                assert window["input_ids"][place] == ids[firsts[word]]
                assert window["target"][place] == TAGS.index(tag)
        assert sum(len(set(window["words"])) for window in windows if window["sentence"] == number) > 50


def logits_for(window: Any, labels: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), len(TAGS)).float()
    return one_hot, torch.ones(len(labels))


def test_scores_are_seqevals_and_right_labels_score_one(tokenizer: PreTrainedTokenizerBase) -> None:
    examples, built, rng = make_sentences(20, words=30), task(), np.random.default_rng(0)
    windows = built.encode(examples, tokenizer)
    right = [logits_for(window, np.maximum(window["target"], 0)) for window in windows]
    assert score("f1", built.rows(right, windows, examples)) == 1
    assert built.predictions(right, windows, examples) == [list(sentence.tags) for sentence in examples]
    noisy = [
        logits_for(window, np.where(rng.random(16) < 0.2, rng.integers(0, 5, 16), np.maximum(window["target"], 0)))
        for window in windows
    ]
    said = built.predictions(noisy, windows, examples)
    rows = built.rows(noisy, windows, examples)
    gold = [list(sentence.tags) for sentence in examples]
    assert score("f1", rows) == pytest.approx(seqeval.metrics.f1_score(gold, said), abs=1e-12)
    assert 0.3 < score("f1", rows) < 0.95
    assert rows.sums["tp"].sum() / rows.sums["gold"].sum() == pytest.approx(seqeval.metrics.recall_score(gold, said))


def test_a_word_takes_the_label_of_the_window_that_shows_most_around_it(tokenizer: PreTrainedTokenizerBase) -> None:
    built = task(max_length=10, doc_stride=4)
    (sentence,) = examples = [Sentence(words=tuple(WORDS[:12]), tags=("B-PER",) + ("O",) * 11)]
    first, second = built.encode(examples, tokenizer)
    assert (first["words"].tolist(), second["words"].tolist()) == (list(range(8)), list(range(4, 12)))
    said = built.predictions(
        [logits_for(each, np.full(10, label)) for each, label in ((first, 1), (second, 3))], [first, second], examples
    )
    assert said == [["B-LOC"] * 6 + ["B-PER"] * 6]
    assert len(sentence.words) == 12


def test_losses_are_means_over_words_and_over_real_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    built = task()
    windows = built.encode(make_sentences(2, words=4), tokenizer)
    length = max(len(window["input_ids"]) for window in windows)
    mask = torch.stack([torch.arange(length) < len(window["input_ids"]) for window in windows]).float()
    targets = torch.stack([torch.from_numpy(window["target"]) for window in windows])
    mine, theirs = torch.randn(2, len(windows), length, 5, generator=torch.Generator().manual_seed(0))
    nlls = [
        -mine[row, place].log_softmax(-1)[targets[row, place]].item()
        for row in range(len(windows))
        for place in range(length)
        if targets[row, place] >= 0
    ]
    assert built.hard_loss((mine, mask), targets).item() == pytest.approx(np.mean(nlls), rel=1e-5)
    assert built.hard_loss((mine, mask), torch.full_like(targets, -100)).item() == 0
    kls = [
        4 * torch.nn.functional.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="sum").item()
        for s, t in zip(mine[mask > 0], theirs[mask > 0], strict=True)
    ]
    soft = built.soft_loss((mine, mask), (theirs, mask), temperature=2.0)
    assert soft.item() == pytest.approx(np.mean(kls), rel=1e-5)


def test_entities_are_of_one_type_each() -> None:
    assert entities(["I-PER", "I-LOC", "O", "U-PER"]) == [("PER", 0, 0), ("LOC", 1, 1), ("PER", 3, 3)]


# --------------------------------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def conll(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences with persons of a first name and a last name, each from six words, and places of one word."""
    folder, rng = tmp_path_factory.mktemp("conll"), random.Random(0)
    for name, count in (("train", 120), ("test", 40)):
        lines = []
        for _ in range(count):
            for _ in range(rng.randint(1, 12)):
                person = [f"{rng.choice(WORDS[:6])} B-PER", f"{rng.choice(WORDS[6:12])} I-PER"]
                lines += rng.choice([person, [f"{rng.choice(WORDS[12:18])} B-LOC"], [f"{rng.choice(WORDS[18:40])} O"]])
            lines.append("")
        (folder / f"{name}.txt").write_text("\n".join(lines), "utf-8")
    return folder


FAST = ("trainer=cpu", "trainer.enable_progress_bar=false", "finetune.lr=3e-3", "finetune.batch_size=16")


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_model_learns_entities_and_is_scored_again(
    model_type: str, conll: Path, save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    given = ["task=ner", f"task.data_dir={conll}", "task.max_length=24", "task.doc_stride=8", *FAST]
    given += ["task.max_scored_rows=30"]
    model = save_teacher(model_type, num_layers=2)
    done = call(
        distilkit.evaluate.__main__.main,
        f"model={model}",
        "name=mine",
        "finetune.epochs=20",
        "save_model=true",
        *given,
        cwd=tmp_path,
    )
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    (found,) = read_results([tmp_path])
    assert found.score == found.scores["f1"]
    assert found.score > 0.9
    folder = only(tmp_path, "outputs/evaluate/mine/ner/*/model")
    again = call(
        distilkit.evaluate.__main__.main, f"model={folder}", "name=again", "finetune.epochs=0", *given, cwd=tmp_path
    )
    assert again.code == 0, again.err
    rows = read_rows(folder.parent, "test")
    assert rows is not None and len(set(rows.ids.tolist())) == 30 and rows.ids.max() > 30
    assert agreement(rows, rows) == 1
    assert [each.score for each in read_results([tmp_path])] == [found.score, found.score]
    other = call(
        distilkit.evaluate.__main__.main,
        f"model={folder}",
        "finetune.epochs=0",
        "task.labels=[O,B-PER,I-PER,B-LOC,I-LOC]",
        *given,
        cwd=tmp_path,
    )
    assert (other.code, "set task.labels=[O,B-LOC,I-LOC,B-PER,I-PER]" in other.err) == (1, True), other.err
