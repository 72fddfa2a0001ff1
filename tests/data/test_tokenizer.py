"""Tokenizers that are trained on a corpus."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distilkit.data.tokenizer import load_tokenizer, train_tokenizer
from distilkit.errors import UserError
from tiny import make_documents

MODELS = pytest.mark.parametrize("model", ["wordpiece", "bpe"])


class Texts:
    """A corpus in memory that counts how often it is read."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.reads = texts, 0

    def fingerprint(self) -> dict[str, Any]:
        return {"texts": self.texts}

    def documents(self) -> Iterator[str]:
        self.reads += 1
        yield from self.texts


def settings(cache_dir: Path, **fields: Any) -> dict[str, Any]:
    return {"cache_dir": str(cache_dir), "lowercase": True, "max_documents": 1000, "vocab_size": 300} | fields


def test_more_words_than_asked_for_are_a_warning_that_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = Texts(["".join(chr(0x4E00 + start + n) for n in range(20)) for start in range(0, 800, 20)])
    for _ in range(2):  # trained, and from the cache
        words = len(train_tokenizer(corpus=texts, model="wordpiece", **settings(tmp_path, vocab_size=200)))
        assert (
            f"the tokenizer has {words} words, more than tokenizer.vocab_size=200: each character of the corpus is one, "
            f"and so are the special tokens; set at least {words}, or tokenizer=bpe"
        ) in caplog.text
        caplog.clear()
    assert texts.reads == 2  # once for the characters, once for the words
    train_tokenizer(corpus=texts, model="wordpiece", **settings(tmp_path, vocab_size=2000))
    assert not caplog.text


@MODELS
def test_a_trained_tokenizer_is_read_from_a_cache_that_cannot_be_written(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Texts(make_documents(50))
    first = train_tokenizer(corpus=texts, model=model, **settings(tmp_path))
    reads = texts.reads

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert train_tokenizer(corpus=texts, model=model, **settings(tmp_path)).get_vocab() == first.get_vocab()
    assert texts.reads == reads


@MODELS
def test_the_same_text_gives_the_same_vocabulary_each_time(tmp_path: Path, model: str) -> None:
    texts = make_documents(50)  # many pairs of characters are equally frequent
    found = [
        train_tokenizer(corpus=Texts(texts), model=model, **settings(tmp_path / str(turn))).get_vocab()
        for turn in range(5)
    ]
    assert all(vocabulary == found[0] for vocabulary in found)


def test_wordpiece_splits_words_as_bert_does(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(corpus=Texts(make_documents(50)), model="wordpiece", **settings(tmp_path))
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    assert added == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}  # and no single characters
    tokens = tokenizer.tokenize("[MASK] Zqxe")
    assert tokens[0] == "[MASK]" and not tokens[1].startswith("##")


def test_a_training_that_fails_leaves_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the corpus is empty: no tokenizer can be trained on it"):
        train_tokenizer(corpus=Texts([]), model="bpe", **settings(tmp_path))
    assert [path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("config", ["[1, 2]", '{"model_type": "bert", "dtype": "torch.float16"}'])
def test_a_config_that_is_none_is_an_error_of_the_tokenizer(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config, "utf-8")
    with pytest.raises(UserError, match=f"cannot load a tokenizer from '{tmp_path}': "):
        load_tokenizer(name=str(tmp_path))


@pytest.mark.parametrize(
    ("model", "name", "least"),
    [("bpe", "vocab_size", 261), ("wordpiece", "vocab_size", 6), ("bpe", "max_documents", 1)],
)
def test_a_size_that_is_too_small_is_an_error(tmp_path: Path, model: str, name: str, least: int) -> None:
    found = f"tokenizer.{name}={least - 1}, but with tokenizer.model={model} it must be at least {least}"
    with pytest.raises(UserError, match=found):
        train_tokenizer(corpus=Texts(["ba"]), model=model, **settings(tmp_path, **{name: least - 1}))
    train_tokenizer(corpus=Texts(["ba"]), model=model, **settings(tmp_path, **{name: least}))
