"""The compiled side of a plan: a stage's real step, compiled for any mesh without one array of it.

Run as a process of its own (`python -m mmjax.training.plan_compile`), since the number of devices that jax
emulates is settled once per process: a request as JSON comes on standard input, the answer goes to standard
output. The program is compiled and never run, so it does not matter how many devices the machine has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mmjax.errors import ConfigError, MmjaxError
from mmjax.parallel import BATCH_AXES, batch_sharding, make_mesh, replicated
from mmjax.training.before import in_order
from mmjax.training.cli import load_experiment
from mmjax.training.experiment import Experiment
from mmjax.training.plan_flops import count_jaxpr
from mmjax.training.plan_hlo import collectives
from mmjax.training.plan_shapes import batch_shapes, device_bytes, mesh_shape, open_shapes
from mmjax.training.source import OpenedModel
from mmjax.training.stage_run import StageRun
from mmjax.training.state import merge

# XLA's CPU scheduler would otherwise start as much as it can at once, and hold more than a chip's does.
# And it would keep in float32 what a bfloat16 program means to keep in bfloat16.
OPTIONS: dict[str, bool] = {
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
    "xla_allow_excess_precision": False,
}
# No chip of the table has more memory of its own than this, beside that which data sheets call its memory.
_CACHE = 2**27
# XLA takes CPU devices beyond these for those of another process, with which it has to be able to talk.
_DEVICES_OF_A_PROCESS = 2048


def emulate(devices: int) -> None:
    """Let this process see as many CPU devices as the mesh has.

    Raises:
        ConfigError: jax has already started, with fewer.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
        if devices > _DEVICES_OF_A_PROCESS:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)
    except RuntimeError:
        if len(jax.devices()) < devices:
            raise ConfigError(
                "the experiment file uses jax while it is read, before the mesh is known; "
                "make its arrays inside functions"
            ) from None


def compile_stages(experiment: Experiment, devices_per_node: int) -> list[dict[str, Any]]:
    """Compile every stage's step and say what it holds, computes and sends.

    Args:
        experiment: with overrides applied.
        devices_per_node: of the chip that is planned for.

    Returns:
        One dict per stage: see `compile_stage`.
    """
    # They are for the compiler of the chip that is planned for, and this is a CPU's.
    train = dataclasses.replace(experiment.train, compiler_options=())
    experiment = dataclasses.replace(experiment, train=train)
    shape = mesh_shape(experiment)
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    opened = open_shapes(experiment, mesh)
    stages = range(len(experiment.stages))
    return [compile_stage(experiment, index, opened, mesh, devices_per_node) for index in stages]


def compile_stage(
    experiment: Experiment, index: int, opened: OpenedModel, mesh: Mesh, devices_per_node: int
) -> dict[str, Any]:
    """Compile one stage's step, as `mmjax train` would run it, on shapes alone.

    Returns:
        "steps", "parameters" (total, trained, frozen), "bytes" (per device at the peak), "flops" (by dtype,
        over all devices), "product_bytes" (read and written by products, over all devices), "loss_flops",
        "network" (by kind of collective: count, bytes and between_nodes that a device sends),
        "unknown_loops".
    """
    run = StageRun(experiment, index, opened, mesh)
    data = experiment.data if run.stage.data is None else run.stage.data
    batch = batch_shapes(opened.model, run.stage.loss, data, opened.shapes, run.settings.batch_size)
    traced = run.step.trace(run.shapes, batch, jax.eval_shape(run.rates, 0))
    compiled = traced.lower().compile(OPTIONS)
    work = count_jaxpr(traced.jaxpr, devices=mesh.size, cache=_CACHE)
    loss = _loss_alone(run, opened, batch)
    network, unknown = collectives(compiled.as_text(), mesh.size, devices_per_node)
    sizes = {path: math.prod(leaf.shape) for path, leaf in opened.shapes.items()}
    total, trained = sum(sizes.values()), sum(sizes[path] for path in run.trained)
    return {
        "stage": run.stage.name,
        "steps": run.settings.steps,
        "batch_size": run.settings.batch_size,
        "accumulate": run.settings.accumulate,
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "parameters": {"total": total, "trained": trained, "frozen": total - trained},
        "bytes": _peak(run, batch, compiled.memory_analysis(), loss),
        "flops": work.flops,
        "product_bytes": work.bytes,
        "loss_flops": loss["flops"],
        "network": {kind: dataclasses.asdict(traffic) for kind, traffic in sorted(network.items())},
        "unknown_loops": work.loops_of_unknown_length + unknown,
    }


