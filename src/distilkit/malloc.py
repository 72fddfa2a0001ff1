"""Let the C library keep large buffers between steps.

A vocabulary-wide tensor is larger than glibc's threshold for giving memory back, so that every step maps and unmaps
hundreds of megabytes: with a vocabulary of 30,522 on 2 cores that was half of the time of a training step.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LIMIT = 2**31 - 1  # mallopt takes an int


def keep_large_buffers() -> bool:
    """Raise glibc's thresholds for this process; return False, with nothing changed, on another C library."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, _LIMIT) == 1 for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
