"""`mmjax.score`: how likely a model finds given answers to prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmjax.errors import DataError
from mmjax.generation.loop import repeat_rows
from mmjax.generation.prefill import read_prompt
from mmjax.generation.prompts import (
    bucket,
    cache_dtype,
    check_ids,
    check_length,
    check_model,
    length_matters,
    longest_input,
    prepare,
)
from mmjax.generation.tiles import look

Array = jax.Array


@flax.struct.dataclass
class AnswerScores:
    """Log-probabilities of C answers to each of B prompts.

    Attributes:
        total: float32 [B, C], of each answer as a whole, given its prompt.
        tokens: float32 [B, C, A], of each token, given the prompt and the tokens before it; 0 for padding.
        mask: bool [B, C, A], False for padding.
    """

    total: Array
    tokens: Array
    mask: Array

    @property
    def mean(self) -> Array:
        """float32 [B, C]: per token, which does not favour short answers."""
        return self.total / self.mask.sum(axis=-1)


def score(
    model: Any,
    params: Any,
    batch: Mapping[str, Any],
    answers: Sequence[Sequence[Sequence[int]]] | np.ndarray,
) -> AnswerScores:
    """Log-probabilities of answers, for multiple choice and for preferences.

    Every prompt is computed once, however many answers it has; only where the positions' scaling depends on
    the length (dynamic, longrope) and a text is longer than the original context, once for each answer.
    Differentiable in the parameters.

    Args:
        model, params, batch: as in `mmjax.generate`.
        answers: for each prompt the same number C of answers, each a sequence of token ids, of any lengths;
            or an int array [B, C, A] in which negative numbers, such as -100, end the shorter ones.

    Raises:
        ConfigError, DataError: what cannot be done as asked.

    >>> from mmjax.language import DecoderConfig
    >>> from mmjax.models import CausalLM
    >>> sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    >>> model = CausalLM(DecoderConfig(num_attention_heads=2, **sizes))
    >>> params = model.init(jax.random.key(0), **model.example_batch())["params"]
    >>> scores = score(model, params, {"input_ids": [[3, 1, 4]]}, [[[5, 6], [7]]])
    >>> scores.total.shape, scores.mask.tolist()
    ((1, 2), [[[True, True], [True, False]]])
    """
    check_model(model)
    prompts = prepare(batch, longest_input(model), model)
    ids, mask = _as_arrays(answers, prompts.rows)
    check_ids(model, prompts.inputs.get("input_ids"), index=prompts.inputs.get("image_index"))
    check_ids(model, ids, "answers")
    longest = ids.shape[-1]
    check_length(model, prompts.length, longest)
    room = bucket(longest, longest_input(model))
    padding = ((0, 0), (0, 0), (0, room - longest))
    tokens = _score(
        params,
        prompts.inputs,
        np.int32(prompts.length),
        np.pad(ids, padding),
        np.pad(mask, padding),
        model=model,
        dtype=jnp.dtype(cache_dtype(model, params)).name,
        whole=length_matters(model, prompts.length + longest),
    )[..., :longest]
    return AnswerScores(total=tokens.sum(axis=-1), tokens=tokens, mask=jnp.asarray(mask))


def _as_arrays(answers: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [B, C, A], 0 where the mask is False."""
    try:
        lists = [[np.asarray(answer).reshape(-1) for answer in row] for row in answers]
    except (TypeError, ValueError):
        raise DataError("answers: expected, for each prompt, a list of answers of token ids") from None
    if len(lists) != rows or not lists[0] or len({len(row) for row in lists}) > 1:
        counts = [len(row) for row in lists]
        raise DataError(f"answers: {rows} prompts need the same number of answers each, got {counts}")
    lists = [[answer[: _end(answer)] for answer in row] for row in lists]
    longest = max(len(answer) for row in lists for answer in row)
    ids = np.zeros((rows, len(lists[0]), longest), np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(lists):
        for j, answer in enumerate(row):
            if not len(answer) or not np.issubdtype(answer.dtype, np.integer):
                raise DataError(f"answers: answer {j} to prompt {i} is not a list of at least one token id")
            ids[i, j, : len(answer)], mask[i, j, : len(answer)] = answer, True
    return ids, mask


def _end(answer: np.ndarray) -> int:
    negative = np.flatnonzero(answer < 0)
    return int(negative[0]) if negative.size else len(answer)


@functools.partial(jax.jit, static_argnames=("model", "dtype", "whole"))
def _score(
    params: Any,
    inputs: dict[str, Array],
    prompt_length: Array,
    answers: Array,
    mask: Array,
    *,
    model: Any,
    dtype: str,
    whole: bool,
) -> Array:
    """float32 [B, C, A]: of each token of answers int32 [B, C, A].

    With `whole`, prompts are read again with each answer, by models whose keys depend on the text's length.
    """
    rows, count, longest = answers.shape
    ids, given = answers.reshape(-1, longest), mask.reshape(-1, longest)
    if whole:
        logits = _whole_texts(params, inputs, prompt_length, ids, given, model=model)
    else:
        cache = model.init_cache(rows, inputs["attention_mask"].shape[1] + longest, dtype)
        first, cache = read_prompt(model, params, cache, inputs, prompt_length, fresh=True)
        first, cache = repeat_rows((first, cache), count)
        out = model.apply({"params": params}, input_ids=ids, attention_mask=given, cache=cache)
        logits = jnp.concatenate([first[:, None], out.logits[:, :-1]], axis=1)
    chosen = jnp.take_along_axis(logits, ids[:, :, None], axis=-1)[..., 0]
    tokens = (chosen - jax.nn.logsumexp(logits, axis=-1)).reshape(answers.shape)
    return jnp.where(mask, tokens, 0.0)


def _whole_texts(
    params: Any, inputs: dict[str, Array], prompt_length: Array, ids: Array, mask: Array, *, model: Any
) -> Array:
    """float32 [B * C, A, V]: what answers [B * C, A] are scored by, of one pass over prompt and answer."""
    apply = functools.partial(model.apply, {"params": params})
    # Images are looked at once: what is repeated is what the decoder reads.
    inputs = look(model, params, inputs)
    prompt = apply(**inputs, method="embed_inputs"), inputs["attention_mask"] != 0
    embeds, before = repeat_rows(prompt, len(ids) // len(prompt[1]))
    embeds = jnp.concatenate([embeds, apply(input_ids=ids, method="embed_inputs")], axis=1)
    whole_mask = jnp.concatenate([before, mask], axis=1)
    hidden, _ = apply(inputs_embeds=embeds, attention_mask=whole_mask, method="hidden")
    # The padding after a prompt lies between its last token and the answer's first.
    last = lax.dynamic_index_in_dim(hidden, prompt_length - 1, axis=1, keepdims=True)
    hidden = jnp.concatenate([last, hidden[:, before.shape[1] : -1]], axis=1)
    return apply(hidden, method="logits")


__all__ = ["AnswerScores", "score"]
