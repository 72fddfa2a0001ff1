"""Synthetic text and a tokenizer for it; word frequencies follow Zipf's law."""

import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

_NUM_WORDS = 100_000
_WORDS_OF_DOCUMENT = 300


def words(num_words: int = _NUM_WORDS, *, seed: int = 0) -> list[str]:
    """Generate random words of 2 to 11 letters, the frequent and short ones first."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(2 + rng.poisson(np.linspace(2, 7, num_words)), 11)
    letters = np.array(list(LETTERS))
    return ["".join(letters[rng.integers(0, len(LETTERS), length)]) for length in lengths]


def tokenizer(vocab_size: int = 30522) -> PreTrainedTokenizerFast:
    """Build a WordPiece tokenizer: frequent words whole, others in pieces of one to three letters."""
    pieces = ["".join(piece) for size in (1, 2, 3) for piece in itertools.product(LETTERS, repeat=size)]
    known = dict.fromkeys([*SPECIAL, *LETTERS, *(f"##{piece}" for piece in pieces), ".", *words()])
    ids = {token: index for index, token in enumerate(itertools.islice(known, vocab_size))}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def write_text(file: Path, *, megabytes: float, seed: int = 0) -> None:
    """Write documents of 300 words, separated by blank lines, until the file has the given size."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array(words(), dtype=object)
    written = 0
    with file.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1e6:
            drawn = _zipf(rng, 1000 * _WORDS_OF_DOCUMENT, len(vocabulary)).reshape(1000, -1)
            for row in vocabulary[drawn]:
                written += stream.write(" ".join(row) + ".\n\n")
                if written >= megabytes * 1e6:
                    break


def token_stream(num_tokens: int, *, vocab_size: int, seed: int = 0) -> NDArray[np.uint16]:
    """Draw token ids without special ones, as stored in a token cache."""
    rng = np.random.default_rng(seed)
    return (len(SPECIAL) + _zipf(rng, num_tokens, vocab_size - len(SPECIAL))).astype(np.uint16)


def _zipf(rng: np.random.Generator, count: int, num_ranks: int) -> NDArray[np.int64]:
    """Draw ranks from 0 with a probability proportional to 1 / rank."""
    return np.minimum(num_ranks ** rng.random(count), num_ranks).astype(np.int64) - 1
