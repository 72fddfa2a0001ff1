"""Load a Hugging Face language model, and run its head separately, so that only chosen tokens need logits."""

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from distilkit.attention import dense_mask, use_attention
from distilkit.errors import UserError
from distilkit.losses import Head

LM = Literal["mlm", "clm"]

_AUTO_CLASS = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM}
_BEFORE_OUTPUT = ("generator_predictions", "head", "lm_head")  # where a model transforms its last hidden states


class Batch(TypedDict):
    """A micro-batch, as the data module builds it and the objective reads it.

    ``labelled`` and ``real`` are computed on the host, so that it need not wait for the device to count them. The last
    four describe the optimizer step: token counts over all its micro-batches, and the position in it.
    """

    input_ids: Tensor  # (batch, length)
    labels: Tensor  # (batch, length), -100 without a target
    attention_mask: NotRequired[Tensor]  # (batch, length), 0 on padding
    document_ids: NotRequired[Tensor]  # (batch, length), constant within a document
    left_out: NotRequired[Tensor]  # (batch,), blocks that only fill up the batch of a rank
    teacher_reads: NotRequired[dict[Any, Any]]  # what several students of one process have read of the teacher on it
    teacher_is_read: NotRequired[bool]  # by another of these students
    teacher_states: NotRequired[Tensor]  # (rows, width), the teacher's last hidden states at tokens with a label
    labelled: NotRequired[Tensor]  # (rows,), flat indices of the tokens with a label
    real: NotRequired[Tensor]  # (tokens,), flat indices of all tokens but padding
    num_tokens: NotRequired[Tensor]  # scalar
    num_labels: NotRequired[Tensor]  # scalar
    is_first: NotRequired[bool]
    is_last: NotRequired[bool]


def lm_of(model_type: str, architectures: list[str] | None = None, auto_map: Mapping[str, Any] | None = None) -> LM:
    """Return mlm or clm by ``architectures``, then by ``model_type``; a type with both classes is masked by default.

    ``auto_map`` names the classes of a model that brings its own code.
    """
    own = {name: str(of).rpartition(".")[2] for name, of in (auto_map or {}).items()}
    masked = {own.get("AutoModelForMaskedLM"), MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)} - {None}
    causal = {own.get("AutoModelForCausalLM"), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)} - {None}
    if not masked and not causal:
        found = f"model type {model_type!r} has neither a masked nor a causal language-model class"
        raise UserError(f"{found}; choose another model")
    return "clm" if not masked or causal & set(architectures or ()) else "mlm"


def lm_of_name(name: str, *, revision: str, trust_remote_code: bool) -> LM:
    """Return mlm or clm by the config of a model, a hub id or a folder, whose weights are not read."""
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    return lm_of(config.model_type, config.architectures, getattr(config, "auto_map", None))


def lm_of_model(model: PreTrainedModel) -> LM:
    """Return mlm or clm by the model's class, whatever its config says."""
    return lm_of(model.config.model_type, [type(model).__name__], getattr(model.config, "auto_map", None))


