"""Load a Hugging Face language model, and run its head separately, so that only chosen tokens need logits."""

import hashlib
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distilkit.attention import dense_mask, use_attention
from distilkit.errors import UserError
from distilkit.losses import Head

LM = Literal["mlm", "clm"]

_AUTO_CLASS = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM}
_POSITIONS_AFTER_PAD = ("roberta", "xlm-roberta")  # their first position is pad_token_id + 1


class Batch(TypedDict):
    """A micro-batch, as the data module builds it and the objective reads it.

    ``labelled`` and ``real`` are computed on the host, so that it need not wait for the device to count them. The last
    four describe the optimizer step: token counts over all its micro-batches, and the position in it.
    """

    input_ids: Tensor  # (batch, length)
    labels: Tensor  # (batch, length), -100 without a target
    attention_mask: NotRequired[Tensor]  # (batch, length), 0 on padding
    document_ids: NotRequired[Tensor]  # (batch, length), constant within a document
    labelled: NotRequired[Tensor]  # (rows,), flat indices of the tokens with a label
    real: NotRequired[Tensor]  # (tokens,), flat indices of all tokens but padding
    num_tokens: NotRequired[Tensor]  # scalar
    num_labels: NotRequired[Tensor]  # scalar
    is_first: NotRequired[bool]
    is_last: NotRequired[bool]


def lm_of(model_type: str, architectures: list[str] | None = None) -> LM:
    """Return mlm or clm by ``architectures``, then by ``model_type``; a type with both classes is masked by default."""
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if masked is None and causal is None:
        found = f"model type {model_type!r} has neither a masked nor a causal language-model class"
        raise UserError(f"{found}; choose another model")
    return "clm" if masked is None or (architectures and causal in architectures) else "mlm"


def load_language_model(
    name: str, *, revision: str = "main", lm: LM | None = None, trust_remote_code: bool = False, needs_head: bool = True
) -> tuple[PreTrainedModel, LM]:
    """Load a language model from the hub or a folder, from safetensors, in float32; ``lm=None`` reads its config."""
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **source)
        lm = lm or lm_of(config.model_type, config.architectures)
        model, info = _AUTO_CLASS[lm].from_pretrained(
            name, **source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        where, reason = "folder" if Path(name).is_dir() else "hub id", str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load {where} {name!r} at revision {revision!r}: {reason} "
            "A hub id needs the network or the Hugging Face cache; a folder needs config.json and model.safetensors "
            "(remote code needs trust_remote_code=true)"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing and needs_head:
        found = f"{name!r} has no trained language-model head: {', '.join(missing)} are missing from its files"
        cure = "use a checkpoint saved with its head, or set objective.alpha_ce=0 and objective.alpha_mse=0"
        raise UserError(f"{found}; {cure}")
    return model, lm


def build_from_config(config: PretrainedConfig) -> PreTrainedModel:
    """Build the language model of a config with random weights, in float32."""
    auto: Any = _AUTO_CLASS[lm_of(config.model_type, config.architectures)]
    return cast(PreTrainedModel, auto.from_config(config, dtype=torch.float32))


def weight_hash(model: PreTrainedModel) -> str:
    """Return the SHA-256 of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _restarting_positions(model: PreTrainedModel, document_ids: Tensor) -> Tensor:
    """Number the tokens of each document from its start: (batch, length) -> (batch, length)."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)  # (length,)
    starts = torch.ones_like(document_ids, dtype=torch.bool)  # (batch, length)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    # The running maximum carries each start to the end of its document, without a loop that waits for the device.
    positions = index - torch.where(starts, index, 0).cummax(dim=1).values
    after_pad = model.config.model_type in _POSITIONS_AFTER_PAD
    return positions + model.config.pad_token_id + 1 if after_pad else positions


def last_hidden_state(
    model: PreTrainedModel, ids: Tensor, *, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """Run the model without its head: (batch, length) ids -> (batch, length, width) states after the last norm.

    ``attention_mask`` (batch, length) is 0 on padding, or None without padding. ``document_ids`` (batch, length) is
    constant within a document; a document's states are then the same as without its neighbours. Padding has its own
    document id, and its states are not meaningful.
    """
    causal = lm_of(model.config.model_type, model.config.architectures) == "clm"
    arguments: dict[str, Any] = {"use_cache": False} if causal else {}
    if document_ids is None:
        arguments["attention_mask"] = attention_mask
    else:
        arguments["position_ids"] = _restarting_positions(model, document_ids)
    if use_attention(model):
        arguments["document_ids"] = document_ids
    elif document_ids is not None:
        length, window = ids.shape[1], getattr(model.config, "sliding_window", None)
        if window is not None and window < length:  # one mask for all layers would replace the window
            found = f"{type(model).__name__} has a sliding window of {window} tokens, which this mask does not support"
            raise UserError(f"data.attend_across_documents=false, but {found}; set data.attend_across_documents=true")
        mask = dense_mask(document_ids, length=length, causal=causal, reach=length, device=ids.device)
        arguments["attention_mask"] = mask
    return cast(Tensor, model.base_model(input_ids=ids, **arguments).last_hidden_state)


def token_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the backbone on a batch, and return the states of all tokens, with padding, (batch * length, width)."""
    padding, documents = batch.get("attention_mask"), batch.get("document_ids")
    return last_hidden_state(model, batch["input_ids"], attention_mask=padding, document_ids=documents).flatten(0, 1)


def lm_head(model: PreTrainedModel, states: Tensor) -> Head:
    """Return the parts of the logits of last hidden states (rows, width): transformed states, weight and bias."""
    parts: Any = model
    features = states
    match model.config.model_type:
        case "bert" if hasattr(model, "cls"):
            features = parts.cls.predictions.transform(states)
        case "roberta" | "xlm-roberta" if hasattr(model, "lm_head"):
            features = parts.lm_head.layer_norm(nn.functional.gelu(parts.lm_head.dense(states)))
        case "distilbert":
            features = parts.vocab_layer_norm(parts.activation(parts.vocab_transform(states)))
        case "electra":
            features = parts.generator_predictions(states)
        case "modernbert":
            features = parts.head(states)
    output = parts.get_output_embeddings()
    return Head(features, output.weight, output.bias)


@torch.no_grad()
def check_split(model: PreTrainedModel) -> None:
    """Check on a short sequence that backbone and head give the logits of the whole model."""
    was_training = model.training
    model.eval()
    ids = torch.arange(4, device=model.device)[None, :] + 4  # (1, 4)
    whole = model(input_ids=ids).logits[0]  # (4, vocabulary); before ``last_hidden_state``, which changes the attention
    is_linear = isinstance(model.get_output_embeddings(), nn.Linear)
    split = nn.functional.linear(*lm_head(model, last_hidden_state(model, ids)[0])) if is_linear else None
    model.train(was_training)
    if split is None or not torch.allclose(whole, split, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"model type {model.config.model_type!r} cannot be split into backbone and head; supported are bert, "
            "roberta, xlm-roberta, distilbert, electra, modernbert, gpt2 and causal models with a plain linear head"
        )


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters, each tied weight counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_parameters_without_embeddings(model: nn.Module) -> int:
    """Return the number of parameters without word, position and segment embeddings."""
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return num_parameters(model) - sum(table.numel() for table in tables.values())


def max_positions(model: PreTrainedModel) -> int:
    """Return the maximum number of tokens of a sequence."""
    reserved = model.config.pad_token_id + 1 if model.config.model_type in _POSITIONS_AFTER_PAD else 0
    return int(model.config.max_position_embeddings - reserved)


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
