"""Next-token loss against plain float64: blocks, hard cases, meshes, and what is never held."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.errors import ConfigError
from mmjax.losses import next_token, token_losses
from mmjax.parallel import make_mesh

B, T, D, V = 4, 7, 6, 19


def inputs(size: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, V, (B, T)).astype(np.int32)
    labels[0, 2:5] = labels[3] = -100
    return {
        "hidden": (size * rng.standard_normal((B, T, D))).astype(np.float32),
        "kernel": rng.standard_normal((D, V)).astype(np.float32),
        "bias": rng.standard_normal(V).astype(np.float32),
        "weights": rng.uniform(0, 2, (B, T)).astype(np.float32),
        "labels": labels,
    }


def plain(hidden, kernel, labels, *, bias=None, weights=None, softcap=None):
    """The loss as one would write it, with the whole of the logits."""
    logits = hidden[:, :-1] @ kernel + (0 if bias is None else bias)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    targets = labels[:, 1:]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[
        ..., 0
    ]
    share = (targets != -100) * (1.0 if weights is None else weights[:, 1:])
    return -(log_probs * share).sum() / share.sum()


def both(names, given, *, softcap=None, **options):
    """Value and gradients by name: in blocks, and plain in float64."""

    def run(loss, given, **options):
        def of(moving):
            extra = {name: x for name, x in moving.items() if name not in ("hidden", "kernel")}
            return loss(moving["hidden"], moving["kernel"], given["labels"], **extra, **options)

        return jax.jit(jax.value_and_grad(of))({name: given[name] for name in names})

    value, grads = run(next_token, given, softcap=softcap, **options)
    with jax.enable_x64(True):
        wide = {k: np.asarray(x, None if k == "labels" else np.float64) for k, x in given.items()}
        expected, expected_grads = run(plain, wide, softcap=softcap)
        return value, grads, float(expected), {k: np.asarray(x) for k, x in expected_grads.items()}


def check(names, given, *, tolerance=2e-6, **options):
    value, grads, expected, expected_grads = both(names, given, **options)
    assert value.dtype == jnp.float32
    assert abs(float(value) - expected) <= 1e-6 * max(1.0, abs(expected))
    for name, gradient in expected_grads.items():
        assert grads[name].dtype == given[name].dtype
        assert np.abs(np.asarray(grads[name]) - gradient).max() <= tolerance * np.abs(gradient).max(), name


PLAIN = ("hidden", "kernel")


@pytest.mark.parametrize("blocks", [(1, 1), (3, 8), (7, 19), (None, None)], ids=str)
def test_blocks_equal_the_whole(blocks):
    sizes = {"sequence_block": blocks[0], "vocabulary_block": blocks[1]}
    check((*PLAIN, "bias", "weights"), inputs(), softcap=3.0, **sizes)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("names", [PLAIN, (*PLAIN, "bias"), (*PLAIN, "weights")], ids=lambda n: n[-1])
def test_what_may_be_left_out(names, softcap):
    check(names, inputs(), softcap=softcap, sequence_block=100, vocabulary_block=8)


def test_logits_in_the_thousands():
    check((*PLAIN, "bias"), inputs(size=1000.0), sequence_block=2, vocabulary_block=5)


def test_gradients_of_a_model_that_is_nearly_certain_do_not_cancel():
    """The other logits lie 15 below the label's: in float32, probability minus one has two digits left."""
    labels = np.arange(B * T, dtype=np.int32).reshape(B, T) % V
    hidden = 15 * np.eye(V, dtype=np.float32)[np.roll(labels, -1, axis=1)]
    given = {"hidden": hidden, "kernel": np.eye(V, dtype=np.float32), "labels": labels}
    value, grads, expected, expected_grads = both(PLAIN, given, sequence_block=2, vocabulary_block=5)
    assert 0 < expected < 1e-5
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name in PLAIN:
        np.testing.assert_allclose(grads[name], expected_grads[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_to_learn_from_is_zero(weighted):
    given = inputs()
    labels = np.full((B, T), -100, np.int32) if not weighted else given["labels"]
    weights = np.zeros((B, T), np.float32) if weighted else None
    value, grads = jax.value_and_grad(next_token, (0, 1))(
        given["hidden"], given["kernel"], labels, weights=weights, vocabulary_block=5
    )
    assert float(value) == 0.0
    assert all((np.asarray(g) == 0).all() for g in grads)


def test_ignored_positions_are_not_computed():
    """NaN in their hidden states is not met, as it would be in a product that they take part in."""
    rng = np.random.default_rng(0)
    given = inputs()
    hidden = rng.standard_normal((2, 512, D)).astype(np.float32)
    labels = np.full((2, 512), -100, np.int32)
    for row in range(2):
        labels[row, 1 + rng.choice(511, 128, replace=False)] = rng.integers(0, V, 128)
    learned = np.roll(labels != -100, -1, axis=1)
    clean = np.where(learned[..., None], hidden, 0)
    run = jax.jit(jax.value_and_grad(next_token, (0, 1)))
    value, grads = run(np.where(learned[..., None], hidden, np.nan), given["kernel"], labels)
    expected, expected_grads = both(PLAIN, {**given, "hidden": clean, "labels": labels})[2:]
    assert abs(float(value) - expected) <= 1e-6
    for found, name in zip(grads, PLAIN, strict=True):
        assert np.abs(np.asarray(found) - expected_grads[name]).max() <= 2e-6, name


def test_the_first_label_and_the_last_hidden_state_play_no_part():
    given = inputs()
    value, grads = jax.value_and_grad(next_token)(given["hidden"], given["kernel"], given["labels"])
    other = given["labels"].copy()
    other[:, 0] = 1 + other[:, 1]
    assert float(next_token(given["hidden"], given["kernel"], other)) == float(value)
    assert (np.asarray(grads)[:, -1] == 0).all() and (np.asarray(grads)[1, :-1] != 0).all()


def test_losses_of_single_tokens():
    given = inputs()
    targets = np.roll(given["labels"], -1, axis=1)
    losses = token_losses(given["hidden"], given["kernel"], targets, vocabulary_block=4)
    log_probs = jax.nn.log_softmax(given["hidden"] @ given["kernel"])
    expected = -np.take_along_axis(np.asarray(log_probs), np.maximum(targets, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, np.where(targets == -100, 0, expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [V, -1])
def test_a_label_outside_the_vocabulary_is_nan_and_not_another_label(bad):
    given = inputs()
    given["labels"][1, 2] = bad
    assert np.isnan(next_token(given["hidden"], given["kernel"], given["labels"]))


def test_one_entry_and_one_token():
    assert float(next_token(jnp.ones((1, 2, 3)), jnp.ones((3, 1)), jnp.zeros((1, 2), int))) == 0.0
    assert float(next_token(jnp.ones((1, 1, 3)), jnp.ones((3, 4)), jnp.zeros((1, 1), int))) == 0.0


@pytest.mark.parametrize("shape", [(1, 7), (4, 33), (32, 26)], ids=str)
def test_few_tokens_of_a_wider_model_in_bfloat16(shape):
    """Products over batch and time at once are not in every CPU backend for so few."""
    key = jax.random.key(0)
    hidden = jax.random.normal(key, (*shape, 128))
    kernel = 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (128, 512))
    labels = jax.random.randint(jax.random.fold_in(key, 2), shape, 0, 512)
    gradients = jax.jit(jax.grad(next_token, (0, 1)))
    narrow = gradients(hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), labels)
    for mine, wanted in zip(narrow, gradients(hidden, kernel, labels), strict=True):
        error = np.abs(np.asarray(mine, np.float32) - np.asarray(wanted)).max()
        assert error <= 2e-2 * np.abs(np.asarray(wanted)).max()


def test_bfloat16_has_float32_sums():
    given = inputs()
    narrow = {**given, **{name: jnp.asarray(given[name], jnp.bfloat16) for name in (*PLAIN, "bias")}}
    value, grads, expected, expected_grads = both(
        (*PLAIN, "bias"), narrow, sequence_block=3, vocabulary_block=8
    )
    assert value.dtype == jnp.float32
    assert abs(float(value) - expected) <= 2e-6 * expected
    for name, gradient in expected_grads.items():
        assert grads[name].dtype == jnp.bfloat16
        close = np.abs(np.asarray(grads[name], np.float32) - gradient).max()
        assert close <= 1e-2 * np.abs(gradient).max(), name


def test_a_wide_kernel_keeps_its_dtype_under_narrow_hidden_states():
    given = inputs()
    grads = jax.grad(next_token, (0, 1))(
        jnp.asarray(given["hidden"], jnp.bfloat16), given["kernel"], given["labels"]
    )
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


MESHES = {
    "rows": ({"data": 4, "fsdp": 1, "tensor": 2}, PartitionSpec(None, None)),
    "vocabulary": ({"data": 2, "fsdp": 2, "tensor": 2}, PartitionSpec("fsdp", "tensor")),
    "width": ({"data": 1, "fsdp": 4, "tensor": 2}, PartitionSpec("fsdp", None)),
}


@pytest.mark.parametrize("ring", [True, False], ids=["mesh", "compiler"])
@pytest.mark.parametrize("name", MESHES)
def test_devices_equal_one(name, ring):
    shape, kernel_spec = MESHES[name]
    mesh, axes = make_mesh(shape), ("data", "fsdp")
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((8, 6, 8)).astype(np.float32)
    kernel = rng.standard_normal((8, 20)).astype(np.float32)
    labels = rng.integers(0, 20, (8, 6)).astype(np.int32)
    labels[:3, 2:] = -100
    sizes = {"sequence_block": 4, "vocabulary_block": 6}
    run = jax.value_and_grad(
        lambda h, k: next_token(h, k, labels, **sizes, mesh=mesh if ring else None, axis=axes), (0, 1)
    )
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(hidden, kernel, labels)
    rows, table = (NamedSharding(mesh, spec) for spec in (PartitionSpec(axes), kernel_spec))
    step = jax.jit(run, out_shardings=(None, (rows, table)))
    value, grads = step(jax.device_put(hidden, rows), jax.device_put(kernel, table))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert np.abs(np.asarray(ours) - theirs).max() <= 2e-6 * np.abs(theirs).max()


def compiled(which, shapes):
    return jax.jit(jax.grad(next_token, which)).lower(*shapes).compile()


def test_memory_is_a_tile_and_not_the_logits():
    batch, length, width, vocabulary = 2, 1024, 32, 16384
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    )
    whole = batch * length * vocabulary * 4

    def loss(hidden, kernel, labels):
        return next_token(hidden, kernel, labels, sequence_block=128, vocabulary_block=2048)

    program = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    assert program.memory_analysis().temp_size_in_bytes < whole / 8
    text = program.as_text()
    for rows in (f"{batch},{length}", f"{batch * length}", f"{batch},{length - 1}"):
        assert f"[{rows},{vocabulary}]" not in text
    # The plain loss does hold them: the assertion above can fail.
    assert (
        f"{length - 1},{vocabulary}]" in jax.jit(jax.grad(plain, (0, 1))).lower(*shapes).compile().as_text()
    )


def test_a_frozen_output_layer_costs_no_gradient():
    shapes = (
        jax.ShapeDtypeStruct((2, 64, 48), jnp.float32),
        jax.ShapeDtypeStruct((48, 9000), jnp.float32),
        jax.ShapeDtypeStruct((2, 64), jnp.int32),
    )
    of_both, of_hidden = (compiled(which, shapes).memory_analysis() for which in ((0, 1), 0))
    block = 48 * 8192 * 4
    assert of_hidden.temp_size_in_bytes <= of_both.temp_size_in_bytes - block


def test_second_derivatives_are_refused():
    given = inputs()

    def slope(scale):
        return jax.grad(lambda s: next_token(s * given["hidden"], given["kernel"], given["labels"]))(scale)

    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(slope)(1.0)


def test_bad_arguments():
    given = inputs()
    arguments = (given["hidden"], given["kernel"], given["labels"])
    for options, words in [
        ({"sequence_block": 0}, "sequence_block: expected a positive integer"),
        ({"vocabulary_block": -1}, "vocabulary_block: expected a positive integer"),
        ({"softcap": 0.0}, "softcap: expected a number above 0"),
        ({"mesh": make_mesh({"data": 8})}, "4 rows cannot be split evenly over the 8 devices"),
        ({"mesh": make_mesh({"data": 8}), "axis": "ring"}, "the mesh has no axis 'ring'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            next_token(*arguments, **options)
    with pytest.raises(AssertionError):
        next_token(given["hidden"], given["kernel"][1:], given["labels"])
    with pytest.raises(AssertionError):
        next_token(given["hidden"], given["kernel"], given["labels"][:, 1:])
