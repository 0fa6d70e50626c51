"""Tokens and text as they are made, and conversations that go on from the cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import ConfigError, DataError
from mmjax.generation import images
from mmjax.generation.loop import resume, start
from mmjax.generation.prefill import in_pieces
from mmjax.generation.prompts import bucket, cache_dtype, length_matters, longest_input, prepare
from mmjax.generation.samplers import BeamSearch, Greedy, Sampler
from mmjax.generation.text import make_ready

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A text that a model has read, to go on from.

    Attributes:
        cache: of the model, one row, whose first slots hold the tokens of `ids`.
        ids: the tokens.
        keys: what tells them apart: of images, what they show.
    """

    cache: Any
    ids: tuple[int, ...]
    keys: tuple[Any, ...]


def stream(
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
    conversation: Conversation | None = None,
) -> TokenStream:
    """What `mmjax.generate` returns, one column at a time.

    Args:
        model, params, batch, max_new_tokens, sampler, key, stop_ids, num_return_sequences, pad_id: as there;
            no beam search. Of the parameters `jax.ShapeDtypeStruct`s are enough to check a call.
        conversation: what the model has read already, one row. `batch` is the whole text so far, with all of
            its images; as much of its beginning as the conversation shares is not computed again. Where the
            positions' scaling depends on the length (dynamic, longrope), texts beyond the original context
            are computed as a whole.

    Raises:
        ConfigError, DataError: what cannot be done as asked; before anything is computed.

    >>> from mmjax.language import DecoderConfig
    >>> from mmjax.models import CausalLM
    >>> sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    >>> model = CausalLM(DecoderConfig(num_attention_heads=2, **sizes))
    >>> params = model.init(jax.random.key(0), **model.example_batch())["params"]
    >>> tokens = stream(model, params, {"input_ids": [[3, 1, 4]]}, max_new_tokens=5)
    >>> answer = [int(token[0]) for token in tokens]
    >>> question = [3, 1, 4, *answer, 8]
    >>> more = stream(model, params, {"input_ids": [question]}, conversation=tokens.conversation)
    >>> len(answer), more.reused
    (5, 7)
    """
    sampler = Greedy() if sampler is None else sampler
    if isinstance(sampler, BeamSearch):
        raise ConfigError("sampler: beams are known at the end only; stream with Greedy or Sampling")
    prompts, controls = make_ready(
        model, batch, max_new_tokens, sampler, key, stop_ids, num_return_sequences, pad_id
    )
    reused, patches = 0, getattr(model.config, "tile_rows", 0)
    one_row = prompts.rows == 1 and "input_ids" in prompts.inputs
    keys = images.token_keys(prompts.inputs, patches, prompts.length) if one_row else None
    if conversation is not None:
        known = {"input_ids", "attention_mask", *images.NAMES}
        if keys is None or num_return_sequences != 1 or set(batch) - known:
            raise DataError("conversation: goes on with one row of input_ids and its images, nothing else")
        # The conversation's own length counts too: a text that was cut short has keys of the longer one.
        longest = max(prompts.length, len(conversation.ids))
        reused = 0 if length_matters(model, longest) else shared(conversation.keys, keys)
    text = {name: prompts.inputs[name] for name in ("input_ids", "attention_mask") if name in prompts.inputs}
    if reused:
        rest = {name: value for name, value in prompts.inputs.items() if name in images.MEDIA}
        for name in ("input_ids", *images.PER_TOKEN):
            if name in prompts.inputs:
                rest[name] = prompts.inputs[name][:, reused : prompts.length]
        # Images that were seen before are not looked at again.
        rest = images.used_only(rest, patches) if "image_index" in rest else rest
        prompts = prepare(rest, longest_input(model), model)
    size, room = prompts.inputs["attention_mask"].shape[1], bucket(max_new_tokens)
    length, kept = bucket(reused + size + room), None
    if conversation is not None and reused:
        # A longer one stays as long: programs are compiled for its length already. It is copied now, since
        # the stream that it comes from may go on.
        length = max(length, conversation.cache.length)
        kept = rewind(conversation.cache, np.int32(reused), length=length)

    def make_cache() -> Any:
        dtype = cache_dtype(model, params)
        return model.init_cache(prompts.rows, length, dtype) if kept is None else kept

    plan = sampler.plan()
    begin = functools.partial(
        start,
        params,
        inputs=prompts.inputs,
        prompt_length=np.int32(prompts.length),
        # Whole texts have other lengths than what is read now, so other programs; most need none.
        text=text if "repetition_penalty" in plan.names else {},
        controls=controls,
        model=model,
        plan=plan,
        copies=num_return_sequences,
        room=room,
        # Only where it makes a difference: first and later turns of one size are one program elsewhere.
        fresh=not reused and in_pieces(model, size),
    )
    go_on = functools.partial(resume, params, controls, model=model, plan=plan)
    ids = text["input_ids"][0, : reused + prompts.length].tolist() if "input_ids" in text else None
    return TokenStream(make_cache, begin, go_on, max_new_tokens, ids, reused, keys)


