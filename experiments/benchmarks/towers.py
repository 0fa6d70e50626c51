"""ViT-B/16 forward and a CLIP ViT-B/32 training step, in mmjax and in transformers, side by side on CPU.

    python experiments/benchmarks/towers.py [--quick]

Every library, and every form of it, runs in a process of its own with the same random weights and inputs.
The processes take turns, one call set at a time; a turn during which other programs used the machine is taken
again. The table has medians and, against the best form of the other library, the median of the turns' ratios.
Results go to RESULTS.md and results.json beside this file; parts (--quick, --case) to output/towers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tower_workers import Case
from turns import HERE, MEMORY, Runner, describe, machine, ratio, take_turns

CASES = [
    Case("vit", 8, "float32"),
    Case("vit", 8, "bfloat16"),
    Case("vit", 32, "float32"),
    Case("vit", 32, "bfloat16"),
    Case("clip", 32, "float32"),
    Case("clip", 32, "bfloat16"),
]
TITLES = {"vit": "ViT-B/16 forward", "clip": "CLIP ViT-B/32 training step"}
AIMS = {"float32": 1.0, "bfloat16": 0.8}


def forms(case: Case) -> dict[str, list[str]]:
    """The forms of each library that are worth measuring for a case.

    Training keeps float32 parameters in both libraries; inference may hold them in bfloat16.
    """
    if case.dtype == "float32":
        return {"mmjax": ["jit"], "transformers": ["eager", "compiled"]}
    if case.model == "clip":
        return {"mmjax": ["jit"], "transformers": ["eager autocast", "compiled autocast"]}
    return {
        "mmjax": ["jit", "jit weights"],
        "transformers": ["eager autocast", "eager weights", "compiled weights"],
    }


def prepare(folder: Path) -> None:
    """Write both models with random weights as hub folders, through transformers."""
    import torch
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    vit = ViTConfig()
    vit.num_labels = 1000
    ViTForImageClassification(vit).save_pretrained(folder / "vit")
    CLIPModel(CLIPConfig()).save_pretrained(folder / "clip")


def measure(case: Case, folder: Path, rounds: int, retakes: int) -> list[Runner]:
    """All forms of a case, taking turns."""
    start = [
        functools.partial(
            Runner.start, "tower_workers.py", library, form, case.name, str(folder / case.model)
        )
        for library, names in forms(case).items()
        for form in names
    ]
    return take_turns(start, rounds, retakes)


def summary(case: Case, runners: list[Runner]) -> dict[str, Any]:
    """The numbers of a case."""
    return {"case": dataclasses.asdict(case), "aim": AIMS[case.dtype], **compare(runners)}


def compare(runners: list[Runner]) -> dict[str, Any]:
    """Each form's numbers, and the ratio and difference of the libraries' best forms."""
    best = {
        library: min((r for r in runners if r.library == library), key=lambda r: r.median)
        for library in ("mmjax", "transformers")
    }
    ours, theirs = best["mmjax"], best["transformers"]
    middle, least, largest = ratio(ours, theirs)
    first, second = (r.setup["result"] for r in (ours, theirs))
    scale = max(abs(x) for x in second)
    return {
        "ratio": middle,
        "ratio_range": [least, largest],
        "difference": max(abs(a - b) for a, b in zip(first, second, strict=True)) / scale,
        "best": {library: runner.form for library, runner in best.items()},
        "forms": [r.numbers() for r in runners],
    }


def table(results: list[dict[str, Any]], about: dict[str, Any], rounds: int) -> str:
    """RESULTS.md."""
    lines = [
        "# Towers on CPU: mmjax beside transformers",
        "",
        "Made by `python experiments/benchmarks/towers.py`; see its first lines for how it measures.",
        "",
        describe(about, rounds),
        "",
        "The ratio is transformers' time over mmjax's, best form against best form (above 1: mmjax is "
        "faster). The difference is the largest between the two libraries' results (logits, or the first "
        "three losses) over the largest value.",
        "",
        "| case | dtype | mmjax | transformers | ratio (range) | aim | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case = result["case"]
        best = {f["library"]: f for f in result["forms"] if result["best"][f["library"]] == f["form"]}
        low, high = result["ratio_range"]
        cells = [milliseconds(best[name]["median_seconds"]) for name in ("mmjax", "transformers")]
        lines.append(
            f"| {TITLES[case['model']]}, batch {case['batch']} | {case['dtype']} | {' | '.join(cells)} "
            f"| **{result['ratio']:.2f}** ({low:.2f} to {high:.2f}) | {result['aim']} "
            f"| {result['difference']:.0e} |"
        )
    lines += [
        "",
        "Every form. For mmjax compiling is apart from the first call; torch.compile compiles in its first "
        "call. Peak memory is the process's high-water mark, libraries included.",
        "",
        "| case | dtype | library | form | median | processor time | compile | first call | peak memory "
        "| noisy turns |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case = result["case"]
        for form in result["forms"]:
            title = f"{TITLES[case['model']]}, batch {case['batch']}"
            lines.append(f"| {title} | {case['dtype']} | {form_cells(form, rounds)} |")
    return "\n".join(lines) + "\n"


def form_cells(form: dict[str, Any], rounds: int) -> str:
    """Library, form, median, processor time, compile, first call, peak memory and noisy turns."""
    compiled = form["compile_seconds"]
    cells = [
        form["library"],
        form["form"],
        milliseconds(form["median_seconds"]),
        milliseconds(form["processor_seconds"]),
        "" if compiled is None else f"{compiled:.1f} s",
        f"{form['first_call_seconds']:.1f} s",
        f"{form['peak_bytes'] / 2**30:.2f} GiB",
        f"{form['noisy_turns']} of {rounds}",
    ]
    return " | ".join(cells)


def milliseconds(seconds: float) -> str:
    """For example "12 ms"."""
    return f"{1000 * seconds:.0f} ms"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="three turns of each form")
    parser.add_argument("--rounds", type=int, default=None, help="turns of each form (default 9, quick 3)")
    parser.add_argument("--retakes", type=int, default=4, help="of a turn that others disturbed (default 4)")
    parser.add_argument("--case", action="append", help="only these, such as vit-8-bfloat16 (repeatable)")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (3 if options.quick else 9)
    cases = [Case.parse(name) for name in options.case] if options.case else CASES
    output = Path("output", "towers") if options.quick or options.case else HERE
    output.mkdir(parents=True, exist_ok=True)

    results = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for case in cases:
            print(case.name, flush=True)
            results.append(summary(case, measure(case, Path(folder), rounds, options.retakes)))
            print(f"  ratio {results[-1]['ratio']:.2f}", flush=True)
    about = {**machine("jax", "flax", "torch", "transformers"), "memory": MEMORY}
    text = table(results, about, rounds)
    (output / "RESULTS.md").write_text(text)
    (output / "results.json").write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
