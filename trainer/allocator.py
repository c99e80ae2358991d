"""The C library's memory allocator, told to keep what a training step has freed.

On a CPU each step allocates and frees the same megabytes. glibc hands large blocks back to the
kernel, which gives the next step zeroed pages one fault at a time: 2,000 to 6,000 faults and 7 to
20 ms of system time in a step of 70 ms (smallcnn, batches of 128). Both thresholds matter: with the
first alone, blocks come from the heap, whose end is handed back, which is worse.
"""

import ctypes
import functools
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's malloc.h, as mallopt(3) has them."""
_MOST = 2**31 - 1
"""Bytes: mallopt takes an int. A larger block is mapped, and handed back, as ever."""
_PAD = 2**26


@functools.cache
def keep_freed_memory() -> bool:
    """For as long as this process lives; False where the C library is not glibc.

    What a process has used at most stays with it: a worker needs it again with its next step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = {_M_MMAP_THRESHOLD: _MOST, _M_TRIM_THRESHOLD: _MOST, _M_TOP_PAD: _PAD}
    return all(mallopt(option, value) == 1 for option, value in options.items())