class TokenStream(Iterator[np.ndarray]):
    """New tokens int32 [R], one array per step, padding for rows that have ended; stops when all have.

    Work is done when a token is asked for, and only then; `close` ends it, as leaving a `with` block does.

    Attributes:
        reused: how many tokens of the prompt were not computed again.
    """

    def __init__(
        self,
        make_cache: Callable[[], Any],
        begin: functools.partial[Any],
        go_on: functools.partial[Any],
        limit: int,
        ids: list[int] | None,
        reused: int,
        keys: list[Any] | None,
    ) -> None:
        self.reused = reused
        self._begin: Any = make_cache, begin
        self._go_on: Any = go_on
        self._limit, self._ids, self._keys = limit, ids, keys
        self._state: Any = None
        self._made: list[int] = []
        self._step = 0
        self._ended = False

    def __next__(self) -> np.ndarray:
        if self._ended or self._step >= self._limit:
            raise StopIteration
        if self._state is None:
            make_cache, begin = self._begin
            state, self._begin = begin(cache=make_cache()), None
        else:
            state = self._go_on(self._state, np.int32(self._step + 1))
        self._state = state
        tokens, done = jax.device_get((state.tokens[:, self._step], state.done))
        self._step += 1
        self._ended = bool(done.all())
        self._made.append(int(tokens[0]))
        return tokens

    def close(self) -> None:
        """Make no more tokens."""
        self._ended, self._begin, self._go_on = True, None, None

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def conversation(self) -> Conversation:
        """What the model has read and said so far, to go on from with `stream`.

        Going on with this stream uses it up.

        Raises:
            ConfigError: nothing was made yet, or the prompts are not one row of ids.
        """
        if self._state is None or self._ids is None or self._keys is None or len(self._state.token) != 1:
            raise ConfigError("conversation: there is one after the first token of a single row of input_ids")
        # The newest token is not in the cache yet.
        made = self._made[:-1]
        return Conversation(self._state.cache, tuple(self._ids + made), tuple(self._keys + made))


def shared(before: Sequence[Any], now: Sequence[Any]) -> int:
    """How many tokens two texts begin with together, at most all but the last of `now`.

    >>> shared([1, 2, 3, 4], [1, 2, 9]), shared([1, 2], [1, 2])
    (2, 1)
    """
    most = min(len(before), len(now) - 1)
    return next((i for i in range(most) if before[i] != now[i]), most)


@functools.partial(jax.jit, static_argnames=("length",))
def rewind(cache: Any, tokens: Array, *, length: int) -> Any:
    """A cache of one row that holds only its first tokens, and has room for `length` in all.

    Args:
        cache: a KVCache without padding before its tokens.
        tokens: int32 [], how many stay.
        length: at least the cache's own.
    """

    def widen(slots: Array) -> Array:
        width = [(0, 0)] * slots.ndim
        width[slots.ndim // 2] = (0, length - slots.shape[slots.ndim // 2])
        return jnp.pad(slots, width)

    wide = jax.tree.map(lambda x: widen(x) if x.ndim else x, cache)
    return wide.replace(mask=wide.mask & (jnp.arange(length) < tokens), cursor=jnp.asarray(tokens))


# A byte that only goes on with a character, as vocabularies with a token for each byte write it.
_A_BYTE = "<0x80>"


def stream_text(
    tokens: Iterable[np.ndarray], tokenizer: Any, *, skip_special_tokens: bool = True
) -> Iterator[str]:
    """The text of one row of tokens, in pieces that together are what `tokenizer.decode` gives.

    A piece is held back while its last character is incomplete. Where tokens stand for single bytes beside
    others (`<0x80>`), a run of them is held back to its end: one wrong byte changes what all of them mean.
    Closing the iterator closes `tokens`.

    Args:
        tokens: arrays of one id, such as `stream` gives.
        tokenizer: of the model.
        skip_special_tokens: leave out special tokens, such as the one that ends a text.
    """
    ids: list[int] = []
    # Pieces are decoded together with the ones before: what a token means depends on its neighbours.
    behind = said = 0
    before = ""
    find = getattr(tokenizer, "token_to_id", None)
    byte = find(_A_BYTE) if find is not None else None

    def decode(some: list[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=skip_special_tokens)

    def is_final(now: str) -> bool:
        if now.endswith("\ufffd"):
            return False
        return byte is None or decode([*ids[behind:], byte]).startswith(now)

    try:
        for token in tokens:
            number = int(np.asarray(token).reshape(()) if np.size(token) == 1 else _several(token))
            # The table of many models has more rows than there are tokens.
            if number >= tokenizer.vocab_size:
                continue
            ids.append(number)
            now = decode(ids[behind:])
            if len(now) > len(before) and is_final(now):
                yield now[len(before) :]
                behind, said = said, len(ids)
                before = decode(ids[behind:said])
        rest = decode(ids[behind:]) if ids else ""
        if len(rest) > len(before):
            yield rest[len(before) :]
    finally:
        close = getattr(tokens, "close", None)
        if close is not None:
            close()


def _several(token: Any) -> int:
    raise DataError(f"stream_text: takes one row of tokens, got {np.size(token)} rows")


__all__ = ["Conversation", "TokenStream", "stream", "stream_text"]
