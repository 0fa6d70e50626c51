"""The decode loop: a documented state, a pure step, one `lax.while_loop`, and the programs made of them."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from mmjax.generation.prefill import read_prompt
from mmjax.generation.samplers import Plan
from mmjax.generation.warpers import choose

Array = jax.Array


@flax.struct.dataclass
class DecodeState:
    """Texts of R rows under way.

    Attributes:
        cache: of the model, with every token but the newest.
        token: int32 [R], each row's newest token; a finished row's last one.
        tokens: int32 [R, N], the new tokens so far, then padding.
        done: bool [R], whether a row has ended.
        step: int32 [], how many new tokens there are.
        seen: bool [R, V], tokens of the prompt and the text so far; None where no sampler asks.
    """

    cache: Any
    token: Array
    tokens: Array
    done: Array
    step: Array
    seen: Array | None


@flax.struct.dataclass
class Controls:
    """The numbers of one call, which programs take as inputs.

    Attributes:
        keys: one PRNG key per row, [R], or None.
        numbers: of the sampler, by their names.
        stop_ids: int32 [K]; -1 matches no token.
        pad_id: int32 [].
        limit: int32 [], how many new tokens to make, at most N.
    """

    keys: Array | None
    numbers: dict[str, Any]
    stop_ids: Array
    pad_id: Array
    limit: Array


def repeat_rows(tree: Any, copies: int) -> Any:
    """Every array with each of its rows `copies` times in a row; numbers stay.

    >>> repeat_rows({"x": jnp.array([1, 2]), "n": jnp.int32(3)}, 2)["x"].tolist()
    [1, 1, 2, 2]
    """
    if copies == 1:
        return tree
    return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0) if x.ndim else x, tree)


def begin(
    plan: Plan, controls: Controls, logits: Array, cache: Any, text: dict[str, Array], copies: int, room: int
) -> DecodeState:
    """The state after the first new token.

    Args:
        logits, cache: of the prompts, as `read_prompt` gives them, [B, V].
        text: the whole prompts, input_ids and attention_mask [B, S], where they are ids.
        copies: texts per prompt; R = B * copies.
        room: N.
    """
    seen = None
    if "repetition_penalty" in plan.names:
        seen = jnp.zeros(logits.shape, bool)
        if "input_ids" in text:
            each = jnp.arange(logits.shape[0])[:, None]
            seen = seen.at[each, text["input_ids"]].max(text["attention_mask"] != 0)
    logits, cache, seen = repeat_rows((logits, cache, seen), copies)
    rows = logits.shape[0]
    state = DecodeState(
        cache=cache,
        token=jnp.zeros((rows,), jnp.int32),
        tokens=jnp.full((rows, room), controls.pad_id, jnp.int32),
        done=jnp.zeros((rows,), bool),
        step=jnp.int32(0),
        seen=seen,
    )
    return take(plan, controls, state, logits)


def take(plan: Plan, controls: Controls, state: DecodeState, logits: Array) -> DecodeState:
    """Choose each row's next token.

    Args:
        state: whose cache has every token that the logits come after.
        logits: float32 [R, V].
    """
    keys = controls.keys
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
    token = choose(logits, plan, controls.numbers, state.seen, keys)
    written = jnp.where(state.done, controls.pad_id, token)
    token = jnp.where(state.done, state.token, token)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return state.replace(  # type: ignore[attr-defined]
        token=token,
        tokens=lax.dynamic_update_slice(state.tokens, written[:, None], (jnp.int32(0), state.step)),
        done=state.done | (token[:, None] == controls.stop_ids).any(axis=1),
        step=state.step + 1,
        seen=seen,
    )


def step(model: Any, plan: Plan, params: Any, controls: Controls, state: DecodeState) -> DecodeState:
    """One token more for every row that has not ended."""
    out = model.apply(
        {"params": params},
        input_ids=state.token[:, None],
        # The last token of a finished row stays out, so that a conversation can go on after it.
        attention_mask=~state.done[:, None],
        cache=state.cache,
    )
    state = state.replace(cache=out.cache)  # type: ignore[attr-defined]
    return take(plan, controls, state, out.logits[:, 0])


def advance_until(
    model: Any, plan: Plan, params: Any, controls: Controls, state: DecodeState, stop: Array
) -> DecodeState:
    """Steps until there are `stop` new tokens (int32 []), the limit is reached, or every row has ended."""

    def goes_on(state: DecodeState) -> Array:
        return (state.step < jnp.minimum(stop, controls.limit)) & ~state.done.all()

    return lax.while_loop(goes_on, functools.partial(step, model, plan, params, controls), state)


@functools.partial(jax.jit, static_argnames=("model", "plan", "copies", "room", "length", "dtype"))
def generate_whole(
    params: Any,
    inputs: dict[str, Array],
    prompt_length: Array,
    controls: Controls,
    *,
    model: Any,
    plan: Plan,
    copies: int,
    room: int,
    length: int,
    dtype: str,
) -> Array:
    """Prefill and loop as one program: int32 [R, N]; `length` is that of the cache."""
    cache = model.init_cache(inputs["attention_mask"].shape[0], length, dtype)
    logits, cache = read_prompt(model, params, cache, inputs, prompt_length, fresh=True)
    state = begin(plan, controls, logits, cache, inputs, copies, room)
    return advance_until(model, plan, params, controls, state, controls.limit).tokens


@functools.partial(jax.jit, static_argnames=("model", "plan", "copies", "room", "fresh"))
def start(
    params: Any,
    cache: Any,
    inputs: dict[str, Array],
    prompt_length: Array,
    text: dict[str, Array],
    controls: Controls,
    *,
    model: Any,
    plan: Plan,
    copies: int,
    room: int,
    fresh: bool,
) -> DecodeState:
    """Prefill alone, after what the cache holds (nothing, if `fresh`); the cache given stays as it is."""
    logits, cache = read_prompt(model, params, cache, inputs, prompt_length, fresh=fresh)
    return begin(plan, controls, logits, cache, text, copies, room)


@functools.partial(jax.jit, static_argnames=("model", "plan"), donate_argnames=("state",))
def resume(
    params: Any, controls: Controls, state: DecodeState, stop: Array, *, model: Any, plan: Plan
) -> DecodeState:
    """The loop alone; the state given is used up."""
    return advance_until(model, plan, params, controls, state, stop)


__all__ = ["Controls", "DecodeState", "generate_whole", "resume", "start", "step"]
