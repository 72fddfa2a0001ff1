"""Export models to ONNX for batches of any size and length, quantize them to int8, and run them with ONNX Runtime."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilkit.cli import silenced
from distilkit.errors import UserError
from distilkit.language_model import num_parameters

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_ONE_FILE = 1.8e9  # bytes of weights; a protocol buffer holds 2 GiB


def missing_packages() -> list[str]:
    """List the packages for ONNX that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


class _Outputs(nn.Module):
    """The model as a function of plain tensors, in the order of ``names``, to its logits or its last states."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)))
        return tuple(outputs[name] for name in outputs_of(outputs))


def outputs_of(outputs: Mapping[str, Any]) -> list[str]:
    """List a model's logits in its outputs, of which answers have two; those of a bare encoder are its last states."""
    return [name for name in outputs if name.endswith("logits")] or ["last_hidden_state"]


def export_onnx(model: PreTrainedModel, file: Path, *, example: Mapping[str, Tensor], name: str, cure: str) -> Path:
    """Write a model as an ONNX file, for batches of any size and length, and return its path.

    ``example`` holds the inputs of one batch, all (batch, length). Weights of more than 1.8 GB are in a second file
    beside it. A model that torch cannot export raises a ``UserError`` with the ``cure``.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # A size of 1 would become a constant.
    inputs = tuple(tensor.repeat(2, 1) if len(tensor) == 1 else tensor for tensor in example.values())
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with silenced(), torch.inference_mode():
            outputs = outputs_of(model(**example))
        with silenced():
            torch.onnx.export(
                _Outputs(model, list(example)).eval(),
                inputs,
                file,
                input_names=list(example),
                output_names=outputs,
                dynamic_shapes=(tuple(free for _ in inputs),),
                dynamo=True,
                verbose=False,
                external_data=4 * num_parameters(model) > _ONE_FILE,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} ({model.config.model_type}) cannot be exported to ONNX: {reason}; {cure}") from error
    return file


def quantize_int8(file: Path, quantized: Path) -> Path:
    """Write an ONNX file again with weights in int8; activations are quantized at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized.parent.mkdir(parents=True, exist_ok=True)
    large = sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) > _ONE_FILE
    with silenced():
        quantize_dynamic(file, quantized, weight_type=QuantType.QInt8, use_external_data_format=large)
    return quantized


def open_session(file: Path, *, threads: int) -> Any:
    """Open an ``onnxruntime.InferenceSession`` on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin between batches would take cores from the model that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
