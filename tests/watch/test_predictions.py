"""The words that both models predict for held-out text."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from distilkit.data.batches import DistillationDataModule
from distilkit.errors import UserError
from distilkit.watch.predictions import Predictions, Row, _sentence, markdown, top_words
from tiny import Texts, build_model
from training import MASKING


def asked_of(tokenizer: PreTrainedTokenizerBase, folder: str, *, lm: Any, packing: Any = "blocks") -> Predictions:
    data = DistillationDataModule(
        corpus=Texts(60),
        tokenizer=tokenizer,
        masking=MASKING,
        seed=0,
        lm=lm,
        cache_dir=folder,
        block_size=32,
        global_batch_size=8,
        micro_batch_size=4,
        val_share=0.2,
        max_val_blocks=4,
        attend_across_documents=False,
        packing=packing,
        num_workers=0,
    )
    data.open()
    callback = Predictions(enabled=True, num_sentences=3, file="nowhere")
    callback._choose(data, lm)
    return callback


@pytest.mark.parametrize("lm", ["mlm", "clm"])
@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_the_words_are_the_most_probable_ones_of_the_whole_model(
    lm: str,
    packing: str,
    tokenizer: PreTrainedTokenizerBase,
    causal_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    words = tokenizer if lm == "mlm" else causal_tokenizer
    callback = asked_of(words, str(tmp_path_factory.mktemp("cache")), lm=lm, packing=packing)
    assert callback.asked is not None
    batch, places = callback.asked
    assert len(places) == len(callback.texts) == 3
    model = build_model("bert" if lm == "mlm" else "gpt2", num_layers=2)
    found = top_words(model, batch, places, tokenizer=words)
    ids, labels = batch["input_ids"], batch["labels"].flatten()
    length = ids.shape[1]
    for place, top, (sentence, word) in zip(places.tolist(), found, callback.texts, strict=True):
        row, at = divmod(place, length)
        assert word == words.decode([int(labels[place])]).strip()
        assert sentence.count("____") == 1
        if lm == "mlm":
            assert int(ids[row, at]) == words.mask_token_id
        else:
            assert sentence.endswith(f"{words.decode([int(ids[row, at])])} ____")
        # The document alone, in which the model reads the word.
        own = batch["document_ids"][row] == batch["document_ids"][row, at] if "document_ids" in batch else None
        near = (
            (own if own is not None else batch.get("attention_mask", torch.ones_like(ids))[row] > 0).nonzero().flatten()
        )
        with torch.no_grad():
            logits = model(input_ids=ids[row, near][None]).logits[0, int((near == at).nonzero())]
        shares, best = logits.softmax(-1).topk(5)
        expected = [
            f"{words.decode([i]).strip()} {100 * p:.0f} %" for i, p in zip(best.tolist(), shares.tolist(), strict=True)
        ]
        assert top == expected


def test_the_sentences_are_the_same_each_time_and_spread_over_the_text(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("cache"))
    one, two = (asked_of(tokenizer, folder, lm="mlm").texts for _ in range(2))
    assert one == two
    assert len({sentence for sentence, _ in one}) == 3
    assert all("[SEP]" not in sentence and "[CLS]" not in sentence for sentence, _ in one)  # of one document each


def test_only_the_word_that_is_asked_for_is_a_blank(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("[MASK] ba [MASK] be [MASK] bi", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    near = torch.ones(len(ids), dtype=torch.bool)
    assert _sentence(ids, 2, near, tokenizer, "mlm") == "[MASK] ba ____ be [MASK] bi"


def test_the_page_has_a_table_for_each_sentence_with_the_teacher_first_and_right_words_in_bold() -> None:
    rows = [
        Row(step=0, sentence="a ____ c|d", word="b", model=model, top=["x 60 %", "b 30 %"])
        for model in ("student", "teacher")
    ]
    rows.append(Row(step=2, sentence="a ____ c|d", word="b", model="student", top=["b 90 %", "## 5 %"]))
    lines = markdown(rows).splitlines()
    assert lines[0] == r"**1.** a \_\_\_\_ c\|d"
    assert [line for line in lines if "%" in line] == [
        "|  | teacher | x 60 % | **b 30 %** |",
        "| 0 | student | x 60 % | **b 30 %** |",
        r"| 2 | student | **b 90 %** | \#\# 5 % |",
    ]


def test_a_resumed_run_keeps_the_rows_and_a_wrong_number_is_refused() -> None:
    one, two = (Predictions(enabled=True, num_sentences=3, file="nowhere") for _ in range(2))
    one.rows = [Row(step=2, sentence="s", word="w", model="student", top=["x 60 %"])]
    two.load_state_dict(one.state_dict())
    assert two.rows == one.rows
    with pytest.raises(UserError, match=r"callbacks\.predictions\.num_sentences=0, but it must be at least 1; set"):
        Predictions(enabled=True, num_sentences=0, file="nowhere")


def test_a_sharded_model_is_left_out_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    from distilkit.sharding import FullyShardedStrategy

    trainer = SimpleNamespace(loggers=[], strategy=FullyShardedStrategy(shard_teacher=True), is_global_zero=True)
    callback = Predictions(enabled=True, num_sentences=3, file="nowhere")
    with caplog.at_level("INFO"):
        callback.setup(cast(Any, trainer), cast(Any, None), "fit")
    assert callback.enabled is False
    assert [record.message for record in caplog.records] == [
        "predictions for held-out words are left out, because trainer=fsdp shards the models"
    ]
