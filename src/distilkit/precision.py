"""``trainer.precision=auto``: bfloat16 where the device multiplies it faster than float32."""

import functools
import os
from time import thread_time

import torch
from torch import nn

_ROWS, _WIDTH, _REPEATS = 256, 768, 4  # of the layer that is timed on a CPU: about 0.1 seconds
_FASTER = 1.3  # the least ratio that counts, so that a machine chooses the same again


def choose_precision(*, accelerator: str, before: str | None = None, alone: bool = True) -> tuple[str, str]:
    """Return ``bf16-mixed`` or ``32-true`` for the device of an accelerator, and the reason.

    1. A GPU needs compute capability 8.0; older ones only emulate bfloat16.
    2. A CPU needs AMX or avx512_bf16, and a layer in bfloat16 must be faster than in float32. Several processes, which
       are not ``alone``, may measure different ratios, and take float32.
    3. A resumed run keeps the precision of its checkpoint, ``before``, on a device that has bfloat16.
    """
    before = before if before in ("bf16-mixed", "32-true") else None
    kept = ", and the checkpoint was trained so" if before else ""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return before or "bf16-mixed", found + kept
        return "32-true", f"{found}, and bfloat16 needs 8.0; 16-mixed may be faster"
    if accelerator not in ("auto", "cpu") or (accelerator == "auto" and torch.backends.mps.is_available()):
        return "32-true", f"bfloat16 was not tried on the device of trainer.accelerator={accelerator}"
    if not (units := _cpu_units()):
        return "32-true", "this CPU has neither AMX nor avx512_bf16"
    found = f"this CPU has {' and '.join(units)}"
    if before:
        return before, found + kept
    if not alone or any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS")):
        return "32-true", f"{found}, but several processes may measure different speeds"
    if (ratio := measured_ratio()) < _FASTER:
        return "32-true", f"{found}, but a layer in bfloat16 is only {ratio:.1f} times as fast as in float32"
    return "bf16-mixed", f"{found}, and a layer in bfloat16 is {ratio:.1f} times as fast as in float32"


def emulation(device: torch.device) -> str | None:
    """Return what to say of a device that has no units for bfloat16, or None."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU only emulates bfloat16, which is slow; set trainer.precision=16-mixed or 32-true"
    if device.type == "cpu" and torch.cpu.get_capabilities().get("architecture") == "x86_64" and not _cpu_units():
        return "this CPU only emulates bfloat16, which is slow; set trainer.precision=32-true"
    return None


def _cpu_units() -> list[str]:
    """Return the units of an x86 processor that multiply bfloat16."""
    has = torch.cpu.get_capabilities()
    return [name for key, name in (("amx_bf16", "AMX"), ("avx512_bf16", "avx512_bf16")) if has.get(key)]


@functools.cache  # jobs of a sweep in one process take the same
def measured_ratio() -> float:
    """Return how many times as fast a layer's forward and backward pass is in bfloat16, by the best of some passes.

    One thread and its own clock are used: the wall clock of a busy machine would choose otherwise each time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would also count the time in which one waits for another
    layer, inputs = nn.Linear(_WIDTH, _WIDTH), torch.randn(_ROWS, _WIDTH, requires_grad=True)
    gradient = torch.randn(_ROWS, _WIDTH)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with torch.enable_grad():
        for _ in range(1 + _REPEATS):
            for halves, times in seconds.items():
                start = thread_time()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=halves):
                    outputs = layer(inputs)
                outputs.backward(gradient.to(outputs.dtype))
                times.append(thread_time() - start)
    torch.set_num_threads(threads)
    return min(seconds[False][1:]) / min(seconds[True][1:])  # the first ones set up
