"""Keeping freed memory: whose settings win, and that it says what it did."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

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


EXPERIMENT = """
import resource, sys

sys.path.insert(0, {root!r})
import jax
import jax.numpy as jnp
from tests.training.toy import toy_experiment


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def evaluate(outcome):
    x = jnp.ones((4400, 8))
    program = jax.jit(lambda x: (lambda product: product / product.max())(x @ x.T).sum())
    before = faults()
    of_runs = []
    for _ in range(41):
        program(x).block_until_ready()
        of_runs.append(faults() - before)
        before = faults()
    return {{"faults": sorted(of_runs)[20]}}


def experiment():
    jax.devices()
    return toy_experiment(evaluate=evaluate)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_run_keeps_the_buffers_of_its_programs(tmp_path):
    """A program's 77 MB are not taken anew for each of its runs, though the experiment's file starts jax.

    The median run tells: in some the heap still grows, where what was kept lies between other blocks.
    """
    file = tmp_path / "kept.py"
    file.write_text(EXPERIMENT.format(root=str(Path(__file__).parents[2])))
    faults = []
    for own in ({}, {"MALLOC_ARENA_MAX": "2"}):
        command = [sys.executable, "-m", "mmjax.cli", "train", str(file), "--workdir", str(tmp_path)]
        environment = {**os.environ, **own}
        subprocess.run([*command, "--overwrite"], check=True, capture_output=True, env=environment)
        result = json.loads((tmp_path / "output/toy/result.json").read_text())
        faults.append(result["metrics"]["faults"])
    kept, given_back = faults
    print("MED", kept, given_back)
    assert kept < given_back / 4


@pytest.mark.parametrize(("named", "only"), [("cpu", True), ("cpu,cuda", True), ("cuda,cpu", False)])
def test_what_jax_was_told_to_take_is_what_it_has(named, only):
    assert asked({"JAX_PLATFORMS": named}, "") == only


def test_an_installed_plugin_may_find_an_accelerator():
    plugin = "import importlib.metadata as m; m.entry_points = lambda group: ['a plugin']; "
    assert not asked({"JAX_PLATFORMS": ""}, plugin)


def asked(environment, first):
    """What a process of its own answers; jax reads its settings when it is imported."""
    script = first + "from mmjax.parallel import only_cpu; print(only_cpu())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout.strip() == "True"
