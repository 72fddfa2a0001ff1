"""Dynamic masking: the mask of a token is a pure function of (seed, epoch, sample, position).

There is no generator state, so a mask does not depend on workers, ranks, batch size or the step of a resume. Special
tokens and padding stay unmasked: ``Masker._choose`` gives them a key that is never chosen.
"""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from distilkit.data.tokenizer import num_ids
from distilkit.errors import UserError
from distilkit.losses import IGNORE_INDEX
from distilkit.schedule import Points, check_points, piecewise

Ids = NDArray[np.int64]
_Random = NDArray[np.uint64]

VALIDATION_EPOCH = -1  # an epoch that training never reaches

_LAST = np.uint64(2**64 - 1)  # the key of a token that is never chosen


def mix(x: _Random) -> _Random:
    """Scramble 64-bit counters so that neighbours look independent (splitmix64's finalizer, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    shifted = x >> np.uint64(30)  # in place from here on, because masking spends most of its time here
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x


def random_bits(seed: int, epoch: int, samples: Ids, length: int) -> _Random:
    """Draw 64 random bits for each position of each sample: (batch,) -> (batch, length)."""
    key = mix(np.array([seed % 2**64], dtype=np.uint64))
    key = mix(key ^ np.array([epoch % 2**64], dtype=np.uint64))
    sample_keys = mix(key ^ samples.astype(np.uint64))  # (batch,)
    return mix(sample_keys[:, None] ^ np.arange(length, dtype=np.uint64))


def to_uniform(bits: _Random) -> NDArray[np.float64]:
    """Map random bits to uniform numbers in (0, 1)."""
    in_one_to_two = bits >> np.uint64(12) | np.float64(1).view(np.uint64)  # the mantissa of a number in [1, 2)
    return in_one_to_two.view(np.float64) - (1 - 2.0**-53)  # subtracting 1 would allow 0 itself


def continues_word(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Return for each id whether it continues a word, (ids,): WordPiece, byte-level BPE or SentencePiece."""
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(num_ids(tokenizer))))]
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
    """Settings for choosing and replacing tokens (BERT, arXiv 1810.04805, section 3.1 and appendix A.1).

    ``mlm_probability`` is the share of real tokens chosen as targets; their number is exact in each sample. It may be
    points over the training, as [[0, 0.3], [1, 0.15]] (``schedule.piecewise``). Of the targets, ``mask_share`` become
    the mask token, ``random_share`` a random word, and the rest stay unchanged. ``smoothing`` weights tokens by
    count ** -smoothing (0: uniform; DistilBERT: 0.7). ``whole_word`` keeps words whole. After so many ``epochs`` their
    masks come again in turn; 0 makes new ones in each epoch.
    """

    mlm_probability: Points
    mask_share: float
    random_share: float
    smoothing: float
    whole_word: bool
    epochs: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        key, limit = "data.masking.mlm_probability", "between 0 and 1"
        rate = check_points(self.mlm_probability, key=key, limit=limit, holds=lambda each: 0 < each < 1)
        object.__setattr__(self, "mlm_probability", rate)
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise UserError(
                f"data.masking.mask_share={self.mask_share} and random_share={self.random_share}, but both must be at "
                "least 0 and their sum at most 1"
            )
        if type(self.epochs) is not int or self.epochs < 0:
            found = f"data.masking.epochs (or teacher_cache.epochs)={self.epochs}"
            raise UserError(f"{found}, but it must be a whole number of at least 0")
        if self.smoothing < 0:
            raise UserError(f"data.masking.smoothing={self.smoothing}, but it must be at least 0 (DistilBERT: 0.7)")