def load_language_model(
    name: str, *, revision: str = "main", lm: LM | None = None, trust_remote_code: bool = False, needs_head: bool = True
) -> tuple[PreTrainedModel, LM, bool]:
    """Load a language model from the hub or a folder, from safetensors, in float32; ``lm=None`` reads its config.

    The last value tells whether the files hold its head; without ``needs_head`` it may be random.
    """
    if lm not in (None, *_AUTO_CLASS):
        raise UserError(f"teacher.lm is {lm!r}; it takes mlm or clm")
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        lm = lm or lm_of_name(name, **source)
        model, info = _AUTO_CLASS[lm].from_pretrained(
            name, **source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # of damaged weights, of a config's odd values, of a model's own code
        where, reason = "folder" if Path(name).is_dir() else "hub id", str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot load {where} {name!r} at revision {revision!r}: {reason or type(error).__name__} "
            "A hub id needs the network or the Hugging Face cache; a folder needs config.json and model.safetensors "
            "(remote code needs trust_remote_code=true)"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if body := [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]:
        raise UserError(f"{', '.join(body[:4])} of {name!r} are missing from its files; give all of its files")
    if missing and needs_head:
        found = f"{name!r} has no trained language-model head: {', '.join(missing)} are missing from its files"
        cure = "use a checkpoint saved with its head, or set objective.alpha_ce=0 and objective.alpha_mse=0"
        raise UserError(f"{found}; {cure}")
    return model, lm, not missing


def build_from_config(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the language model of a config with random weights, in float32."""
    auto: Any = _AUTO_CLASS[lm_of(config.model_type, config.architectures, getattr(config, "auto_map", None))]
    return cast(PreTrainedModel, auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code))


def weight_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _padding_position(model: PreTrainedModel) -> int | None:
    """Return the position of padding where a model numbers its tokens after it, as RoBERTa does, or None."""
    embeddings = getattr(model.base_model, "embeddings", None)
    return getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)


def _restarting_positions(model: PreTrainedModel, ids: Tensor, document_ids: Tensor) -> Tensor:
    """Number the tokens of each document as the model numbers them in a document alone: (batch, length) -> the same."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)  # (batch, length)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    pad = _padding_position(model)
    counted = torch.ones_like(ids) if pad is None else (ids != pad).long()
    before = counted.cumsum(dim=1) - counted  # (batch, length), counted tokens before each one
    # The running maximum carries each start to the end of its document, without a loop that waits for the device.
    positions = before - torch.where(starts, before, 0).cummax(dim=1).values
    return positions if pad is None else (positions + 1) * counted + pad


def _apart(model: PreTrainedModel, document_ids: Tensor, *, causal: bool) -> Tensor | dict[str, Tensor]:
    """Return the masks of a family that keeps its own attention, in the form that it reads."""
    length, window = document_ids.shape[1], getattr(model.config, "sliding_window", None)

    def mask(reach: int) -> Tensor:
        seen = dense_mask(document_ids, length=length, causal=causal, reach=reach, device=document_ids.device)
        if model.config._attn_implementation == "sdpa":
            return seen
        hidden = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)  # eager attention adds its mask
        return hidden.masked_fill(~seen, torch.finfo(model.dtype).min)

    full, sliding = mask(length), length if window is None else window - 1 if causal else window
    types = getattr(model.config, "layer_types", None)
    if types and "sliding_attention" in types:
        return {"full_attention": full, "sliding_attention": mask(sliding)}
    return full if types or window is None else mask(sliding)


def last_hidden_state(
    model: PreTrainedModel, ids: Tensor, *, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """Run the model without its head: (batch, length) ids -> (batch, length, width) states after the last norm.

    ``attention_mask`` (batch, length) is 0 on padding, or None without padding. ``document_ids`` (batch, length) is
    constant within a document; a document's states are then the same as without its neighbours. Padding has its own
    document id, and its states are not meaningful. ``probe`` finds the model types for which this is not so.
    """
    causal = lm_of_model(model) == "clm"
    arguments: dict[str, Any] = {"use_cache": False} if causal else {}
    if document_ids is None:
        arguments["attention_mask"] = attention_mask
    elif model._is_stateful:  # some take a mask and do not read it
        found = f"model type {model.config.model_type!r} cannot keep packed documents apart: it carries a state"
        raise UserError(f"data.attend_across_documents=false, but {found}; set data.attend_across_documents=true")
    elif "position_ids" in inspect.signature(model.base_model.forward).parameters:
        arguments["position_ids"] = _restarting_positions(model, ids, document_ids)
    if use_attention(model):
        arguments["document_ids"] = document_ids
    elif document_ids is not None:
        arguments["attention_mask"] = _apart(model, document_ids, causal=causal)
    return cast(Tensor, model.base_model(input_ids=ids, **arguments).last_hidden_state)


def real_mask(batch: Batch) -> Tensor | None:
    """Return 0 for padding and for all tokens of blocks that are left out (batch, length); None if all tokens count."""
    mask, left_out = batch.get("attention_mask"), batch.get("left_out")
    if left_out is None:
        return mask
    ones = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return ones.masked_fill(left_out[:, None], 0)


def token_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the backbone on a batch, and return the states of all tokens, with padding, (batch * length, width)."""
    padding, documents = batch.get("attention_mask"), batch.get("document_ids")
    return last_hidden_state(model, batch["input_ids"], attention_mask=padding, document_ids=documents).flatten(0, 1)


def lm_head(model: PreTrainedModel, states: Tensor) -> Head:
    """Return the parts of the logits of last hidden states (rows, width): transformed states, weight and bias.

    The head is recognised by its modules, and ``check_split`` compares it with the model's own.
    """
    parts: Any = model
    output = parts.get_output_embeddings()
    bias, features = output.bias, states
    predictions: Any = getattr(getattr(parts, "cls", parts), "predictions", None)
    block: Any = predictions or getattr(parts, "lm_head", None)
    blocks = (getattr(predictions, "transform", None), *(getattr(parts, name, None) for name in _BEFORE_OUTPUT))
    before = [each for each in blocks if each is not None and all(part is not output for part in each.modules())]
    if before:  # as in BERT, ELECTRA and ModernBERT
        features = before[0](states)
    elif hasattr(block, "dense"):  # as in RoBERTa and ALBERT, with the output in the same block
        norm = block.layer_norm if hasattr(block, "layer_norm") else block.LayerNorm
        features = norm(getattr(block, "activation", nn.functional.gelu)(block.dense(states)))
        bias = getattr(block, "bias", None) if bias is None else bias  # ESM adds it after the product
    elif hasattr(parts, "vocab_transform"):  # as in DistilBERT
        features = parts.vocab_layer_norm(parts.activation(parts.vocab_transform(states)))
    scale = getattr(model.config, "logit_scale", None) or 1 / (getattr(model.config, "logits_scaling", None) or 1)
    return Head(features if scale == 1 else features * scale, output.weight, bias)  # Cohere and Granite scale


@torch.no_grad()
def check_split(model: PreTrainedModel) -> None:
    """Check on a short sequence that backbone and head give the logits of the whole model."""
    was_training = model.training
    model.eval()
    reason = ""
    try:
        ids = (torch.arange(4, device=model.device)[None, :] + 4) % num_embeddings(model)  # (1, 4)
        whole = model(input_ids=ids).logits[0]  # (4, vocabulary); before ``last_hidden_state``, which changes attention
        split = nn.functional.linear(*lm_head(model, last_hidden_state(model, ids)[0]))
        same = isinstance(model.get_output_embeddings(), nn.Linear) and torch.allclose(
            whole, split, rtol=1e-3, atol=1e-3
        )
    except UserError:
        raise
    except Exception as error:  # whatever a foreign architecture does with its head
        same, reason = False, f" ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    finally:
        model.train(was_training)
    if not same:
        found = f"model type {model.config.model_type!r} cannot be split into backbone and head{reason}"
        raise UserError(
            f"{found}; choose a model whose logits are a linear map of transformed last hidden states, "
            "such as bert, roberta, deberta-v2, modernbert, gpt2 or llama"
        )


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of ids that a model embeds."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters, each tied weight counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_parameters_without_embeddings(model: nn.Module) -> int:
    """Return the number of parameters without word, position and segment embeddings."""
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return num_parameters(model) - sum(table.numel() for table in tables.values())


def matrix_flops(modules: Iterable[nn.Module]) -> int:
    """Return the FLOPs of one token's pass through the matrices of some modules; a multiply-add counts as two."""
    return sum(2 * part.weight.numel() for part in modules if isinstance(part, nn.Linear | Conv1D))


def max_positions(model: PreTrainedModel) -> int:
    """Return the maximum number of tokens of a sequence."""
    pad = _padding_position(model)
    return int(model.config.max_position_embeddings) - (0 if pad is None else pad + 1)


def check_positions(model: PreTrainedModel, length: int, *, key: str, name: str) -> None:
    """Check that a sequence length, set by the config's ``key``, fits the model's positions, if they are limited."""
    limit = max_positions(model) if hasattr(model.config, "max_position_embeddings") else length
    if length > limit:
        raise UserError(f"{key}={length}, but {name} has {limit} positions; set {key}={limit} or less")


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a frozen model's parameters once, and not its buffers: rotary frequencies need float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def compile_backbone(model: PreTrainedModel) -> None:
    """Compile the backbone's forward in place, which keeps the names of weights in checkpoints."""
    use_attention(model)  # before: GPT-2's own attention is not causal when compiled without a mask
    model.base_model.compile()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Store only the inputs of layers, and recompute the other activations in backward."""
    if not model.supports_gradient_checkpointing:
        found = f"activation_checkpointing=true, but {type(model).__name__} does not support it"
        raise UserError(f"{found}; set activation_checkpointing=false")
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # its hook breaks a compiled graph, and only frozen embeddings need it
