"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 2**30


def keep_freed() -> bool:
    """Have large freed blocks of this process kept for reuse; False where the C library is not glibc.

    glibc gives activations of more than 32 MiB back to the system when they are freed, and every step then pays a
    page fault for each 4 KiB of them: ten times as long as it takes to fill memory that is there. The process keeps
    its largest size instead.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, _LARGE) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
