"""Beam search as one program: the texts that are kept, those that have ended, and when to stop."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from mmjax.generation.loop import Controls, repeat_rows
from mmjax.generation.prefill import read_prompt

Array = jax.Array
# Stands for minus infinity; two of them still add up.
WORST = -1e9


@flax.struct.dataclass
class BeamState:
    """W texts under way for each of B prompts, and the W best that have ended.

    Attributes:
        cache: of the model, [B * W] rows, with every token but the newest.
        running: int32 [B, W, N], texts under way, the likeliest first.
        scores: float32 [B, W], their log-probabilities.
        ended: int32 [B, W, N], texts that have ended, the best first.
        ended_scores: float32 [B, W], log-probabilities over lengths to the power of the penalty.
        is_ended: bool [B, W], which of them there are.
        hopeful: bool [B], whether a text under way may yet be better than the ended ones.
        goes_on: bool [].
        step: int32 [], how many new tokens the texts under way have.
    """

    cache: Any
    running: Array
    scores: Array
    ended: Array
    ended_scores: Array
    is_ended: Array
    hopeful: Array
    goes_on: Array
    step: Array


def _pick(values: Array, index: Array) -> Array:
    """[B, M, ...] at index [B, W]: [B, W, ...]."""
    return jnp.take_along_axis(values, index.reshape(index.shape + (1,) * (values.ndim - 2)), axis=1)


def extend(state: BeamState, logits: Array, controls: Controls, early_stopping: bool | str) -> BeamState:
    """One token more for the texts under way, out of the logits float32 [B * W, V] after each."""
    rows, beams = state.scores.shape
    size = logits.shape[-1]
    likely = jax.nn.log_softmax(logits, axis=-1).reshape(rows, beams, size) + state.scores[:, :, None]
    # So many that, even if all the stop ids follow every text, W others are among them.
    count = min((1 + controls.stop_ids.shape[0]) * beams, beams * size)
    scores, index = lax.top_k(likely.reshape(rows, -1), count)
    parents, token = index // size, (index % size).astype(jnp.int32)
    texts = _pick(state.running, parents)
    texts = lax.dynamic_update_slice(texts, token[:, :, None], (jnp.int32(0), jnp.int32(0), state.step))
    length = state.step + 1
    at_limit = length >= controls.limit
    ends = (token[:, :, None] == controls.stop_ids).any(axis=-1) | at_limit

    running_scores, best = lax.top_k(scores + ends * WORST, beams)
    running, parents = _pick(texts, best), _pick(parents, best)

    penalty = controls.numbers["length_penalty"]
    # Only a text among the W likeliest counts as ended.
    ended_now = ends & (jnp.arange(count) < beams)
    closed = ~state.hopeful
    if early_stopping is True:
        closed |= state.is_ended.all(axis=1)
    final = scores / length.astype(jnp.float32) ** penalty
    final = final + closed[:, None] * WORST + ~ended_now * WORST
    merged_scores = jnp.concatenate([state.ended_scores, final], axis=1)
    ended_scores, kept = lax.top_k(merged_scores, beams)
    ended = _pick(jnp.concatenate([state.ended, texts], axis=1), kept)
    is_ended = _pick(jnp.concatenate([state.is_ended, ended_now], axis=1), kept)

    reached: Array = length
    if early_stopping == "never":
        reached = jnp.where(penalty > 0, controls.limit, length)
    possible = running_scores[:, 0] / reached.astype(jnp.float32) ** penalty
    worst = jnp.where(is_ended, ended_scores.min(axis=1, keepdims=True), WORST).min(axis=1)
    hopeful = state.hopeful & (possible > worst)
    goes_on = hopeful.any() & ~ends.all()
    if early_stopping is True:
        goes_on &= ~is_ended.all()

    source = (parents + beams * jnp.arange(rows)[:, None]).reshape(-1)
    cache = jax.tree.map(lambda x: jnp.take(x, source, axis=0) if x.ndim else x, state.cache)
    return BeamState(
        cache=cache,
        running=running,
        scores=running_scores,
        ended=ended,
        ended_scores=ended_scores,
        is_ended=is_ended,
        hopeful=hopeful,
        goes_on=goes_on,
        step=length,
    )


@functools.partial(
    jax.jit, static_argnames=("model", "num_beams", "early_stopping", "room", "length", "dtype")
)
def search_whole(
    params: Any,
    inputs: dict[str, Array],
    prompt_length: Array,
    controls: Controls,
    *,
    model: Any,
    num_beams: int,
    early_stopping: bool | str,
    room: int,
    length: int,
    dtype: str,
) -> Array:
    """Prefill and search as one program: int32 [B, W, N], the best text first."""
    rows = inputs["attention_mask"].shape[0]
    cache = model.init_cache(rows, length, dtype)
    logits, cache = read_prompt(model, params, cache, inputs, prompt_length, fresh=True)
    logits, cache = repeat_rows((logits, cache), num_beams)
    blank = jnp.full((rows, num_beams, room), controls.pad_id, jnp.int32)
    none = jnp.full((rows, num_beams), WORST, jnp.float32)
    state = BeamState(
        cache=cache,
        running=blank,
        # At first all texts are the prompt, so only one of them counts.
        scores=none.at[:, 0].set(0.0),
        ended=blank,
        ended_scores=none,
        is_ended=jnp.zeros((rows, num_beams), bool),
        hopeful=jnp.ones((rows,), bool),
        goes_on=jnp.array(True),
        step=jnp.int32(0),
    )

    def step(state: BeamState) -> BeamState:
        at = jnp.broadcast_to(state.step - 1, (rows, num_beams, 1))
        token = jnp.take_along_axis(state.running, at, axis=2).reshape(-1, 1)
        out = model.apply({"params": params}, input_ids=token, cache=state.cache)
        state = state.replace(cache=out.cache)  # type: ignore[attr-defined]
        return extend(state, out.logits[:, 0], controls, early_stopping)

    state = extend(state, logits, controls, early_stopping)
    return lax.while_loop(lambda state: state.goes_on, step, state).ended


__all__ = ["BeamState", "extend", "search_whole"]
