"""The interface of a corpus: raw text as a stream of documents. See text_files, hub and docstrings for sources."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from distilkit.errors import UserError


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
    if not file.exists():  # the token cache knows a file by its time, so that an old one is not replaced
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(content, "ascii")
        temporary.replace(file)
    return str(file), len(documents)
