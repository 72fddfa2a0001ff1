"""Dynamic masking: which tokens are hidden is a pure function of (seed, epoch, sample, position).

No generator is stepped, so a mask does not depend on workers, ranks, batch size or where a run was resumed.
"""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.losses import IGNORE_INDEX

Ids = NDArray[np.int64]
Random = NDArray[np.uint64]

VALIDATION_EPOCH = -1  # validation masks are those of one epoch that training never reaches

_LAST = np.uint64(2**64 - 1)  # the key of a token that is never chosen


def mix(x: Random) -> Random:
    """Scramble 64-bit counters so that neighbours look independent (splitmix64's finalizer, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    shifted = x >> np.uint64(30)  # in place from here on: this is the most of the work of masking
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x


def random_bits(seed: int, epoch: int, samples: Ids, length: int) -> Random:
    """Draw 64 random bits for each position of each sample: (batch,) -> (batch, length)."""
    key = mix(np.array([seed % 2**64], dtype=np.uint64))
    key = mix(key ^ np.array([epoch % 2**64], dtype=np.uint64))
    rows = mix(key ^ samples.astype(np.uint64))
    return mix(rows[:, None] ^ np.arange(length, dtype=np.uint64))


def to_uniform(bits: Random) -> NDArray[np.float64]:
    """Map random bits to uniform numbers in (0, 1)."""
    in_one_to_two = bits >> np.uint64(12) | np.float64(1).view(np.uint64)  # the mantissa of a number in [1, 2)
    return in_one_to_two.view(np.float64) - (1 - 2.0**-53)  # half a step above 0, where 1 would give 0 itself


def continues_word(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Tell for each id whether it continues the word before it, for WordPiece, byte-level BPE and SentencePiece."""
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if backend["type"] == "WordPiece":
        prefix = backend["continuing_subword_prefix"]
        flags = np.array([token.startswith(prefix) for token in tokens])
    else:
        flags = np.array([not token.startswith(("Ġ", "▁")) for token in tokens])
        if flags.all():
            raise UserError("data.masking.whole_word=true, but this tokenizer marks no word starts; set it to false")
    flags[tokenizer.all_special_ids] = False
    return flags


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How tokens are chosen and replaced (BERT, arXiv 1810.04805, section 3.1 and appendix A.1).

    ``mlm_probability`` of a sample's real tokens are chosen, an exact number in each sample. Of these,
    ``mask_share`` become the mask token, ``random_share`` a random word, the others stay. ``smoothing`` prefers rare
    tokens by count ** -smoothing (0: all alike; the original's 0.7). ``whole_word`` chooses words, not pieces.
    """

    mlm_probability: float
    mask_share: float
    random_share: float
    smoothing: float
    whole_word: bool

    def __post_init__(self) -> None:
        """Check the shares."""
        if not 0 < self.mlm_probability < 1:
            raise UserError(f"data.masking.mlm_probability={self.mlm_probability}, but it must be between 0 and 1")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise UserError(
                f"data.masking.mask_share={self.mask_share} and random_share={self.random_share}, but both must be at "
                "least 0 and their sum at most 1"
            )
        if self.smoothing < 0:
            raise UserError(f"data.masking.smoothing={self.smoothing}, but it must be at least 0 (the original: 0.7)")


class Masker:
    """Mask batches of one tokenizer; ``token_counts`` is how often each id occurs, (vocabulary,)."""

    def __init__(self, masking: Masking, *, tokenizer: PreTrainedTokenizerBase, token_counts: Ids, seed: int) -> None:
        """Precompute what depends on the vocabulary only."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                "the tokenizer has no mask token, which masked-LM training needs; set tokenizer.tokenizer_type to the "
                "model's type (bert, roberta, ...) if its folder has a bare tokenizer.json, or use a causal objective"
            )
        self.masking = masking
        self.seed = seed
        self.mask_id = tokenizer.mask_token_id
        self.is_special = np.zeros(len(tokenizer), dtype=bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.words = np.flatnonzero(~self.is_special)
        self.rarity = np.maximum(token_counts, 1).astype(np.float64) ** masking.smoothing if masking.smoothing else None
        self.continues = continues_word(tokenizer) if masking.whole_word else None

    def __call__(self, input_ids: Ids, *, epoch: int, samples: Ids, lengths: Ids | None = None) -> tuple[Ids, Ids]:
        """Return masked ids and labels, both (batch, length), -100 where a token is not a target.

        ``samples`` (batch,) are the indices that name each mask; ``lengths`` (batch,) counts real tokens, None
        when all are.
        """
        batch, length = input_ids.shape
        real = np.full(batch, length) if lengths is None else lengths
        bits = random_bits(self.seed, epoch, samples, length)
        chosen = np.flatnonzero(self._choose(input_ids, bits, real))
        originals = input_ids.reshape(-1)[chosen]
        output, labels = input_ids.copy(), np.full(input_ids.shape, IGNORE_INDEX, dtype=np.int64)
        output.reshape(-1)[chosen] = self._replacements(originals, mix(bits.reshape(-1)[chosen]))
        labels.reshape(-1)[chosen] = originals
        return output, labels

    def _choose(self, input_ids: Ids, bits: Random, real: Ids) -> NDArray[np.bool_]:
        """Mark the targets of each row, (batch, length)."""
        length = input_ids.shape[1]
        special = self.is_special.take(input_ids)
        if (real < length).any():
            special |= np.arange(length) >= real[:, None]
        budget = np.maximum(1, np.round(self.masking.mlm_probability * real)).astype(np.int64)
        keys = self._keys(input_ids, bits)
        keys[special] = _LAST
        if self.continues is None:
            return _smallest(keys, budget)
        return _smallest_words(keys, budget, self._word_starts(input_ids, special))

    def _keys(self, input_ids: Ids, bits: Random) -> Random:
        """Draw a key for each token; the smallest ones win with probability by weight (an exponential race)."""
        if self.rarity is None:
            return bits.copy()
        keys = np.log(to_uniform(bits))
        keys *= self.rarity.take(input_ids)
        return np.negative(keys, out=keys).view(np.uint64)  # positive floats are ordered as their bits are

    def _word_starts(self, input_ids: Ids, special: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tell where words begin; a special token is a word, and so is what follows it and what begins a row."""
        assert self.continues is not None
        starts = ~self.continues.take(input_ids) | special
        starts[:, 1:] |= special[:, :-1]
        starts[:, 0] = True
        return starts

    def _replacements(self, originals: Ids, bits: Random) -> Ids:
        """Replace 80 / 10 / 10 of the chosen (targets,) by a second draw; a random word is never a special token."""
        uniform = to_uniform(bits)
        masked = uniform < self.masking.mask_share
        random = np.flatnonzero(~masked & (uniform < self.masking.mask_share + self.masking.random_share))
        replaced = np.where(masked, self.mask_id, originals)
        replaced[random] = self.words[mix(bits[random]) % np.uint64(len(self.words))]
        return replaced


def _smallest(keys: Random, budget: Ids) -> NDArray[np.bool_]:
    """Mark the ``budget`` (rows,) smallest keys of each row (rows, length), or all but the last where there are fewer."""
    ordered = np.partition(keys, np.unique(budget) - 1, axis=1)
    threshold = ordered[np.arange(len(keys)), budget - 1]
    return keys <= np.minimum(threshold, _LAST - np.uint64(1))[:, None]


def _smallest_words(
    keys: Random, budget: Ids, starts: NDArray[np.bool_], *, num_tried: int | None = None
) -> NDArray[np.bool_]:
    """Mark whole words by the keys of their first tokens while they fit, passing over one that is too long (as BERT did).

    ``keys`` and ``starts`` are (rows, length), ``budget`` (rows,) counts tokens. A word of the last key is not taken.
    ``num_tried`` words are sorted at first, for those are nearly always enough.
    """
    num_rows, length = keys.shape
    num_tried = num_tried or min(length, 2 * int(budget.max()) + 8)
    places, sizes = _words_by_key(keys, starts, num_tried)
    taken, left = _taken_while_they_fit(sizes, budget)

    change = np.zeros(num_rows * length + 1, dtype=np.int8)  # +1 where a chosen word begins, -1 where it has ended
    change[places[taken]] = 1
    change[places[taken] + sizes[taken]] -= 1
    chosen = np.cumsum(change[:-1], dtype=np.int8).view(bool).reshape(num_rows, length)
    short = np.flatnonzero(left)
    if len(short) and num_tried < length:
        chosen[short] = _smallest_words(keys[short], budget[short], starts[short], num_tried=length)
    return chosen


def _words_by_key(keys: Random, starts: NDArray[np.bool_], count: int) -> tuple[Ids, Ids]:
    """Sort the ``count`` words of smallest keys in each row: their places in the flat tokens and sizes, (rows, count).

    What is no word that may be chosen comes last, and is longer than a row.
    """
    num_rows, length = keys.shape
    place = np.arange(length, dtype=np.uint64)
    low_bits = np.uint64(2 ** (length - 1).bit_length() - 1)  # of a key, given up for its place
    ordered = np.where(starts, keys, _LAST)
    ordered &= ~low_bits
    ordered |= place
    if count < length:
        ordered.partition(count - 1, axis=1)
    ordered = np.sort(ordered[:, :count], axis=1)
    places = (ordered & low_bits).view(np.int64) + np.arange(0, num_rows * length, length)[:, None]
    ends = np.append(np.flatnonzero(starts)[1:], num_rows * length)  # no word crosses a row, for each row starts one
    sizes = ends[np.cumsum(starts)[places] - 1] - places
    sizes[ordered >= _LAST & ~low_bits] = length + 1
    return places, sizes


def _taken_while_they_fit(sizes: Ids, budget: Ids) -> tuple[NDArray[np.bool_], Ids]:
    """Take words of ``sizes`` (rows, words) in order, each that fits: which ones, and what is left of ``budget``."""
    used = np.cumsum(sizes, axis=1)
    taken = used <= budget[:, None]
    passed = np.count_nonzero(taken, axis=1)
    left = budget - np.where(passed, used[np.arange(len(used)), passed - 1], 0)
    rows = np.flatnonzero(left)
    while len(rows):  # each round takes one more word in each row, the next that fits
        fits = (sizes[rows] <= left[rows, None]) & (np.arange(sizes.shape[1]) >= passed[rows, None])
        some = fits.any(axis=1)
        rows, word = rows[some], fits[some].argmax(axis=1)
        taken[rows, word] = True
        left[rows] -= sizes[rows, word]
        passed[rows] = word + 1
        rows = rows[left[rows] > 0]
    return taken, left
