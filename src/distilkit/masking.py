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


def mix(x: Random) -> Random:
    """Scramble 64-bit counters so that neighbours look independent (splitmix64's finalizer, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(seed: int, epoch: int, samples: Ids, length: int) -> Random:
    """Draw 64 random bits for each position of each sample: (batch,) -> (batch, length)."""
    key = mix(np.array([seed % 2**64], dtype=np.uint64))
    key = mix(key ^ np.array([epoch % 2**64], dtype=np.uint64))
    rows = mix(key ^ samples.astype(np.uint64))
    return mix(rows[:, None] ^ np.arange(length, dtype=np.uint64))


def to_uniform(bits: Random) -> NDArray[np.float64]:
    """Map random bits to uniform numbers in (0, 1)."""
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # 53 bits and a half would round up to 1


def continues_word(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Tell for each id whether it continues the word before it, for WordPiece, byte-level BPE and SentencePiece.

    Raises:
        UserError: the tokenizer marks neither the start nor the continuation of a word.
    """
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

    Raises:
        UserError: a share is out of range.
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
        """Precompute what depends on the vocabulary only.

        Raises:
            UserError: the tokenizer has no mask token.
        """
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
        self.weight = (
            np.maximum(token_counts, 1).astype(np.float64) ** -masking.smoothing if masking.smoothing else None
        )
        self.continues = continues_word(tokenizer) if masking.whole_word else None

    def __call__(self, input_ids: Ids, *, epoch: int, samples: Ids, lengths: Ids | None = None) -> tuple[Ids, Ids]:
        """Return masked ids and labels, both (batch, length), -100 where a token is not a target.

        ``samples`` (batch,) are the indices that name each mask; ``lengths`` (batch,) counts real tokens, None
        when all are.
        """
        batch, length = input_ids.shape
        bits = random_bits(self.seed, epoch, samples, length)
        real = np.full(batch, length) if lengths is None else lengths
        special = self.is_special[input_ids] | (np.arange(length) >= real[:, None])
        budget = np.maximum(1, np.round(self.masking.mlm_probability * real)).astype(np.int64)
        if self.continues is None:
            chosen = self._choose_tokens(input_ids, bits, special, budget)
        else:
            chosen = self._choose_words(input_ids, bits, special, budget)
        return self._replace(input_ids, chosen, mix(bits))

    def _keys(self, input_ids: Ids, bits: Random) -> NDArray[np.float64]:
        """Draw a key for each token; the smallest ones win with probability by weight (an exponential race)."""
        uniform = to_uniform(bits)
        return uniform if self.weight is None else -np.log(uniform) / self.weight[input_ids]

    def _choose_tokens(
        self, input_ids: Ids, bits: Random, special: NDArray[np.bool_], budget: Ids
    ) -> NDArray[np.bool_]:
        keys = np.where(special, np.inf, self._keys(input_ids, bits))
        rows = np.arange(len(keys))
        ordered = np.partition(keys, np.unique(budget) - 1, axis=1)
        return (keys <= ordered[rows, budget - 1][:, None]) & ~special

    def _choose_words(self, input_ids: Ids, bits: Random, special: NDArray[np.bool_], budget: Ids) -> NDArray[np.bool_]:
        """Take whole words in random order while they fit, passing over one that is too long (as BERT did)."""
        assert self.continues is not None
        starts = ~self.continues[input_ids] | special
        starts[:, 1:] |= special[:, :-1]
        starts[:, 0] = True
        word = np.cumsum(starts, axis=1) - 1
        keys = self._keys(input_ids, bits)
        chosen = np.zeros_like(special)
        for row in range(len(input_ids)):
            first = np.flatnonzero(starts[row])
            sizes = np.diff(np.append(first, input_ids.shape[1]))
            taken = np.zeros(len(first), dtype=bool)
            left = budget[row]
            for candidate in np.argsort(np.where(special[row, first], np.inf, keys[row, first])):
                if left == 0 or special[row, first[candidate]]:
                    break
                if sizes[candidate] <= left:
                    taken[candidate] = True
                    left -= sizes[candidate]
            chosen[row] = taken[word[row]]
        return chosen & ~special

    def _replace(self, input_ids: Ids, chosen: NDArray[np.bool_], bits: Random) -> tuple[Ids, Ids]:
        """Replace 80 / 10 / 10 by a second draw; a random word is never a special token."""
        uniform = to_uniform(bits)
        masked = chosen & (uniform < self.masking.mask_share)
        random = chosen & ~masked & (uniform < self.masking.mask_share + self.masking.random_share)
        output = np.where(masked, self.mask_id, input_ids)
        output[random] = self.words[mix(bits[random]) % np.uint64(len(self.words))]
        return output, np.where(chosen, input_ids, IGNORE_INDEX)
