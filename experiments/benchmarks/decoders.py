"""Text from a 1.1B LLaMA on CPU: mmjax beside transformers; loading; compiling.

    python experiments/benchmarks/decoders.py [--quick] [--only speed loading compiling starting]

- speed: greedy texts after prompts of 256 tokens, batches of 1 and 8; every library and form in a process of
  its own, taking turns. A turn of one new token gives the time to the first token; what a turn of 33 takes
  more is the time of 32 further ones.
- loading: a bfloat16 folder of 2.2 GB; seconds, and how much memory the process came to hold.
- compiling: prefill and one decode step of 32 layers of LLaMA-2-7B's shapes, scanned and unrolled; nothing is
  run.
- starting: `mmjax generate` twice, with an empty folder of compiled programs and with a full one.

Weights are random. Results go to DECODERS.md and decoders.json beside this file; --quick to output/decoders.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from decoder_workers import PROMPT, Case
from turns import HERE, MEMORY, Runner, describe, machine, ratio, take_turns

WORKER = "decoder_workers.py"
# By batch. The float32 forms, and compiling with a static cache, are measured where they take least time: one
# prompt.
FORMS = {
    1: [
        ("mmjax", "bfloat16"),
        ("mmjax", "bfloat16 transposed"),
        ("mmjax", "float32"),
        ("transformers", "eager bfloat16"),
        ("transformers", "compiled bfloat16"),
        ("transformers", "eager float32"),
    ],
    8: [("mmjax", "bfloat16"), ("mmjax", "bfloat16 transposed"), ("transformers", "eager bfloat16")],
}
LIBRARIES = ("mmjax", "transformers")
NEW = 33
PARTS = ("speed", "loading", "compiling", "starting")
TINY_LLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


def prepare(folder: Path) -> None:
    """Write the model with random weights as a hub folder, bfloat16, with a small tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**TINY_LLAMA, eos_token_id=2)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    vocabulary = {f"w{number}": number for number in range(TINY_LLAMA["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def speed(folder: Path, batch: int, rounds: int, retakes: int) -> dict[str, Any]:
    """First-token times and decode rates of every form at one batch size, and the best forms' ratios."""
    turns: dict[int, list[Runner]] = {}
    for new in (1, NEW):
        case = Case(batch, new).name
        print(f"  batch {batch}, {new} new", flush=True)
        text = functools.partial(Runner.start, WORKER, writes_text=True)
        start = [functools.partial(text, *form, case, str(folder)) for form in FORMS[batch]]
        turns[new] = take_turns(start, rounds, retakes)
    return {"batch": batch, **compare(turns[1], turns[NEW], batch)}


def compare(first: list[Runner], whole: list[Runner], batch: int) -> dict[str, Any]:
    """The best form of each library, for the first token and for decoding apart."""
    leave_first(first, whole)
    found: dict[str, Any] = {}
    for name, runners in (("first", first), ("decode", whole)):
        ours, theirs = (
            min((r for r in runners if r.library == library), key=lambda r: r.median) for library in LIBRARIES
        )
        found[name] = {"best": [ours.form, theirs.form], "ratio": ratio(ours, theirs)}
    found["forms"] = [
        {
            "library": one.library,
            "form": one.form,
            "first_seconds": one.median,
            "tokens_per_second": batch * (NEW - 1) / more.median,
            "peak_bytes": more.peak,
            "noisy_turns": one.noisy + more.noisy,
        }
        for one, more in zip(first, whole, strict=True)
    ]
    return found


def leave_first(first: list[Runner], whole: list[Runner]) -> None:
    """From here on a turn of the longer texts is what it took beyond the first token."""
    for one, more in zip(first, whole, strict=True):
        more.seconds = [seconds - one.median for seconds in more.seconds]
        more.processor = [seconds - statistics.median(one.processor) for seconds in more.processor]


def loading(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Each way to open the folder, in fresh processes that alternate."""
    ways = [("mmjax", "1"), ("mmjax", "8"), ("transformers", "1")]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for library, devices in ways:
            flags = f"--xla_force_host_platform_device_count={devices}"
            command = [sys.executable, str(HERE / WORKER), library, devices, "load", str(folder)]
            done = subprocess.run(
                command, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True, check=True
            )
            runs[library, devices].append(json.loads(done.stdout.splitlines()[-1]))
    return [
        {"library": library, "devices": int(devices), **_medians(runs[library, devices])}
        for library, devices in ways
    ]


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def compiling() -> list[dict[str, Any]]:
    """Seconds to trace and to compile, from shapes alone, each in a fresh process."""
    results = []
    for layers in ("unrolled", "scanned"):
        for what in ("prefill", "decode"):
            command = [sys.executable, str(HERE / WORKER), "mmjax", layers, what, "-"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append({"layers": layers, "program": what, **json.loads(done.stdout.splitlines()[-1])})
    return results


def starting(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of whole `mmjax generate` commands."""
    seconds: dict[str, list[float]] = {"first": [], "second": []}
    command = [sys.executable, "-m", "mmjax.cli", "generate", "--model", str(folder)]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for start in seconds:
                begin = time.perf_counter()
                subprocess.run(
                    [*command, "--max-new-tokens", "8", "w5 w6 w7"],
                    env={**os.environ, "XDG_CACHE_HOME": cache},
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
                seconds[start].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(results: dict[str, Any]) -> str:
    """DECODERS.md."""
    lines = [
        "# Language models on CPU",
        "",
        "Made by `python experiments/benchmarks/decoders.py`; see its first lines for what is measured.",
        "",
        describe(results["machine"], results["rounds"]),
        "",
        f"## Speed: LLaMA shapes of 1.1B, prompts of {PROMPT} tokens",
        "",
        "Ratios are transformers' time over mmjax's, best form against best form (above 1: mmjax is faster).",
        "",
        "| batch | first token: mmjax | transformers | ratio (range) | decoding: mmjax | transformers "
        "| ratio (range) |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results["speed"]:
        forms = {(f["library"], f["form"]): f for f in result["forms"]}
        cells = []
        for name, field, unit in (
            ("first", "first_seconds", "s"),
            ("decode", "tokens_per_second", "tokens/s"),
        ):
            for library, form in zip(LIBRARIES, result[name]["best"], strict=True):
                cells.append(f"{forms[library, form][field]:.2f} {unit} ({form})")
            middle, low, high = result[name]["ratio"]
            cells.append(f"**{middle:.2f}** ({low:.2f} to {high:.2f})")
        lines.append(f"| {result['batch']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| batch | library | form | first token | decoding | peak memory | noisy turns |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results["speed"]:
        for f in result["forms"]:
            lines.append(
                f"| {result['batch']} | {f['library']} | {f['form']} | {f['first_seconds']:.2f} s "
                f"| {f['tokens_per_second']:.2f} tokens/s | {f['peak_bytes'] / 2**30:.2f} GiB "
                f"| {f['noisy_turns']} of {2 * results['rounds']} |"
            )
    return "\n".join([*lines, *_loading_lines(results), *_compiling_lines(results)]) + "\n"


def _loading_lines(results: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Loading: a bfloat16 folder of 2.2 GB",
        "",
        "Memory is what the process held at most, less what it held with its libraries imported.",
        "",
        "| library | devices | seconds | weights | peak above the imports | peak above imports and weights |",
        "|---|---|---|---|---|---|",
    ]
    for run in results["loading"]:
        over = run["peak_bytes"] - run["weight_bytes"]
        sizes = " | ".join(f"{size / 1e6:.0f} MB" for size in (run["weight_bytes"], run["peak_bytes"], over))
        lines.append(f"| {run['library']} | {run['devices']} | {run['seconds']:.1f} s | {sizes} |")
    return lines


def _compiling_lines(results: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Compiling: 32 layers of LLaMA-2-7B's shapes, bfloat16",
        "",
        f"Prefill of {PROMPT} tokens, and one step with a cache of {2 * PROMPT}.",
        "",
        "| layers | program | trace and lower | compile |",
        "|---|---|---|---|",
    ]
    for run in results["compiling"]:
        lines.append(
            f"| {run['layers']} | {run['program']} | {run['lower']:.1f} s | {run['compile']:.1f} s |"
        )
    first, second = (results["starting"][name] for name in ("first", "second"))
    return [
        *lines,
        "",
        f"`mmjax generate`, 8 tokens, the 1.1B folder: {first:.1f} s the first time, {second:.1f} s the "
        f"second, with the programs of the first ({second / first:.2f} of it).",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two turns of each form")
    parser.add_argument("--rounds", type=int, default=None, help="turns of each form (default 5, quick 2)")
    parser.add_argument("--retakes", type=int, default=2, help="of a turn that others disturbed (default 2)")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="measure these, keep the rest"
    )
    options = parser.parse_args(arguments)
    rounds = options.rounds or (2 if options.quick else 5)
    output = Path("output", "decoders") if options.quick else HERE
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "decoders.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    results |= {
        "machine": {**machine("jax", "flax", "torch", "transformers"), "memory": MEMORY},
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        measure: dict[str, Callable[[], Any]] = {
            "speed": lambda: [speed(folder, batch, rounds, options.retakes) for batch in FORMS],
            "loading": lambda: loading(folder, rounds),
            "compiling": compiling,
            "starting": lambda: starting(folder, 2),
        }
        for part in options.only:
            print(part, flush=True)
            results[part] = measure[part]()
            kept.write_text(json.dumps(results, indent=1) + "\n")
    if all(part in results for part in PARTS):
        text = report(results)
        (output / "DECODERS.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
