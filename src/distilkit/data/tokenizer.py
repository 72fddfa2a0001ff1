"""Load a tokenizer, or train one on the corpus."""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distilkit.data.cache_folder import make_once
from distilkit.data.corpus import Corpus
from distilkit.errors import UserError

log = logging.getLogger(__name__)

# Special tokens in the order of their ids.
_BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_ROBERTA = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def load_tokenizer(
    *, name: str | None, revision: str = "main", tokenizer_type: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from the hub or a folder.

    ``tokenizer_type`` (bert, roberta, gpt2, ...) is for a folder that holds a vocabulary without a config.
    """
    if name is None:
        raise UserError(
            "teacher=none brings no tokenizer; set tokenizer.name=<hub id or folder>, or tokenizer=wordpiece"
        )
    type_argument = {} if tokenizer_type is None else {"tokenizer_type": tokenizer_type}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, **type_argument
        )
    except Exception as error:  # of damaged files, of a missing package, of a tokenizer's own code
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot load a tokenizer from {name!r}: {reason} "
            "A hub id needs the network (and HF_HUB_OFFLINE unset) or a filled Hugging Face cache; a folder needs the "
            "files of its tokenizer, or tokenizer.tokenizer_type for a bare vocabulary"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers loads this from a folder without files
        raise UserError(
            f"{name!r} has no tokenizer: there is no vocabulary in it; add the tokenizer's files "
            "(tokenizer.save_pretrained)"
        )
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {name!r} is not a fast tokenizer; save it with a fast tokenizer class first")
    return tokenizer


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the highest id plus one; it exceeds the number of words where a vocab.txt holds a word twice."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of everything that determines how text becomes ids."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]  # left over from the last call; the cache uses neither
    state = [backend, sorted(tokenizer.all_special_tokens)]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def train_tokenizer(
    *,
    corpus: Corpus,
    cache_dir: str,
    model: Literal["wordpiece", "bpe"],
    vocab_size: int,
    lowercase: bool,
    max_documents: int,
) -> PreTrainedTokenizerBase:
    """Train BERT's WordPiece or GPT-2's byte-level BPE on the first documents of a corpus, or load it from the cache.

    The cache key is a hash of the corpus fingerprint and the settings. BPE has RoBERTa's special tokens.
    """
    if model not in ("wordpiece", "bpe"):
        raise UserError(f"tokenizer.model is {model!r}, but it must be wordpiece or bpe")
    smallest = (
        len(_BERT) + 1 if model == "wordpiece" else len(_ROBERTA) + 256
    )  # special tokens, and a word or all bytes
    for name, value, least in (("vocab_size", vocab_size, smallest), ("max_documents", max_documents, 1)):
        if value < least:
            raise UserError(f"tokenizer.{name}={value}, but with tokenizer.model={model} it must be at least {least}")
    settings = [corpus.fingerprint(), model, vocab_size, lowercase, max_documents]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        def texts() -> Iterator[str]:
            return itertools.islice(corpus.documents(), max_documents)

        trained = _wordpiece(texts, vocab_size, lowercase) if model == "wordpiece" else _bpe(texts(), vocab_size)
        trained.save_pretrained(folder)

    folder = make_once(Path(cache_dir).expanduser(), f"tokenizers/{model}-{vocab_size}-{key}", write)
    tokenizer = load_tokenizer(name=str(folder))
    if (size := len(tokenizer)) > vocab_size:
        found = f"the tokenizer has {size:,} words, more than tokenizer.vocab_size={vocab_size}"
        kept = "each character of the corpus is one, and so are the special tokens"
        log.warning("%s: %s; set at least %d, or tokenizer=bpe", found, kept, size)
    return tokenizer


def _wordpiece(documents: Callable[[], Iterator[str]], vocab_size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    def empty(vocab: dict[str, int] | None = None) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    def vocabulary(size: int, first: list[str]) -> dict[str, int]:
        tokenizer = empty()
        _train(
            tokenizer,
            documents(),
            trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False),
        )
        return tokenizer.get_vocab()

    special = list(_BERT.values())
    # The trainer numbers single characters within words (##e) in an order that changes from run to run, and decides
    # between equally frequent pairs by these numbers (huggingface/tokenizers issue 1794). So they are found first, by a
    # training without merges, and given to it in their order.
    within = sorted(word for word in vocabulary(len(special), special) if len(word) == 3 and word.startswith("##"))
    tokenizer = empty(vocabulary(vocab_size, [*special, *within]))
    tokenizer.add_special_tokens(special)
    sep, cls = ("[SEP]", special.index("[SEP]")), ("[CLS]", special.index("[CLS]"))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_BERT)


def _bpe(documents: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(_ROBERTA.values())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    _train(tokenizer, documents, trainer)
    sep, cls = ("</s>", special.index("</s>")), ("<s>", special.index("<s>"))
    tokenizer.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_ROBERTA, cls_token="<s>", sep_token="</s>")


def _train(tokenizer: Tokenizer, documents: Iterator[str], trainer: trainers.Trainer) -> None:
    first = next(documents, None)
    if first is None:
        raise UserError("the corpus is empty: no tokenizer can be trained on it; check data.corpus")
    tokenizer.train_from_iterator(itertools.chain([first], documents), trainer=trainer)
