from collections.abc import Iterator
from typing import Any

import pytest

from distilkit.data.corpus import Concatenation, has_surrogate, nonempty


class Texts:
    def __init__(self, documents: list[str]) -> None:
        self.texts = documents

    def fingerprint(self) -> dict[str, Any]:
        return {"texts": self.texts}

    def documents(self) -> Iterator[str]:
        yield from self.texts


def test_a_concatenation_reads_and_names_its_parts_in_order() -> None:
    one, two = Texts(["a", "b"]), Texts(["c"])
    both = Concatenation(parts=[one, two])
    assert list(both.documents()) == list(both.documents()) == ["a", "b", "c"]
    assert both.fingerprint() == {"parts": [one.fingerprint(), two.fingerprint()]}
    assert both.fingerprint() != Concatenation(parts=[two, one]).fingerprint()


def test_documents_are_stripped_and_empty_ones_dropped() -> None:
    assert list(nonempty([" a\n", "", " \n\t", "b c"])) == ["a", "b c"]


@pytest.mark.parametrize(("text", "expected"), [("", False), ("🙂", False), ("a \ud83d b", True), ("\ude42", True)])
def test_an_unpaired_surrogate_is_found(text: str, expected: bool) -> None:
    assert has_surrogate(text) == expected
