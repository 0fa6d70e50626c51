"""How this process's allocator treats memory that a step has freed."""

from __future__ import annotations

import ctypes
import os

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that programs free, in place of handing it back to the system.

    On CPU, XLA takes a program's buffers from malloc and frees them at its end. glibc may give gigabytes
    back, and every page of the next step is then taken and zeroed anew: a million page faults in a CLIP
    ViT-B/32 step of 32 pairs. To be called before the first large program; the process then holds the most
    that it ever needed.

    Returns:
        Whether it was set: not where another C library allocates, nor where the user has set GLIBC_TUNABLES
        or one of glibc's MALLOC_ variables.

    >>> keep_freed_memory() in (True, False)
    True
    """
    own = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    if any(name in os.environ for name in own):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  other libraries' mallopt has other numbers
        settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
        return all([library.mallopt(name, value) == 1 for name, value in settings])
    except (AttributeError, OSError, TypeError):
        return False
