"""Count the words of a corpus, once for all sizes of a vocabulary, and choose those that stay."""

import hashlib
import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from distilkit.data.cache import batches, cache_key, dtype_of, separator_id, split_of, tokenize
from distilkit.data.cache_folder import make_once
from distilkit.data.corpus import Corpus
from distilkit.data.tokenizer import num_ids
from distilkit.errors import UserError
from distilkit.trim.pieces import Spec, characters, needed_ids, vocabulary, word_parts

log = logging.getLogger(__name__)

_HELD_OUT = 2_000_000  # characters of held-out text that are kept, to say what changes
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How often the training split of a corpus has each word of a tokenizer, and the first of its held-out text."""

    key: str
    counts: NDArray[np.int64]  # (ids,)
    held_out: list[str]


def count_words(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, cache_dir: str | Path, val_share: float, max_documents: int
) -> Counted:
    """Count the words of the first documents of a corpus, or read the counts from the cache."""
    settings = [_FORMAT, cache_key(corpus, tokenizer, val_share=val_share), max_documents]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        counts, held_out, size = np.zeros(num_ids(tokenizer), dtype=np.int64), list[str](), 0
        log.info("counting the words of the corpus, of %s documents at most", f"{max_documents:,}")
        documents = itertools.islice(corpus.documents(), max_documents)
        for batch in batches(documents, max_documents=4096, max_bytes=2_000_000):
            by_split: dict[str, list[str]] = {"train": [], "val": []}
            for document in batch:
                by_split[split_of(document, val_share=val_share)].append(document)
            if by_split["train"]:
                ids = tokenize(by_split["train"], tokenizer, dtype=dtype_of(tokenizer))
                counts += np.bincount(ids, minlength=len(counts))
            for document in by_split["val"]:
                held_out += [document] if size < _HELD_OUT else []
                size += len(document)
        counts[separator_id(tokenizer)] = 0  # one after each document, which no text spells
        if not counts.any():
            raise UserError("the corpus is empty: no word can be counted in it; check data.corpus")
        np.save(folder / "counts.npy", counts)
        (folder / "held_out.json").write_text(json.dumps(held_out), "ascii")

    folder = make_once(Path(cache_dir).expanduser(), f"tokenizers/counts-{key}", write)
    held_out = json.loads((folder / "held_out.json").read_text("ascii"))
    return Counted(key=key, counts=np.load(folder / "counts.npy"), held_out=held_out)


def _weights(spec: Spec, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what each word counts in the order in which words are taken (ids,).

    The piece of a single character counts as often as the text has this character, since it stands for the words of it
    that are left out. So common characters come before rare words, and a character that is seen once does not.
    """
    words, pieces, occurrences = vocabulary(spec), characters(spec), np.zeros_like(counts)
    for word, index in words.items():
        if count := int(counts[index]):
            for piece in pieces(word):
                if piece in words:
                    occurrences[words[piece]] += count
    return np.maximum(counts, occurrences)


def choose_words(
    spec: Spec, counts: NDArray[np.int64], *, vocab_size: int | None, coverage: float | None
) -> tuple[set[int], float]:
    """Choose the ids that stay, and return the share of the counted tokens that they cover.

    These are the needed ones, and then the most frequent words with all that their tokenization passes through: as many
    as fit into ``vocab_size``, or until they cover the share ``coverage``. Words that the text does not have stay out.
    """
    words, parts, weights = vocabulary(spec), word_parts(spec), _weights(spec, counts)
    kept, by_id = needed_ids(spec), {index: word for word, index in words.items()}
    total, covered = int(counts.sum()), int(counts[sorted(kept)].sum())
    for index in np.argsort(-weights, kind="stable"):
        full = len(kept) == vocab_size or (coverage is not None and covered >= coverage * total)
        if full or not weights[index]:
            break
        if index in kept or index not in by_id:
            continue
        new = {int(index), *(words[part] for part in parts(by_id[index]))} - kept
        if vocab_size is None or len(kept) + len(new) <= vocab_size:
            kept |= new
            covered += int(counts[sorted(new)].sum())
    return kept, covered / total


def check_size(spec: Spec, *, vocab_size: int | None, coverage: float | None, prefix: str) -> None:
    """Refuse a size or a coverage that no choice of words has; ``prefix`` is that of both names in the config."""
    size, share = f"{prefix}vocab_size", f"{prefix}coverage"
    if (vocab_size is None) == (coverage is None):
        found = f"{size}={vocab_size} and {share}={coverage}".replace("None", "null")
        raise UserError(f"{found}, but one of them sets how many words stay: {size}=32000, or {share}=0.9999")
    if coverage is not None and not 0 < coverage <= 1:
        raise UserError(f"{share}={coverage}, but it must be above 0 and at most 1, for example 0.9999")
    if vocab_size is not None:
        least = len(needed_ids(spec)) + 1
        most = len({*vocabulary(spec), *(each["content"] for each in spec["added_tokens"])})
        if not least <= vocab_size <= most:
            why = "special and added tokens and single bytes stay, and one word"
            raise UserError(f"{size}={vocab_size}, but it must be from {least} ({why}) to {most}, all words there are")
