"""SQuAD: windows and answers against its official script and a brute-force search, and the command line."""

import gzip
import itertools
import json
import lzma
import random
import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

import distilkit.evaluate.__main__
from distilkit.data.text_files import TextFiles
from distilkit.data.tokenizer import train_tokenizer
from distilkit.errors import UserError
from distilkit.evaluate.squad import (
    Answer,
    Question,
    QuestionTask,
    best_spans,
    best_text,
    encode_questions,
    find_span,
    n_best_answers,
    question_of,
    read_questions,
    squad_scores,
)
from distilkit.metrics import measure
from distilkit.records import read_results, read_rows
from jobs import Outcome, call, only
from tiny import WORDS, make_documents

UNICODE = "«ba» ça 🙂🙃 naïve — 北京 ba\u200bbe e\u0301a."


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """RoBERTa's kind: byte-level BPE, two separators between question and context."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text("\n\n".join(make_documents(100)), "utf-8")
    return train_tokenizer(
        corpus=TextFiles(paths=str(folder / "text.txt")),
        cache_dir=str(folder),
        model="bpe",
        vocab_size=400,
        lowercase=False,
        max_documents=100,
    )


@pytest.fixture(params=["wordpiece", "bpe"])
def either(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """BERT's kind of tokenizer and RoBERTa's."""
    name = "tokenizer" if request.param == "wordpiece" else "byte_tokenizer"
    found = request.getfixturevalue(name)
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def ask(context: str, answer: str, *, start: int | None = None, question: str = "ba be?", key: str = "q") -> Question:
    at = context.index(answer) if start is None else start
    return Question(id=key, question=question, context=context, answers=((answer, at),))


def make_questions(count: int, *, words: int = 90, seed: int = 0) -> list[Question]:
    """Questions on contexts of so many words, with answers of 1 to 6 words: the first, the last, and any."""
    rng = random.Random(seed)
    questions = []
    for number in range(count):
        parts = [rng.choice(WORDS) for _ in range(words)]
        first = {0: 0, 1: words - 1}.get(number, rng.randrange(words - 6))
        answer = " ".join(parts[first : first + rng.randint(1, 6)])
        start = len(" ".join([*parts[:first], ""]))
        question = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
        questions.append(ask(" ".join(parts), answer, start=start, question=question, key=str(number)))
    return questions


# ------------------------------------------------------------------------ files


def layout(entry: dict[str, Any] | None = None) -> dict[str, Any]:
    qas = [{"id": "1", "question": "  Who?", "answers": [{"text": "Norman", "answer_start": 4}]}, entry]
    paragraph = {"context": "The Norman dynasty", "qas": [each for each in qas if each]}
    return {"version": "1.1", "data": [{"title": "Normans", "paragraphs": [paragraph]}]}


@pytest.mark.parametrize(("name", "opener"), [("a.json", open), ("a.json.gz", gzip.open), ("a.json.xz", lzma.open)])
def test_the_official_file_is_read_plain_and_compressed(name: str, opener: Callable[..., Any], tmp_path: Path) -> None:
    second = {
        "id": "2",
        "question": "What?",
        "answers": [{"text": "dynasty", "answer_start": 11}, {"text": "The Norman dynasty", "answer_start": 0}],
    }
    with opener(tmp_path / name, "wt", encoding="utf-8") as stream:
        json.dump(layout(second), stream)
    expected = [
        Question(id="1", question="  Who?", context="The Norman dynasty", answers=(("Norman", 4),)),
        Question(
            id="2", question="What?", context="The Norman dynasty", answers=(("dynasty", 11), ("The Norman dynasty", 0))
        ),
    ]
    assert read_questions(tmp_path / name) == expected


def test_rows_of_the_hub_give_the_same_questions(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(layout()), "utf-8")
    answers = {"text": ["Norman"], "answer_start": [4]}
    row = {"id": "1", "title": "Normans", "context": "The Norman dynasty", "question": "  Who?", "answers": answers}
    assert [question_of(row, place="row 0")] == read_questions(tmp_path / "a.json")
    with pytest.raises(UserError, match="row 1.answers has no 'text' .list."):
        question_of({**row, "answers": {"answer_start": [4]}}, place="row 1")


def broken(**changes: Any) -> dict[str, Any]:
    entry = {"id": "2", "question": "What?", "answers": [{"text": "dynasty", "answer_start": 11}], **changes}
    return layout({key: value for key, value in entry.items() if value is not None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no 'data' .list.; SQuAD 1.1's layout is"),
        ({"data": [{"title": "x"}]}, r"data\[0\] has no 'paragraphs' .list."),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\] has no 'context' .text."),
        ({"data": [{"paragraphs": [{"context": "a"}]}]}, r"data\[0\].paragraphs\[0\] has no 'qas' .list."),
        ({"data": []}, "holds no question; give the official"),
        (broken(id=None), r"paragraphs\[0\].qas\[1\] has no 'id' .text."),
        (broken(question=3), r"qas\[1\] has no 'question' .text."),
        (broken(answers=None), r"qas\[1\] has no 'answers' .list."),
        (broken(answers=[{"text": "dynasty"}]), r"qas\[1\].answers\[0\] has no 'answer_start' .number."),
        (broken(answers=[]), r"qas\[1\] has no answer, .* files of SQuAD 2.0 are not supported"),
        (
            broken(answers=[{"text": "dynasty", "answer_start": 12}]),
            "answer 'dynasty' is not at character 12 of its context; fix answer_start",
        ),
        (broken(answers=[{"text": "dynasty", "answer_start": -7}]), "is not at character -7"),
        (broken(question="\ud83d?"), r"qas\[1\]: unpaired surrogate; fix or drop"),
    ],
)
def test_a_malformed_file_is_named_with_what_it_lacks(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "dev-v1.1.json"
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_questions(file)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_is_cut_short_or_missing_is_told(tmp_path: Path) -> None:
    whole = json.dumps(layout()).encode()
    (tmp_path / "a.json").write_bytes(whole[:50])
    (tmp_path / "b.json.xz").write_bytes(lzma.compress(whole)[:-30])
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(whole)[:-10])
    (tmp_path / "d.json").write_bytes(b"\xff\xfe")
    (tmp_path / "g.json").write_bytes(b'{"data": ' + b"1" * 5000 + b"}")
    (tmp_path / "h.json").write_bytes(b"[" * 100_000)
    for name, message in (
        ("a.json", "a.json is not JSON"),
        ("g.json", "g.json is not JSON"),
        ("h.json", "h.json is not JSON"),
        ("b.json.xz", "cannot read .*b.json.xz: .*cut short"),
        ("c.json.gz", "cannot read .*c.json.gz: .*cut short"),
        ("d.json", "d.json is not UTF-8"),
        ("e.json", "cannot read .*e.json: .*No such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_questions(tmp_path / name)


# ---------------------------------------------------------------------- windows


def perfect(windows: list[dict[str, Any]], *, rng: np.random.Generator) -> list[tuple[Any, Any]]:
    """Logits that point to each window's target where it holds the answer, as tensors with some padding."""
    logits = []
    for window in windows:
        pair = rng.normal(size=(2, len(window["input_ids"]) + 3))
        for row, token in enumerate(window["target"]):
            pair[row, token] += 50
        logits.append((torch.from_numpy(pair[0]).float(), torch.from_numpy(pair[1]).float()))
    return logits


