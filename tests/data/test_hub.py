import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from omegaconf import OmegaConf

from distilkit.data import corpus as corpus_module
from distilkit.data import hub as hub_module
from distilkit.data.hub import HubDataset, MultilingualWikipedia, sampling_probabilities
from distilkit.errors import UserError

Hub = dict[str | None, datasets.IterableDataset]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A stand-in for the hub: data sets in memory by the name of their config; others cannot be reached."""
    stored: Hub = {}

    def load_dataset(path: str, name: str | None = None, *, streaming: bool, **_: Any) -> datasets.IterableDataset:
        if name not in stored:
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nand a second line")
        assert streaming
        return stored[name]

    def load_dataset_builder(path: str, name: str) -> Any:
        train = SimpleNamespace(num_examples=sum(1 for _ in stored[name]))
        return SimpleNamespace(info=SimpleNamespace(splits={"train": train}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return stored


def rows_of(**columns: list[Any]) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict(columns).to_iterable_dataset()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["= A =", "a1", "a2", "= B =", "b1", "= C ="]),
        ({"rows_per_document": 3}, ["= A =\n\na1", "a2\n= B =\nb1", "= C ="]),
        ({"rows_per_document": 100}, ["= A =\n\na1\na2\n= B =\nb1\n\n= C ="]),
        ({"document_start": "= "}, ["= A =\n\na1\na2", "= B =\nb1", "= C ="]),
    ],
)
def test_rows_of_the_hub_are_joined_into_documents(hub: Hub, options: dict[str, Any], expected: list[str]) -> None:
    hub[None] = rows_of(id=list(range(8)), text=["= A =", None, "a1", "a2", "= B =", "b1", "", "= C ="])
    assert list(HubDataset(path="wiki", **options).documents()) == expected


def test_rows_before_the_first_heading_are_a_document(hub: Hub) -> None:
    hub[None] = rows_of(text=["preface", "= A =", "a"])
    assert list(HubDataset(path="wiki", document_start="=").documents()) == ["preface", "= A =\na"]


def test_wikitext_headings_begin_documents_and_subheadings_do_not(hub: Hub) -> None:
    pattern = OmegaConf.load(Path(__file__).parents[2] / "conf/train/data/wikitext103.yaml").corpus.document_start
    articles = [
        " = Robert Boulter = \n",
        "",
        " Actor . \n",
        " = = Career = = \n",
        " = = = 2000 = = = \n",
        " = Du Fu = \n",
    ]
    hub[None] = rows_of(text=articles)
    documents = list(HubDataset(path="wikitext", document_start=pattern).documents())
    assert [document.splitlines()[0].strip() for document in documents] == ["= Robert Boulter =", "= Du Fu ="]


def test_a_stream_without_known_columns_is_read_by_its_first_row(hub: Hub) -> None:
    hub[None] = datasets.IterableDataset.from_generator(lambda: iter([{"body": "a", "id": 1}, {"body": "b", "id": 2}]))
    assert list(HubDataset(path="web", column="body").documents()) == ["a", "b"]
    with pytest.raises(UserError, match=r"dataset 'web' has no column 'text'; it has body, id: set data\.corpus\.col"):
        list(HubDataset(path="web").documents())


def test_a_data_set_without_rows_has_no_column(hub: Hub) -> None:
    hub[None] = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(UserError, match="no column 'text'; it has none"):
        list(HubDataset(path="web").documents())


def test_a_column_of_the_hub_without_text_is_an_error(hub: Hub) -> None:
    hub[None] = rows_of(text=[1, 2])
    with pytest.raises(UserError, match=r"'web', row 0: column 'text' holds int, not text; name the text column with"):
        list(HubDataset(path="web").documents())


def test_a_hub_that_cannot_be_reached_is_an_error_of_one_line(hub: Hub) -> None:
    with pytest.raises(UserError) as caught:
        list(HubDataset(path="c4", name="de", split="validation").documents())
    assert str(caught.value) == (
        "cannot open dataset 'c4' (config 'de', split 'validation'): Couldn't reach 'c4' on the Hub; check the names "
        "and the connection to the hub"
    )


@pytest.mark.parametrize("failure", [ConnectionError(), ValueError("Bad split: x"), RuntimeError("no loading scripts")])
def test_whatever_the_hub_answers_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=re.escape(str(failure) or repr(failure)) + "; check the names"):
        list(HubDataset(path="c4").documents())


def test_fewer_than_one_row_a_document_is_an_error() -> None:
    with pytest.raises(UserError, match="rows_per_document=0, but it must be at least 1"):
        HubDataset(path="books", rows_per_document=0)


@pytest.mark.parametrize("argument", ["path", "name", "split", "column", "revision", "document_start"])
def test_the_fingerprint_of_a_data_set_changes_with_each_argument(argument: str) -> None:
    base = {"path": "a"}
    assert HubDataset(**base).fingerprint() == HubDataset(**base).fingerprint()
    assert HubDataset(**base | {argument: "b"}).fingerprint() != HubDataset(**base).fingerprint()


def test_wikipedias_are_sampled_by_the_power_of_their_size() -> None:
    large, small = sampling_probabilities([1_000_000, 1_000], 0.7)
    assert large + small == pytest.approx(1)
    assert large / small == pytest.approx(1000**0.7)


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, [1 / 3] * 3), (1.0, [0.1, 0.3, 0.6])])
def test_the_exponents_bounds_are_all_alike_and_by_size(exponent: float, expected: list[float]) -> None:
    assert sampling_probabilities([10, 30, 60], exponent) == pytest.approx(expected)


def test_wikipedias_are_mixed_by_that_probability_until_each_was_read_whole(hub: Hub) -> None:
    sizes = {"en": 1500, "is": 40}
    for language, size in sizes.items():
        hub[f"2023.{language}"] = rows_of(text=[f"{language} {number}" for number in range(size)], id=[0] * size)
    wikipedia = MultilingualWikipedia(languages=list(sizes), date="2023", exponent=0.7, seed=0)
    documents = list(wikipedia.documents())
    assert set(documents) == {f"{language} {number}" for language, size in sizes.items() for number in range(size)}
    share = sum(document.startswith("is") for document in documents) / len(documents)
    expected = 40**0.7 / (40**0.7 + 1500**0.7)
    assert abs(share - expected) < 5 * (expected * (1 - expected) / len(documents)) ** 0.5
    assert documents == list(wikipedia.documents())


def test_another_seed_mixes_wikipedias_otherwise_and_is_another_corpus(hub: Hub) -> None:
    for language in ("en", "is"):
        hub[f"2023.{language}"] = rows_of(text=[f"{language} {number}" for number in range(100)])
    first, second = (
        MultilingualWikipedia(languages=["en", "is"], date="2023", exponent=0.7, seed=seed) for seed in (0, 1)
    )
    assert list(first.documents()) != list(second.documents())
    assert first.fingerprint() != second.fingerprint()


def test_a_missing_language_is_an_error_that_names_it(hub: Hub) -> None:
    wikipedia = MultilingualWikipedia(languages=["tlh"], date="2023", exponent=0.7, seed=0)
    with pytest.raises(UserError, match=r"config '2023\.tlh'.*check the names and the connection to the hub"):
        list(wikipedia.documents())


def test_no_language_is_an_error() -> None:
    with pytest.raises(UserError, match=r"languages is empty; list at least one, for example \[en,de\]"):
        MultilingualWikipedia(languages=[], date="2023", exponent=0.7, seed=0)


@pytest.mark.parametrize("exponent", [-0.1, 1.1])
def test_an_exponent_out_of_range_is_an_error(exponent: float) -> None:
    with pytest.raises(UserError, match=rf"exponent={exponent}, but it must be between 0 .* and 1"):
        MultilingualWikipedia(languages=["en"], date="2023", exponent=exponent, seed=0)


def test_an_empty_cell_is_no_text_and_an_empty_value_of_another_kind_is_an_error(hub: Hub) -> None:
    hub[None] = rows_of(text=["a", None, "", "b"])
    assert list(HubDataset(path="web").documents()) == ["a", "b"]
    for value in (0, 0.0, False, [], ["a"]):
        hub[None] = rows_of(text=[value])
        with pytest.raises(UserError, match=rf"row 0: column 'text' holds {type(value).__name__}, not text; name the"):
            list(HubDataset(path="web").documents())


@pytest.mark.parametrize("options", [{"rows_per_document": 10**9}, {"document_start": "never"}])
def test_rows_that_never_end_a_document_are_cut_into_several(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    for module in (corpus_module, hub_module):
        monkeypatch.setattr(module, "LONGEST", 100)
    hub[None] = rows_of(text=["ten digits"] * 95)
    documents = list(HubDataset(path="web", **options).documents())
    assert len(documents) > 5
    assert "\n".join(documents) == "\n".join(["ten digits"] * 95)


def test_a_pattern_that_is_none_is_an_error() -> None:
    with pytest.raises(UserError, match=r"document_start='\(' is no pattern: .*; mend it"):
        HubDataset(path="web", document_start="(")