class Masker:
    """Mask batches of one tokenizer. ``token_counts`` (ids,) is the frequency of each id."""

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
        self.is_special = np.zeros(num_ids(tokenizer), dtype=bool)
        self.is_special[tokenizer.all_special_ids] = True
        words = np.array(sorted(tokenizer.get_vocab().values()))  # an id may have no word
        self.words = words[~self.is_special[words]]
        self.inverse_weights = None  # (ids,); a token that never occurred counts as one
        if masking.smoothing:
            with np.errstate(over="ignore"):
                self.inverse_weights = np.maximum(token_counts, 1).astype(np.float64) ** masking.smoothing
            if not np.isfinite(self.inverse_weights).all():
                found = f"data.masking.smoothing={masking.smoothing} makes weights that are not finite"
                raise UserError(f"{found}; set it between 0 and 1 (DistilBERT: 0.7)")
        self.continues = continues_word(tokenizer) if masking.whole_word else None

    def __call__(
        self, input_ids: Ids, *, epoch: int, samples: Ids, lengths: Ids | None = None, progress: float = 1.0
    ) -> tuple[Ids, Ids]:
        """Return masked ids and labels, both (batch, length). Labels are -100 except at targets.

        ``samples`` (batch,) are the sample indices that determine the masks. ``lengths`` (batch,) are the numbers of
        real tokens; None means that there is no padding. A rate that changes is that at ``progress``; 1 is the last.
        """
        batch, length = input_ids.shape
        real = np.full(batch, length) if lengths is None else lengths
        if self.masking.epochs and epoch != VALIDATION_EPOCH:
            epoch %= self.masking.epochs
        bits = random_bits(self.seed, epoch, samples, length)
        rate = piecewise(self.masking.mlm_probability, progress)
        chosen = np.flatnonzero(self._choose(input_ids, bits, real, rate))  # (targets,), flat indices
        originals = input_ids.reshape(-1)[chosen]
        output, labels = input_ids.copy(), np.full(input_ids.shape, IGNORE_INDEX, dtype=np.int64)
        output.reshape(-1)[chosen] = self._replacements(originals, mix(bits.reshape(-1)[chosen]))
        labels.reshape(-1)[chosen] = originals
        return output, labels

    def _choose(self, input_ids: Ids, bits: _Random, real: Ids, rate: float) -> NDArray[np.bool_]:
        """Mark the targets, (batch, length). Special tokens and padding stay unmasked, because their keys are _LAST.

        1. Compute the budget of each sample from its real tokens, special tokens included, as BERT does.
        2. Draw a key for each token, and then exclude special tokens, so that no draw depends on its neighbours.
        3. Choose the tokens or words with the smallest keys.
        """
        length = input_ids.shape[1]
        special = self.is_special.take(input_ids)  # (batch, length)
        if (real < length).any():
            special |= np.arange(length) >= real[:, None]  # padding counts as special
        budget = np.maximum(1, np.round(rate * real)).astype(np.int64)  # (batch,)
        keys = self._keys(input_ids, bits)  # (batch, length)
        keys[special] = _LAST
        if self.continues is None:
            return _smallest(keys, budget)
        return _smallest_words(keys, budget, self._word_starts(input_ids, special))

    def _keys(self, input_ids: Ids, bits: _Random) -> _Random:
        """Draw a key for each token, (batch, length): -log(uniform) / weight. The smallest are a draw by weight."""
        if self.inverse_weights is None:
            return bits.copy()
        keys = np.log(to_uniform(bits))
        keys *= self.inverse_weights.take(input_ids)
        return np.negative(keys, out=keys).view(np.uint64)  # positive floats have the order of their bits

    def _word_starts(self, input_ids: Ids, special: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Mark where words start, (batch, length): also at special tokens, after them, and at the first position."""
        assert self.continues is not None
        starts = ~self.continues.take(input_ids) | special
        starts[:, 1:] |= special[:, :-1]
        starts[:, 0] = True
        return starts

    def _replacements(self, originals: Ids, bits: _Random) -> Ids:
        """Return what replaces the targets, (targets,) -> (targets,). A random word is never a special token.

        1. One uniform number decides between mask token, random word and no change (80 / 10 / 10 in BERT).
        2. The random words need new bits, because the first ones lie in a narrow range here.
        """
        uniform = to_uniform(bits)  # (targets,)
        masked = uniform < self.masking.mask_share
        random = np.flatnonzero(~masked & (uniform < self.masking.mask_share + self.masking.random_share))
        replaced = np.where(masked, self.mask_id, originals)
        replaced[random] = self.words[mix(bits[random]) % np.uint64(len(self.words))]
        return replaced


def _smallest(keys: _Random, budget: Ids) -> NDArray[np.bool_]:
    """Mark the ``budget`` (batch,) smallest keys of each sample, (batch, length), except those that are _LAST."""
    ordered = np.partition(keys, np.unique(budget) - 1, axis=1)
    threshold = ordered[np.arange(len(keys)), budget - 1]  # (batch,), the largest chosen key
    return keys <= np.minimum(threshold, _LAST - np.uint64(1))[:, None]


def _smallest_words(
    keys: _Random, budget: Ids, starts: NDArray[np.bool_], *, num_tried: int | None = None
) -> NDArray[np.bool_]:
    """Mark whole words by the keys of their first tokens, skipping words that exceed the budget (as BERT does).

    ``keys`` and ``starts`` are (batch, length), ``budget`` (batch,) counts tokens. ``num_tried`` words are sorted
    first, because these are nearly always enough. Samples with budget left are repeated with all words.
    """
    batch, length = keys.shape
    num_tried = num_tried or min(length, 2 * int(budget.max()) + 8)
    places, sizes = _words_by_key(keys, starts, num_tried)  # (batch, num_tried)
    taken, left = _taken_while_they_fit(sizes, budget)  # (batch, num_tried), (batch,)

    change = np.zeros(batch * length + 1, dtype=np.int8)  # +1 where a chosen word starts, -1 after its end
    change[places[taken]] = 1  # 1. assigned first: a word may start where another one ends
    change[places[taken] + sizes[taken]] -= 1  # 2. both changes then cancel
    chosen = np.cumsum(change[:-1], dtype=np.int8).view(bool).reshape(batch, length)
    short = np.flatnonzero(left)
    if len(short) and num_tried < length:
        chosen[short] = _smallest_words(keys[short], budget[short], starts[short], num_tried=length)
    return chosen


def _words_by_key(keys: _Random, starts: NDArray[np.bool_], count: int) -> tuple[Ids, Ids]:
    """Return flat positions and sizes of the ``count`` words with the smallest keys of each sample, (batch, count).

    1. Replace the low bits of each key by its position, so that sorting the keys also sorts the positions.
    2. Partition before sorting, because ``count`` is usually much smaller than ``length``.
    3. Read sizes from the distance to the next start. Excluded words sort last and get a size above ``length``.
    """
    batch, length = keys.shape
    position = np.arange(length, dtype=np.uint64)
    low_bits = np.uint64(2 ** (length - 1).bit_length() - 1)
    ordered = np.where(starts, keys, _LAST)  # (batch, length)
    ordered &= ~low_bits
    ordered |= position
    if count < length:
        ordered.partition(count - 1, axis=1)
    ordered = np.sort(ordered[:, :count], axis=1)  # (batch, count)
    places = (ordered & low_bits).view(np.int64) + np.arange(0, batch * length, length)[:, None]
    ends = np.append(np.flatnonzero(starts)[1:], batch * length)  # (words,); each sample starts with a word
    sizes = ends[np.cumsum(starts)[places] - 1] - places
    sizes[ordered >= _LAST & ~low_bits] = length + 1
    return places, sizes


def _taken_while_they_fit(sizes: Ids, budget: Ids) -> tuple[NDArray[np.bool_], Ids]:
    """Take words in order while they fit: ``sizes`` (batch, words) -> taken (batch, words), remaining budget (batch,).

    1. Take the words before the first that does not fit, for all samples at once.
    2. Then take one word per round in each sample with budget left: the next one that fits.
    """
    used = np.cumsum(sizes, axis=1)  # (batch, words)
    taken = used <= budget[:, None]
    passed = np.count_nonzero(taken, axis=1)  # (batch,), words taken or skipped
    left = budget - np.where(passed, used[np.arange(len(used)), passed - 1], 0)
    open_ = np.flatnonzero(left)  # (samples,), those with budget left
    while len(open_):
        fits = (sizes[open_] <= left[open_, None]) & (np.arange(sizes.shape[1]) >= passed[open_, None])
        some = fits.any(axis=1)
        open_, word = open_[some], fits[some].argmax(axis=1)
        taken[open_, word] = True
        left[open_] -= sizes[open_, word]
        passed[open_] = word + 1
        open_ = open_[left[open_] > 0]
    return taken, left
