import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distilkit.data.masking import Ids, Masker, Masking, continues_word, mix, random_bits, to_uniform
from distilkit.errors import UserError
from distilkit.losses import IGNORE_INDEX
from tiny import SPECIAL, VOCABULARY, make_documents

PAD, CLS, SEP, MASK = (SPECIAL.index(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
NUM_SPECIAL = len(SPECIAL)
FIRST_PIECE = VOCABULARY.index(next(token for token in VOCABULARY if token.startswith("##")))

MakeMasker = Callable[..., Masker]


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerBase) -> MakeMasker:
    """Make a masker from the paper's settings and changes to them."""

    def masker(*, seed: int = 0, counts: Ids | None = None, **fields: Any) -> Masker:
        paper: dict[str, Any] = {
            "mlm_probability": 0.15,
            "mask_share": 0.8,
            "random_share": 0.1,
            "smoothing": 0.0,
            "whole_word": False,
        }
        token_counts = np.arange(len(VOCABULARY)) ** 2 if counts is None else counts
        return Masker(Masking(**paper | fields), tokenizer=tokenizer, token_counts=token_counts, seed=seed)

    return masker


def words(batch: int, length: int, *, seed: int = 0) -> Ids:
    """Blocks of ordinary tokens, about a quarter of them pieces that continue a word."""
    return np.random.default_rng(seed).integers(NUM_SPECIAL, len(VOCABULARY), (batch, length))


def blocks(batch: int, length: int, *, seed: int = 0) -> Ids:
    """The same between [CLS] and [SEP], with a separator here and there."""
    ids = words(batch, length, seed=seed)
    ids[np.random.default_rng(seed + 1).random(ids.shape) < 0.05] = SEP
    ids[:, 0], ids[:, -1] = CLS, SEP
    return ids


def chi_square(observed: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Return how far counts are from the expected ones, in standard deviations of a chi-square."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(observed) - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


KINDS = [{}, {"smoothing": 0.7}, {"whole_word": True}, {"smoothing": 0.7, "whole_word": True}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "+".join(kind) or "plain")


@every_kind
def test_a_mask_depends_on_its_sample_and_not_on_the_batch_around_it(
    make: MakeMasker, kind: dict[str, float | bool]
) -> None:
    masker, ids, samples = make(**kind), blocks(24, 40), np.arange(100, 124)
    lengths = np.random.default_rng(0).integers(10, 41, 24)
    inputs, labels = masker(ids, epoch=3, samples=samples, lengths=lengths)
    order = np.random.default_rng(1).permutation(24)
    for rows in [order, *np.split(order, 4), *(np.array([row]) for row in order)]:
        again = masker(ids[rows], epoch=3, samples=samples[rows], lengths=lengths[rows])
        np.testing.assert_array_equal(again, (inputs[rows], labels[rows]))


@every_kind
def test_a_new_masker_repeats_the_masks_of_an_old_one_and_leaves_its_input_alone(
    make: MakeMasker, kind: dict[str, float | bool]
) -> None:
    ids, samples = blocks(8, 40), np.arange(8)
    before = ids.copy()
    first = make(**kind)(ids, epoch=0, samples=samples)
    make(**kind)(ids, epoch=1, samples=samples)
    np.testing.assert_array_equal(make(**kind)(ids, epoch=0, samples=samples), first)
    np.testing.assert_array_equal(ids, before)


def test_the_masks_are_those_of_every_earlier_version(make: MakeMasker) -> None:
    lengths, ids = np.random.default_rng(0).integers(10, 41, 24), blocks(24, 40)
    found = []
    for kind in KINDS:
        masked = make(**kind)(ids, epoch=3, samples=np.arange(100, 124), lengths=lengths)
        found.append(zlib.crc32(np.stack(masked).astype("<i8").tobytes()))
    assert found == [605368812, 3299921236, 2857363723, 3044592578]


RATES = [[0, 0.3], [0.5, 0.3], [1, 0.1]]


@every_kind
@pytest.mark.parametrize(("progress", "rate"), [(0.0, 0.3), (0.5, 0.3), (0.75, 0.2), (1.0, 0.1)])
def test_a_rate_that_changes_gives_the_masks_of_its_value(
    make: MakeMasker, kind: dict[str, float | bool], progress: float, rate: float
) -> None:
    ids, samples = blocks(24, 40), np.arange(24)
    changing, fixed = make(**kind, mlm_probability=RATES), make(**kind, mlm_probability=rate)
    found = changing(ids, epoch=3, samples=samples, progress=progress)
    np.testing.assert_array_equal(found, fixed(ids, epoch=3, samples=samples))
    np.testing.assert_array_equal(found, fixed(ids, epoch=3, samples=samples, progress=0.3))
    if progress == 1:
        np.testing.assert_array_equal(found, changing(ids, epoch=3, samples=samples))


def test_the_targets_of_a_lower_rate_are_among_those_of_a_higher_one(make: MakeMasker) -> None:
    masker, ids = make(mlm_probability=RATES), words(50, 40)
    first, middle, last = (
        masker(ids, epoch=0, samples=np.arange(50), progress=progress)[1] != IGNORE_INDEX for progress in (0, 0.75, 1)
    )
    assert (first.sum(), middle.sum(), last.sum()) == (50 * 12, 50 * 8, 50 * 4)
    assert (last <= middle).all()
    assert (middle <= first).all()


@pytest.mark.parametrize(
    ("seed", "epoch", "shift"), [(1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (2**40, 0, 0)]
)
def test_masks_of_other_seeds_epochs_and_samples_are_independent(
    make: MakeMasker, seed: int, epoch: int, shift: int
) -> None:
    ids, samples = words(500, 100), np.arange(500)
    first = make()(ids, epoch=0, samples=samples)[1] != IGNORE_INDEX
    second = make(seed=seed)(ids, epoch=epoch, samples=samples + shift)[1] != IGNORE_INDEX
    both, chance = (first & second).mean(), 0.15**2
    assert abs(both - chance) < 5 * np.sqrt(chance / first.size)


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
@pytest.mark.parametrize("probability", [0.01, 0.15, 0.5, 0.99])
def test_each_sample_has_exactly_its_number_of_targets(make: MakeMasker, smoothing: float, probability: float) -> None:
    lengths = np.arange(1, 61)
    masker = make(mlm_probability=probability, smoothing=smoothing)
    _, labels = masker(words(60, 60), epoch=0, samples=np.arange(60), lengths=lengths)
    expected = [max(1, round(probability * length)) for length in range(1, 61)]
    assert (labels != IGNORE_INDEX).sum(axis=1).tolist() == expected


def test_a_sample_with_fewer_words_than_targets_has_each_word_chosen(make: MakeMasker) -> None:
    ids = np.array([[CLS, 9, SEP, 8, SEP, SEP], [CLS, SEP, SEP, SEP, SEP, SEP]])
    _, labels = make(mlm_probability=0.9)(ids, epoch=0, samples=np.arange(2))
    assert labels.tolist() == [[-100, 9, -100, 8, -100, -100], [-100] * 6]


@every_kind
def test_labels_are_the_originals_where_chosen_and_other_tokens_are_untouched(
    make: MakeMasker, kind: dict[str, float | bool]
) -> None:
    ids = blocks(200, 50)
    inputs, labels = make(**kind)(ids, epoch=0, samples=np.arange(200))
    chosen = labels != IGNORE_INDEX
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(inputs[~chosen], ids[~chosen])


@every_kind
@pytest.mark.parametrize("probability", [0.15, 0.9])
def test_no_special_token_is_chosen_or_brought_in(
    make: MakeMasker, kind: dict[str, float | bool], probability: float
) -> None:
    ids = blocks(300, 50)
    masker = make(mlm_probability=probability, mask_share=0.0, random_share=1.0, **kind)
    inputs, labels = masker(ids, epoch=0, samples=np.arange(300))
    assert (labels[ids < NUM_SPECIAL] == IGNORE_INDEX).all()
    assert (inputs[labels != IGNORE_INDEX] >= NUM_SPECIAL).all()


@every_kind
@pytest.mark.parametrize("filler", [PAD, SEP, FIRST_PIECE - 1, FIRST_PIECE])
def test_what_stands_past_the_length_is_never_chosen_and_does_not_matter(
    make: MakeMasker, kind: dict[str, float | bool], filler: int
) -> None:
    ids, samples = words(50, 40), np.arange(50)
    lengths = np.random.default_rng(0).integers(5, 40, 50)
    real = np.arange(40) < lengths[:, None]
    masker = make(mlm_probability=0.4, **kind)
    inputs, labels = masker(np.where(real, ids, filler), epoch=0, samples=samples, lengths=lengths)
    assert (labels[~real] == IGNORE_INDEX).all()
    assert (inputs[~real] == filler).all()
    padded = masker(np.where(real, ids, PAD), epoch=0, samples=samples, lengths=lengths)
    np.testing.assert_array_equal(labels, padded[1])


@pytest.mark.parametrize(("mask_share", "random_share"), [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.3, 0.6)])
def test_the_chosen_are_replaced_in_the_shares_asked_for(
    make: MakeMasker, mask_share: float, random_share: float
) -> None:
    ids = words(2000, 64)
    inputs, labels = make(mask_share=mask_share, random_share=random_share)(ids, epoch=0, samples=np.arange(2000))
    chosen = labels != IGNORE_INDEX
    same_word = random_share / (len(VOCABULARY) - NUM_SPECIAL)  # a random word may be the word itself
    for found, share in [
        (inputs[chosen] == MASK, mask_share),
        (inputs[chosen] == ids[chosen], 1 - mask_share - random_share + same_word),
    ]:
        assert abs(found.mean() - share) <= 5 * np.sqrt(share * (1 - share) / chosen.sum())


def test_random_words_are_uniform_over_the_vocabulary_without_special_tokens(make: MakeMasker) -> None:
    inputs, labels = make(mask_share=0.0, random_share=1.0)(words(2000, 64), epoch=0, samples=np.arange(2000))
    found = np.bincount(inputs[labels != IGNORE_INDEX], minlength=len(VOCABULARY))[NUM_SPECIAL:]
    assert abs(chi_square(found, np.full(len(found), found.sum() / len(found)))) < 5


def test_how_a_token_is_replaced_does_not_depend_on_where_or_why_it_was_chosen(make: MakeMasker) -> None:
    ids = words(4000, 64)
    inputs, labels = make()(ids, epoch=0, samples=np.arange(4000))
    chosen = labels != IGNORE_INDEX
    masked = (inputs == MASK) & chosen
    share = masked.sum(axis=0) / chosen.sum(axis=0)
    assert abs(share - 0.8).max() < 5 * np.sqrt(0.8 * 0.2 / chosen.sum(axis=0).min())
    assert abs(np.corrcoef(masked[chosen][:-1], masked[chosen][1:])[0, 1]) < 5 / np.sqrt(chosen.sum())


def test_every_position_is_chosen_equally_often(make: MakeMasker) -> None:
    _, labels = make()(words(8000, 64), epoch=0, samples=np.arange(8000))
    found = (labels != IGNORE_INDEX).sum(axis=0)
    spread = 1 - 10 / 64  # ten of 64 without replacement: less than independent draws would
    assert abs(chi_square(found, np.full(64, 1250.0)) - (spread - 1) * np.sqrt(63 / 2)) < 5 * spread


LINE = [12, 12, 20, CLS, 33, 47, 60]
COUNTS = {12: 5_000, 20: 1, 33: 300, 47: 20_000, 60: 0}  # a token that never occurred counts once


def line_weights() -> NDArray[np.float64]:
    weights = np.array([0.0 if token == CLS else max(COUNTS[token], 1) ** -0.7 for token in LINE])
    return weights / weights.sum()


@pytest.mark.parametrize("num_chosen", [1, 2])
def test_smoothing_chooses_rare_tokens_by_the_power_of_their_count(make: MakeMasker, num_chosen: int) -> None:
    counts = np.full(len(VOCABULARY), 10**9)
    for token, count in COUNTS.items():
        counts[token] = count
    samples = np.arange(40_000)
    ids = np.tile(LINE, (len(samples), 1))
    masker = make(counts=counts, smoothing=0.7, mlm_probability=num_chosen / len(LINE))
    _, labels = masker(ids, epoch=0, samples=samples)
    found = (labels != IGNORE_INDEX).mean(axis=0)
    once = line_weights()
    expected = once.copy()
    if num_chosen == 2:  # the second is drawn by weight among those that are left
        for token in range(len(LINE)):
            others = np.delete(np.arange(len(LINE)), token)
            expected[token] += sum(once[first] * once[token] / (1 - once[first]) for first in others)
    assert expected.sum() == pytest.approx(num_chosen)
    assert (abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(samples))).all()


def test_a_smoothing_of_zero_is_blind_to_counts(make: MakeMasker) -> None:
    ids, samples = blocks(20, 50), np.arange(20)
    rare = make(counts=np.ones(len(VOCABULARY), dtype=np.int64))(ids, epoch=0, samples=samples)
    np.testing.assert_array_equal(make()(ids, epoch=0, samples=samples), rare)


def words_of(row: Ids) -> list[list[int]]:
    """Group the positions of a row into words, special tokens left out."""
    groups: list[list[int]] = []
    open_word = False
    for position, token in enumerate(row):
        if token < NUM_SPECIAL:
            open_word = False
        elif open_word and VOCABULARY[token].startswith("##"):
            groups[-1].append(position)
        else:
            groups.append([position])
            open_word = True
    return groups


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
@pytest.mark.parametrize("probability", [0.02, 0.15, 0.5])
def test_whole_words_are_chosen_whole_and_as_many_as_fit(
    make: MakeMasker, smoothing: float, probability: float
) -> None:
    ids = blocks(200, 50)
    pieces = np.random.default_rng(5).random(ids.shape) < 0.4
    ids = np.where(pieces & (ids >= NUM_SPECIAL), FIRST_PIECE, ids)
    ids[::2, 0] = FIRST_PIECE  # a block may begin in the middle of a word
    masker = make(whole_word=True, smoothing=smoothing, mlm_probability=probability)
    _, labels = masker(ids, epoch=0, samples=np.arange(200))
    budget = max(1, round(probability * 50))
    for row, chosen in zip(ids, labels != IGNORE_INDEX, strict=True):
        groups = words_of(row)
        assert all(len(set(chosen[group])) == 1 for group in groups)
        left = budget - chosen.sum()
        assert left >= 0
        assert all(chosen[group[0]] or len(group) > left for group in groups)


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_the_one_word_that_fits_is_found_however_late_it_comes(make: MakeMasker, smoothing: float) -> None:
    ids = np.tile([9, FIRST_PIECE] * 30, (300, 1))
    place = np.arange(300) % 30 * 2
    ids[np.arange(300), place + 1] = 10  # two words of one piece in place of one of two
    _, labels = make(whole_word=True, smoothing=smoothing, mlm_probability=0.01)(ids, epoch=0, samples=np.arange(300))
    assert (labels != IGNORE_INDEX).sum(axis=1).tolist() == [1] * 300


def test_whole_words_are_chosen_equally_often_while_all_fit(make: MakeMasker) -> None:
    piece = FIRST_PIECE
    ids = np.tile([9, piece, 10, piece, CLS, piece, piece, 11, piece, 12], (8000, 1))
    _, labels = make(whole_word=True, mlm_probability=0.2)(ids, epoch=0, samples=np.arange(8000))
    found = (labels != IGNORE_INDEX).sum(axis=0)
    for first, second in ((0, 1), (2, 3), (5, 6), (7, 8)):
        assert found[first] == found[second]
    pairs = found[[0, 2, 5, 7]]
    assert abs(chi_square(pairs, np.full(4, pairs.sum() / 4))) < 5


def test_pieces_continue_a_word_in_wordpiece(tokenizer: PreTrainedTokenizerBase) -> None:
    assert continues_word(tokenizer).tolist() == [token.startswith("##") for token in VOCABULARY]


def trained(backend: Tokenizer, trainer: trainers.Trainer) -> PreTrainedTokenizerBase:
    backend.train_from_iterator(make_documents(200), trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", eos_token="</s>")


def byte_level_bpe() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    return trained(backend, trainers.BpeTrainer(vocab_size=120, special_tokens=["<mask>", "</s>"], show_progress=False))


def metaspace_bpe() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(backend, trainers.BpeTrainer(vocab_size=120, special_tokens=["<mask>", "</s>"], show_progress=False))


def metaspace_unigram() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<mask>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=70, special_tokens=special, unk_token="<unk>", show_progress=False)
    return trained(backend, trainer)


@pytest.mark.parametrize("build", [byte_level_bpe, metaspace_bpe, metaspace_unigram])
def test_pieces_continue_a_word_where_no_space_was_before_them(build: Callable[[], PreTrainedTokenizerBase]) -> None:
    tokenizer = build()
    text = " ".join(make_documents(50, seed=1)).replace(".", "")
    encoding = tokenizer(text, add_special_tokens=False)
    word = np.array([text[:end].count(" ") for _, end in tokenizer.backend_tokenizer.encode(text).offsets])
    continued = np.append(False, word[1:] == word[:-1])
    assert 0.1 < continued.mean() < 0.9
    np.testing.assert_array_equal(continues_word(tokenizer)[encoding["input_ids"]], continued)
    assert not continues_word(tokenizer)[tokenizer.all_special_ids].any()


def test_a_tokenizer_that_marks_no_words_is_an_error_for_whole_words() -> None:
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = trained(
        backend, trainers.BpeTrainer(special_tokens=["<mask>"], end_of_word_suffix="</w>", show_progress=False)
    )
    with pytest.raises(UserError, match=r"whole_word=true, but this tokenizer marks no word starts; set it to false"):
        continues_word(tokenizer)


def test_a_tokenizer_without_a_mask_token_is_an_error(causal_tokenizer: PreTrainedTokenizerBase) -> None:
    masking = Masking(mlm_probability=0.15, mask_share=0.8, random_share=0.1, smoothing=0.0, whole_word=False)
    counts = np.ones(len(VOCABULARY), dtype=np.int64)
    with pytest.raises(UserError, match=r"no mask token.*set tokenizer\.tokenizer_type .* or use a causal objective"):
        Masker(masking, tokenizer=causal_tokenizer, token_counts=counts, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlm_probability": 0.0}, r"mlm_probability=0\.0, but it must be between 0 and 1"),
        ({"mlm_probability": 1.0}, r"mlm_probability=1\.0, but it must be between 0 and 1"),
        ({"mlm_probability": "0.3"}, r"data\.masking\.mlm_probability=0\.3, but it must be between 0 and 1"),
        (
            {"mlm_probability": [[0, 0.3], [1, 0.0]]},
            r"\[1, 0\.0\]\]: each value must be between 0 and 1; give \[\[share",
        ),
        ({"mlm_probability": [[0, 0.3], [0.9, 0.1]]}, r"its shares of the training do not rise from 0 to 1"),
        ({"mask_share": -0.1}, r"mask_share=-0\.1 and random_share=0\.1, but both must be at least 0 and their sum at"),
        ({"random_share": -0.1}, r"mask_share=0\.8 and random_share=-0\.1, but both must be at least 0"),
        ({"random_share": 0.3}, r"mask_share=0\.8 and random_share=0\.3, but both .* their sum at most 1"),
        ({"smoothing": -0.7}, r"smoothing=-0\.7, but it must be at least 0 \(DistilBERT: 0\.7\)"),
    ],
)
def test_a_share_out_of_range_is_an_error(make: MakeMasker, fields: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**fields)


