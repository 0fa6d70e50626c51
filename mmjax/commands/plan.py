"""Say what an experiment needs on a mesh of chips, without running it: no data, no parameters, no files.

    mmjax plan experiments/clip_vit_b32.py --mesh data=256 --chip h100
    mmjax plan EXPERIMENT.py --mesh data=64,tensor=2 --chip v5p --train.batch_size=1048576

Any field of the experiment can be set as for `mmjax train`: --train.batch_size=65536. The training step
itself is compiled for the mesh (1 to 4,096 devices, emulated, however many there are) and read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from mmjax.commands.output import byte_text, count_text, print_json, printable
from mmjax.commands.parser import add_json

_OPTIONS = ("--chip", "--smoke", "--json", "--help")
_PARTS = ("parameters", "optimizer", "ema", "batch", "gradients", "embeddings", "loss", "activations")
_LABELS = {"optimizer": "optimizer state", "ema": "moving average", "loss": "loss workspace"}
_FULL = 0.75
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmjax plan`."""
    parser.add_argument("file", metavar="EXPERIMENT.py", help="an experiment file")
    parser.add_argument(
        "--chip",
        default="h100",
        metavar="CHIP",
        help="a100, h100, h200, b200, v4, v5e, v5p or v6e (default: h100); own figures follow as "
        "h100,memory=94e9",
    )
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", help="devices by axis: data, fsdp, tensor (default: the experiment's)"
    )
    parser.add_argument("--smoke", action="store_true", help="plan the experiment's quick try")
    add_json(parser)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line in which any other --FIELD=VALUE overrides a field of the experiment."""
    known, overrides = [], []
    words = iter(arguments)
    for word in words:
        name, found, value = word.partition("=")
        if not word.startswith("--") or name in _OPTIONS or word == "--":
            known.append(word)
            # The value of an option may start with anything.
            known += [next(words, "")] if word == "--chip" else []
        else:
            overrides.append(f"{name[2:]}={value if found else next(words, '')}")
    options = parser.parse_args(known)
    options.overrides = overrides
    return options


def run(options: argparse.Namespace) -> int:
    """Run `mmjax plan`."""
    from mmjax.training.plan_chips import find_chip
    from mmjax.training.planning import make_plans

    chip = find_chip(options.chip)
    plans = make_plans(options.file, options.overrides, chip, smoke=options.smoke, debug=options.debug)
    if options.json:
        print_json({"stages": plans})
        return 0
    for number, plan in enumerate(plans):
        if number:
            print()
        for label, text in _rows(plan):
            print(f"{label:<22}{printable(text)}".rstrip())
    print()
    for line in _notes(plans):
        print(line)
    return 0


def _rows(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is worth saying about a plan, label and text."""
    from mmjax.training.progress import format_seconds

    chip, counts = plan["chip"], plan["parameters"]
    axes = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    parts = f" in {plan['accumulate']:,} micro-batches" if plan["accumulate"] > 1 else ""
    rate = plan["samples_per_second"]
    yield "experiment", f"{plan['experiment']}, stage {plan['stage']}"
    yield "devices", f"{plan['devices']:,} x {chip['name']} ({axes})"
    yield "batch", f"{plan['batch_size']:,} samples per step{parts}"
    yield "parameters", f"{counts['total']:,} ({counts['trained']:,} trained, {counts['frozen']:,} frozen)"
    yield "", ""
    yield "BYTES PER DEVICE", "at the step's peak"
    for name in _PARTS:
        if plan["bytes"][name]:
            yield f"  {_LABELS.get(name, name)}", byte_text(round(plan["bytes"][name]))
    yield "  together", f"{byte_text(round(plan['bytes']['total']))}, {_fit_text(plan)}"
    yield "", ""
    yield "WORK PER STEP", "and device"
    yield "  products", f"{_si(plan['flops_per_device'])}FLOP ({_dtypes(plan)})"
    if plan["loss_flops"]:
        yield "  of which the loss", f"{_si(plan['loss_flops'] / plan['devices'])}FLOP"
    yield "  memory traffic", byte_text(round(plan["memory_traffic"]))
    for kind, sent in plan["network"].items():
        across = f", {byte_text(round(sent['between_nodes']))} between nodes" if sent["between_nodes"] else ""
        yield f"  {kind}", f"{byte_text(round(sent['bytes']))} sent in {sent['count']:,}{across}"
    yield "", ""
    yield "TIME PER STEP", "at the chip's peak rates"
    for name, seconds in plan["seconds"].items():
        yield f"  {name}", _seconds(seconds) + ("  <- bounds the step" if name == plan["bound"] else "")
    yield "  at most", f"{count_text(round(rate))} samples/s" if rate else "nothing to compute"
    yield f"  {plan['steps']:,} steps", f"{format_seconds(plan['stage_seconds'])} at least"


def _fit_text(plan: dict[str, Any]) -> str:
    share, memory = plan["memory_share"], byte_text(round(plan["chip"]["memory"]))
    return f"{100 * share:.1f}% of {memory}: {'fits' if plan['fits'] else 'DOES NOT FIT'}"


def _notes(plans: list[dict[str, Any]]) -> Iterator[str]:
    """How the figures came about, and what could be done."""
    for plan in plans:
        if not plan["fits"]:
            yield (
                f"Stage {plan['stage']} does not fit: raise --train.accumulate (now {plan['accumulate']}), "
                "let the model's execution recompute (remat=true), or use more devices."
            )
        elif plan["memory_share"] > _FULL and plan["chip"]["name"].startswith("NVIDIA"):
            yield "jax takes 75% of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."
        if plan["unknown_loops"]:
            yield "Loops whose number of turns depends on data are counted as one turn."
    yield (
        "Temporary bytes and collectives are those of XLA's compiler for this machine's CPU, which fuses "
        "otherwise than a chip's; times are lower bounds, since compute, memory and network are taken to "
        "overlap perfectly."
    )
    yield f"Chip figures: {plans[0]['chip']['source']}."


def _dtypes(plan: dict[str, Any]) -> str:
    total = sum(plan["flops"].values()) or 1.0
    parts = sorted(plan["flops"].items(), key=lambda item: -item[1])
    return ", ".join(f"{100 * flops / total:.0f}% {dtype}" for dtype, flops in parts)


def _si(value: float) -> str:
    """A number with the prefix that suits it.

    Example:
        >>> _si(1.5e12), _si(12)
        ('1.50 T', '12.00 ')
    """
    power = 0
    while value >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.2f} {_PREFIXES[power]}"


def _seconds(value: float) -> str:
    """A time in s, ms or us.

    Example:
        >>> _seconds(0.0123), _seconds(2.5), _seconds(3e-5)
        ('12.3 ms', '2.50 s', '30.0 us')
    """
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"
