"""`mmjax.generate`: new tokens for a batch of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import ConfigError
from mmjax.generation.beams import search_whole
from mmjax.generation.loop import Controls, generate_whole
from mmjax.generation.prompts import (
    Prompts,
    bucket,
    cache_dtype,
    check_ids,
    check_length,
    check_model,
    ending_ids,
    longest_input,
    padding_id,
    prepare,
)
from mmjax.generation.samplers import BeamSearch, Greedy, Sampler, Sampling

Array = jax.Array


def generate(
    model: Any,
    params: Any,
    batch: Mapping[str, Any],
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    key: Array | None = None,
    stop_ids: int | Sequence[int] | None = None,
    *,
    num_return_sequences: int = 1,
    pad_id: int | None = None,
) -> Array:
    """Let a model go on with prompts.

    The work is one compiled program, whose lengths are rounded up (see `bucket`): other prompts, other
    numbers of a sampler, other keys and stop ids do not compile again.

    Args:
        model: a language model, as `mmjax.load` gives it.
        params: its parameters.
        batch: input_ids int [B, T], and attention_mask [B, T] where rows are padded, on either side; or
            inputs_embeds [B, T, D]; more arguments of the model go to it with the prompts.
        max_new_tokens: N; a text ends sooner at a stop id.
        sampler: `mmjax.generation.Greedy` (the default), `Sampling` or `BeamSearch`.
        key: for `Sampling`: a PRNG key, or one per row [B]. What a row gets depends on its prompt, its key
            and the number of the sample, not on the other rows: with one key, equal prompts get equal texts.
        stop_ids: ids that end a text; None: those of the model's config; (): none.
        num_return_sequences: texts per prompt: samples, or the best beams.
        pad_id: what follows a text that has ended; None: the config's, else the first stop id.

    Returns:
        int32 [B * num_return_sequences, N]: the new tokens, the stop id included, then padding. The texts of
        one prompt follow each other.

    Raises:
        ConfigError, DataError: what cannot be done as asked.

    Deviations:
        A repetition penalty does not count padding, as transformers' does.

    >>> from mmjax.language import DecoderConfig
    >>> from mmjax.models import CausalLM
    >>> sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    >>> model = CausalLM(DecoderConfig(num_attention_heads=2, **sizes))
    >>> params = model.init(jax.random.key(0), **model.example_batch())["params"]
    >>> generate(model, params, {"input_ids": [[3, 1, 4]]}, max_new_tokens=5).shape
    (1, 5)
    """
    sampler = Greedy() if sampler is None else sampler
    prompts, controls = make_ready(
        model, batch, max_new_tokens, sampler, key, stop_ids, num_return_sequences, pad_id
    )
    room = bucket(max_new_tokens)
    size = prompts.inputs["attention_mask"].shape[1]
    static: dict[str, Any] = dict(
        model=model, room=room, length=size + room, dtype=jnp.dtype(cache_dtype(model, params)).name
    )
    length = np.int32(prompts.length)
    if isinstance(sampler, BeamSearch):
        best = search_whole(
            params,
            prompts.inputs,
            length,
            controls,
            num_beams=sampler.num_beams,
            early_stopping=sampler.early_stopping,
            **static,
        )
        tokens = best[:, :num_return_sequences].reshape(-1, room)
    else:
        tokens = generate_whole(
            params,
            prompts.inputs,
            length,
            controls,
            plan=sampler.plan(),
            copies=num_return_sequences,
            **static,
        )
    return tokens[:, :max_new_tokens]


def make_ready(
    model: Any,
    batch: Mapping[str, Any],
    max_new_tokens: int,
    sampler: Sampler,
    key: Array | None,
    stop_ids: int | Sequence[int] | None,
    copies: int,
    pad_id: int | None,
    before: int = 0,
) -> tuple[Prompts, Controls]:
    """Check a call, and put its numbers into arrays; arguments as in `generate`.

    Args:
        before: how many tokens a cache holds already.
    """
    check_model(model)
    if not isinstance(sampler, Greedy | Sampling | BeamSearch):
        raise ConfigError(f"sampler: {sampler!r} is not Greedy, Sampling or BeamSearch (mmjax.generation)")
    if isinstance(copies, bool) or not isinstance(copies, (int, np.integer)) or copies < 1:
        raise ConfigError(f"num_return_sequences: {copies!r} is not a whole number of at least 1")
    if copies > 1 and isinstance(sampler, Greedy):
        raise ConfigError("num_return_sequences: a greedy text has no others; give sampler=Sampling(...)")
    if isinstance(sampler, BeamSearch) and copies > sampler.num_beams:
        raise ConfigError(f"num_return_sequences: {copies} of only {sampler.num_beams} beams")
    prompts = prepare(batch, longest_input(model), model)
    check_ids(model, prompts.inputs.get("input_ids"), index=prompts.inputs.get("image_index"))
    check_length(model, before + prompts.length, max_new_tokens)
    stops = ending_ids(model, stop_ids)
    # So that one stop id or four are one program.
    filled = [*stops, *[-1] * (-len(stops) % 4 or (0 if stops else 4))]
    arrays: dict[str, Any] = dict(
        stop_ids=np.asarray(filled, np.int32),
        pad_id=np.int32(padding_id(model, stops) if pad_id is None else pad_id),
        limit=np.int32(max_new_tokens),
    )
    controls = Controls(
        keys=_row_keys(key, prompts.rows, copies) if isinstance(sampler, Sampling) else None,
        numbers=sampler.numbers(),
        **arrays,
    )
    return prompts, controls


def _row_keys(key: Array | None, rows: int, copies: int) -> Array:
    """A key for each text, [rows * copies], from one key or one per prompt, and the number of the sample."""
    if key is None:
        raise ConfigError("key: sampling needs one; give key=jax.random.key(0), for example")
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ConfigError("key: not a PRNG key; make one with jax.random.key")
    if key.shape not in ((), (rows,)):
        raise ConfigError(f"key: shape {key.shape}; give one key, or one for each of the {rows} prompts")
    each = jnp.broadcast_to(key, (rows,))
    samples = jnp.arange(copies)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(each, samples).reshape(-1)


__all__ = ["generate"]