@pytest.mark.parametrize(("max_length", "doc_stride"), [(384, 128), (48, 12), (40, 0)])
def test_answers_are_found_at_the_right_characters(
    max_length: int, doc_stride: int, either: PreTrainedTokenizerBase
) -> None:
    questions = make_questions(40)
    windows = encode_questions(questions, either, max_length=max_length, doc_stride=doc_stride)
    assert (len(windows) > 2 * len(questions)) == (max_length < 384)
    holding = Counter()
    for window in windows:
        question = questions[window["question"]]
        text, at = question.answers[0]
        offsets, (first, last) = window["offsets"], window["target"]
        in_context = offsets[offsets[:, 0] >= 0]
        holds = in_context[0, 0] <= at and in_context[-1, 1] >= at + len(text)
        assert ((first, last) != (0, 0)) == holds
        assert len(window["input_ids"]) == len(offsets) <= max_length
        if holds:
            assert (offsets[first, 0], offsets[last, 1]) == (at, at + len(text))
            holding[window["question"]] += 1
    if doc_stride:  # an answer is shorter than what windows share
        assert set(holding) == set(range(len(questions)))
    logits = perfect(windows, rng=np.random.default_rng(0))
    answers = n_best_answers(questions, windows, logits, n_best=20, max_answer_length=30)
    for number, (question, given) in enumerate(zip(questions, answers, strict=True)):
        if number in holding:
            assert (given[0].text, given[0].start) == question.answers[0]
            assert question.context[given[0].start : given[0].end] == given[0].text


