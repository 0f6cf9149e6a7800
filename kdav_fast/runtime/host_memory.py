"""What the C library does with memory that torch frees on a CPU."""

import ctypes
import os
import platform

# <malloc.h>; both values are ints.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM = 2**31 - 1
_LARGEST_MMAP = 2**30, 2**25  # older versions of glibc refuse more than 32 MiB


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, for good, up to 2 GiB, and take blocks of up to 1 GiB from that.

    Every step allocates the same activations and frees them. By default glibc gives large blocks back to the system
    each time, and the next step waits for the system to clear their pages again.

    Returns:
        Whether it was set: not with another C library, and not where the environment already says what to do
        (`MALLOC_*`, `GLIBC_TUNABLES`).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    larger = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST_MMAP)
    return larger and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM))
