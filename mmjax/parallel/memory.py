"""How this process's allocator treats memory that a step has freed."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that programs free, in place of handing it back to the system.

    On CPU, XLA takes a program's buffers from malloc and frees them at its end. glibc may give gigabytes
    back, and every page of the next step is then taken and zeroed anew: a million page faults in a CLIP
    ViT-B/32 step of 32 pairs. The process then holds the most that it ever needed, and where a program's
    buffers fall between others', several times the program's.

    To be called before jax starts its devices: a thread of theirs that has allocated before has an arena of
    its own, which no setting takes from it, and no arena but the first keeps blocks of more than 64 MB.

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


def only_cpu() -> bool:
    """Whether jax will find the CPU and nothing else, told without importing it.

    Where an accelerator's plugin is installed, it is believed that there is an accelerator, unless
    JAX_PLATFORMS says "cpu".

    >>> only_cpu() in (True, False)
    True
    """
    named = os.environ.get("JAX_PLATFORMS")
    if named:
        return named.split(",")[0] == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
