import platform
import subprocess
import sys

from distilkit.cli import keep_large_buffers

# The resident memory after freeing 200 MB, with and without the raised thresholds.
PROBE = """
import resource, sys
from distilkit.cli import keep_large_buffers
if sys.argv[1] == "keep":
    assert keep_large_buffers()
block = bytearray(200_000_000)
del block
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * resource.getpagesize())
"""


def resident_after_freeing(mode: str) -> int:
    output = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True).stdout
    return int(output)


def test_freed_buffers_stay_with_the_process_where_the_library_is_glibc() -> None:
    if platform.libc_ver()[0] == "glibc":
        assert resident_after_freeing("keep") - resident_after_freeing("give back") > 150_000_000
    else:
        assert not keep_large_buffers()
