"""Keeping freed memory: whose settings win, and that it says what it did."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from mmjax.parallel import keep_freed_memory


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_"])
def test_the_users_settings_stay(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_stays():
    """In a process of its own: 256 MiB that were freed are still there, and were given back without it."""
    script = """
import ctypes, os, sys
from mmjax.parallel import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
block = library.malloc(1 << 28)
ctypes.memset(block, 1, 1 << 28)
library.free(block)
pages = int(open("/proc/self/statm").read().split()[1])
print(kept, pages * os.sysconf("SC_PAGE_SIZE") > 1 << 28)
"""
    for word, expected in (("keep", "True True"), ("plain", "False False")):
        done = subprocess.run(
            [sys.executable, "-c", script, word], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
