"""The memory of this process or of its device: the peak, what is free, and how the peak is measured anew."""

import ctypes
import gc
import os
import platform
import re
import resource
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUPS = (  # limit, use and statistics of a container, of version 2 and 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def reset_peak(device: torch.device) -> None:
    """Return what is free to the system or the device, and measure the peak from here on.

    Without Linux, the peak of the host is that of the whole process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if platform.libc_ver()[0] == "glibc":  # what an earlier step had would hide what this one needs
        ctypes.CDLL(None).malloc_trim(0)
    if os.access(_RESET, os.W_OK):
        _RESET.write_text("5")  # man 5 proc


def peak_bytes(device: torch.device) -> int:
    """Return the most memory since ``reset_peak``: of tensors on CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def used_bytes(device: torch.device) -> int:
    """Return the memory that is in use now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS") or peak_bytes(device)


def limit_bytes(device: torch.device, *, share: float) -> float:
    """Return what the peak may reach: what is in use, and a share of the memory that is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = _free_on_host()
    return used_bytes(device) + share * free


def _free_on_host() -> float:
    """Return the bytes that are free on this machine, or in its container if that has less."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+)", info.read_text("utf-8") if info.exists() else "")
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2  # of the machine, if nothing better is known
    free = float(found[1]) * 1024 if found else half
    for names in _CGROUPS:
        limit, use, statistics = (Path("/sys/fs/cgroup", name) for name in names)
        if limit.exists() and use.exists() and (text := limit.read_text("utf-8").strip()).isdigit():
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", statistics.read_text("utf-8"), re.MULTILINE)
            free = min(free, int(text) - int(use.read_text("utf-8")) + (int(cached[1]) if cached else 0))
    return free


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+)", _STATUS.read_text("utf-8") if _STATUS.exists() else "")
    return int(found[1]) * 1024 if found else 0
