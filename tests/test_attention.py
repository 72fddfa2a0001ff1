"""Our attention against transformers' own eager one, for every family, with and without gradients."""

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

import distilkit.attention
from distilkit.attention import FAMILIES, use_attention
from distilkit.errors import UserError
from distilkit.export import student_files
from distilkit.language_model import checkpoint_activations, compile_backbone, last_hidden_state
from distilkit.student import cut_student
from tiny import ARCHITECTURES, build_model, build_teacher

LENGTHS = [[9, 14, 7], [1, 12, 17]]
DOCUMENTS = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in LENGTHS])
PADDING = torch.tensor([[1] * 30, [1] * 19 + [0] * 11])


def ids_of(*shape: int) -> Tensor:
    return torch.randint(5, 120, shape, generator=torch.Generator().manual_seed(3))


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """The oracle: the same weights on transformers' plainest attention, never touched by us."""
    twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
    twin.to(model.dtype).load_state_dict(model.state_dict())
    return twin.train(model.training)


def eager_states(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    return model.base_model(input_ids=ids, **arguments).last_hidden_state


def assert_same_gradients(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """In float64, since the gradient of a key's bias is nothing but rounding."""
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    for name, parameter in ours.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_model(request.param, num_layers=4)


def test_every_family_is_on_this_attention(model: PreTrainedModel) -> None:
    assert model.config.model_type in FAMILIES
    assert use_attention(model)
    assert use_attention(model), "asked twice, it is installed once"
    assert len(model.base_model._forward_pre_hooks) == 1


@pytest.mark.parametrize("padded", [False, True])
def test_states_and_gradients_equal_eager_attention(model: PreTrainedModel, padded: bool) -> None:
    ids, oracle = ids_of(2, 30), eager(model.double())
    mask = PADDING if padded else torch.ones_like(PADDING)
    ours = last_hidden_state(model, ids, attention_mask=PADDING if padded else None)[mask.bool()]
    # Each row alone and without its padding: eager ModernBERT gives NaN in float64 where a window holds padding only.
    rows = (row[real.bool()] for row, real in zip(ids, mask, strict=True))
    theirs = torch.cat([eager_states(oracle, row[None])[0] for row in rows])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert_same_gradients(model, oracle)


def test_packed_documents_equal_each_document_alone_in_eager_attention(model: PreTrainedModel) -> None:
    ids, oracle = ids_of(2, 30), eager(model.double())
    weights = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    packed = last_hidden_state(model, ids, document_ids=DOCUMENTS)
    (packed * weights).sum().backward()
    for row, sizes in enumerate(LENGTHS):
        for document in range(len(sizes)):
            where = DOCUMENTS[row] == document
            alone = eager_states(oracle, ids[row, where][None])[0]
            torch.testing.assert_close(packed[row, where], alone, rtol=1e-5, atol=1e-5)
            (alone * weights[row, where]).sum().backward()
    assert_same_gradients(model, oracle)


@torch.no_grad()
def test_padding_after_packed_documents_is_a_document_of_its_own(model: PreTrainedModel) -> None:
    ids = ids_of(2, 30)
    documents = DOCUMENTS.masked_fill(PADDING == 0, -1)
    padded = last_hidden_state(model, ids, attention_mask=PADDING, document_ids=documents)
    where = documents[1] == 1  # 6 of its 12 tokens are real, from position 1 on
    alone = last_hidden_state(model, ids[1, where][None])[0]
    torch.testing.assert_close(padded[1, where], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_causal_model_does_not_see_the_future() -> None:
    model, ids = build_model("gpt2", num_layers=2), ids_of(1, 20)
    other = ids.clone()
    other[:, 12:] = 7
    states, changed = (last_hidden_state(model, x) for x in (ids, other))
    torch.testing.assert_close(states[:, :12], changed[:, :12], rtol=0, atol=1e-6)
    assert (states[:, 12:] - changed[:, 12:]).abs().max() > 0.1


@torch.no_grad()
def test_the_model_itself_still_takes_a_padding_mask_in_any_position(model: PreTrainedModel) -> None:
    ids, oracle = ids_of(2, 30), eager(model)
    use_attention(model)
    expected = oracle(input_ids=ids, attention_mask=PADDING).logits[PADDING.bool()]
    got = model(input_ids=ids, attention_mask=PADDING).logits[PADDING.bool()]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-5)
    if model.config.model_type != "gpt2":  # whose second argument is a cache
        states = eager_states(oracle, ids, attention_mask=PADDING)[PADDING.bool()]
        got = model.base_model(ids, PADDING).last_hidden_state[PADDING.bool()]
        torch.testing.assert_close(got, states, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_mask_that_cannot_be_honoured_is_refused(model: PreTrainedModel) -> None:
    use_attention(model)
    with pytest.raises(ValueError, match=r"the attention mask is \(2, 1, 30, 30\), but it must be \(batch, length\)"):
        model.base_model(input_ids=ids_of(2, 30), attention_mask=torch.ones(2, 1, 30, 30))
    model.base_model._forward_pre_hooks.clear()  # nobody reads the padding any more
    model.base_model._forward_pre_hooks_with_kwargs.clear()
    with pytest.raises(TypeError, match="visible"):
        model.base_model(input_ids=ids_of(2, 30), attention_mask=PADDING)


@torch.no_grad()
def test_families_unknown_to_us_keep_their_own_attention(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = last_hidden_state(copy.deepcopy(model), ids_of(2, 30), document_ids=DOCUMENTS)
    monkeypatch.setattr(distilkit.attention, "FAMILIES", ())
    got = last_hidden_state(model, ids_of(2, 30), document_ids=DOCUMENTS)
    assert not model.base_model._forward_pre_hooks and model.base_model.config is model.config
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_dropout_falls_on_attention_weights_in_training_only(model_type: str) -> None:
    """With all dropout but attention's off, the mean over many draws is near the state without dropout."""
    fields = (
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.3}
        if model_type == "bert"
        else {"attention_dropout": 0.3, "embedding_dropout": 0.0, "mlp_dropout": 0.0}
    )
    model = build_model(model_type, num_layers=1, **fields)
    use_attention(model)
    seen: list[float] = []
    attention = distilkit.attention.sdpa_attention_forward

    def values_of_one(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        output, weights = attention(module, query, key, torch.ones_like(value), mask, **kwargs)
        seen.append(float(output[..., 0].var()))  # rows of weights sum to 1 without dropout, and scatter with it
        means.append(float(output.mean()))
        return output, weights

    means: list[float] = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(distilkit.attention, "sdpa_attention_forward", values_of_one)
        last_hidden_state(model.eval(), ids_of(8, 60))
        last_hidden_state(model.train(), ids_of(8, 60))
    assert seen[0] < 1e-9 and means[0] == pytest.approx(1, abs=1e-5)
    assert seen[1] > 1e-3 and means[1] == pytest.approx(1, abs=0.05)


class Counter(TorchDispatchMode):
    """Count what makes the host wait for a device, and what is as large as a mask of one sequence."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.syncs, self.masks = length, [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal"):
            self.syncs.append(name)
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.shape[-2:] == (self.length, self.length):
                self.masks.append(name)
        return output


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_forward_never_waits_and_builds_masks_only_for_packing(
    model: PreTrainedModel, training: bool, packed: bool
) -> None:
    model.train(training)
    for module in model.modules():  # attention dropout on a CPU is spelt out over all weights
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = ids_of(2, 30)
    ids[0, -1] = model.config.pad_token_id  # at which GPT-2 looks
    documents = DOCUMENTS if packed else None
    last_hidden_state(model, ids, document_ids=documents)
    with Counter(30) as counter:
        last_hidden_state(model, ids, document_ids=documents).sum().backward()
    assert counter.syncs == []
    if packed:
        assert counter.masks
    elif model.config.model_type == "modernbert":  # the window of its local layers, once for all of them
        assert counter.masks.count("le") == 1
    else:
        assert counter.masks == []


def test_the_counter_sees_what_transformers_does_by_itself() -> None:
    model = eager(build_model("gpt2", num_layers=1))
    with Counter(30) as counter:
        eager_states(model, ids_of(2, 30), attention_mask=torch.ones(2, 30, dtype=torch.long))
    assert counter.syncs or counter.masks


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_sees_the_same(model: PreTrainedModel, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs, by torch's own eager flex attention on the CPU."""
    documents = DOCUMENTS if packed else None
    expected = last_hidden_state(model, ids_of(2, 30), document_ids=documents)
    calls = []

    def flex(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **kwargs: Any) -> Any:
        calls.append(mask)
        assert kwargs["dropout"] == 0
        output = torch.nn.attention.flex_attention.flex_attention(
            query, key, value, block_mask=mask, scale=kwargs["scaling"]
        )
        return output.transpose(1, 2).contiguous(), None

    for name in ("_can_flex", "_flex_runs"):
        monkeypatch.setattr(distilkit.attention, name, lambda *_: True)
    monkeypatch.setattr(distilkit.attention, "flex_attention_forward", flex)
    got = last_hidden_state(model, ids_of(2, 30), document_ids=documents)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert bool(calls) == (packed or model.config.model_type == "modernbert")
    assert len({id(mask) for mask in calls}) <= 2, "one mask a forward for full and one for sliding layers"


@torch.no_grad()
def test_dense_masks_take_over_where_flex_attention_does_not_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model("bert", num_layers=1)
    use_attention(model)
    expected = last_hidden_state(model, ids_of(2, 30), document_ids=DOCUMENTS)

    def flex(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Cannot find a working triton installation\nsecond line")

    monkeypatch.setattr(distilkit.attention, "_can_flex", lambda *_: True)
    monkeypatch.setattr(distilkit.attention, "flex_attention_forward", flex)
    distilkit.attention._flex_runs.cache_clear()
    for _ in range(2):
        assert torch.equal(last_hidden_state(model, ids_of(2, 30), document_ids=DOCUMENTS), expected)
    said = [record.message for record in caplog.records if "dense masks" in record.message]
    assert said == ["attention runs on dense masks, which are slower: Cannot find a working triton installation"]
    distilkit.attention._flex_runs.cache_clear()


def test_teacher_and_student_are_apart_and_what_is_saved_is_plain(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    teacher = build_teacher("roberta")
    use_attention(teacher.model)
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
    ours = {id(module.config) for module in student.modules() if hasattr(module, "config")}
    theirs = {id(module.config) for module in teacher.model.modules() if hasattr(module, "config")}
    assert not ours & theirs
    assert student.base_model.config._attn_implementation == "sdpa", "the teacher's choice is not handed on"
    use_attention(student)

    student.save_pretrained(tmp_path)
    for config in ((tmp_path / "config.json").read_text(), student_files(student, tokenizer)["config.json"]):
        assert not [key for key, value in json.loads(config).items() if "attn" in key or value == "distilkit"]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = student.eval()(input_ids=ids_of(2, 30), attention_mask=PADDING).logits
        torch.testing.assert_close(
            loaded(input_ids=ids_of(2, 30), attention_mask=PADDING).logits[PADDING.bool()], expected[PADDING.bool()]
        )


def test_a_copy_of_a_model_keeps_its_attention_and_its_own_hook(model: PreTrainedModel) -> None:
    expected = last_hidden_state(model, ids_of(2, 30), attention_mask=PADDING)[PADDING.bool()]
    twin = copy.deepcopy(model)
    got = last_hidden_state(twin, ids_of(2, 30), attention_mask=PADDING)[PADDING.bool()]
    torch.testing.assert_close(got, expected)
    assert twin.base_model.config is not model.base_model.config


@pytest.mark.parametrize("packed", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(model: PreTrainedModel, packed: bool) -> None:
    documents = DOCUMENTS if packed else None
    twin = copy.deepcopy(model.double())
    checkpoint_activations(twin)
    saved: dict[bool, int] = {}
    for again, each in ((False, model), (True, twin)):
        each.train()
        torch.manual_seed(0)  # dropout is drawn again alike in the second forward
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(_measure, sizes), lambda tensor: tensor):
            states = last_hidden_state(each, ids_of(2, 30), document_ids=documents)
        saved[again] = sum(sizes)
        states.square().sum().backward()
    assert_same_gradients(twin, model)
    assert saved[True] < saved[False] / 2


def test_attention_with_dropout_keeps_no_weights_for_backward_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients as without making them again, and nothing of (batch, heads, length, length) in between."""
    model = build_model("bert", num_layers=2).double().train()
    use_attention(model)
    whole = copy.deepcopy(model)
    square = 2 * 4 * 60 * 60
    saved: list[list[int]] = []
    for each, again in ((model, True), (whole, False)):
        if not again:
            plain = lambda function, *tensors, use_reentrant: function(*tensors)  # noqa: E731
            monkeypatch.setattr(distilkit.attention, "checkpoint", plain)
        torch.manual_seed(0)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(_measure, sizes), lambda tensor: tensor):
            states = last_hidden_state(each, ids_of(2, 60))
        states.square().sum().backward()
        saved.append(sizes)
    assert square not in saved[0] and square in saved[1]
    assert_same_gradients(model, whole)


def _measure(sizes: list[int], tensor: Tensor) -> Tensor:
    sizes.append(tensor.numel())
    return tensor


def test_checkpointing_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("bert", num_layers=1)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="activation_checkpointing=true, but BertForMaskedLM does not support it; set"):
        checkpoint_activations(model)


@pytest.fixture
def compiler() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_gpt2_stays_causal_and_keeps_the_names_of_its_weights(
    compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph is what matters; making machine code of it is torch's own business, and the slow test's."""
    model = build_model("gpt2", num_layers=2)
    names, plain = list(model.state_dict()), copy.deepcopy(model)
    calls: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.extend(n for n in graph.graph.nodes if "scaled_dot_product_attention" in str(n.target))
        return graph.forward

    monkeypatch.setattr(model.base_model, "compile", functools.partial(model.base_model.compile, backend=keep))
    compile_backbone(model)
    got = last_hidden_state(model, ids_of(2, 30))
    assert [(call.kwargs["is_causal"], call.kwargs["attn_mask"]) for call in calls] == [(True, None)] * 2
    torch.testing.assert_close(got, last_hidden_state(plain, ids_of(2, 30)), rtol=1e-5, atol=1e-5)
    packed, alone = (last_hidden_state(each, ids_of(2, 30), document_ids=DOCUMENTS) for each in (model, plain))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert len(calls) == 4 and not compiler["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "modernbert"])
def test_compiled_backbones_give_the_same_gradients(model_type: str, compiler: Any) -> None:
    model = build_model(model_type, num_layers=2).double()
    twin = copy.deepcopy(model)
    compile_backbone(twin)
    for documents, padding in ((None, None), (DOCUMENTS, PADDING)):
        model.zero_grad(), twin.zero_grad()
        for each in (model, twin):
            states = last_hidden_state(each, ids_of(2, 30), document_ids=documents, attention_mask=padding)
            (states if padding is None else states * padding[:, :, None]).square().sum().backward()
        assert_same_gradients(twin, model)
    assert not compiler["graph_break"]
