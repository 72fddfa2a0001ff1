"""Load a Hugging Face language model, split it at its last hidden state, and run the two parts.

The split lets the objective compute vocabulary-wide logits for chosen tokens only.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distilkit.attention import dense_mask, use_attention
from distilkit.errors import UserError
from distilkit.losses import Head

LM = Literal["mlm", "clm"]

_AUTO_CLASS = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM}
_POSITIONS_AFTER_PAD = ("roberta", "xlm-roberta")  # their first position is pad_token_id + 1


class Batch(TypedDict):
    """A micro-batch: what the data module makes, and the objective reads.

    All but ``input_ids`` and ``labels`` is optional. Padding has an ``attention_mask``, separated documents have
    ``document_ids``. ``labelled`` and ``real`` are found on the host, so that a device need not report how many there
    are. The data module adds the last four: counts over the whole optimizer step, and the place in it.
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


# ------------------------------------------------------------------------------- loading


def lm_of(model_type: str, architectures: list[str] | None = None) -> LM:
    """Return the kind of a language model by ``config.architectures``, then by ``config.model_type``.

    A type that has both classes (BERT, RoBERTa) is masked unless its files say otherwise.
    """
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if masked is None and causal is None:
        raise UserError(f"model type {model_type!r} has neither a masked nor a causal language-model class")
    if masked is None or (architectures and causal in architectures):
        return "clm"
    return "mlm"


def load_language_model(
    name: str,
    *,
    revision: str = "main",
    lm: LM | None = None,
    trust_remote_code: bool = False,
    needs_head: bool = True,
) -> tuple[PreTrainedModel, LM]:
    """Load a masked or causal language model from the hub or a folder, from safetensors, in float32.

    ``lm`` is read from the config when it is None.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        lm = lm or lm_of(config.model_type, config.architectures)
        model, info = _AUTO_CLASS[lm].from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        where = "folder" if Path(name).is_dir() else "hub id"
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load {where} {name!r} at revision {revision!r}: {reason} "
            "A hub id needs the network or a filled Hugging Face cache; a folder needs config.json and "
            "model.safetensors (remote code only with trust_remote_code=true)"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing and needs_head:
        raise UserError(
            f"{name!r} has no trained language-model head: {', '.join(missing)} were not in its files and would be "
            "random targets; use a checkpoint saved with its head, or set objective.alpha_ce=0 and objective.alpha_mse=0"
        )
    return model, lm


def weight_hash(model: PreTrainedModel) -> str:
    """Return the SHA-256 over names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------- backbone and head


def _restarting_positions(model: PreTrainedModel, document_ids: Tensor) -> Tensor:
    """Number the tokens of each document as if it stood alone: (batch, length) -> (batch, length)."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    positions = index - torch.where(starts, index, 0).cummax(dim=1).values
    if model.config.model_type in _POSITIONS_AFTER_PAD:
        positions = positions + model.config.pad_token_id + 1
    return positions


def last_hidden_state(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Run the model without its head: (batch, length) ids -> (batch, length, width) states after the last norm.

    ``attention_mask`` is (batch, length) with 0 on padding, and None when there is none. ``document_ids`` (batch,
    length), constant within a document, keeps packed documents apart: a document's states are those of the document
    alone. Padding has a document id of its own. States of padding mean nothing.
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
        length = input_ids.shape[1]
        window = getattr(model.config, "sliding_window", None)
        if window is not None and window < length:  # one mask for all layers would widen it
            raise UserError(
                f"data.attend_across_documents=false, but {type(model).__name__} attends within {window} tokens in a way "
                "that is not known here; set data.attend_across_documents=true"
            )
        arguments["attention_mask"] = dense_mask(
            document_ids, length=length, causal=causal, reach=length, device=input_ids.device
        )
    return cast(Tensor, model.base_model(input_ids=input_ids, **arguments).last_hidden_state)


def token_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the backbone on a batch: states of all tokens, padding included, (batch * length, width)."""
    states = last_hidden_state(
        model,
        batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        document_ids=batch.get("document_ids"),
    )
    return states.flatten(0, 1)


def head_transform(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply what stands between the last hidden state and the output embeddings: (tokens, width) -> (tokens, width)."""
    parts: Any = model  # each family names its own
    match model.config.model_type:
        case "bert" if hasattr(model, "cls"):
            output = parts.cls.predictions.transform(hidden)
        case "roberta" | "xlm-roberta" if hasattr(model, "lm_head"):
            head = parts.lm_head
            output = head.layer_norm(nn.functional.gelu(head.dense(hidden)))
        case "distilbert":
            output = parts.vocab_layer_norm(parts.activation(parts.vocab_transform(hidden)))
        case "electra":
            output = parts.generator_predictions(hidden)
        case "modernbert":
            output = parts.head(hidden)
        case _:
            output = hidden
    return cast(Tensor, output)


def output_embeddings(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Return what turns the transformed states into logits: the weight (vocabulary, width) and the bias or None."""
    output = model.get_output_embeddings()
    return output.weight, output.bias


def lm_head(model: PreTrainedModel, states: Tensor) -> Head:
    """Return what makes the logits of these states (rows, width)."""
    return Head(head_transform(model, states), *output_embeddings(model))


@torch.no_grad()
def check_split(model: PreTrainedModel) -> None:
    """Make sure that backbone and head together are the whole model, on one short sequence."""
    was_training = model.training
    model.eval()
    ids = torch.arange(4, device=model.device)[None, :] + 4
    whole = model(input_ids=ids).logits[0]
    head = output_embeddings(model) if isinstance(model.get_output_embeddings(), nn.Linear) else None
    split = nn.functional.linear(head_transform(model, last_hidden_state(model, ids)[0]), *head) if head else None
    model.train(was_training)
    if split is None or not torch.allclose(whole, split, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"model type {model.config.model_type!r} cannot be split into backbone and head; supported are bert, "
            "roberta, xlm-roberta, distilbert, electra, modernbert, gpt2 and causal models with a plain linear head"
        )


# -------------------------------------------------------------------------- size and limits


def num_parameters(model: nn.Module) -> int:
    """Count the parameters, each tied weight once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_parameters_without_embeddings(model: nn.Module) -> int:
    """Count the parameters but those of the tables of words, positions and segments."""
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return num_parameters(model) - sum(table.numel() for table in tables.values())


def max_positions(model: PreTrainedModel) -> int:
    """Return how many tokens a sequence may have."""
    limit = int(model.config.max_position_embeddings)
    if model.config.model_type in _POSITIONS_AFTER_PAD:
        limit -= int(model.config.pad_token_id) + 1
    return limit


def check_positions(model: PreTrainedModel, length: int, *, key: str, name: str) -> None:
    """Make sure that sequences of a length, set by the config's ``key``, fit the model's positions, if it has a limit."""
    limit = max_positions(model) if hasattr(model.config, "max_position_embeddings") else length
    if length > limit:
        raise UserError(f"{key}={length}, but {name} has {limit} positions; set {key}={limit} or less")


# ------------------------------------------------------------------------ how models run


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a frozen model's parameters once, where autocast would cast them at each step.

    Buffers keep their dtype: rotary frequencies need float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def compile_backbone(model: PreTrainedModel) -> None:
    """Compile the backbone's forward in place; the names of weights, and so checkpoints, do not change."""
    use_attention(model)  # first: GPT-2's own attention sees the future when it is compiled without a mask
    model.base_model.compile()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each layer in training, and recompute the rest in backward: less memory, more time."""
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"activation_checkpointing=true, but {type(model).__name__} does not support it; set activation_checkpointing=false"
        )
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # a hook for frozen embeddings, which breaks a compiled graph
