"""The memory of this process, or of its tensors on CUDA: a peak that is measured anew, and what is free."""

import ctypes
import gc
import os
import platform
import re
import resource
from pathlib import Path

import torch

_GROUPS = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")


def reset_peak(device: torch.device) -> None:
    """Return what is free to the system or the device, and measure the peak from here on.

    Where the system cannot forget a peak, the one of the whole process stays.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if platform.libc_ver()[0] == "glibc":  # what an earlier step had would hide what the next one needs
        ctypes.CDLL(None).malloc_trim(0)
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc


def peak_bytes(device: torch.device) -> int:
    """Return the most memory since ``reset_peak``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes("/proc/self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def used_bytes(device: torch.device) -> int:
    """Return the memory that is in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _kilobytes("/proc/self/status", "VmRSS") or peak_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process may still take, on this machine and in its container."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # if nothing better is known
    free = _kilobytes("/proc/meminfo", "MemAvailable") or half
    for limit, used in ((Path("/sys/fs/cgroup", name) for name in names) for names in _GROUPS):
        if used.is_file() and limit.is_file() and (most := limit.read_text("utf-8").strip()).isdigit():
            stat = used.with_name("memory.stat")  # what was read of files counts as used, but makes room
            cached = re.findall(r"inactive_file (\d+)", stat.read_text("utf-8") if stat.is_file() else "")
            free = min(free, int(most) - int(used.read_text("utf-8")) + max(map(int, cached), default=0))
    return free


def megabytes(number: float) -> str:
    """Write megabytes (2 ** 20 bytes) as MB or GB."""
    return f"{number / 1024:,.1f} GB" if number >= 1024 else f"{number:.3g} MB"


def _kilobytes(file: str, name: str) -> int:
    """Return an entry in kB of a file of /proc in bytes, or 0 without it."""
    found = re.search(rf"{name}:\s*(\d+)", Path(file).read_text("utf-8") if Path(file).is_file() else "")
    return int(found[1]) * 1024 if found else 0
