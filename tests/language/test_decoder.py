"""Few positions of the decoder's output: the same numbers for less of the last layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.language import DecoderConfig
from mmjax.models import CausalLM
from mmjax.nn import Execution
from tests.tiny import DECODER, DECODERS, random_batch, random_params

POST = CausalLM(
    DecoderConfig(
        **DECODER, model_type="opt", norm="layer", norm_order="post", positions="learned", gated_mlp=False
    )
)
MODELS = {**DECODERS, "post": POST, "scanned": CausalLM(POST.config, execution=Execution(scan_layers=True))}
LAST = jnp.array([4, 5, 6])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("keep", [3, LAST], ids=["last three", "one each"])
def test_positions_are_those_of_all(name, cached, keep):
    """The same states and logits as without, and every key and value of the cache."""
    model = MODELS[name]
    params, batch = random_params(model), random_batch(model)
    cache = model.init_cache(3, 12) if cached else None

    def run(keep):
        return jax.jit(
            lambda params: model.apply({"params": params}, **batch, cache=cache, logits_to_keep=keep)
        )(params)

    whole, few = run(0), run(keep)
    at = LAST[:, None] if keep is LAST else np.broadcast_to([5, 6, 7], (3, 3))
    for found, all_of_them in (
        (few.logits, whole.logits),
        (few.last_hidden_state, whole.last_hidden_state),
    ):
        expected = np.take_along_axis(np.asarray(all_of_them), np.asarray(at)[..., None], 1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    jax.tree.map(np.testing.assert_array_equal, few.cache, whole.cache)


def test_what_is_asked_of_every_layer_is_whole():
    model = DECODERS["many"]
    params, batch = random_params(model), random_batch(model)
    out = model.apply({"params": params}, **batch, logits_to_keep=LAST, output_hidden_states=True)
    assert [states.shape for states in out.hidden_states] == [(3, 8, 16)] * 3
    assert out.last_hidden_state.shape == (3, 1, 16)
    np.testing.assert_array_equal(out.last_hidden_state[:, 0], out.hidden_states[-1][jnp.arange(3), LAST])


def test_dropout_is_that_of_all_positions():
    """Its masks are drawn for whole rows, whatever is kept of them."""
    model = DECODERS["plain"]
    params, batch = random_params(model), random_batch(model)
    noise = {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}

    def run(keep):
        return jax.jit(
            lambda: model.apply({"params": params}, **batch, **noise, logits_to_keep=keep)
        )().logits

    np.testing.assert_allclose(run(LAST)[:, 0], run(0)[jnp.arange(3), LAST], rtol=0, atol=1e-5)


def test_the_last_layer_is_computed_for_them_alone():
    """Of two layers with one position of each row, little more is computed than of one with all."""
    sizes = {**DECODER, "vocab_size": 32, "hidden_size": 64, "intermediate_size": 512}
    two = CausalLM(DecoderConfig(**sizes))
    one = CausalLM(dataclasses.replace(two.config, num_hidden_layers=1))

    def flops(model, keep):
        def run(params, ids):
            return model.apply({"params": params}, ids, logits_to_keep=keep).logits

        shapes = random_params(model), np.zeros((3, 64), np.int32)
        return jax.jit(run).lower(*shapes).compile().cost_analysis()["flops"]

    whole, half = flops(two, 1), flops(one, 64)
    assert half < whole < 1.2 * half
