"""Small tokenizers of each kind that can be trimmed, trained in memory, with the structure of well-known ones."""

import functools
import json
import random
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_SYLLABLES = [start + end for start in "bdfgklmnprstz" for end in "aeiou" if (ord(start) + ord(end)) % 3]
_ENDS = ["", "n", "r", "s", "st", "é", "ü", "ing", "ß"]
_BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_XLMR = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


@functools.cache
def sentences(seed: int, count: int = 600) -> list[str]:
    """Write sentences of words with a long tail; seeds have many words in common."""
    common, rng = random.Random(0), random.Random(seed)
    lexicon = ["".join(common.choices(_SYLLABLES, k=common.randint(1, 4))) + common.choice(_ENDS) for _ in range(800)]
    lexicon += ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 5))) + rng.choice(_ENDS) for _ in range(400)]
    weights = [1 / (rank % 800 + 1) for rank in range(len(lexicon))]
    made = []
    for _ in range(count):
        words = rng.choices(lexicon, weights, k=rng.randint(3, 14))
        words = [word.title() if rng.random() < 0.2 else word for word in words]
        made.append(" ".join(words) + rng.choice([".", "!", ", 12.", " (42)", "…", "?\n"]))
    return made


def random_strings(count: int) -> list[str]:
    """Cut strings out of other sentences, some of them with characters that no tokenizer has seen."""
    rng, text = random.Random(7), " ".join(sentences(3))
    made = []
    for _ in range(count):
        start, length = rng.randrange(len(text)), rng.randint(1, 30)
        cut = list(text[start : start + length])
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            cut.insert(rng.randint(0, len(cut)), rng.choice("xqwXyé\u4e2d\u00a0\U0001f600\n #▁"))
        made.append("".join(cut))
    return made


def wordpiece() -> PreTrainedTokenizerFast:
    """Build BERT's."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = list(_BERT.values())
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator(sentences(1), trainer=trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_BERT)


def byte_bpe() -> PreTrainedTokenizerFast:
    """Build RoBERTa's, with the mask token after all words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=650, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sentences(1), trainer=trainer)
    backend.add_special_tokens(["<mask>"])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_XLMR)


def causal_bpe() -> PreTrainedTokenizerFast:
    """Build GPT-2's, with an end-of-text token alone, and added tokens of text as ModernBERT's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(sentences(1), trainer=trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens(["   ", "  "])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def _with_bytes(backend: Tokenizer, *, first: int) -> Tokenizer:
    """Put the pieces of bytes behind the special ones, and let unknown characters fall back to them."""
    spec = json.loads(backend.to_str())
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):
        spec["model"]["vocab"] = [*vocab[:first], *([name, 0.0] for name in names), *vocab[first:]]
    else:
        words = sorted(vocab, key=vocab.__getitem__)
        spec["model"]["vocab"] = {word: i for i, word in enumerate([*words[:first], *names, *words[first:]])}
    spec["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(spec))


def unigram(*, byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    """Build XLM-R's."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    backend.train_from_iterator(sentences(1), trainer=trainer)
    if byte_fallback:
        backend = _with_bytes(backend, first=4)
    backend.add_special_tokens(["<mask>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_XLMR)


def character_bpe() -> PreTrainedTokenizerFast:
    """Build Llama's: BPE over characters, with bytes for those that it does not know."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(sentences(1), trainer=trainer)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend = _with_bytes(backend, first=3)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def build(kind: str) -> PreTrainedTokenizerBase:
    """Build the tokenizer of a kind of ``KINDS`` once."""
    return KINDS[kind]()


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "wordpiece": wordpiece,
    "byte_bpe": byte_bpe,
    "causal_bpe": causal_bpe,
    "character_bpe": character_bpe,
    "unigram": unigram,
    "unigram_bytes": functools.partial(unigram, byte_fallback=True),
}
