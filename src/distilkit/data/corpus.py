"""The interface of a corpus: raw text as a stream of documents. See text_files, hub and docstrings for sources."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from distilkit.data.cache_folder import usable
from distilkit.errors import UserError


class Piece(NamedTuple):
    """A part of a corpus that is read on its own, as a file; the ``size`` is in any unit of its corpus."""

    size: float
    documents: Callable[[], Iterator[str]]


class Corpus(Protocol):
    """A stream of documents that can be read repeatedly and may be larger than memory.

    A corpus of several files may also have a method ``pieces``, a list of ``Piece`` that hold its documents one after
    the other. Then a process that prepares a shard of it reads its own files only.
    """

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


LONGEST = 1_000_000  # characters of a document; a tokenizer takes some 200 bytes of memory for each


def nonempty(documents: Iterable[str]) -> Iterator[str]:
    """Strip documents, drop the empty ones, and cut those longer than ``LONGEST`` at white space."""
    for document in documents:
        begin = 0
        while begin < len(document):
            end = end_of_piece(document, begin)
            if piece := document[begin:end].strip():
                yield piece
            begin = end


def end_of_piece(text: str, begin: int = 0) -> int:
    """Return where to cut a text so that at most ``LONGEST`` characters follow ``begin``: before white space."""
    end = begin + LONGEST
    if len(text) <= end:
        return len(text)
    space = max(text.rfind(space, end - LONGEST // 16, end) for space in " \n\u3000")
    return space if space > begin else end


def text_of(value: object, *, place: str) -> str:
    """Return the text of a row, "" for None, or raise a ``UserError`` that names the row's place."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place} holds {type(value).__name__}, not text; name the text column with data.corpus.column")
    if has_surrogate(value):
        raise UserError(f"{place} holds an unpaired surrogate; fix or drop that row")
    return value


def has_surrogate(text: str) -> bool:
    """Return whether a text holds an unpaired surrogate, which UTF-8 cannot encode and tokenizers reject."""
    return re.search("[\ud800-\udfff]", text) is not None


def write_documents(text: Iterable[str], folder: Path) -> tuple[str, int]:
    """Write documents to a .jsonl file named by its content, unless it exists; return its path and their number."""
    documents = [] if isinstance(text, str) else list(text)
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, str):
            raise UserError(f"document {number} of text is a {type(document).__name__}; give strings")
        if has_surrogate(document):
            raise UserError(f"document {number} of text holds an unpaired surrogate; fix or drop it")
    if not documents:
        raise UserError("text is a string or holds no document; give documents, such as [text], or files as paths=")
    if len(documents[0]) < 256 and "\0" not in documents[0] and Path(documents[0]).is_file():
        raise UserError(f"text begins with {documents[0]!r}, which is a file; use paths= for files")
    content = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    file = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.jsonl"
    with usable(folder):
        if not file.exists():  # the token cache knows a file by its time, so that an old one is not replaced
            folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(content, "ascii")
            temporary.replace(file)
    return str(file), len(documents)
