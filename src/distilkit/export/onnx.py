"""Export a model with a task's head to ONNX, quantize it to int8, and run it with ONNX Runtime on the CPU."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilkit.cli import silenced
from distilkit.errors import UserError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def missing_packages() -> list[str]:
    """List the packages for ONNX that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


class _Logits(nn.Module):
    """The model as a function of plain tensors, in the order of ``names``, to its logits."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)))
        return tuple(outputs[name] for name in logits_of(outputs))


def logits_of(outputs: Mapping[str, Any]) -> list[str]:
    """List a model's logits in its outputs: ``logits``, or those of the starts and ends of answers."""
    return [name for name in outputs if name.endswith("logits")]


def export_onnx(model: PreTrainedModel, folder: Path, *, example: Mapping[str, Tensor], name: str) -> Path:
    """Write ``model.onnx`` into a new folder, for batches of any size and length, and return its path.

    ``example`` holds the inputs of one batch, all (batch, length). Weights may be in a second file, so the size
    is that of the folder.
    """
    folder.mkdir(parents=True)
    file = folder / "model.onnx"
    # A size of 1 would become a constant.
    inputs = tuple(tensor.repeat(2, 1) if len(tensor) == 1 else tensor for tensor in example.values())
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with silenced(), torch.inference_mode():
            outputs = logits_of(model(**example))
        with silenced():
            torch.onnx.export(
                _Logits(model, list(example)).eval(),
                inputs,
                file,
                input_names=list(example),
                output_names=outputs,
                dynamic_shapes=(tuple(free for _ in inputs),),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} ({model.config.model_type}) cannot be exported to ONNX: {reason}; set task.onnx=false"
        ) from error
    return file


def quantize_int8(file: Path, folder: Path) -> Path:
    """Write the model with weights in int8 into a new folder; activations are quantized at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir(parents=True)
    quantized = folder / file.name
    with silenced():
        quantize_dynamic(file, quantized, weight_type=QuantType.QInt8, use_external_data_format=True)
    return quantized


def open_session(file: Path, *, threads: int) -> Any:
    """Open an ``onnxruntime.InferenceSession`` on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin between batches would take cores from the model that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
