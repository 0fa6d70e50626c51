"""Contrastive losses and gradient caching on CPU: time beside dense JAX and open_clip, and memory.

    python experiments/benchmarks/contrastive.py [--quick] [--only PART ...]

Value and gradients of both embeddings and of the scale (and bias). Every form runs in a process of its own,
and the processes take turns. The part "large" runs a loss of 131,072 pairs once, which takes minutes. Results
go to contrastive.json and, when every part is there, CONTRASTIVE.md beside this file; with --quick, to
output/contrastive. Times of the losses are kept for every processor that this ran on: the ratios depend on
how fast the libraries' products are there.
Needs torch, and open_clip's loss: pip install --no-deps open_clip_torch
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contrastive_workers import clip_step, loss_in_jax, make_embeddings, temporary_bytes
from turns import HERE, MEMORY, Runner, describe, machine, peak_bytes, ratio, take_turns

WORKER = "contrastive_workers.py"
COUNT, WIDTH, PRODUCT = 8192, 512, 4096
LARGEST = 131_072
PARTS = ("time", "caching", "memory", "large")
# Products of N x N x D that nothing can leave out. InfoNCE: the similarities, once for the value and once for
# the gradient, and the gradient of each side. The sigmoid's gradient needs nothing of other pairs: one less.
PRODUCTS = {"infonce": 4, "sigmoid": 3}
MICRO_BATCH = 16


def time_loss(name: str, rounds: int, retakes: int) -> dict[str, Any]:
    """A loss of 8,192 pairs in every form, and the machine's product rate between them."""
    case = f"{name}-{COUNT}-{WIDTH}"
    start: list[Callable[[], Runner]] = [
        functools.partial(Runner.start, WORKER, "mmjax", "blocks", case),
        functools.partial(Runner.start, WORKER, "jax", "dense", case),
        functools.partial(Runner.start, WORKER, "jax", "dense, memory kept", case),
        functools.partial(Runner.start, WORKER, "open_clip", "eager", case),
        functools.partial(Runner.start, WORKER, "open_clip", "compiled", case),
        functools.partial(Runner.start, WORKER, "product", "jax", f"matmul-{PRODUCT}"),
        functools.partial(Runner.start, WORKER, "product", "torch", f"matmul-{PRODUCT}"),
    ]
    runners = take_turns(start, rounds, retakes)
    ours, dense, kept, eager, compiled, *products = runners
    product = min(products, key=lambda r: r.median)
    torch = min((eager, compiled), key=lambda r: r.median)
    rate = 2 * PRODUCT**3 / product.median
    used = PRODUCTS[name] * 2 * COUNT**2 * WIDTH / ours.median
    first = ours.setup["result"]
    differences = [
        max(abs(a - b) / max(abs(b), 1) for a, b in zip(first, r.setup["result"], strict=True))
        for r in runners[1:5]
    ]
    return {
        "loss": name,
        "forms": [r.numbers() for r in runners],
        "over_dense": ratio(ours, dense),
        "over_kept": ratio(ours, kept),
        "over_open_clip": ratio(ours, torch),
        "product_rate": rate,
        "share_of_product_rate": used / rate,
        "difference": max(differences),
    }


def memory(counts: Sequence[int]) -> list[dict[str, Any]]:
    """XLA's temporary bytes for value and gradients, compiled and not run."""
    import jax
    import numpy as np

    rows = []
    for count in counts:
        side, scalar = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((count, WIDTH), ()))
        row: dict[str, Any] = {"pairs": count}
        for name, number in (("infonce", 3), ("sigmoid", 4)):
            arguments = (side, side, scalar, scalar)[:number]
            for form in ("blocks", "dense"):
                gradient = jax.value_and_grad(loss_in_jax(name, form), tuple(range(number)))
                compiled = jax.jit(gradient).lower(*arguments).compile()
                row[f"{name} {form}"] = temporary_bytes(compiled)
        rows.append(row)
    return rows


def run_large() -> dict[str, float]:
    """InfoNCE of 131,072 pairs with gradients, once, in this process."""
    import jax
    import numpy as np

    gradient = jax.jit(jax.value_and_grad(loss_in_jax("infonce", "blocks"), (0, 1, 2)))
    arguments = (*jax.device_put(make_embeddings(LARGEST, WIDTH)), np.float32(100))
    compiled = gradient.lower(*arguments).compile()
    begin = time.perf_counter()
    value, grads = jax.block_until_ready(compiled(*arguments))
    seconds = time.perf_counter() - begin
    finite = all(bool(np.isfinite(np.asarray(g)).all()) for g in grads)
    assert finite, "a gradient is not finite"
    return {"pairs": LARGEST, "seconds": seconds, "peak_bytes": peak_bytes(), "loss": float(value)}


