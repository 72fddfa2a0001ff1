"""Corpora from the Hugging Face hub, streamed while they are tokenized."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from distilkit.data.corpus import LONGEST, Piece, nonempty, text_of
from distilkit.errors import UserError


class HubDataset:
    """Stream a dataset of the Hugging Face hub.

    By default each row is a document. ``rows_per_document`` joins that many rows. With ``document_start``, a row that
    matches this pattern starts a new document, for example a heading of WikiText.
    """

    # Not a dataclass: OmegaConf would turn the parts of a Concatenation into configs.

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        revision: str | None = None,
        rows_per_document: int = 1,
        document_start: str | None = None,
    ) -> None:
        """Store the arguments of ``datasets.load_dataset``. Nothing is downloaded yet."""
        if rows_per_document < 1:
            raise UserError(f"data.corpus.rows_per_document={rows_per_document}, but it must be at least 1")
        self.path, self.name, self.split, self.column, self.revision = path, name, split, column, revision
        self.rows_per_document = rows_per_document
        self.document_start = document_start
        try:
            self.start = re.compile(document_start) if document_start else None
        except re.error as error:
            raise UserError(f"data.corpus.document_start={document_start!r} is no pattern: {error}; mend it") from error

    def fingerprint(self) -> dict[str, Any]:
        """Return the arguments. Pin ``revision`` if the dataset on the hub may change."""
        return {"hub": {name: value for name, value in vars(self).items() if name != "start"}}

    def documents(self) -> Iterator[str]:
        """Yield the documents as they are downloaded."""
        return self._documents(self._rows())

    def pieces(self) -> list[Piece]:
        """List the files of the data set, all of one size, or the whole where a document may span two of them."""
        rows = self._rows()
        if self.start or self.rows_per_document > 1:
            return [Piece(1, self.documents)]
        parts = [rows.shard(num_shards=rows.num_shards, index=index) for index in range(rows.num_shards)]
        return [Piece(1, partial(self._documents, part)) for part in parts]

    def _documents(self, rows: Any) -> Iterator[str]:
        texts: list[str] = []  # of the rows of one document
        size = 0
        for number, row in enumerate(rows):
            text = text_of(row[self.column], place=f"dataset {self.path!r}, row {number}: column {self.column!r}")
            complete = self.start.match(text) if self.start else len(texts) == self.rows_per_document
            if texts and (complete or size > LONGEST):  # a pattern may never match
                yield from nonempty(["\n".join(texts)])
                texts, size = [], 0
            texts.append(text)
            size += len(text)
        yield from nonempty(["\n".join(texts)])

    def _rows(self) -> Any:
        """Open the dataset in streaming mode, with only the text column."""
        import datasets

        try:
            rows = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=True)
            columns = rows.column_names or list(next(iter(rows), {}))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot open dataset {self.path!r} (config {self.name!r}, split {self.split!r}): "
                f"{(str(error) or repr(error)).splitlines()[0]}; check the names and the connection to the hub"
            ) from error
        if self.column not in columns:
            raise UserError(
                f"dataset {self.path!r} has no column {self.column!r}; it has {', '.join(columns) or 'none'}: set "
                "data.corpus.column"
            )
        return rows.select_columns([self.column])


class MultilingualWikipedia:
    """Sample Wikipedias in proportion to size ** exponent, which oversamples small languages.

    mBERT uses an exponent of 0.7 (google-research/bert, multilingual.md). The stream ends when every language has been
    read completely.
    """

    def __init__(
        self, *, languages: Sequence[str], date: str, exponent: float, seed: int, path: str = "wikimedia/wikipedia"
    ) -> None:
        """Store the language codes and the date of the dump."""
        if not languages:
            raise UserError("data.corpus.languages is empty; list at least one, for example [en,de]")
        if not 0 <= exponent <= 1:
            raise UserError(f"data.corpus.exponent={exponent}, but it must be between 0 (equal) and 1 (by size)")
        self.languages, self.date, self.exponent, self.seed, self.path = list(languages), date, exponent, seed, path

    def fingerprint(self) -> dict[str, Any]:
        """Return the dump, the languages and the sampling settings."""
        return {"wikipedia": vars(self)}

    def documents(self) -> Iterator[str]:
        """Yield articles, each from a randomly drawn language."""
        import datasets

        configs = [f"{self.date}.{language}" for language in self.languages]
        streams = [HubDataset(path=self.path, name=config)._rows() for config in configs]
        builders = [datasets.load_dataset_builder(self.path, config) for config in configs]
        sizes = [builder.info.splits["train"].num_examples for builder in builders]
        mixed = datasets.interleave_datasets(
            streams,
            probabilities=sampling_probabilities(sizes, self.exponent),
            seed=self.seed,
            stopping_strategy="all_exhausted",
        )
        yield from nonempty(text_of(row["text"], place=f"dataset {self.path!r}: column 'text'") for row in mixed)


def sampling_probabilities(sizes: Sequence[int], exponent: float) -> list[float]:
    """Return size ** exponent, normalised to sum 1."""
    powers = [size**exponent for size in sizes]
    return [power / sum(powers) for power in powers]
