"""A corpus: raw text as a stream of documents. Its kinds are in text_files, hub and docstrings."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol


class Corpus(Protocol):
    """Raw text as a stream of documents that may be read again, and may be larger than memory."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the text, as JSON: a change of it means another cache."""
        ...

    def documents(self) -> Iterator[str]:
        """Yield the documents in a fixed order, without empty ones."""
        ...


class Concatenation:
    """Read several corpora one after the other, as Wikipedia and then books."""

    def __init__(self, *, parts: Sequence[Corpus]) -> None:
        """Take the parts in order."""
        self.parts = list(parts)

    def fingerprint(self) -> dict[str, Any]:
        """Name the parts in order."""
        return {"parts": [part.fingerprint() for part in self.parts]}

    def documents(self) -> Iterator[str]:
        """Yield the documents of each part in turn."""
        for part in self.parts:
            yield from part.documents()


def nonempty(documents: Iterable[str]) -> Iterator[str]:
    """Strip documents, and drop the empty ones."""
    return (text for document in documents if (text := document.strip()))


def has_surrogate(text: str) -> bool:
    """Tell whether a text holds half of a surrogate pair, which UTF-8 cannot write and tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