def test_windows_share_the_stride_and_cover_the_context(either: PreTrainedTokenizerBase) -> None:
    [question] = make_questions(1, words=120)
    windows = encode_questions([question], either, max_length=40, doc_stride=10)
    contexts = [[tuple(pair) for pair in window["offsets"].tolist() if pair[0] >= 0] for window in windows]
    for one, other in itertools.pairwise(contexts):
        assert one[-10:] == other[:10]
    joined = [*contexts[0], *(pair for context in contexts[1:] for pair in context[10:])]
    whole = either(question.context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert joined == whole
    for window in windows:
        assert window["input_ids"][0] == either.cls_token_id
        question_ids = either(question.question, add_special_tokens=False)["input_ids"]
        assert window["input_ids"][1 : len(question_ids) + 1].tolist() == question_ids


@pytest.mark.parametrize(
    "answer", ["«ba»", "ça", "🙂🙃", "🙃", "naïve", "— 北京", "北京", "ba\u200bbe", "e\u0301a.", UNICODE]
)
def test_unicode_answers_are_found(answer: str, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    for context in (UNICODE, f"{UNICODE} ba", f"ba {UNICODE}"):
        question = ask(context, answer)
        windows = encode_questions([question], byte_tokenizer, max_length=384, doc_stride=128)
        logits = perfect(windows, rng=np.random.default_rng(0))
        [given] = n_best_answers([question], windows, logits, n_best=5, max_answer_length=200)
        assert windows[0]["target"] != (0, 0)
        assert given[0].text == answer


def test_an_answer_within_a_token_gives_the_whole_token(tokenizer: PreTrainedTokenizerBase) -> None:
    question = ask("ba zzz9 be", "9")  # an unknown word is one token
    [window] = encode_questions([question], tokenizer, max_length=384, doc_stride=128)
    first, last = window["target"]
    assert first == last
    assert window["offsets"][first].tolist() == [3, 7]


def test_an_answer_that_is_only_partly_in_a_window_points_to_its_first_token() -> None:
    offsets = np.array([[-1, -1], [-1, -1], [4, 6], [7, 9], [10, 12], [-1, -1]], dtype=np.int32)
    assert find_span(offsets, 4, 9) == (2, 3)
    assert find_span(offsets, 7, 12) == (3, 4)
    assert find_span(offsets, 1, 6) == find_span(offsets, 10, 15) == find_span(offsets, 20, 25) == (0, 0)
    assert find_span(offsets, 6, 7) == (0, 0)  # a blank between two tokens
    assert find_span(np.full((3, 2), -1, dtype=np.int32), 0, 2) == (0, 0)


def test_blanks_before_a_question_do_not_count(either: PreTrainedTokenizerBase) -> None:
    plain, blank = (ask("ba be bi", "be", question=text) for text in ("do de", " " * 3000 + "do de"))
    one, other = encode_questions([plain, blank], either, max_length=24, doc_stride=4)
    assert one["input_ids"].tolist() == other["input_ids"].tolist()


def test_special_tokens_that_the_text_spells_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    [window] = encode_questions([ask("ba [SEP] be", "be")], tokenizer, max_length=384, doc_stride=128)
    assert window["input_ids"].tolist().count(tokenizer.sep_token_id) == 2


def test_no_question_gives_no_window(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_questions([], tokenizer, max_length=384, doc_stride=128) == []


def test_a_question_that_leaves_no_room_is_an_error(either: PreTrainedTokenizerBase) -> None:
    question = ask("ba be bi bo bu " * 30, "be", question="ba " * 40, key="long")
    length = len(either(question.question, add_special_tokens=False)["input_ids"])
    least = length + either.num_special_tokens_to_add(pair=True) + 10 + 1
    message = f"task.max_length={least - 1} leaves 10 tokens .* question 'long', which has {length} tokens.* to {least} or more"
    with pytest.raises(UserError, match=message):
        encode_questions([question], either, max_length=least - 1, doc_stride=10)
    with pytest.raises(UserError, match="task.max_length=8 leaves 0 tokens"):
        encode_questions([question], either, max_length=8, doc_stride=10)
    assert encode_questions([question], either, max_length=least, doc_stride=10)
    with pytest.raises(UserError, match="task.doc_stride=-1, but it must be at least 0"):
        encode_questions([question], either, max_length=384, doc_stride=-1)


# ---------------------------------------------------------------------- answers


def brute_force(
    question: Question,
    windows: list[dict[str, Any]],
    logits: list[NDArray[np.float64]],
    *,
    n_best: int,
    max_answer_length: int,
) -> list[tuple[str, float]]:
    """Look at every pair of tokens of every window, one after the other."""
    best: dict[tuple[int, int], float] = {}
    for window, (start, end) in zip(windows, logits, strict=True):
        offsets = window["offsets"].tolist()
        for first, (begin, _) in enumerate(offsets):
            for last in range(first, min(first + max_answer_length, len(offsets))):
                if begin < 0 or offsets[last][0] < 0:
                    continue
                span = (begin, offsets[last][1])
                best[span] = max(best.get(span, -np.inf), start[first] + end[last])
    ranked = sorted(best.items(), key=lambda item: -item[1])[:n_best]
    return [(question.context[begin:end], score) for (begin, end), score in ranked]


@pytest.mark.parametrize(("n_best", "max_answer_length"), [(20, 30), (1, 1), (7, 3), (2000, 50)])
def test_the_n_best_are_those_of_a_search_over_all_pairs_of_all_windows(
    n_best: int, max_answer_length: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    limits = {"n_best": n_best, "max_answer_length": max_answer_length}
    questions = make_questions(4, words=60, seed=3)
    windows = encode_questions(questions, tokenizer, max_length=32, doc_stride=8)
    rng = np.random.default_rng(1)
    # the highest logits stand where no answer may be: on the question, on special tokens and on padding
    logits = [rng.normal(size=(2, 40)) for _ in windows]
    for window, pair in zip(windows, logits, strict=True):
        outside = np.append(window["offsets"][:, 0] < 0, np.ones(40 - len(window["offsets"]), dtype=bool))
        pair[:, outside] += 9
    answers = n_best_answers(questions, windows, [tuple(pair) for pair in logits], **limits)
    for number, question in enumerate(questions):
        own = [row for row, window in enumerate(windows) if window["question"] == number]
        assert len(own) > 2
        expected = brute_force(question, [windows[row] for row in own], [logits[row] for row in own], **limits)
        assert [answer.text for answer in answers[number]] == [text for text, _ in expected]
        assert [answer.score for answer in answers[number]] == pytest.approx([score for _, score in expected])


def test_equal_sums_go_to_the_earliest_span() -> None:
    offsets = np.array([[-1, -1], [0, 1], [1, 2], [2, 3]], dtype=np.int32)
    spans = best_spans(np.zeros(4), np.zeros(4), offsets, n_best=4, max_answer_length=2)
    assert [(first, last) for _, first, last in spans] == [(1, 1), (1, 2), (2, 2), (2, 3)]


def test_an_empty_answer_is_given_only_when_there_is_nothing_else() -> None:
    questions = [ask("ba be", "ba", key="a"), ask("ba be", "ba", key="b")]
    nothing = np.full((2, 2), -1, dtype=np.int32)
    something = np.array([[-1, -1], [2, 3], [3, 5]], dtype=np.int32)  # the best span is the blank between two words
    windows = [{"question": 0, "offsets": nothing}, {"question": 1, "offsets": something}]
    logits = [(np.zeros(2), np.zeros(2)), (np.array([0, 9.0, 0]), np.array([0, 9.0, 0]))]
    answers = n_best_answers(questions, windows, logits, n_best=3, max_answer_length=5)
    assert answers[0] == [Answer("", 0, 0, 0.0)]
    assert [answer.text for answer in answers[1]] == ["", "be", "be"]
    assert [best_text(given) for given in answers] == ["", "be"]


# The official script, evaluate-v1.1.py, as it was published with the data set.


def normalize_answer(text: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def remove_punctuation(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(character for character in text if character not in exclude)

    return " ".join(remove_articles(remove_punctuation(text.lower())).split())


def official_f1(prediction: str, truth: str) -> float:
    said, right = normalize_answer(prediction).split(), normalize_answer(truth).split()
    num_same = sum((Counter(said) & Counter(right)).values())
    if num_same == 0:
        return 0
    precision, recall = num_same / len(said), num_same / len(right)
    return 2 * precision * recall / (precision + recall)


def official_scores(questions: list[Question], said: dict[str, str]) -> dict[str, float]:
    exact = f1 = 0.0
    for question in questions:
        truths = [text for text, _ in question.answers]
        exact += max(normalize_answer(said[question.id]) == normalize_answer(truth) for truth in truths)
        f1 += max(official_f1(said[question.id], truth) for truth in truths)
    return {"exact_match": exact / len(questions), "f1": f1 / len(questions)}


def test_scores_are_those_of_the_official_script() -> None:
    rng = random.Random(0)
    pieces = ["the", "a", "An", "cat", "Cat's", "sat,", "U.S.", "é", "“mat”", ".", "$", "—", "10%", "the-cat", "  "]
    questions, answers = [], []
    for number in range(400):
        truths = tuple((" ".join(rng.choices(pieces, k=rng.randint(1, 4))), 0) for _ in range(rng.randint(1, 5)))
        questions.append(Question(id=str(number), question="?", context="", answers=truths))
        said = rng.choice([truths[0][0], " ".join(rng.choices(pieces, k=2)), truths[-1][0].upper() + " the", ".", ""])
        answers.append([Answer(said, 0, len(said), 0.0)])
    said_by_id = {question.id: best_text(given) for question, given in zip(questions, answers, strict=True)}
    expected = official_scores(questions, said_by_id)
    assert 0.3 < expected["exact_match"] != expected["f1"]
    parts = squad_scores(questions, answers)
    assert {name: part.mean() for name, part in parts.items()} == pytest.approx(expected, rel=1e-12)
    each = [official_scores([question], said_by_id) for question in questions]
    assert [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)] == each


def test_an_answer_without_a_word_matches_exactly_but_has_no_f1_as_in_the_official_script() -> None:
    questions = [
        Question(id="a", question="?", context=".", answers=((".", 0),)),
        Question(id="b", question="?", context="cat", answers=(("cat", 0),)),
    ]
    answers = [[Answer(".", 0, 1, 0.0)], [Answer("The cat!", 0, 3, 0.0)]]
    parts = squad_scores(questions, answers)
    assert {name: part.tolist() for name, part in parts.items()} == {"exact_match": [1.0, 1.0], "f1": [0.0, 1.0]}


# ------------------------------------------------------------------ the command


SETTINGS: dict[str, Any] = {
    "name": "squad",
    "max_length": 40,
    "doc_stride": 8,
    "n_best": 5,
    "max_answer_length": 4,
    "max_train_rows": None,
    "max_scored_rows": None,
    "data_dir": None,
    "hub": {"path": "nobody/nothing", "train": "train", "scored": "validation"},
    "files": {"train": "train-v1.1.json*", "scored": "dev-v1.1.json*"},
}


def write_squad(folder: Path) -> Path:
    """Write questions whose answer is the one word of the paragraph that ends in -al."""
    rng = random.Random(0)
    wanted = [word for word in WORDS if word.endswith("al")]
    others = [word for word in WORDS if not word.endswith("al")]
    for name, count in (("train", 300), ("dev", 60)):
        paragraphs = []
        for number in range(count):
            before, after = (" ".join(rng.choices(others, k=rng.randint(1, 6))) for _ in range(2))
            word = rng.choice(wanted)
            entry = {
                "id": f"{name}{number}",
                "question": "ba bi",
                "answers": [{"text": word, "answer_start": len(before) + 1}],
            }
            paragraphs.append({"context": f"{before} {word} {after}", "qas": [entry]})
        content = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{name}-v1.1.json").write_text(json.dumps(content), "utf-8")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squad(tmp_path_factory.mktemp("squad"))


@pytest.fixture
def score(files: Path, save_teacher: Callable[..., Path], tmp_path: Path) -> Callable[..., Outcome]:
    def run(*overrides: str, model_type: str = "distilbert") -> Outcome:
        return call(
            distilkit.evaluate.__main__.main,
            f"model={save_teacher(model_type, num_layers=2)}",
            "task=squad",
            f"task.data_dir={files}",
            "task.max_length=40",
            "task.doc_stride=8",
            "trainer=cpu",
            "trainer.enable_progress_bar=false",
            "finetune.lr=2e-3",
            "finetune.batch_size=16",
            "seed=1",
            "save_model=true",
            *overrides,
            cwd=tmp_path,
        )

    return run


def test_answers_are_learnt_and_written_as_the_official_script_reads_them(
    score: Callable[..., Outcome], files: Path, tmp_path: Path
) -> None:
    done = score("finetune.epochs=6", "name=mine")
    assert done.code == 0, done.err
    (found,) = read_results([tmp_path])
    assert list(found.scores) == ["exact_match", "f1"]
    assert found.scores["exact_match"] > 0.8
    said = json.loads(only(tmp_path, "outputs/evaluate/mine/squad/*/predictions-dev.json").read_text("utf-8"))
    paragraphs = json.loads((files / "dev-v1.1.json").read_text("utf-8"))["data"][0]["paragraphs"]
    right = [said[entry["id"]] == entry["answers"][0]["text"] for part in paragraphs for entry in part["qas"]]
    assert len(said) == len(right) == 60
    assert sum(right) / 60 == pytest.approx(found.scores["exact_match"])
    rows = read_rows(found.folder, "dev")
    assert rows is not None
    assert rows.ids.tolist() == list(said)
    assert rows.sums["exact_match"].tolist() == right
    assert measure(list(found.scores), rows) == found.scores
    assert {"train_data", "scored_data"} <= found.settings.keys()


def test_a_second_distillation_runs_with_a_teacher_of_another_family(
    score: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert score("finetune.epochs=6", "name=teacher", model_type="bert").code == 0
    folder = only(tmp_path, "outputs/evaluate/teacher/squad/*/model")
    done = score(f"teacher={folder}", "distil.alpha_task=0", "distil.alpha_ce=1", "finetune.epochs=6", "name=student")
    assert done.code == 0, done.err
    (student,) = read_results([tmp_path / "outputs/evaluate/student"])
    assert student.scores["f1"] > 0.6  # from the teacher alone: the labels were given no weight
    assert student.teacher["name"] == str(folder)


def random_logits(*, length: int, width: int) -> tuple[torch.Tensor, ...]:
    """Return logits of a window of ``length`` tokens in a batch that is ``width`` wide, with wild ones on padding."""
    generator = torch.Generator().manual_seed(length)
    raw = torch.randn(2, 2, length, generator=generator)
    padded = torch.full((2, 2, width), 50.0)
    padded[:, :, :length] = raw
    mask = torch.zeros(2, width)
    mask[:, :length] = 1
    outputs = SimpleNamespace(start_logits=padded[0], end_logits=padded[1])
    return QuestionTask(**SETTINGS).logits(outputs, mask)


def test_padding_carries_no_mass() -> None:
    task = QuestionTask(**SETTINGS)
    targets = torch.tensor([[1, 2], [0, 3]])
    alone, padded = (random_logits(length=6, width=width) for width in (6, 11))
    teacher_alone = tuple(logits.roll(1, dims=1) for logits in alone)
    wide = torch.full((2, 5), -1e9)
    teacher_padded = tuple(torch.cat([logits, wide], dim=1) for logits in teacher_alone)
    torch.testing.assert_close(task.hard_loss(padded, targets), task.hard_loss(alone, targets))
    soft = task.soft_loss(padded, teacher_padded, temperature=2.0)
    torch.testing.assert_close(soft, task.soft_loss(alone, teacher_alone, temperature=2.0))
    assert soft > 0.1 and soft.isfinite()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 4.0])
def test_padding_is_finite_at_every_temperature(temperature: float) -> None:
    student, teacher = random_logits(length=6, width=9), random_logits(length=6, width=9)[::-1]
    assert QuestionTask(**SETTINGS).soft_loss(student, teacher, temperature=temperature).isfinite()


def test_the_soft_loss_is_the_mean_of_two_divergences() -> None:
    task = QuestionTask(**SETTINGS)
    student, teacher = random_logits(length=6, width=6), random_logits(length=6, width=6)[::-1]
    expected = 0.0
    for q, p in zip(student, teacher, strict=True):
        q, p = (q / 2).softmax(-1), (p / 2).softmax(-1)
        expected += 4 * float((p * (p.log() - q.log())).sum(-1).mean()) / 2
    assert float(task.soft_loss(student, teacher, temperature=2.0)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("key", ["max_length", "n_best", "max_answer_length", "max_train_rows", "max_scored_rows"])
def test_limits_below_one_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"task.{key}=0, but it must be at least 1"):
        QuestionTask(**SETTINGS | {key: 0})


def test_the_files_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("", "utf-8")
    with pytest.raises(UserError, match="has 0 files 'train-v1.1.json\\*', but one is needed; it holds readme.txt"):
        QuestionTask(**SETTINGS | {"data_dir": str(tmp_path)}).train_examples()


def test_a_model_must_score_starts_and_ends() -> None:
    task = QuestionTask(**SETTINGS)
    task.check_head(SimpleNamespace(config=SimpleNamespace(num_labels=2)), name="mine")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="'mine' has 3 outputs a token, but task squad has 2; fine-tune it on this task"
    ):
        task.check_head(SimpleNamespace(config=SimpleNamespace(num_labels=3)), name="mine")  # type: ignore[arg-type]
