"""What `mmjax plan` says, against what XLA reports, what arrays hold, and counts made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmjax import losses
from mmjax.cli import main
from mmjax.errors import ConfigError
from mmjax.losses.pairs import FINE_PAIRS
from mmjax.parallel import make_mesh
from mmjax.training.cli import load_experiment
from mmjax.training.plan_chips import CHIPS, find_chip
from mmjax.training.plan_compile import OPTIONS
from mmjax.training.plan_flops import count_jaxpr, count_work
from mmjax.training.plan_hlo import collectives
from mmjax.training.planning import make_plans, plan_stage
from mmjax.training.stage_run import StageRun
from tests.training import toy

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "experiments" / "digits.py"
SMALL = [
    "train.batch_size=32",
    "train.ema_decay=0.9",
    *(f"model.config.{tower}_config.num_hidden_layers=1" for tower in ("vision", "text")),
]
H100 = CHIPS["h100"]


def shape(*dims: int, dtype: str = "float32", sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


# --- FLOPs


def test_products_are_counted_by_dtype_with_their_bytes() -> None:
    def f(x: Any, y: Any) -> Any:
        batched = jnp.einsum("bij,bjk->bik", x, y)
        return batched.sum() + jnp.dot(x[0].astype("bfloat16"), y[0].astype("bfloat16")).sum()

    work = count_work(f, shape(3, 4, 5), shape(3, 5, 7))
    assert work.flops == {"float32": 2.0 * 3 * 4 * 5 * 7, "bfloat16": 2.0 * 4 * 5 * 7}
    assert work.bytes == 4 * 3 * (4 * 5 + 5 * 7 + 4 * 7) + 2 * (4 * 5 + 5 * 7 + 4 * 7)


def test_a_convolution_is_counted() -> None:
    def f(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    work = count_work(f, shape(3, 8, 6, 5), shape(2, 2, 5, 7))
    assert work.total_flops == 2 * (3 * 4 * 3 * 7) * (2 * 2 * 5)


def test_products_of_entries_and_their_sums_are_no_products():
    def scaled(x, factors):
        return jnp.einsum("td,t->td", x, factors).sum()

    work = count_work(jax.grad(scaled, (0, 1)), shape(3, 4), shape(3))
    assert (work.total_flops, work.bytes) == (0, 0)


def test_loops_branches_remat_and_custom_gradients_are_followed() -> None:
    one = 2.0 * 4**3

    @jax.custom_vjp
    def squared(x: Any) -> Any:
        return x @ x

    squared.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

    def body(x: Any, _: None) -> tuple[Any, None]:
        return jax.checkpoint(lambda x: jnp.tanh(x @ jnp.tanh(x)))(x), None

    def scanned(x: Any) -> Any:
        return jax.lax.scan(body, x, length=5)[0].sum()

    def branched(x: Any, flag: Any) -> Any:
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    x = shape(4, 4)
    assert count_work(scanned, x).total_flops == 5 * one
    # Forward, forward again, and one product for each of the two factors.
    assert count_work(jax.grad(scanned), x).total_flops == 5 * 4 * one
    assert count_work(jax.grad(lambda x: squared(x).sum()), x).total_flops == 2 * one
    assert count_work(branched, x, shape(dtype="bool")).total_flops == 2 * one
    loop = count_work(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), x)
    assert (loop.total_flops, loop.loops_of_unknown_length) == (one, 1)


def test_what_fits_a_chip_s_cache_is_no_memory_traffic() -> None:
    jaxpr = jax.make_jaxpr(lambda x, y: (x @ x.T, y @ y.T))(shape(64, 64), shape(8, 8))
    large, small = 3 * 4 * 64 * 64, 3 * 4 * 8 * 8
    assert count_jaxpr(jaxpr).bytes == large + small
    assert count_jaxpr(jaxpr, cache=small).bytes == large
    assert count_jaxpr(jaxpr, cache=small, devices=64).bytes == 0


def test_what_no_result_needs_is_not_counted() -> None:
    assert count_work(lambda x: (x @ x, x)[1], shape(4, 4)).total_flops == 0


@pytest.mark.parametrize(("count", "sharp"), [(64, 3), (2 * FINE_PAIRS, 1)])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_sharded_loss_is_counted_on_all_devices(devices: int, count: int, sharp: int) -> None:
    """The value compares all pairs once; its gradient once more, with a product for either side.

    Where pairs are few, a comparison is three products, for the sake of its digits.
    """
    mesh = make_mesh({"data": devices}, jax.devices()[:devices]) if devices > 1 else None
    width, block = 16, 8
    products, own = 2.0 * count * count * width, 2.0 * count * block * width
    embeds, scale = shape(count, width), shape()

    def loss(image: Any, text: Any, scale: Any) -> Any:
        return losses.infonce(image, text, scale, block_size=block, mesh=mesh)

    found = count_work(jax.grad(loss, argnums=(0, 1)), embeds, embeds, scale).total_flops
    # The tiles on the diagonal have the positives' own dot products, forward.
    assert found == (2 * sharp + 2) * products + sharp * own


# --- collectives


def test_collectives_of_a_ring_are_counted_with_the_turns_of_its_loop() -> None:
    devices, rows, width, block = 8, 64, 16, 8
    mesh = make_mesh({"data": devices})
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def local(x: Any) -> Any:
        def visit(state: Any, _: None) -> tuple[Any, None]:
            travelling, total = state
            return (jax.lax.ppermute(travelling, "data", ring), total + travelling @ x.T), None

        total = jnp.zeros((rows // devices, rows // devices))
        return jax.lax.psum(jax.lax.scan(visit, (x, total), length=devices)[0][1], "data")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(), check_vma=False
    )
    text = jax.jit(mapped).lower(shape(rows, width)).compile().as_text()
    found, unknown = collectives(text, devices, devices_per_node=4)
    assert unknown == 0
    permute, total = found["collective-permute"], found["all-reduce"]
    assert (permute.count, permute.bytes) == (devices, devices * 4 * block * width)
    assert total.bytes == pytest.approx(2 * 4 * block * block * 7 / 8)
    # Two nodes of four: each device carries a quarter of the sum to the other node, and back.
    assert permute.between_nodes == permute.bytes
    assert total.between_nodes == pytest.approx(2 * 4 * block * block / 2 / 4)
    within, _ = collectives(text, devices, devices_per_node=8)
    assert {kind: traffic.between_nodes for kind, traffic in within.items()} == dict.fromkeys(found, 0.0)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_what_a_program_has_in_bfloat16_is_sent_as_such(dtype: str, width: int) -> None:
    mesh = make_mesh({"fsdp": 8})
    kernel, rows = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "fsdp"), ("fsdp",)))

    def product(x: Any, w: Any) -> Any:
        split = jax.lax.with_sharding_constraint(w.astype(dtype), kernel)
        return x.astype(dtype) @ jax.lax.with_sharding_constraint(split, NamedSharding(mesh, PartitionSpec()))

    shapes = (shape(16, 32, sharding=rows), shape(32, 64, sharding=kernel))
    compiled = jax.jit(product, out_shardings=rows).lower(*shapes).compile(OPTIONS)
    found, _ = collectives(compiled.as_text(), 8, devices_per_node=8)
    assert list(found) == ["all-gather"]
    assert found["all-gather"].bytes == width * 32 * 64 * 7 / 8


PROGRAM = """
%body (p: (s32[], bf16[6,4])) -> (s32[], bf16[6,4]) {
  %g = (bf16[3,4]{1,0}, bf16[6,4]{1,0}) all-gather-start(%x), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %r = (s32[], bf16[6,4]) tuple(%i, %d)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], bf16[6,4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %s = f32[2]{0} reduce-scatter(%a), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, to_apply=%add
  %a = (f32[4]{0}, pred[8]{0}) all-to-all(%b, %c), replica_groups={}
  ROOT %o = f32[4]{0} copy(%s)
}
"""


def test_every_way_to_write_a_collective_is_read() -> None:
    found, unknown = collectives(PROGRAM, devices=4, devices_per_node=2)
    assert unknown == 0
    gather, scatter, swap = (found[kind] for kind in ("all-gather", "reduce-scatter", "all-to-all"))
    # The result has 48 bytes, of which a device has half already; neighbours 0,1 and 2,3 share a node.
    assert (gather.count, gather.bytes, gather.between_nodes) == (5, 5 * 24, 0)
    # Its groups are 0,2 and 1,3.
    assert (scatter.bytes, scatter.between_nodes) == (8, 8)
    assert swap.bytes == (16 + 8) * 3 / 4 and swap.between_nodes == pytest.approx((16 + 8) * 2 / 4)


def test_a_loop_of_unknown_length_is_told() -> None:
    text = PROGRAM.replace("known_trip_count", "something_else")
    found, unknown = collectives(text, devices=4, devices_per_node=2)
    assert (found["all-gather"].count, unknown) == (1, 1)


# --- chips and bounds


@pytest.mark.parametrize("name", ["h100", "H100", "nvidia-h100", "v5e", "tpu-v5e", "TPU v5e", "tpuv5e"])
def test_chips_are_found_by_the_names_that_people_use(name: str) -> None:
    assert find_chip(name) == CHIPS["v5e" if "v5" in name.lower() else "h100"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h1000", "no chip 'h1000'; known: a100, h100, h200, b200, v4, v5e, v5p, v6e"),
        ("h100,ram=3", "no figure 'ram'"),
        ("h100,memory=-1", "memory=-1 is not a positive number"),
        ("memory=1e9", "bfloat16 is missing"),
        ("h100,devices_per_node=2.5", "devices_per_node=2.5 is not"),
    ],
)
def test_a_chip_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_chip(text)


def test_the_slowest_of_three_bounds_the_step() -> None:
    chip = find_chip("bfloat16=100,float32=50,memory=1000,bandwidth=10,link=4,network=2,devices_per_node=8")
    size = {"parameters": 10, "optimizer": 20, "ema": 0, "gradients": 10, "total": 900}
    compiled = {
        "devices": 2,
        "steps": 30,
        "batch_size": 6,
        "bytes": size,
        "flops": {"bfloat16": 1000.0, "float32": 200.0},
        "product_bytes": 40.0,
        "network": {"all-reduce": {"count": 1, "bytes": 20.0, "between_nodes": 8.0}},
    }
    plan = plan_stage(compiled, chip)
    assert plan["seconds"] == {"compute": 5 + 2, "memory": (20 + 2 * 40) / 10, "network": 4}
    assert (plan["bound"], plan["step_seconds"], plan["samples_per_second"]) == ("memory", 10, 0.6)
    assert plan["stage_seconds"] == 300
    assert (plan["memory_share"], plan["fits"]) == (0.9, True)
    assert not plan_stage({**compiled, "bytes": {**size, "total": 1001}}, chip)["fits"]


# --- the whole plan

TWO_STAGES = """
import dataclasses
import numpy as np
from tests.training import toy

