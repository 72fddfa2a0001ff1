"""How models run: in which precision products are made, compiled or not, with activations kept or computed again."""

import torch
from transformers import PreTrainedModel

from distilkit.attention import use_attention
from distilkit.errors import UserError


def set_matmul_precision(name: str) -> None:
    """Set how torch multiplies matrices of float32: ``highest``, ``high`` or ``medium``.

    Raises:
        UserError: it is none of these.
    """
    if name not in ("highest", "high", "medium"):
        raise UserError(f"matmul_precision={name}, but it takes highest, high or medium")
    torch.set_float32_matmul_precision(name)


def compile_backbone(model: PreTrainedModel) -> None:
    """Compile the backbone's forward in place: the names of weights, and so checkpoints, stay as they are."""
    use_attention(model)  # before: GPT-2's own attention sees the future when it is compiled without a mask
    model.base_model.compile()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each layer in training, and compute the rest again in backward: less memory, more time.

    Raises:
        UserError: the architecture does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"activation_checkpointing=true, but {type(model).__name__} does not support it; set activation_checkpointing=false"
        )
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # a hook for frozen embeddings, which breaks a compiled graph
