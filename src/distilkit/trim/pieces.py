"""Leave words out of a fast tokenizer, so that text of the words that stay gets the same tokens, renumbered.

Normalizer, pre-tokenizer and added tokens stay, so each pre-token reaches the model as before. Then, for a pre-token whose
tokens all stay, by kind of model:

- WordPiece takes the longest word that fits, from left to right. The word it took is still there, and every longer word
  of the smaller vocabulary was in the full one, where it did not fit.
- BPE applies the merge of the lowest rank until none fits. Ranks keep their order. If the merges that it applied stay, the
  one it applies next is still the lowest, and none fits in the end. No merge reaches over the end of a token, so the
  merges within a token are those that build it alone: ``word_parts`` replays them.
- Unigram takes the pieces of the highest sum of scores. Fewer pieces make no other sum higher, and those of the best stay.
  An unknown character counts 10 less than the lowest score of all pieces. So a piece of this score stays, too: else
  unknown characters would count more, and where a single character is left out, it would win over longer pieces.

[UNK] of WordPiece is the one exception. A pre-token that has no tokens stays unknown if each character of a word is a
piece, too, at the start or as ##. This is so in BERT's vocabularies and in those that ``tokenizers`` trains.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from distilkit.errors import UserError

Spec = dict[str, Any]  # a fast tokenizer, as ``tokenizers`` writes it in tokenizer.json
KINDS = ("WordPiece", "BPE", "Unigram")


def check_kind(spec: Spec, *, name: str) -> None:
    """Refuse tokenizers whose words cannot be left out like this."""
    model, limit = spec["model"], f"a vocabulary of {', '.join(KINDS)} can be trimmed"
    if (kind := model.get("type")) not in KINDS:
        raise UserError(f"the tokenizer of {name!r} is of kind {kind}, but only {limit}; set tokenizer=pretrained")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if kind == "BPE" else ():
        if model.get(key):
            found = f"the tokenizer of {name!r} is a BPE with {key}={model[key]!r}"
            raise UserError(f"{found}, but only one without can be trimmed; set tokenizer=pretrained")


def vocabulary(spec: Spec) -> dict[str, int]:
    """Return the words of the model with their ids; added tokens that the model does not hold are not among them."""
    words = spec["model"]["vocab"]
    return dict(words) if isinstance(words, dict) else {word: index for index, (word, _) in enumerate(words)}


def _with_ids(node: Any, new: Callable[[int], int]) -> Any:
    """Return a post-processor, or a part of one, with its ids replaced."""
    if isinstance(node, list):
        return [_with_ids(each, new) for each in node]
    if not isinstance(node, dict):
        return node
    changed = {key: _with_ids(each, new) for key, each in node.items()}
    for key in ("sep", "cls"):  # of BertProcessing and RobertaProcessing: [word, id]
        if key in node:
            changed[key] = [node[key][0], new(node[key][1])]
    if "ids" in node:  # of TemplateProcessing
        changed["ids"] = list(map(new, node["ids"]))
    return changed


def needed_ids(spec: Spec) -> set[int]:
    """Return the ids that stay whatever the text is: added and special tokens, bytes, and what stands for the unknown."""
    model, words = spec["model"], vocabulary(spec)
    ids = {int(each["id"]) for each in spec["added_tokens"]}

    def note(each: int) -> int:
        ids.add(each)
        return each

    _with_ids(spec["post_processor"], note)
    names = [model.get("unk_token")]
    if model.get("byte_fallback"):
        names += [f"<0x{byte:02X}>" for byte in range(256)]
    if any('"ByteLevel"' in str(spec[part]).replace("'", '"') for part in ("normalizer", "pre_tokenizer")):
        names += ByteLevel.alphabet()
    ids |= {words[name] for name in names if name in words}
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        ids |= {scores.index(min(scores)), *([] if model["unk_id"] is None else [model["unk_id"]])}
    return ids


def word_parts(spec: Spec) -> Callable[[str], list[str]]:
    """Return a function of a word to all words that its tokenization passes through, in the order of the merges.

    These are the characters and products of BPE's merges; WordPiece and Unigram find a word at once.
    """
    if spec["model"]["type"] != "BPE":
        return lambda word: []
    ranks = {tuple(pair): rank for rank, pair in enumerate(spec["model"]["merges"])}
    words = vocabulary(spec)

    def parts(word: str) -> list[str]:
        symbols, passed = list(word), list(word)
        while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
            first, second = min(pairs, key=ranks.__getitem__)
            at = next(i for i in range(len(symbols)) if symbols[i : i + 2] == [first, second])  # the leftmost
            symbols[at : at + 2] = [first + second]
            passed.append(first + second)
        whole = symbols == [word] and words.keys() >= set(passed)  # else no merges make it: it is found as it is
        return [each for each in dict.fromkeys(passed) if each != word] if whole else []

    return parts


def characters(spec: Spec) -> Callable[[str], Iterator[str]]:
    """Return a function of a word to the pieces of single characters that would stand for it, if they are words."""
    prefix = spec["model"].get("continuing_subword_prefix") or ""

    def pieces(word: str) -> Iterator[str]:
        within = bool(prefix) and word.startswith(prefix) and word != prefix
        for index, each in enumerate(word.removeprefix(prefix) if within else word):
            yield prefix + each if within or index else each

    return pieces


def in_order(spec: Spec, kept: Iterable[int], *, pad_id: int | None) -> list[int]:
    """Return the ids that are kept in the order of their new ids, which is that of the old ones.

    Padding keeps its id, if it can: RoBERTa numbers positions from there. Added tokens that the model does not hold
    come after its words, where ``tokenizers`` puts them.
    """
    words = spec["model"]["vocab"]
    own = set(words.values()) if isinstance(words, dict) else set(range(len(words)))
    ids = sorted(kept, key=lambda each: (each not in own, each))
    size = sum(each in own for each in ids)
    if pad_id in own and pad_id in ids and pad_id < size:
        ids.remove(pad_id)
        ids.insert(pad_id, pad_id)
    return ids


def with_words(spec: Spec, ids: list[int]) -> Spec:
    """Return a tokenizer that has these ids alone, numbered by their places in the list."""
    new = {old: index for index, old in enumerate(ids)}
    model = dict(spec["model"])
    if model["type"] == "Unigram":
        own = range(len(model["vocab"]))
        model["vocab"] = [model["vocab"][old] for old in ids if old in own]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        by_id = sorted((new[old], word) for word, old in model["vocab"].items() if old in new)
        model["vocab"] = words = {word: index for index, word in by_id}
    if model["type"] == "BPE":  # also merges that no word needs: other text is then closer to what it was
        model["merges"] = [[a, b] for a, b in model["merges"] if a in words and b in words and a + b in words]
    added = sorted(spec["added_tokens"], key=lambda each: new[each["id"]])
    return {
        **spec,
        "truncation": None,  # of the last call; padding holds an id
        "padding": None,
        "added_tokens": [{**each, "id": new[each["id"]]} for each in added],
        "post_processor": _with_ids(spec["post_processor"], new.__getitem__),
        "model": model,
    }
