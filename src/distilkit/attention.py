"""Attention without masks where none is needed, and with exact ones for padding, packed documents and windows.

transformers builds its masks in each backbone's forward: it waits for the device to look for padding and packing, GPT-2
loses ``is_causal`` under torch.compile, and its bidirectional masks let packed documents see each other. A function
registered without a mask builder gets no mask from it at all; what a query may see is worked out here instead, once a
forward, and shared by all layers.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "gpt2", "modernbert")
"""Model types whose layers pass keyword arguments on to the attention function; others keep their own attention."""

_NAME = "distilkit"
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")  # each family has one of them

Mask = Tensor | BlockMask | None


class Visible(NamedTuple):
    """Which keys a query sees, in layers of full and of sliding attention.

    A boolean (batch or 1, 1, length, length), a block mask of that shape, or None: all keys, or all up to the query in
    a causal layer.
    """

    full: Mask
    sliding: Mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    visible: Visible,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend by torch's own kernels: (batch, heads, length, width) three times -> (batch, length, heads, width).

    ``visible`` comes from the hook of ``use_attention`` and has no default, so that without the hook, which reads the
    padding mask, the call fails instead of attending to padding.
    """
    mask = visible.full if sliding_window is None else visible.sliding
    if isinstance(mask, BlockMask):
        return flex_attention_forward(module, query, key, value, mask, **kwargs)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    if kwargs.get("dropout") and query.device.type == "cpu" and not torch.compiler.is_compiling():
        # torch's CPU kernels with dropout keep several (batch, heads, length, length) for backward, a sixth of what a step
        # of BERT holds; made again, with the same dropout, they cost little time.
        output: tuple[Tensor, None] = checkpoint(attention, query, key, value, use_reentrant=False)
        return output
    return attention(query, key, value)


AttentionInterface.register(_NAME, attend)


def _rule(segments: Tensor | None, *, causal: bool, reach: int) -> Callable[..., Tensor]:
    def sees(batch: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        seen = (query - key).abs() <= reach
        if causal:
            seen = seen & (query >= key)
        if segments is not None:
            seen = seen & (segments[batch, query] == segments[batch, key])
        return seen

    return sees


def dense_mask(segments: Tensor | None, *, length: int, causal: bool, reach: int, device: torch.device) -> Tensor:
    """Return a boolean (batch or 1, 1, length, length), true where a query sees a key.

    It sees what has its own number in ``segments`` (batch, length), if given, at most ``reach`` positions away, and
    not after it if ``causal``.
    """
    batch, index = (
        torch.arange(1 if segments is None else len(segments), device=device),
        torch.arange(length, device=device),
    )
    return _rule(segments, causal=causal, reach=reach)(batch[:, None, None, None], None, index[:, None], index).expand(
        len(batch), 1, length, length
    )


def _visible(
    backbone: PreTrainedModel, segments: Tensor | None, *, tokens: Tensor, causal: bool, flex: bool
) -> Visible:
    length, device = tokens.shape[1], tokens.device
    window = backbone.config.sliding_window if backbone.config.model_type == "modernbert" else length

    def mask(reach: int) -> Mask:
        if segments is None and reach >= length - 1:
            return None
        if not flex:
            return dense_mask(segments, length=length, causal=causal, reach=reach, device=device)
        rule = _rule(segments, causal=causal, reach=reach)
        return create_block_mask(rule, None if segments is None else len(segments), None, length, length, str(device))

    full = mask(length)
    return Visible(full=full, sliding=full if window >= length - 1 else mask(window))


def _can_flex(backbone: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether flex attention, which skips what no query sees, can run: it needs CUDA and knows no dropout."""
    dropout = backbone.training and any(getattr(backbone.config, name, 0) for name in _DROPOUTS)
    return tokens.is_cuda and not dropout


def _give_visible(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: Sequence[str], causal: bool
) -> tuple[tuple[()], dict[str, Any]]:
    """Replace ``attention_mask`` or ``document_ids`` (batch, length) by what the attention function takes.

    Padding is a segment like any document: it sees only itself, and nothing sees it.
    """
    arguments = dict(zip(names, args, strict=False)) | kwargs
    padding, documents = arguments.pop("attention_mask", None), arguments.pop("document_ids", None)
    segments = padding if documents is None else documents
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments["inputs_embeds"]
    cache = arguments.get("past_key_values")
    if cache is not None and tokens.shape[1] > 1 and cache.get_seq_length():
        raise ValueError("several tokens after a cache need a mask that this attention does not make; export the model")
    if segments is not None and segments.shape != tokens.shape[:2]:
        raise ValueError(f"the attention mask is {tuple(segments.shape)}, but it must be (batch, length)")
    # A padded batch is the last of an epoch: not worth compiling a kernel for.
    flex = _can_flex(backbone, tokens) and padding is None
    arguments["visible"] = _visible(backbone, segments, tokens=tokens, causal=causal, flex=flex)
    return (), arguments


def _trust_the_mask(*_: Any) -> None:
    """Stand for GPT-2's search for padding without a mask, which waits for the device in every forward."""


def use_attention(model: PreTrainedModel) -> bool:
    """Put the backbone of a language model on this attention, once, and tell whether its family allows it.

    The backbone then also takes ``document_ids`` (batch, length). The model's own config is left alone: only the
    backbone's modules read another, so that what is saved, or cut from it, is a plain transformers model.
    """
    backbone = cast(PreTrainedModel, model.base_model)
    if backbone.config._attn_implementation == _NAME:
        return True
    if model.config.model_type not in FAMILIES or not type(model).__module__.startswith("transformers."):
        return False
    config = copy.copy(backbone.config)
    config._attn_implementation = _NAME
    modules: list[Any] = list(backbone.modules())
    for module in modules:
        if getattr(module, "config", None) is not None:
            module.config = config
    names = list(inspect.signature(backbone.forward).parameters)
    causal = any(getattr(module, "is_causal", False) for module in modules)
    hook = functools.partial(_give_visible, names=names, causal=causal)
    backbone.register_forward_pre_hook(hook, with_kwargs=True)
    backbone.warn_if_padding_and_no_attention_mask = _trust_the_mask  # type: ignore[method-assign]
    return True
