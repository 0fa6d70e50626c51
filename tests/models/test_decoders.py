"""Causal language models without a reference at hand: golden folders, the cache, packing, execution.

`tests/golden/make_decoders_golden.py` wrote the folders.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import mmjax
from mmjax.errors import ConfigError
from mmjax.language import DecoderConfig
from mmjax.models import CausalLM
from mmjax.nn import Execution, parameter_specs
from mmjax.nn.rope import DynamicScaling, LongRopeScaling
from mmjax.parallel import batch_sharding, make_mesh, param_shardings
from tests.models.folders import CONFIG

pytestmark = pytest.mark.usefixtures("no_network")

FOLDER = Path(__file__).parents[1] / "golden" / "decoders"
NAMES = sorted(path.name for path in FOLDER.iterdir())
# Their own layers, masks and positions; the others differ in settings that these have too.
SOME = ["gemma2", "opt", "qwen3_moe"]
FORWARD = 1e-5


@functools.cache
def golden(name):
    model, params, processor = mmjax.load(FOLDER / name)
    assert processor is None
    with np.load(FOLDER / name / "expected.npz") as file:
        return model, params, dict(file)


def assert_close(actual, expected, tolerance=FORWARD):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def test_all_of_them_are_here():
    families = {"gemma", "gemma2", "internlm2", "llama", "mistral", "opt", "qwen2", "qwen3", "qwen3_moe"}
    assert {*NAMES} == {*families, "internlm2-no-bias"}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens(name):
    """Both paddings at once; then token by token with the cache, to the reference's text without one."""
    model, params, arrays = golden(name)
    ids, mask, tokens = (arrays[key] for key in ("input_ids", "attention_mask", "tokens"))
    out = jax.jit(model.apply)({"params": params}, ids, mask)
    assert out.logits.dtype == jnp.float32
    assert_close(np.asarray(out.logits)[mask > 0], arrays["logits"][mask > 0])

    @jax.jit
    def step(params, ids, mask, cache):
        out = model.apply({"params": params}, ids, mask, cache=cache, logits_to_keep=1)
        return jnp.argmax(out.logits, axis=-1), out.cache

    cache = model.init_cache(2, ids.shape[1] + tokens.shape[1])
    token, cache = step(params, ids[:2], mask[:2], cache)
    text = [token]
    for _ in range(tokens.shape[1] - 1):
        token, cache = step(params, token, None, cache)
        text.append(token)
    np.testing.assert_array_equal(jnp.concatenate(text, axis=1), tokens)
    assert int(cache.cursor) == ids.shape[1] + tokens.shape[1] - 1


@pytest.mark.parametrize("name", [*SOME, "llama"])
def test_cached_equals_uncached(name):
    """In pieces, with padding on the left of one row and on the right of another."""
    model, params, arrays = golden(name)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    more = np.concatenate([ids, ids[::-1, :4]], axis=1)
    run = jax.jit(lambda i, m, c: model.apply({"params": params}, i, m, cache=c))
    cache, pieces = model.init_cache(3, 16), []
    for start in (0, 4, 8):
        piece_mask = mask[:, start : start + 4] if start < 8 else np.ones((3, 4), int)
        out = run(more[:, start : start + 4], piece_mask, cache)
        cache = out.cache
        pieces.append(out.logits)
    pieces = np.asarray(jnp.concatenate(pieces, axis=1))
    # After padding on the right, the text goes on as if there had been none.
    whole = np.stack([more[0], more[1], np.concatenate([more[2, 6:8], more[2, :6], more[2, 8:]])])
    whole_mask = np.concatenate([mask[:2], mask[2:, ::-1]])
    whole_mask = np.concatenate([whole_mask, np.ones((3, 4), int)], axis=1)
    expected = np.array(jax.jit(model.apply)({"params": params}, whole, whole_mask).logits)
    expected[2] = np.concatenate([expected[2, 2:8], expected[2, :2], expected[2, 8:]])
    real = np.concatenate([mask, np.ones((3, 4), int)], axis=1) > 0
    assert_close(pieces[real], expected[real])


# Of the texts in a row here, one is longer than the original context and the other is not.
BY_LENGTH = [
    DynamicScaling(factor=4.0, original_max_position_embeddings=4),
    LongRopeScaling(
        short_factor=(1.0,) * 3, long_factor=(3.0,) * 3, original_max_position_embeddings=3, factor=4.0
    ),
]