def caching(rounds: int, retakes: int) -> dict[str, Any]:
    """A CLIP ViT-B/32 step of 32 pairs in one piece and in micro-batches, and its memory as batches grow."""
    start = [functools.partial(Runner.start, WORKER, "mmjax", str(parts), "step-32") for parts in (1, 2, 4)]
    plain, *cut = take_turns(start, rounds, retakes)
    growth = []
    for size in (MICRO_BATCH, 4 * MICRO_BATCH, 16 * MICRO_BATCH):
        row = {"batch": size}
        for parts in (1, size // MICRO_BATCH):
            step, state, batch = clip_step(size, parts, shapes_only=True)
            size_of_it = temporary_bytes(step.lower(state, batch).compile())
            row["in one piece" if parts == 1 else "in micro-batches"] = size_of_it
        row.setdefault("in micro-batches", row["in one piece"])
        growth.append(row)
    return {
        "forms": [r.numbers() for r in (plain, *cut)],
        "extra": {r.form: 1 / ratio(r, plain)[0] - 1 for r in cut},
        "difference": max(
            abs(a - b) for r in cut for a, b in zip(r.setup["result"], plain.setup["result"], strict=True)
        ),
        "growth": growth,
    }


def report(results: dict[str, Any]) -> str:
    """CONTRASTIVE.md."""
    lines = [
        "# Contrastive losses on CPU: time and memory",
        "",
        "Made by `python experiments/benchmarks/contrastive.py`; see its first lines.",
        "",
        f"## Time: value and gradients, {COUNT:,} pairs, {WIDTH} numbers each, float32",
        "",
        "Ratios are the other's time over mmjax's, medians of the turns' (above 1: mmjax is faster); "
        "open_clip in the faster of its forms. The share is of the best float32 product that JAX or torch "
        f"did between the turns ({PRODUCT} x {PRODUCT}), counting the products that nothing can leave out "
        f"({' and '.join(f'{number} for {name}' for name, number in PRODUCTS.items())}). Dense JAX holds the "
        "similarities and so needs 3 products for either; with its memory kept it is measured too.",
    ]
    for timed in results["time"].values():
        lines += _times(timed["losses"], timed["machine"])
    names = ("infonce blocks", "infonce dense", "sigmoid blocks", "sigmoid dense")
    lines += ["", "## Memory: XLA's temporary bytes for the same, compiled", ""]
    lines += [describe(results["machine"], len(results["caching"]["forms"][0]["seconds"])), ""]
    lines += [f"| pairs | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for row in results["memory"]:
        lines.append(f"| {row['pairs']:,} | {' | '.join(_mb(row[name]) for name in names)} |")
    large = results["large"]
    lines += [
        "",
        f"InfoNCE of {large['pairs']:,} pairs with gradients ran in {large['seconds']:.0f} s; the process "
        f"never held more than {large['peak_bytes'] / 2**30:.2f} GiB, inputs and libraries included.",
    ]
    cached = results["caching"]
    lines += ["", "## Gradient caching: CLIP ViT-B/32 step of 32 pairs, float32", ""]
    lines += ["| micro-batches | median | extra time | temporary memory |", "|---|---|---|---|"]
    for form in cached["forms"]:
        extra = f"{cached['extra'][form['form']]:+.0%}" if form["form"] in cached["extra"] else ""
        lines.append(f"| {form['form']} | {_ms(form)} | {extra} | {_mb(form['temporary_bytes'])} |")
    lines += ["", f"Temporary memory as the batch grows, micro-batches of {MICRO_BATCH} pairs:", ""]
    lines += ["| pairs | in one piece | in micro-batches |", "|---|---|---|"]
    for row in cached["growth"]:
        lines.append(f"| {row['batch']} | {_mb(row['in one piece'])} | {_mb(row['in micro-batches'])} |")
    lines += ["", f"The losses of the first three steps differ by {cached['difference']:.0e} at most."]
    return "\n".join(lines) + "\n"


def _times(losses: list[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """The tables of one processor."""
    rounds = len(losses[0]["forms"][0]["seconds"])
    lines = [
        "",
        f"### {about['processor']}",
        "",
        describe(about, rounds),
        "",
        "| loss | mmjax | over dense JAX | over it with memory kept | over open_clip | share of product rate "
        "| largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in losses:
        ratios = (result[name] for name in ("over_dense", "over_kept", "over_open_clip"))
        cells = " | ".join(f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in ratios)
        lines.append(
            f"| {result['loss']} | {_ms(result['forms'][0])} | {cells} "
            f"| {result['share_of_product_rate']:.0%} of {result['product_rate'] / 1e9:.0f} GFLOP/s "
            f"| {result['difference']:.0e} |"
        )
    lines += [
        "",
        "| loss | library | form | median | peak memory | noisy turns |",
        "|---|---|---|---|---|---|",
    ]
    for result in losses:
        for form in result["forms"]:
            lines.append(
                f"| {result['loss']} | {form['library']} | {form['form']} | {_ms(form)} "
                f"| {form['peak_bytes'] / 2**30:.2f} GiB | {form['noisy_turns']} of {rounds} |"
            )
    return lines


def _ms(form: dict[str, Any]) -> str:
    return f"{1000 * form['median_seconds']:.0f} ms"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two turns of each form, no retakes")
    parser.add_argument("--rounds", type=int, default=None, help="turns of each form (default 7)")
    parser.add_argument("--retakes", type=int, default=4, help="of a turn that others disturbed (default 4)")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="measure these, keep the rest"
    )
    options = parser.parse_args(arguments)
    rounds = options.rounds or (2 if options.quick else 7)
    retakes = 0 if options.quick else options.retakes
    output = Path("output", "contrastive") if options.quick else HERE
    output.mkdir(parents=True, exist_ok=True)

    kept = output / "contrastive.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    about = {**machine("jax", "torch", "open_clip_torch"), "memory": MEMORY}
    measure: dict[str, Callable[[], Any]] = {
        "time": lambda: [time_loss(name, rounds, retakes) for name in PRODUCTS],
        "caching": lambda: caching(max(2, rounds // 2), retakes),
        "memory": lambda: memory([2**n for n in range(10, 18)]),
        "large": run_large,
    }
    for part in options.only:
        print(part, flush=True)
        measured = measure[part]()
        if part == "time":
            results.setdefault("time", {})[about["processor"]] = {"machine": about, "losses": measured}
        else:
            results |= {part: measured, "machine": about}
        kept.write_text(json.dumps(results, indent=1) + "\n")
    if all(part in results for part in PARTS):
        text = report(results)
        (output / "CONTRASTIVE.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