class Told(toy.SquaredError):
    def example_batch(self, batch_size):
        return {"y": np.zeros((batch_size, toy.CLASSES), np.float32)}

def experiment():
    base = toy.toy_experiment()
    return dataclasses.replace(base, stages=tuple(dataclasses.replace(s, loss=Told()) for s in base.stages))
"""


@pytest.fixture
def two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment file: one stage with frozen parameters, one with a moving average."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "two.py").write_text(TWO_STAGES)
    return tmp_path / "two.py"


def compare_with_arrays(file: Path, overrides: list[str], mesh: dict[str, int]) -> None:
    """The plan saw shapes only, in another process; here the same steps take arrays."""
    overrides = [*overrides, "mesh=" + ",".join(f"{axis}={size}" for axis, size in mesh.items())]
    plans = make_plans(str(file), overrides, H100)
    experiment = load_experiment(str(file), overrides)
    devices = make_mesh(mesh, jax.devices()[: math.prod(mesh.values())])
    opened = experiment.model.open(experiment.data, jax.random.key(0), devices)
    assert len(plans) == len(experiment.stages)
    for index, plan in enumerate(plans):
        run = StageRun(experiment, index, opened, devices)
        state = run.fresh(opened.params())
        size = run.settings.batch_size
        host = next(iter(experiment.data.build(processor=opened.processor, batch_size=size, seed=0)))
        names = {"pixel_values", "input_ids", "attention_mask", "x", "y"}
        batch = run.place({name: x for name, x in host.items() if name in names})
        memory = run.step.lower(state, batch, run.rates(0)).compile(OPTIONS).memory_analysis()
        check_bytes(plan, memory, state, batch, devices.devices.flat[0])
        assert plan["parameters"]["total"] == sum(math.prod(x.shape) for x in opened.shapes.values())
        assert plan["parameters"]["frozen"] == sum(x.size for x in state.frozen.values())
        assert (plan["devices"], plan["mesh"]) == (devices.size, dict(devices.shape))


def check_bytes(plan: Any, memory: Any, state: Any, batch: Any, device: Any) -> None:
    size = plan["bytes"]
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert size["total"] == held + memory.temp_size_in_bytes
    assert size["xla_temporaries"] == memory.temp_size_in_bytes
    for name, arrays in {
        "parameters": (state.params, state.frozen),
        "optimizer": state.opt_state,
        "ema": state.ema,
        "batch": batch,
    }.items():
        shards = [shard for leaf in jax.tree.leaves(arrays) for shard in leaf.addressable_shards]
        assert size[name] == sum(shard.data.nbytes for shard in shards if shard.device == device), name
    parts = ("parameters", "optimizer", "ema", "batch", "gradients", "embeddings", "loss", "activations")
    assert all(size[name] >= 0 for name in parts)
    assert sum(size[name] for name in parts) >= size["total"]


@pytest.mark.parametrize(
    "mesh",
    [{"data": 1}, {"fsdp": 2}, {"data": 2, "tensor": 2}],
    ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items()),
)
def test_the_memory_figure_is_that_of_xla_and_of_the_arrays(two_stages: Path, mesh: dict[str, int]) -> None:
    compare_with_arrays(two_stages, [], mesh)


def test_so_it_is_for_two_towers_on_eight_devices() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    compare_with_arrays(DIGITS, SMALL, {"data": 2, "fsdp": 2, "tensor": 2})


def test_the_command_plans_for_4096_devices_and_16_million_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [f"--{override}" for override in SMALL[1:]]
    # Options that only the chip's own compiler knows stop no plan.
    flags += ["--train.batch_size=16777216", "--train.compiler_options=xla_tpu_no_such_thing=1"]
    wanted = ["--mesh", "data=4096", "--chip", "v5p", *flags]
    assert main(["plan", str(DIGITS), *wanted, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["stages"]
    assert (plan["devices"], plan["batch_size"]) == (4096, 2**24)
    # Every pair is compared in float32: once forward; once more backward, with a product for either side.
    pairs = 2.0 * 2.0**48 * 64
    assert plan["loss_flops"] == pytest.approx(4 * pairs, rel=1e-3)
    assert plan["network"]["collective-permute"]["count"] >= 2 * 4096
    assert plan["fits"]
    least = plan["loss_flops"] / 4096 / CHIPS["v5p"].float32
    assert plan["seconds"]["compute"] == pytest.approx(least, rel=0.1) and plan["step_seconds"] >= least
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_it_to_people(two_stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(two_stages), "--mesh=fsdp=2", "--chip", "h100,memory=1000"]) == 0
    out = capsys.readouterr().out
    wanted = ("stage align", "stage tune", "moving average", "DOES NOT FIT", "bounds the step", "all-reduce")
    for words in wanted:
        assert words in out
    assert list(two_stages.parent.iterdir()) == [two_stages]


def test_a_loss_that_does_not_tell_its_batch_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", toy.__file__, "--mesh=fsdp=2"]) == 2
    assert "SquaredError: the shapes of y in its batches are not known; give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chip", "h1000"], "no chip 'h1000'; known: a100"),
        (["--mesh", "data=4097"], "4,097 devices; a plan is for 4,096 at most"),
        (["--mesh", "data=3"], "cannot be split over 3 devices"),
        (["--mesh", "model=2"], "unknown axis 'model'"),
        (["--mesh", "data=0"], "mesh: sizes must be positive, or -1 for what remains; got {'data': 0}"),
        (["--mesh", "data=8,data=4"], "expected pairs such as name=a whole number (int),..., each name once"),
        (["--train.stepz=3"], "did you mean steps"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(DIGITS), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
