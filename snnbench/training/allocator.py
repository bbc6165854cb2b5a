"""Tell the C library to keep freed memory: a training step asks for the same blocks again.

glibc gives large blocks back to the system when they are freed; every step then waits for the
system to hand out, and clear, the same pages again.  This is set by the command line for its own
processes, never by importing the package.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT = 2**31 - 1  # bytes: the largest number that mallopt takes


def keep_freed_memory() -> str:
    """Set it where that is possible; what was set, for the record."""
    if platform.libc_ver()[0] != "glibc":
        return "unchanged: not glibc"
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(M_MMAP_THRESHOLD, KEPT), mallopt(M_TRIM_THRESHOLD, KEPT),
            mallopt(M_TOP_PAD, 64 << 20)]  # fmt: skip
    return "glibc keeps freed memory" if all(done) else "unchanged: glibc refused"
