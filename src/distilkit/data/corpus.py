"""The interface of a corpus: raw text as a stream of documents. See text_files, hub and docstrings for sources."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol


class Corpus(Protocol):
    """A stream of documents that can be read repeatedly and may be larger than memory."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the text, as JSON. A changed fingerprint leads to a new token cache."""
        ...

    def documents(self) -> Iterator[str]:
        """Yield the non-empty documents in a fixed order."""
        ...


class Concatenation:
    """Read several corpora one after the other, for example Wikipedia and then books."""

    def __init__(self, *, parts: Sequence[Corpus]) -> None:
        """Store the corpora in reading order."""
        self.parts = list(parts)

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprints of the parts in order."""
        return {"parts": [part.fingerprint() for part in self.parts]}

    def documents(self) -> Iterator[str]:
        """Yield the documents of each part in turn."""
        for part in self.parts:
            yield from part.documents()


def nonempty(documents: Iterable[str]) -> Iterator[str]:
    """Strip documents and drop the empty ones."""
    return (text for document in documents if (text := document.strip()))


def has_surrogate(text: str) -> bool:
    """Return whether a text holds an unpaired surrogate, which UTF-8 cannot encode and tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