def _peak(
    run: StageRun, batch: Mapping[str, Any], memory: Any, loss: Mapping[str, float]
) -> dict[str, float]:
    """Bytes on one device at the step's peak, which is XLA's: arguments, new outputs and temporaries.

    What the state, the gradients, the embeddings and the loss take is known from their shapes and from the
    loss compiled alone; the rest of XLA's temporaries are activations.
    """
    state, shardings = run.shapes, run.shardings
    trained = device_bytes(state.params, shardings.params)
    known = {
        "parameters": trained + device_bytes(state.frozen, shardings.frozen),
        "optimizer": device_bytes(state.opt_state, shardings.opt_state),
        "ema": device_bytes(state.ema, shardings.ema),
        "batch": device_bytes(batch, batch_sharding(run.mesh)),
        "gradients": trained,
        "embeddings": loss["embeddings"],
        "loss": loss["workspace"],
    }
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = held + memory.temp_size_in_bytes
    return {
        **known,
        "activations": max(total - sum(known.values()), 0),
        "total": total,
        "xla_arguments": memory.argument_size_in_bytes,
        "xla_outputs": memory.output_size_in_bytes,
        "xla_aliased": memory.alias_size_in_bytes,
        "xla_temporaries": memory.temp_size_in_bytes,
    }


def _loss_alone(run: StageRun, opened: OpenedModel, batch: Mapping[str, Any]) -> dict[str, float]:
    """The part of a loss over pairs that is not the towers': bytes per device, FLOPs over all devices.

    Such a loss (one that takes `micro_batches`, of a model with embeddings of two sides) is called with
    towers that hand on the embeddings they are given. Any other loss is part of the model's own work, and
    these figures are zero.
    """
    none = {"embeddings": 0.0, "workspace": 0.0, "flops": 0.0}
    loss = run.stage.loss
    if "micro_batches" not in inspect.signature(loss).parameters:
        return none
    inputs = opened.model.example_batch(1)  # type: ignore[attr-defined]
    out: Any = jax.eval_shape(lambda p: opened.model.apply({"params": merge(p)}, **inputs), opened.shapes)
    if not {"image_embeds", "text_embeds"} <= set(out.keys()):
        return none
    sides = {"pixel_values": out["image_embeds"], "input_ids": out["text_embeds"]}
    size = run.settings.batch_size
    embeds = {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in sides.items()}
    others = {name: x for name, x in batch.items() if name not in inputs}
    scalars = {path: x for path, x in opened.shapes.items() if not x.shape}
    mesh = run.mesh if math.prod(run.mesh.shape[axis] for axis in BATCH_AXES) > 1 else None

    def value(embeds: Any, scalars: Any, others: Any) -> Any:
        return sum(loss(_Towers(), scalars, {**others, **embeds}, jax.random.key(0), mesh=mesh).values())

    split, whole = batch_sharding(run.mesh), replicated(run.mesh)
    gradient = jax.jit(
        jax.value_and_grad(value, argnums=(0, 1)),
        in_shardings=(split, whole, split),
        out_shardings=(whole, (split, whole)),
    )
    traced = gradient.trace(embeds, scalars, others)
    return {
        # Each side and its gradient.
        "embeddings": 2 * device_bytes(embeds, split),
        "workspace": traced.lower().compile(OPTIONS).memory_analysis().temp_size_in_bytes,
        "flops": count_jaxpr(traced.jaxpr).total_flops,
    }


class _Towers:
    """Stands for a model whose embeddings are its inputs."""

    def apply(self, variables: Any, *, pixel_values: Any, input_ids: Any, **_: Any) -> dict[str, Any]:
        return {"image_embeds": pixel_values, "text_embeds": input_ids}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer one request.

    Args:
        request: "file", "overrides", "smoke", "devices_per_node" and "debug".

    Returns:
        "experiment" (its name) and "stages"; or "error", what the person at the keyboard should put right.
    """
    try:
        experiment = load_experiment(request["file"], request["overrides"], smoke=request["smoke"])
        *_, experiment = in_order(experiment, Path())
        emulate(math.prod(mesh_shape(experiment).values()))
        stages = compile_stages(experiment, request["devices_per_node"])
    except MmjaxError as error:
        if request["debug"]:
            traceback.print_exc()
        return {"error": str(error)}
    return {"experiment": experiment.name, "stages": stages}


def main() -> None:
    """Answer the request on standard input; what the experiment file prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        found = answer(json.load(sys.stdin))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