def test_mix_is_splitmix64() -> None:
    # What the reference implementation (prng.di.unimi.it/splitmix64.c) gives for the seed 1234567.
    golden = 0x9E3779B97F4A7C15
    counters = np.array([(1234567 + step * golden) % 2**64 for step in range(3)], dtype=np.uint64)
    assert mix(counters).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("axis", ["seed", "epoch", "sample", "position"])
def test_each_bit_is_even_and_independent_of_its_neighbour_along_every_axis(axis: str) -> None:
    num = 20_000
    match axis:
        case "position":
            bits = random_bits(0, 0, np.array([7]), num)[0]
        case "sample":
            bits = random_bits(0, 0, np.arange(num), 1)[:, 0]
        case "epoch":
            bits = np.concatenate([random_bits(0, epoch, np.array([7]), 1)[0] for epoch in range(num)])
        case _:
            bits = np.concatenate([random_bits(seed, 0, np.array([7]), 1)[0] for seed in range(num)])
    ones = (bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    bound = 5 * np.sqrt(0.25 / num)
    assert abs(ones.mean(axis=0) - 0.5).max() < bound
    assert abs((ones[1:] ^ ones[:-1]).mean(axis=0) - 0.5).max() < bound


def test_no_draw_repeats_over_seeds_epochs_samples_and_positions() -> None:
    draws = [random_bits(seed, epoch, np.arange(50), 50) for seed in range(10) for epoch in range(-1, 9)]
    assert len(np.unique(draws)) == 100 * 50 * 50


def test_uniform_numbers_are_even_and_never_0_or_1() -> None:
    extremes = to_uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert 0 < extremes[0] < 2**-50
    assert 1 - 2**-50 < extremes[1] < 1
    numbers = to_uniform(random_bits(0, 0, np.arange(1000), 100)).ravel()
    found, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert abs(chi_square(found, np.full(100, 1000.0))) < 5
    bits = np.array([2**63, 2**62], dtype=np.uint64)
    assert to_uniform(bits) == pytest.approx([0.5, 0.25])


def test_a_random_word_is_one_that_there_is_where_ids_are_skipped() -> None:
    ids = {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, "[MASK]": 3, "a": 4, "b": 9, "▁c": 20}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    for smoothing, whole_word in ((0.0, False), (0.7, True)):
        masking = Masking(
            mlm_probability=0.5, mask_share=0.0, random_share=1.0, smoothing=smoothing, whole_word=whole_word
        )
        masker = Masker(masking, tokenizer=gaps, token_counts=np.ones(21, dtype=np.int64), seed=0)
        masked, labels = masker(np.full((50, 40), 20), epoch=0, samples=np.arange(50))
        assert set(masked[labels != IGNORE_INDEX].tolist()) == {4, 9, 20}
