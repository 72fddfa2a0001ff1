"""Text from data sets of the Hugging Face hub, streamed while it is tokenized."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from distilkit.data.corpus import nonempty
from distilkit.errors import UserError


class HubDataset:
    """Stream a data set of the Hugging Face hub.

    A row is a document, unless rows are smaller than documents: then ``rows_per_document`` joins so many, or a row that
    matches the pattern ``document_start`` begins the next (WikiText's headings).
    """

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
        """Take the arguments of ``datasets.load_dataset``; nothing is fetched yet."""
        if rows_per_document < 1:
            raise UserError(f"data.corpus.rows_per_document={rows_per_document}, but it must be at least 1")
        self.path, self.name, self.split, self.column, self.revision = path, name, split, column, revision
        self.rows_per_document = rows_per_document
        self.document_start = document_start

    def fingerprint(self) -> dict[str, Any]:
        """Name the data set; pin ``revision`` where the hub's copy may change."""
        return {"hub": vars(self)}

    def stream(self) -> Any:
        """Open the data set in streaming mode."""
        import datasets

        try:
            rows = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=True)
            columns = rows.column_names or list(next(iter(rows), {}))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot open data set {self.path!r} (config {self.name!r}, split {self.split!r}): "
                f"{(str(error) or repr(error)).splitlines()[0]}; check the names, and that the hub can be reached"
            ) from error
        if self.column not in columns:
            raise UserError(
                f"data set {self.path!r} has no column {self.column!r}; it has {', '.join(columns) or 'none'}: set "
                "data.corpus.column"
            )
        return rows.select_columns([self.column])

    def documents(self) -> Iterator[str]:
        """Yield the documents as they arrive."""
        starts = re.compile(self.document_start) if self.document_start else None
        rows: list[str] = []
        for row in self.stream():
            text = row[self.column] or ""
            if not isinstance(text, str):
                raise UserError(
                    f"data set {self.path!r}: column {self.column!r} holds {type(text).__name__}, not text; name the text "
                    "column with data.corpus.column"
                )
            full = starts.match(text) if starts else len(rows) == self.rows_per_document
            if full and rows:
                yield from nonempty(["\n".join(rows)])
                rows = []
            rows.append(text)
        yield from nonempty(["\n".join(rows)])


class MultilingualWikipedia:
    """Sample Wikipedias in proportion to size ** exponent, small ones oversampled.

    mBERT's exponent is 0.7 (google-research/bert, multilingual.md). The stream ends when every language was read whole.
    """

    def __init__(
        self, *, languages: Sequence[str], date: str, exponent: float, seed: int, path: str = "wikimedia/wikipedia"
    ) -> None:
        """Take language codes and the date of the dump."""
        if not languages:
            raise UserError("data.corpus.languages is empty; list at least one, as [en,de]")
        if not 0 <= exponent <= 1:
            raise UserError(f"data.corpus.exponent={exponent}, but it must be between 0 (all alike) and 1 (by size)")
        self.languages, self.date, self.exponent, self.seed, self.path = list(languages), date, exponent, seed, path

    def fingerprint(self) -> dict[str, Any]:
        """Name the dump, the languages and how they are sampled."""
        return {"wikipedia": vars(self)}

    def documents(self) -> Iterator[str]:
        """Yield articles, the language of each drawn at random."""
        import datasets

        streams, sizes = [], []
        for language in self.languages:
            part = HubDataset(path=self.path, name=f"{self.date}.{language}")
            streams.append(part.stream())
            info = datasets.load_dataset_builder(self.path, part.name).info
            sizes.append(info.splits["train"].num_examples)
        mixed = datasets.interleave_datasets(
            streams,
            probabilities=sampling_probabilities(sizes, self.exponent),
            seed=self.seed,
            stopping_strategy="all_exhausted",
        )
        yield from nonempty(row["text"] for row in mixed)


def sampling_probabilities(sizes: Sequence[int], exponent: float) -> list[float]:
    """Return size ** exponent, normalised to sum 1."""
    powers = [size**exponent for size in sizes]
    return [power / sum(powers) for power in powers]
