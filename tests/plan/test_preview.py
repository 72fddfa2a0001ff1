"""The figures about the text, on streams that are made by hand, and what the teacher predicts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from distilkit.data import DistillationDataModule
from distilkit.data.cache import unknown_share
from distilkit.data.masking import Masking
from distilkit.data.text_files import TextFiles
from distilkit.plan.preview import documents_of, examples, text_figures
from tiny import build_model

MASKING = Masking(mlm_probability=0.15, mask_share=1.0, random_share=0.0, smoothing=0.0, whole_word=False)


def data_module(folder: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str], **changes: Any) -> Any:
    (folder / "corpus.txt").write_text("\n".join(texts), "utf-8")
    settings: dict[str, Any] = {
        "corpus": TextFiles(paths=str(folder / "corpus.txt"), document="line"),
        "lm": "mlm",
        "masking": MASKING,
        "cache_dir": str(folder / "cache"),
        "block_size": 16,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "val_share": 0.2,
        "max_val_blocks": 2,
        "attend_across_documents": True,
        "packing": "blocks",
        "num_workers": 0,
        "seed": 0,
    }
    data = DistillationDataModule(tokenizer=tokenizer, **settings | changes)
    data.prepare_data()
    data.setup()
    return data


def test_documents_are_cut_at_their_separators() -> None:
    found = documents_of(np.array([5, 6, 3, 7, 3, 5, 6, 3]), 3)
    assert [each.tolist() for each in found] == [[5, 6], [7], [5, 6]]
    assert [each.tolist() for each in documents_of(np.array([5, 6]), 3)] == [[5, 6]]


def test_unknown_tokens_are_counted_without_separators(tokenizer: PreTrainedTokenizerBase) -> None:
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    counts[[tokenizer.unk_token_id, tokenizer.sep_token_id, 10]] = 3, 100, 9  # type: ignore[index]
    assert unknown_share(counts, tokenizer) == 0.25
    assert unknown_share(np.zeros_like(counts), tokenizer) is None


def test_figures_count_documents_duplicates_and_padding(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [f"ba be bi {word}" for word in ("bo", "bu", "da", "de", "di", "do", "du", "fa", "fe", "fi")]
    texts += ["Ω ba", *["ko la le"] * 4]  # of one split, because it is chosen by the text
    data = data_module(tmp_path, tokenizer, texts, packing="documents", global_batch_size=1)
    found = text_figures(data)
    train = documents_of(np.asarray(data.cache.tokens["train"]), tokenizer.sep_token_id)  # type: ignore[arg-type]
    lengths = sorted(map(len, train))
    assert found["documents"] == found["documents_read"] == len(train)
    assert found["duplicates"] == 3
    assert found["document_tokens_median"] == np.median(lengths)
    assert found["unknown_share"] == pytest.approx(1 / sum(lengths))
    wide = [len(each) + 2 for each in train]  # with [CLS] and [SEP], in batches of two of like length
    padded = sum(2 * max(pair) for pair in zip(sorted(wide)[::2], sorted(wide)[1::2], strict=False))
    padded += len(wide) % 2 * max(wide)
    assert found["padding_share"] == pytest.approx(1 - sum(wide) / padded)


def test_examples_have_the_teachers_best_predictions(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [f"ba be bi bo {word} do du" for word in ("fa", "fe", "fi", "fo", "fu", "ka", "ke", "ki", "ko", "ku")]
    masking = Masking(mlm_probability=0.7, mask_share=1.0, random_share=0.0, smoothing=0.0, whole_word=False)
    data = data_module(tmp_path, tokenizer, texts, masking=masking)
    teacher = build_model("bert", num_layers=2)
    found = examples(data, teacher, count=2)
    batch = data.draw(2)[0]
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    assert len(found) == 2
    for block, example in enumerate(found):
        places = (batch["labels"][block] >= 0).nonzero().flatten().tolist()
        words = tokenizer.convert_ids_to_tokens(batch["labels"][block, places].tolist())
        assert example.pieces[1::2] == words and len(words) > 6  # all, or a random token would look like the text
        best = logits[block, places[0]].softmax(dim=0).topk(3)
        assert [token for token, _ in example.predictions[0]] == tokenizer.convert_ids_to_tokens(best.indices.tolist())
        assert [share for _, share in example.predictions[0]] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert all(best == [] for example in examples(data, None, count=1) for best in example.predictions)


def test_a_causal_teacher_predicts_the_next_token(tmp_path: Path, causal_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [f"ba be bi bo {word} do du" for word in ("fa", "fe", "fi", "fo", "fu", "ka", "ke", "ki", "ko", "ku")]
    data = data_module(tmp_path, causal_tokenizer, texts, lm="clm")
    teacher = build_model("gpt2", num_layers=2)
    (example,) = examples(data, teacher, count=1)
    ids = data.draw(1)[0]["input_ids"]
    with torch.no_grad():
        first = teacher(input_ids=ids).logits[0, 0]
    assert example.pieces[1] == causal_tokenizer.decode([int(ids[0, 1])])
    assert example.predictions[0][0][0] == causal_tokenizer.decode([int(first.argmax())])
