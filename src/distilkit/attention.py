"""Attention with a mask only where one is needed: for padding, packed documents and sliding windows.

transformers builds masks in each backbone's forward, which has three problems here. It waits for the device to look for
padding and packing. GPT-2 loses ``is_causal`` under torch.compile. Bidirectional masks let packed documents attend to
each other. A function that is registered without a mask builder receives no mask from transformers. Instead, a forward
hook computes the visible keys once, and all layers share them.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

log = logging.getLogger(__name__)

# Model types whose layers pass keyword arguments to the attention function; others keep their own attention.
FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "gpt2", "modernbert")
_NAME = "distilkit"
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")  # each family has one of them

Mask = Tensor | BlockMask | None


class _Visible(NamedTuple):
    """Visible keys: a boolean or block mask (batch or 1, 1, length, length), or None for all that the layer allows."""

    full: Mask  # for layers of full attention
    sliding: Mask  # for layers with a sliding window


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, *, visible: _Visible, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend with torch's kernels: (batch, heads, length, width) three times -> (batch, length, heads, width).

    ``visible`` comes from the hook of ``use_attention``, which reads the padding mask. It has no default: without the
    hook, the call fails instead of attending to padding.
    """
    mask = visible.full if kwargs.pop("sliding_window", None) is None else visible.sliding
    if isinstance(mask, BlockMask):
        return flex_attention_forward(module, query, key, value, mask, **kwargs)
    attention: Callable[..., tuple[Tensor, None]] = functools.partial(sdpa_attention_forward, **kwargs)
    if kwargs.get("dropout") and query.device.type == "cpu" and not torch.compiler.is_compiling():
        # With dropout, torch's CPU kernels keep several (batch, heads, length, length) tensors for backward, a sixth of
        # the memory of a BERT step. Recomputing them with the same dropout costs little time.
        attention = functools.partial(checkpoint, attention, use_reentrant=False)
    return attention(module, query, key, value, mask)


AttentionInterface.register(_NAME, _attend)


def _rule(segments: Tensor | None, *, causal: bool, reach: int) -> Callable[..., Tensor]:
    # All arguments are indices that broadcast against each other, as flex attention passes them.
    def sees(batch: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        seen = (query - key).abs() <= reach
        if causal:
            seen = seen & (query >= key)
        return seen if segments is None else seen & (segments[batch, query] == segments[batch, key])

    return sees


def dense_mask(segments: Tensor | None, *, length: int, causal: bool, reach: int, device: torch.device) -> Tensor:
    """Return a boolean (batch or 1, 1, length, length), true where a query sees a key.

    It sees keys of its segment in ``segments`` (batch, length), at most ``reach`` away, and no later one if ``causal``.
    """
    batch = torch.arange(1 if segments is None else len(segments), device=device)[:, None, None, None]
    key = torch.arange(length, device=device)  # (length,)
    mask = _rule(segments, causal=causal, reach=reach)(batch, None, key[:, None], key)
    return mask.expand(len(batch), 1, length, length)


def _masks(backbone: PreTrainedModel, segments: Tensor | None, tokens: Tensor, *, causal: bool, flex: bool) -> _Visible:
    length, device = tokens.shape[1], tokens.device
    window = backbone.config.sliding_window if backbone.config.model_type == "modernbert" else length

    def mask(reach: int) -> Mask:
        if segments is None and reach >= length - 1:  # the kernels are faster without a mask
            return None
        if not flex or not (torch.compiler.is_compiling() or _flex_runs(device)):
            return dense_mask(segments, length=length, causal=causal, reach=reach, device=device)
        rule = _rule(segments, causal=causal, reach=reach)
        return create_block_mask(rule, None if segments is None else len(segments), None, length, length, str(device))

    full = mask(length)
    return _Visible(full=full, sliding=full if window >= length - 1 else mask(window))


@functools.cache
def _flex_runs(device: torch.device) -> bool:
    """Try flex attention once: it needs Triton, a C compiler and a card that is new enough; log why it fails."""
    mask = create_block_mask(_rule(None, causal=True, reach=128), None, None, 128, 128, str(device))
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            states = torch.zeros(1, 1, 128, 64, device=device, requires_grad=True)
            flex_attention_forward(nn.Module(), states, states, states, mask, scaling=1.0)[0].sum().backward()
    except Exception as error:  # of the compiler, of Triton or of CUDA; dense masks always work
        log.warning("attention runs on dense masks, which are slower: %s", str(error).partition("\n")[0])
        return False
    return True


def _can_flex(backbone: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether flex attention, which skips blocks that no query sees, can run: on CUDA and without dropout."""
    dropout = backbone.training and any(getattr(backbone.config, name, 0) for name in _DROPOUTS)
    return tokens.is_cuda and not dropout


def _give_visible(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: Sequence[str], causal: bool
) -> tuple[tuple[()], dict[str, Any]]:
    """Replace ``attention_mask`` or ``document_ids`` (batch, length) by the ``visible`` of ``_attend``.

    Padding is a segment like any document: it attends only to itself, and no other token attends to it.
    """
    arguments = dict(zip(names, args, strict=False)) | kwargs
    padding, documents = arguments.pop("attention_mask", None), arguments.pop("document_ids", None)
    segments = padding if documents is None else documents
    tokens = arguments["inputs_embeds"] if arguments.get("input_ids") is None else arguments["input_ids"]
    cache = arguments.get("past_key_values")
    if cache is not None and tokens.shape[1] > 1 and cache.get_seq_length():
        found = f"{tokens.shape[1]} tokens follow a cache"
        raise ValueError(f"{found}, but this attention supports 1; export the model, and load it again")
    if segments is not None and segments.shape != tokens.shape[:2]:
        raise ValueError(f"the attention mask is {tuple(segments.shape)}, but it must be (batch, length)")
    # With padding alone, either one batch of an epoch is padded, or lengths vary: neither justifies compiling a kernel.
    flex = _can_flex(backbone, tokens) and (padding is None or documents is not None)
    arguments["visible"] = _masks(backbone, segments, tokens, causal=causal, flex=flex)
    return (), arguments


def _trust_the_mask(*_: Any) -> None:
    """Replace GPT-2's warning about padding without a mask, which waits for the device in every forward."""


def use_attention(model: PreTrainedModel) -> bool:
    """Set this attention on the backbone of a language model, once, and return whether its family supports it.

    The backbone then also takes ``document_ids`` (batch, length). The model's own config does not change, so that a
    saved model, or a student of it, is a plain transformers model. Only the backbone's modules read a changed copy.
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
