"""Make a trimmed tokenizer once, keep it in the cache, and remember which words it has."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distilkit.data.cache_folder import make_once
from distilkit.data.corpus import Corpus
from distilkit.data.tokenizer import load_tokenizer
from distilkit.errors import UserError
from distilkit.trim.counts import check_size, choose_words, count_words
from distilkit.trim.pieces import Spec, check_kind, in_order, with_words

_FORMAT = 1  # increase it when other words are kept for the same settings


@dataclass(frozen=True, kw_only=True)
class Trimming:
    """What a trimmed tokenizer keeps of the full one, and what that changes."""

    ids: list[int]  # of the full tokenizer, by the new ids
    num_words: int  # of the full tokenizer
    covered: float  # share of the counted tokens
    held_out: int  # tokens of held-out text, by the full tokenizer
    changed: int  # of them, those that the trimmed one does not give at the same place

    def __str__(self) -> str:
        """Say what changes."""
        words = f"{self.num_words:,} -> {len(self.ids):,} words"
        if not self.held_out:
            return f"{words}; no held-out text shows what changes"
        return f"{words}; {self.changed / self.held_out:.3%} of {self.held_out:,} held-out tokens change"


def trimming_of(tokenizer: PreTrainedTokenizerBase) -> Trimming | None:
    """Return what a tokenizer of ``trimmed_tokenizer`` keeps; None of any other."""
    return getattr(tokenizer, "distilkit_trimming", None)


def trimmed_tokenizer(
    *,
    corpus: Corpus,
    cache_dir: str,
    name: str | None,
    revision: str = "main",
    tokenizer_type: str | None = None,
    trust_remote_code: bool = False,
    vocab_size: int | None = None,
    coverage: float | None = None,
    max_documents: int,
    val_share: float,
    prefix: str = "tokenizer.",
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with the words that a corpus uses, made from the one of ``name`` or read from the cache.

    It has ``vocab_size`` words, or those that make up the share ``coverage`` of the tokens of the first
    ``max_documents``. Text of these words gets the same tokens, renumbered. ``trimming_of`` tells which words they are.
    ``prefix`` is that of these names in messages.
    """
    full = load_tokenizer(
        name=name, revision=revision, tokenizer_type=tokenizer_type, trust_remote_code=trust_remote_code
    )
    spec = spec_of(full, name=str(name))
    check_size(spec, vocab_size=vocab_size, coverage=coverage, prefix=prefix)
    if max_documents < 1:
        raise UserError(f"{prefix}max_documents={max_documents}, but it must be at least 1")
    counted = count_words(corpus, full, cache_dir=cache_dir, val_share=val_share, max_documents=max_documents)
    key = hashlib.sha256(json.dumps([_FORMAT, counted.key, vocab_size, coverage]).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        kept, covered = choose_words(spec, counted.counts, vocab_size=vocab_size, coverage=coverage)
        ids = in_order(spec, kept, pad_id=full.pad_token_id)
        trimmed = save_with_words(full, spec, ids, folder, trust_remote_code=trust_remote_code)
        changed, held_out = num_changed(counted.held_out, full, trimmed, ids)
        found = Trimming(ids=ids, num_words=len(full), covered=covered, held_out=held_out, changed=changed)
        (folder / "trimming.json").write_text(json.dumps(asdict(found)), "ascii")

    folder = make_once(Path(cache_dir).expanduser(), f"tokenizers/trimmed-{key}", write)
    tokenizer: Any = load_tokenizer(name=str(folder), trust_remote_code=trust_remote_code)
    tokenizer.distilkit_trimming = Trimming(**json.loads((folder / "trimming.json").read_text("ascii")))
    return tokenizer  # type: ignore[no-any-return]


def spec_of(tokenizer: PreTrainedTokenizerBase, *, name: str) -> Spec:
    """Return a fast tokenizer as JSON, after a check that words can be left out of it."""
    spec: Spec = json.loads(tokenizer.backend_tokenizer.to_str())
    check_kind(spec, name=name)
    return spec


def save_with_words(
    full: PreTrainedTokenizerBase, spec: Spec, ids: Sequence[int], folder: Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Write a tokenizer that has these ids alone, in this order, and load it, as all who use the folder will.

    Some classes build their tokenizer from the vocabulary and not from the whole file; one that differs is refused.
    """
    wanted = with_words(spec, list(ids))
    full.save_pretrained(folder)
    for file in folder.iterdir():  # a vocabulary in another form would have all words
        if file.suffix in (".model", ".txt", ".tiktoken") or file.name in ("vocab.json", "added_tokens.json"):
            file.unlink()
    (folder / "tokenizer.json").write_text(json.dumps(wanted, ensure_ascii=False), "utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    if settings.pop("added_tokens_decoder", None):  # by id; the same as in tokenizer.json
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8")
    trimmed = load_tokenizer(name=str(folder), trust_remote_code=trust_remote_code)
    found = json.loads(trimmed.backend_tokenizer.to_str())
    differs = [part for part in wanted if part not in ("truncation", "padding") and found[part] != wanted[part]]
    if differs or len(trimmed) != len(ids):
        what = f"{type(trimmed).__name__} builds another {', '.join(differs) or 'vocabulary'} than its files have"
        raise UserError(f"{what}, so that it cannot be trimmed; set tokenizer=pretrained")
    return trimmed


def num_changed(
    texts: Iterable[str], full: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, ids: Sequence[int]
) -> tuple[int, int]:
    """Count the tokens of texts that the trimmed tokenizer does not give at the same place, and all of them."""
    changed = total = 0
    for text in texts:
        before, after = (
            each(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
            for each in (full, trimmed)
        )
        now = Counter(zip(after["offset_mapping"], (ids[each] for each in after["input_ids"]), strict=True))
        was = Counter(zip(before["offset_mapping"], before["input_ids"], strict=True))
        changed += (was - now).total()
        total += was.total()
    return changed, total
