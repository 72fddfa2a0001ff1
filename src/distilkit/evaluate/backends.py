"""A fine-tuned model in another form, to score it again: in bfloat16, by ONNX Runtime, and there with int8 weights."""

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilkit.errors import UserError
from distilkit.export.onnx import PACKAGES, export_onnx, missing_packages, open_session, quantize_int8

BACKENDS = ("bf16", "onnx", "int8")


def check_backends(names: Sequence[str]) -> None:
    """Make sure that all are known, and that what they need is installed, before a model is trained."""
    if isinstance(names, str) or any(name not in BACKENDS for name in names) or len(set(names)) < len(names):
        raise UserError(f"backends={names}, but it takes a list of {', '.join(BACKENDS)}, each once: backends=[int8]")
    absent = missing_packages()
    if absent and set(names) & {"onnx", "int8"}:
        raise UserError(
            f"backends={list(names)} needs {', '.join(PACKAGES)}, but {', '.join(absent)} cannot be imported: "
            "pip install 'distilkit[onnx]'"
        )


@contextmanager
def in_backend(name: str, model: PreTrainedModel, *, example: Mapping[str, Tensor], label: str) -> Iterator[Any]:
    """Yield a model in another form, with the same inputs and outputs. ``example`` holds the inputs of one batch."""
    if name == "bf16":
        yield copy.deepcopy(model).bfloat16()
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "onnx", "model.onnx")
        cure = "leave onnx and int8 out of backends"
        export_onnx(model.cpu(), file, example=example, name=label, cure=cure)
        if name == "int8":
            file = quantize_int8(file, Path(folder, "int8", "model.onnx"))
        yield _OnnxModel(open_session(file, threads=torch.get_num_threads()), config=model.config)


class _OnnxModel(nn.Module):
    """Run an ONNX Runtime session on the CPU with the interface of the model that it was exported from."""

    def __init__(self, session: Any, *, config: Any) -> None:
        super().__init__()
        self.session, self.config = session, config
        self.inputs = [each.name for each in session.get_inputs()]
        self.outputs = [each.name for each in session.get_outputs()]

    def forward(self, **inputs: Tensor) -> Any:
        arrays = self.session.run(self.outputs, {name: inputs[name].cpu().numpy() for name in self.inputs})
        device = next(iter(inputs.values())).device
        tensors = [torch.from_numpy(array).to(device) for array in arrays]
        return SimpleNamespace(**dict(zip(self.outputs, tensors, strict=True)))
