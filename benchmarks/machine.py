"""The machine under test: processor, versions, and speed of matrix products."""

import os
import platform
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers

from distilkit.records import cpu_name

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def describe(device: str) -> dict[str, Any]:
    """Describe the processor, the versions and the date."""
    return {
        "processor": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def matmul_peaks(device: str, *, side: int | None = None, repeats: int = 7) -> dict[Precision, float]:
    """Measure the fastest product of two square matrices per precision, in GFLOP/s (CPU: of one core)."""
    side = side or (8192 if device == "cuda" else 1024)
    peaks: dict[Precision, float] = {}
    for precision, dtype in DTYPES.items():
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = partial(F.linear, left, right)  # the layout of a linear layer
        product()
        peaks[precision] = 2e-9 * side**3 / min(_seconds(product, device) for _ in range(repeats))
    if device == "cuda":  # the measuring processes need all of the memory
        del left, right, product
        torch.cuda.empty_cache()
    return peaks


def _seconds(product: "partial[torch.Tensor]", device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        product()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    product()
    return time.process_time() - start


def faster_precision(peaks: dict[Precision, float]) -> Precision:
    """Return the faster precision: a CPU without bf16 units emulates bf16, many times slower than fp32."""
    return "bf16" if peaks["bf16"] > peaks["fp32"] else "fp32"
