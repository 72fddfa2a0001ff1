from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from distilkit.errors import UserError
from distilkit.language_model import (
    check_positions,
    check_split,
    last_hidden_state,
    lm_head,
    lm_of,
    max_positions,
    num_parameters,
)
from families import build_family
from tiny import ARCHITECTURES, build_model


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_model(request.param, num_layers=4)


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(5, 120, shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_backbone_and_head_are_the_whole_model(model: PreTrainedModel) -> None:
    ids = ids_of(2, 16)
    output = model(input_ids=ids, output_hidden_states=True)
    hidden = last_hidden_state(model, ids)
    torch.testing.assert_close(hidden, output.hidden_states[-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        torch.nn.functional.linear(*lm_head(model, hidden)),
        output.logits,
        rtol=1e-5,
        atol=1e-5,
    )


@torch.no_grad()
def test_packed_documents_kept_apart_equal_each_document_alone(model: PreTrainedModel) -> None:
    ids, lengths = ids_of(2, 30), ([9, 14, 7], [1, 12, 17])
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    packed = last_hidden_state(model, ids, document_ids=documents)
    for row, sizes in enumerate(lengths):
        for document in range(len(sizes)):
            where = documents[row] == document
            alone = last_hidden_state(model, ids[row, where][None])[0]
            torch.testing.assert_close(packed[row, where], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_document_needs_no_separation(model: PreTrainedModel) -> None:
    ids = ids_of(2, 20)
    one = last_hidden_state(model, ids, document_ids=torch.zeros_like(ids))
    torch.testing.assert_close(one, last_hidden_state(model, ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_all_positions_that_are_promised_exist(model: PreTrainedModel) -> None:
    limit = max_positions(model)
    assert last_hidden_state(model, ids_of(1, limit)).shape[1] == limit
    check_positions(model, limit, key="data.block_size", name="it")
    with pytest.raises(
        UserError, match=rf"data.block_size={limit + 1}, but it has {limit} positions; set data.block_size="
    ):
        check_positions(model, limit + 1, key="data.block_size", name="it")


def test_a_head_that_does_more_is_refused() -> None:
    model = build_model("gpt2", num_layers=1)
    forward = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(UserError, match="model type 'gpt2' cannot be split into backbone and head; choose a model"):
        check_split(model)


@pytest.mark.parametrize(
    "name, fields, reason",
    [
        ("gemma2", {}, "; choose a model"),  # it squeezes its logits
        ("mobilebert", {}, r" \(RuntimeError: mat1 and mat2 shapes cannot be multiplied .*\); choose a model"),
        ("xmod", {"default_language": None}, r" \(ValueError: .*\); choose a model"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_any_error_of_a_foreign_head_is_a_refusal(
    name: str, fields: dict[str, Any], reason: str, training: bool
) -> None:
    model = build_family(name, **fields).train(training)
    with pytest.raises(UserError, match=f"^model type '{name}' cannot be split into backbone and head{reason}"):
        check_split(model)
    assert model.training == training


AFTER_PADDING = dict.fromkeys(("camembert", "data2vec-text", "esm", "ibert", "luke", "xlm-roberta-xl"), 79)


@torch.no_grad()
@pytest.mark.parametrize("name, expected", [*AFTER_PADDING.items(), ("mpnet", 78), ("granite", 80), ("opt", 80)])
def test_other_families_have_the_positions_that_are_promised(name: str, expected: int) -> None:
    """Positions begin after the padding's, which is 0 here, and always 1 in MPNet."""
    model = build_family(name)
    check_split(model)
    assert max_positions(model) == expected
    assert last_hidden_state(model, ids_of(1, expected)).shape[1] == expected


def test_the_task_is_read_from_the_config() -> None:
    assert [lm_of(name) for name in ("bert", "roberta", "gpt2", "modernbert")] == ["mlm", "mlm", "clm", "mlm"]
    assert lm_of("bert", ["BertLMHeadModel"]) == "clm"
    assert lm_of("bert", ["BertForMaskedLM"]) == "mlm"
    assert lm_of("mine", None, {"AutoModelForMaskedLM": "modeling_mine.A"}) == "mlm"
    assert lm_of("mine", None, {"AutoModelForCausalLM": "someone/mine--modeling_mine.B"}) == "clm"
    both = {"AutoModelForMaskedLM": "modeling_mine.A", "AutoModelForCausalLM": "modeling_mine.B"}
    assert [lm_of("mine", names, both) for names in (["A"], ["B"], None)] == ["mlm", "clm", "mlm"]
    with pytest.raises(UserError, match="model type 'vit' has neither a masked nor a causal language-model class"):
        lm_of("vit")


def test_tied_weights_count_once() -> None:
    model = build_model("gpt2", num_layers=1)
    assert num_parameters(model) == num_parameters(model.transformer)
