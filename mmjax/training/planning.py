"""What a training step needs and what bounds it, said before anything runs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.errors import ConfigError, TrainingError
from mmjax.training.plan_chips import Chip

# Flags and settings of this process that must not reach the one that compiles: how many devices it emulates
# is for the plan to say, and it writes nothing.
_DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\S+")
_SETTINGS = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}


def make_plans(
    file: str, overrides: Sequence[str], chip: Chip, *, smoke: bool = False, debug: bool = False
) -> list[dict[str, Any]]:
    """Plan every stage of an experiment file for a chip.

    Args:
        file: the experiment file.
        overrides: "path=value", as for `mmjax train`; "mesh=data=256" says for how many devices.
        chip: see `mmjax.training.plan_chips`.
        smoke: take the experiment's own small settings.
        debug: let the compiling process print the traceback of an error.

    Returns:
        One plan per stage: see `plan_stage`.

    Raises:
        ConfigError: the experiment, its overrides or its mesh are at fault.
        TrainingError: the compiler gave up, for lack of memory for example.
    """
    request = {
        "file": file,
        "overrides": list(overrides),
        "smoke": smoke,
        "debug": debug,
        "devices_per_node": chip.devices_per_node,
    }
    flags = _DEVICE_COUNT.sub("", os.environ.get("XLA_FLAGS", "")).strip()
    environment = {**os.environ, **_SETTINGS, "XLA_FLAGS": flags}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    # The same mmjax, wherever this process found it.
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        # -B: not even the experiment's bytecode is written.
        [sys.executable, "-B", "-m", "mmjax.training.plan_compile"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        stderr=None if debug else subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        last = (done.stderr or "").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise TrainingError(f"{file}: the step could not be compiled: {last[0]} (--debug shows more)")
    found = json.loads(done.stdout)
    if "error" in found:
        raise ConfigError(found["error"])
    return [{"experiment": found["experiment"], **plan_stage(stage, chip)} for stage in found["stages"]]


def plan_stage(compiled: Mapping[str, Any], chip: Chip) -> dict[str, Any]:
    """Hold what a compiled stage needs against what a chip can do.

    Args:
        compiled: of one stage, as `mmjax.training.plan_compile` gives it.
        chip: the chip.

    Returns:
        What was compiled, and: "memory_traffic", bytes that one device moves to and from its memory at least
        (operands and results of products too large for the chip's cache, and the state read and written
        once; whatever stands between products is taken to be fused with them); "seconds" that a step takes
        at least to "compute", for "memory" and for "network"; "bound", the largest of these; "step_seconds",
        its time; "stage_seconds", that of all steps; "samples_per_second", at most; "memory_share", of the
        chip's memory at the peak; "fits".
    """
    devices, size = compiled["devices"], compiled["bytes"]
    state = size["parameters"] + size["optimizer"] + size["ema"] + size["gradients"]
    traffic = compiled["product_bytes"] / devices + 2 * state
    sent = compiled["network"].values()
    between = sum(kind["between_nodes"] for kind in sent)
    within = sum(kind["bytes"] for kind in sent) - between
    flops = {dtype: count / devices for dtype, count in compiled["flops"].items()}
    seconds = {
        "compute": sum(count / chip.peak(dtype) for dtype, count in flops.items()),
        "memory": traffic / chip.bandwidth,
        "network": max(within / chip.link, between / chip.network),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    step = seconds[bound]
    share = size["total"] / chip.memory
    return {
        **compiled,
        "chip": dataclasses.asdict(chip),
        "flops_per_device": sum(flops.values()),
        "memory_traffic": traffic,
        "seconds": seconds,
        "bound": bound,
        "step_seconds": step,
        "stage_seconds": compiled["steps"] * step,
        "samples_per_second": compiled["batch_size"] / step if step else None,
        "memory_share": share,
        "fits": share <= 1,
    }
