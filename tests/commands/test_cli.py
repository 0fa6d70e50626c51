"""The command itself: help, exit codes, and one line for every failure."""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

import mmjax
from mmjax import cli
from mmjax.commands import COMMANDS


def test_help_names_every_command(run):
    code, out, err = run("--help")
    assert code == 0 and err == ""
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run, name):
    code, out, err = run(name, "--help")
    assert code == 0 and err == "" and out.startswith(f"usage: mmjax {name}")


def test_version(run):
    assert run("--version") == (0, f"mmjax {mmjax.__version__}\n", "")


def python(code, *arguments, **options):
    return subprocess.run([sys.executable, "-c", code, *arguments], text=True, capture_output=True, **options)


def test_help_and_usage_errors_import_nothing_heavy():
    lines = (
        "['--help'], ['zeroshot', '--help'], ['eval'], ['embed', '--help'], ['info', '--help'], ['convert']"
    )
    done = python(
        "import sys; from mmjax.cli import main\n"
        f"for line in ({lines}): main(line)\n"
        "heavy = {'jax', 'numpy', 'flax', 'PIL', 'rich', 'sklearn', 'safetensors', 'tokenizers'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    assert done.returncode == 0, done.stderr


def test_the_exit_code_reaches_the_shell():
    done = subprocess.run([sys.executable, "-m", "mmjax.cli", "zeroshoot"], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no command 'zeroshoot': did you mean zeroshot? (see mmjax --help)\n"


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "mmjax.cli", "--version"], stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command given: choose from train, eval"),
        (["frobnicate"], "no command 'frobnicate': choose from"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["zeroshot", "--model", "m", "--image", "a.png"], "required: --labels"),
        (["zeroshot", "--lab", "x"], "required: --model"),
        (["eval", "--model", "m", "--data", "digits"], "required: --task"),
        (["eval", "--model", "m", "--data", "digits", "--task", "vqa"], "invalid choice: 'vqa'"),
        (["info"], "required: DIR"),
        (["info", "a", "--depth", "0"], "'0' is not a whole number of at least 1"),
        (["convert", "a"], "required: DST"),
        (["convert", "a", "b", "--shard-size", "big"], "'big' is not a size such as 500MB"),
        (["convert", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["embed", "--model", "m", "--out", "x.npz", "--batch-size", "-1"], "'-1' is not a whole number"),
        (["eval", "--max-broken", "nan"], "not a number between 0 and 1"),
        (["eval", "--l2", "inf"], "not a finite number of at least 0"),
        (["info", "a", "b\n\x1b[31m"], r"unrecognized arguments: b\\n\\x1b\[31m"),
        (["train", "no-such-file.py"], "no-such-file.py: no such experiment file"),
    ],
)
def test_usage_errors(fails, arguments, message):
    assert re.search(message, fails(*arguments))


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("one\ntwo\x1b[0m"), 1, "unexpected ValueError: one two\\x1b[0m (run with --debug"),
        (FileNotFoundError(2, "No such file or directory", "a\nb"), 2, "a\\nb: No such file or directory"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError(), 1, "out of memory: try a smaller --batch-size"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), 1, "out of memory"),
    ],
)
def test_failures_are_one_line(fails, run, monkeypatch, raised, code, message):
    def boom(arguments, debug):
        raise raised

    monkeypatch.setattr(cli, "_dispatch", boom)
    assert fails("info", code=code).startswith(message)
    found, out, err = run("info", "--debug")
    assert (found, out) == (code, "") and err.startswith("Traceback") and "boom" in err


def test_an_interrupt_that_the_garbage_collector_swallows_comes_again(fails, monkeypatch):
    def collect(phase, details):
        if phase == "start":
            gc.callbacks.remove(collect)
            signal.raise_signal(signal.SIGINT)

    def work(arguments, debug):
        gc.callbacks.append(collect)
        gc.collect()
        threading.Event().wait(30)

    monkeypatch.setattr(cli, "_dispatch", work)
    assert fails("info", code=130) == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_waits_for_an_import_to_end(fails, monkeypatch, tmp_path):
    (tmp_path / "slow_module_of_a_test.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.2)\nDONE = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def work(arguments, debug):
        assert importlib.import_module("slow_module_of_a_test").DONE
        threading.Event().wait(30)

    monkeypatch.setattr(cli, "_dispatch", work)
    assert fails("info", code=130) == "interrupted"


def test_an_interrupt_in_disguise_is_still_one(fails, monkeypatch):
    def work(arguments, debug):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("while initializing the extension") from None

    monkeypatch.setattr(cli, "_dispatch", work)
    assert fails("info", code=130) == "interrupted"


def test_lists_of_faults_keep_their_lines(run, monkeypatch):
    def boom(arguments, debug):
        raise mmjax.errors.CheckpointError("two faults:\n  a\n  b\x07")

    monkeypatch.setattr(cli, "_dispatch", boom)
    assert run("info") == (2, "", "error: two faults:\n  a\n  b\\x07\n")