@pytest.mark.parametrize(
    ("name", "scaling"),
    [*((name, None) for name in (*SOME, "llama")), *(("llama", scaling) for scaling in BY_LENGTH)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_packed_rows_equal_separate_ones(name, scaling):
    model, params, arrays = golden(name)
    if scaling is not None:
        model = model.clone(config=dataclasses.replace(model.config, rope_scaling=scaling))
    ids = arrays["input_ids"][:2]
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2], [3, 3, 3, 3, 1, 1, 0, 0]])
    packed = jax.jit(lambda p: model.apply({"params": p}, ids, segment_ids=segments).logits)(params)
    places = ((0, 0, 3), (0, 3, 8), (1, 0, 4), (1, 4, 6))
    alone, lengths = np.zeros((4, 5), int), np.array([stop - start for _, start, stop in places])
    for text, (row, start, stop) in enumerate(places):
        alone[text, : stop - start] = ids[row, start:stop]
    logits = jax.jit(model.apply)({"params": params}, alone, np.arange(5) < lengths[:, None]).logits
    for text, (row, start, stop) in enumerate(places):
        assert_close(packed[row, start:stop], logits[text, : stop - start])


def test_a_donated_cache_is_written_in_place():
    model, params, arrays = golden("llama")

    def step(params, ids, cache):
        return model.apply({"params": params}, ids, cache=cache).cache

    cache = model.init_cache(3, 64)
    where = [part.unsafe_buffer_pointer() for part in (*cache.keys, *cache.values)]
    cache = jax.jit(step, donate_argnums=2)(params, arrays["input_ids"][:, :1], cache)
    assert [part.unsafe_buffer_pointer() for part in (*cache.keys, *cache.values)] == where
    assert int(cache.cursor) == 1


def loss(model, params, batch):
    out = model.apply({"params": params}, **batch)
    return jnp.mean(jnp.square(jax.nn.log_softmax(out.logits)))


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
@pytest.mark.parametrize(
    "execution", [Execution(scan_layers=True), Execution(remat=True)], ids=["scan", "remat"]
)
def test_execution_changes_nothing(name, execution):
    model, params, arrays = golden(name)
    batch = {key: arrays[key] for key in ("input_ids", "attention_mask")}

    @functools.partial(jax.jit, static_argnums=0)
    def everything(model, params):
        flags = dict(output_hidden_states=True, output_attentions=True, cache=model.init_cache(3, 8))
        out = model.apply({"params": params}, **batch, **flags)
        return out, jax.grad(functools.partial(loss, model))(params, batch)

    changed, plain = (everything(m, params) for m in (model.clone(execution=execution), model))
    assert len(plain[0].hidden_states) == model.config.num_hidden_layers + 1
    for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_dropout_needs_its_key_and_changes_the_output():
    model, params, arrays = golden("opt")
    assert model.config.hidden_dropout == 0.1
    run = functools.partial(model.apply, {"params": params}, arrays["input_ids"])
    noisy = [run(deterministic=False, rngs={"dropout": jax.random.key(seed)}).logits for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.allclose(noisy[0], noisy[2]) and not np.allclose(noisy[0], run().logits)


@pytest.mark.parametrize("name", [*SOME, "internlm2"])
def test_bfloat16(name):
    model, params, arrays = golden(name)
    narrow = model.clone(execution=Execution(dtype="bfloat16"))
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    out = jax.jit(narrow.apply)({"params": params}, ids, mask, cache=narrow.init_cache(3, 8))
    assert out.logits.dtype == jnp.float32 and out.last_hidden_state.dtype == jnp.bfloat16
    assert out.cache.keys[0].dtype == jnp.bfloat16
    if name != "qwen3_moe":  # A token on the border between two experts takes the other one.
        assert_close(np.asarray(out.logits)[mask > 0], arrays["logits"][mask > 0], 0.1)


def test_eight_devices_equal_one():
    model, params, arrays = golden("qwen3_moe")
    batch = {key: np.repeat(arrays[key][:2], 4, axis=0) for key in ("input_ids", "attention_mask")}
    step = jax.value_and_grad(functools.partial(loss, model))
    expected_loss, expected = jax.jit(step)(params, batch)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    lay = param_shardings(mesh, parameter_specs(model))
    assert len({str(sharding.spec) for sharding in jax.tree.leaves(lay)}) >= 4
    found_loss, found = jax.jit(step, in_shardings=(lay, batch_sharding(mesh)), out_shardings=(None, lay))(
        jax.device_put(params, lay), jax.device_put(batch, batch_sharding(mesh))
    )
    np.testing.assert_allclose(found_loss, expected_loss, rtol=FORWARD)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_the_same_folder(name, tmp_path):
    model, params, _ = golden(name)
    mmjax.save(tmp_path, model, params)
    again, params_again, _ = mmjax.load(tmp_path)
    assert again.config == model.config
    ours, theirs = (flatten_dict(p, sep="/") for p in (params_again, params))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)
    ours, theirs = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, FOLDER / name))
    assert {key: ours[key] for key in theirs} == theirs


