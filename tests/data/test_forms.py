"""A teacher on blocks and on single documents."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from distilkit.data.batches import split_step
from distilkit.data.blocks import Blocks
from distilkit.data.cache import tokenize
from distilkit.data.forms import Comparison, _excerpt, compare_forms
from distilkit.data.masking import VALIDATION_EPOCH, Masker
from distilkit.language_model import token_states
from distilkit.losses import IGNORE_INDEX
from streams import MASKING, SEP, causal_or_not, stream_of
from tiny import VOCABULARY, WORDS, build_model, build_objective, make_documents

DTYPE = np.dtype(np.uint16)


def masker_of(tokenizer: PreTrainedTokenizerBase) -> Masker:
    counts = np.ones(len(VOCABULARY), dtype=np.int64)
    return Masker(MASKING, tokenizer=tokenizer, token_counts=counts, seed=0)


@pytest.mark.parametrize("attend", [True, False])
def test_a_masked_teachers_score_on_documents_is_that_of_a_plain_loop(
    tokenizer: PreTrainedTokenizerBase, attend: bool
) -> None:
    model, masker, documents = build_model("bert", num_layers=2), masker_of(tokenizer), make_documents(30)
    found = compare_forms(
        model,
        tokenize(documents, tokenizer, dtype=DTYPE),
        tokenizer=tokenizer,
        block_size=64,
        masker=masker,
        attend_across_documents=attend,
        batch_size=7,
    )
    nll, hits, means = [], [], []
    for index, document in enumerate(documents):
        ids = np.array([tokenizer(document)["input_ids"]])
        masked, labels = masker(ids, epoch=VALIDATION_EPOCH, samples=np.array([index]))
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(masked)).logits[0]
        targets = torch.from_numpy(labels[0])
        chosen = targets != IGNORE_INDEX
        losses = torch.nn.functional.cross_entropy(logits[chosen], targets[chosen], reduction="none")
        nll += losses.tolist()
        hits += (logits[chosen].argmax(-1) == targets[chosen]).tolist()
        means.append(float(losses.mean()))
    assert found is not None
    assert found.sequences == 30
    assert found.nll["documents"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert found.accuracy["documents"] == pytest.approx(np.mean(hits))
    assert found.difference == pytest.approx(found.nll["blocks"] - found.nll["documents"], abs=1e-5)
    if not attend:  # whole documents that are kept apart are read as if alone; some are cut
        assert abs(found.difference) < 1
        assert found.nll["blocks"] != pytest.approx(found.nll["documents"], abs=1e-6)


def test_documents_that_are_kept_apart_and_fit_a_block_score_as_if_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [min(make_documents(20), key=len)]
    found = compare_forms(
        build_model("bert", num_layers=2),
        tokenize(documents, tokenizer, dtype=DTYPE),
        tokenizer=tokenizer,
        block_size=64,
        masker=masker_of(tokenizer),
        attend_across_documents=False,
        batch_size=4,
    )
    assert found is not None
    assert found.difference == pytest.approx(0, abs=1e-5)


def test_a_causal_teacher_is_scored_on_tokens_that_have_context_in_both_forms(
    causal_tokenizer: PreTrainedTokenizerBase,
) -> None:
    model, documents = build_model("gpt2", num_layers=2), make_documents(10)
    found = compare_forms(
        model,
        tokenize(documents, causal_tokenizer, dtype=DTYPE),
        tokenizer=causal_tokenizer,
        block_size=64,
        masker=None,
        attend_across_documents=True,
        batch_size=3,
    )
    # Each document alone, without its first token, and without those at which a block of 64 begins.
    nll, place = [], 0
    for document in documents:
        ids = torch.tensor([causal_tokenizer(document)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
        nll += [loss for index, loss in enumerate(losses, start=place + 1) if index % 64]
        place += ids.shape[1] + 1
    assert found is not None
    assert found.nll["documents"] == pytest.approx(np.mean(nll), rel=1e-4)


@pytest.mark.parametrize("length", [10, 8192, 8193, 100_000])
@pytest.mark.parametrize("separators", [0.0, 0.01, 0.1])
def test_an_excerpt_has_neighbouring_documents_from_several_places(length: int, separators: float) -> None:
    tokens = stream_of(length, separators=separators)
    taken = _excerpt(tokens, SEP)
    assert len(taken) <= 8192 + 4
    assert taken[-1] == SEP
    assert (taken == SEP).sum() <= 48 + 4 or length <= 8192
    if length > 8192 and separators:
        text, parts = tokens.tobytes(), taken.tolist()
        first = parts[: parts.index(SEP, 50)]
        assert np.array(first, dtype=np.uint16).tobytes() in text


@pytest.mark.parametrize(
    ("difference", "error", "sequences", "worse"),
    [
        (0.3, 0.03, 48, "blocks"),
        (-0.3, 0.03, 48, "documents"),
        (0.3, 0.15, 48, None),
        (0.01, 0.0001, 48, None),
        (0.3, 0.03, 5, None),
    ],
)
def test_a_form_is_worse_beyond_chance_and_by_enough_to_matter(
    difference: float, error: float, sequences: int, worse: str | None
) -> None:
    values: Any = {"blocks": 1.0, "documents": 1.0}
    found = Comparison(nll=values, accuracy=values, sequences=sequences, difference=difference, error=error)
    assert [form for form in ("blocks", "documents") if found.worse(form)] == [worse] * (worse is not None)


@causal_or_not
def test_a_stream_without_words_to_score_gives_no_comparison(
    tokenizer: PreTrainedTokenizerBase, causal_tokenizer: PreTrainedTokenizerBase, causal: bool
) -> None:
    used: Any = causal_tokenizer if causal else tokenizer
    unknown = [VOCABULARY.index("[UNK]")] if not causal else [VOCABULARY.index(WORDS[0])]
    found = compare_forms(
        build_model("gpt2" if causal else "bert", num_layers=1),
        np.array([*unknown, SEP], dtype=DTYPE),
        tokenizer=used,
        block_size=16,
        masker=None if causal else masker_of(tokenizer),
        attend_across_documents=True,
        batch_size=4,
    )
    assert found is None


@causal_or_not
def test_a_step_of_documents_has_one_gradient_however_it_is_split(
    tokenizer: PreTrainedTokenizerBase, causal_tokenizer: PreTrainedTokenizerBase, causal: bool
) -> None:
    used: Any = causal_tokenizer if causal else tokenizer
    lm: Any = "clm" if causal else "mlm"
    models = [build_model("gpt2" if causal else "bert", num_layers=2, seed=seed) for seed in (0, 1)]
    blocks = Blocks(
        tokenize(make_documents(14), used, dtype=DTYPE),
        tokenizer=used,
        block_size=48,
        masker=None if causal else masker_of(tokenizer),
        attend_across_documents=True,
        packing="documents",
    )
    step = blocks[(0, np.argsort(blocks.sizes, kind="stable"))]
    objective, gradients, losses = build_objective(lm, "fused"), [], []
    for micro, trim in ((1, True), (3, True), (100, True), (100, False)):
        models[0].zero_grad()
        total = 0.0
        for batch in split_step(step, micro, trim=trim):
            counts = objective.denominators(num_tokens=batch["num_tokens"], num_labels=batch["num_labels"], lm=lm)
            loss, _ = objective.loss(*models, batch, lm=lm, denominators=counts)
            loss.backward()
            total += float(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in models[0].parameters() if p.grad is not None]))
        losses.append(total)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    for gradient in gradients[1:]:
        assert float((gradient - gradients[0]).norm() / gradients[0].norm()) < 1e-5


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "distilbert"])
def test_the_states_of_a_packed_document_are_those_of_the_document_alone(
    tokenizer: PreTrainedTokenizerBase, model_type: str
) -> None:
    documents, model = make_documents(12), build_model(model_type, num_layers=2)
    blocks = Blocks(
        tokenize(documents, tokenizer, dtype=DTYPE),
        tokenizer=tokenizer,
        block_size=60,
        masker=cast(Any, lambda ids, **_: (ids, np.full_like(ids, IGNORE_INDEX))),
        attend_across_documents=False,
        packing="blocks",
    )
    batch = blocks[(0, np.arange(len(blocks)))]
    with torch.no_grad():
        states = token_states(model, batch).view(*batch["input_ids"].shape, -1)
    alone = {tuple(tokenizer(document)["input_ids"]) for document in documents}
    found = 0
    for row, numbers, hidden in zip(batch["input_ids"], batch["document_ids"], states, strict=True):
        for number in range(int(numbers.max()) + 1):
            piece = row[numbers == number]
            if tuple(piece.tolist()) in alone:
                with torch.no_grad():
                    expected = model.base_model(input_ids=piece[None]).last_hidden_state[0]
                torch.testing.assert_close(hidden[numbers == number], expected, rtol=1e-4, atol=1e-4)
                found += 1
    assert found > 3
