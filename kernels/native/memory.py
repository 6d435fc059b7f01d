"""The memory of training steps on a CPU."""

import ctypes
import functools
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_MOST = 2**31 - 1  # an int


@functools.cache
def keep_freed() -> None:
    """Have the process keep the memory that it frees, as a training step needs the same again.

    glibc maps every image of 32 MiB and more anew and hands it back at once, and of smaller ones all beyond 64 MiB.
    New pages cost a fault and are filled with zeros first: a tenth of a step of ResNet-50 at batch 16. What the user
    has set in the environment stands.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST)