def test_inputs_in_other_forms_give_the_same():
    model, params, arrays = golden("gemma2")
    ids, mask = arrays["input_ids"], arrays["attention_mask"]

    # With an outermost jit for each: one operation at a time is slow.
    def run(*arguments, **options):
        return jax.jit(lambda: model.apply({"params": params}, *arguments, **options))()

    out = run(ids, mask)
    embeds = run(ids, method="embed_tokens")
    assert_close(run(None, mask, inputs_embeds=embeds).logits, out.logits)
    positions = np.cumsum(mask, axis=1) - 1
    assert_close(run(ids, mask, positions).logits, out.logits)
    three = np.broadcast_to(positions, (3, *positions.shape))
    several = CausalLM(DecoderConfig(**{**vars(model.config), "rope_sections": (1, 1, 1)}))
    assert_close(several.apply({"params": params}, ids, mask, three).logits, out.logits)
    assert_close(run(ids, mask, logits_to_keep=2).logits, out.logits[:, -2:])
    chosen = run(ids, mask, logits_to_keep=jnp.array([7, 7, 5])).logits
    assert_close(chosen[:, 0], jnp.stack([out.logits[0, 7], out.logits[1, 7], out.logits[2, 5]]))
    hidden, cache = run(ids, mask, method="hidden")
    assert cache is None
    assert_close(hidden, out.last_hidden_state)
    assert_close(run(hidden, method="logits"), out.logits)
    kernel = run(method="output_kernel")
    assert kernel.shape == (16, 29)
    cap = model.config.logits_softcap
    assert_close(cap * np.tanh(np.asarray(hidden @ kernel) / cap), out.logits)


@pytest.mark.parametrize(
    ("name", "inputs", "match"),
    [
        ("llama", dict(), "input_ids, inputs_embeds: give one of the two"),
        ("llama", dict(input_ids=np.zeros(3, int)), "input_ids: expected .batch, tokens., got shape"),
        (
            "llama",
            dict(input_ids=np.zeros((2, 3), int), attention_mask=np.ones((2, 4))),
            r"attention_mask: shape \(2, 4\), but there are 2 rows of 3 tokens",
        ),
        (
            "llama",
            dict(input_ids=np.zeros((2, 3), int), position_ids=np.zeros((2, 2), int)),
            r"position_ids: shape \(2, 2\)",
        ),
        (
            "opt",
            dict(input_ids=np.zeros((1, 33), int)),
            "input_ids: 33 tokens, but the model has 32 positions",
        ),
        (
            "llama",
            dict(input_ids=np.zeros((2, 3), int), logits_to_keep=np.zeros(3, int)),
            "logits_to_keep: expected one position for each of 2 rows",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, inputs, match):
    model, params, _ = golden(name)
    with pytest.raises(ConfigError, match=match):
        model.apply({"params": params}, **inputs)


def test_caches_that_do_not_fit_are_refused():
    model, params, _ = golden("llama")
    ids = np.zeros((2, 5), int)
    run = functools.partial(model.apply, {"params": params}, ids)
    with pytest.raises(ConfigError, match="cache: made for 3 rows and 2 layers, but there are 2 and 2"):
        run(cache=model.init_cache(3, 8))
    with pytest.raises(ConfigError, match="cache: 5 tokens do not fit into 4 slots"):
        run(cache=model.init_cache(2, 4))
    with pytest.raises(ConfigError, match="segment_ids: packed rows cannot be cached"):
        run(cache=model.init_cache(2, 8), segment_ids=ids)
