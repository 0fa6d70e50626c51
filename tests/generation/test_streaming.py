"""Streams, text out of them, and conversations that go on from the cache."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mmjax
from mmjax.errors import ConfigError, DataError, MmjaxError
from mmjax.generation import BeamSearch, Greedy, Sampling, stream, stream_text
from mmjax.generation.loop import start
from mmjax.generation.streaming import rewind
from mmjax.language.learned import train_bpe_tokenizer
from tests.generation.test_generate import CHAIN
from tests.generation.tiny import BY_LENGTH, language_model, model_by_length, prompts, table
from tests.language.chats import first_llama, written

KEY = jax.random.key(5)


@pytest.mark.parametrize("sampler", [Greedy(), Sampling(temperature=1.5, repetition_penalty=1.3)], ids=str)
def test_a_stream_is_what_generate_returns(sampler):
    model, params = language_model()
    batch = prompts((5, 9))
    whole = mmjax.generate(model, params, batch, 12, sampler, KEY, stop_ids=())
    pieces = list(stream(model, params, batch, 12, sampler, KEY, stop_ids=()))
    np.testing.assert_array_equal(np.stack(pieces, axis=1), whole)


def test_a_conversation_can_be_gone_on_from_twice():
    """Its cache is copied when a stream is made, so that the first stream may go on after that."""
    model, params = language_model()
    first = stream(model, params, {"input_ids": [[3, 9, 4, 7]]}, 8, stop_ids=())
    next(first), next(first)
    text = {"input_ids": [[*first.conversation.ids, 5]]}
    other = stream(model, params, text, 4, stop_ids=(), conversation=first.conversation)
    next(first)
    assert other.reused == 5
    found = [int(token[0]) for token in other]
    assert found == mmjax.generate(model, params, text, 4, stop_ids=())[0].tolist()


def test_a_stream_ends_with_its_rows_or_when_closed():
    model, params = table(CHAIN)
    batch = {"input_ids": [[2], [3]]}
    assert [token.tolist() for token in stream(model, params, batch, 9)] == [[3, 4], [4, 5], [5, 0]]
    tokens = stream(model, params, batch, 9)
    next(tokens)
    with tokens:
        pass
    assert list(tokens) == []


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    vocab_size = 256

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode("utf-8", errors="replace")


class Closable:
    def __init__(self, values):
        self.values, self.closed = iter(values), False

    def __iter__(self):
        return self.values

    def close(self):
        self.closed = True


def test_text_comes_in_whole_characters():
    text = "añb 日本 🙂!"
    pieces = list(stream_text([np.array([byte]) for byte in text.encode()], Bytes()))
    assert pieces == list(text)
    # An end in the middle of a character, and an id that is no token's.
    broken = [np.array([number]) for number in (97, 300, 240, 159)]
    assert list(stream_text(broken, Bytes())) == ["a", "\ufffd"]


@pytest.mark.parametrize("text", ["two cats, three  dogs\n and no more", "  cats"])
def test_pieces_of_a_real_tokenizer_add_up(text):
    tokenizer = train_bpe_tokenizer(["two cats and three dogs", "no more cats, two more dogs"], 300)
    ids = tokenizer(text)["input_ids"][0]
    assert "".join(stream_text(ids, tokenizer)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_pieces_of_a_vocabulary_with_single_bytes_add_up(tmp_path):
    """A byte that is wrong changes what the bytes before it mean; what is not of bytes comes at once."""
    tokenizer = written(tmp_path, first_llama(normalized=False), "", bos_token="<s>")
    byte = [tokenizer.token_to_id(f"<0x{n:02X}>") for n in range(256)]
    plain = {c: tokenizer.token_to_id(c) for c in "abc"}
    word = [byte[n] for n in "é\U0001f600".encode()]
    for ids in (
        word,
        word[:4],
        word[:4] + [plain["a"]],
        [plain["a"], *word, plain["b"], word[0], plain["c"]],
    ):
        pieces = list(stream_text([np.array([number]) for number in ids], tokenizer))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    text = stream_text(iter([np.array([n]) for n in (plain["a"], *word, plain["b"], plain["c"])]), tokenizer)
    assert list(text) == ["a", "é\U0001f600b", "c"]


def test_closing_the_text_closes_the_tokens():
    tokens = Closable(np.array([[97], [98]]))
    text = stream_text(tokens, Bytes())
    assert next(text) == "a" and not tokens.closed
    text.close()
    assert tokens.closed
    with pytest.raises(DataError, match="takes one row of tokens, got 2 rows"):
        next(stream_text([np.array([1, 2])], Bytes()))


def test_a_conversation_goes_on_from_the_cache():
    """Equal to reading everything again, while only what is new is read."""
    sampler = Sampling(temperature=1.5, repetition_penalty=1.3)
    model, params = language_model()
    ids, conversation = [3, 9, 4, 7], None
    for turn in range(4):
        batch = {"input_ids": [ids]}
        tokens = stream(model, params, batch, 9, sampler, KEY, stop_ids=(), conversation=conversation)
        answer = [int(token[0]) for token in tokens]
        expected = mmjax.generate(model, params, batch, 9, sampler, KEY, stop_ids=())
        assert answer == expected[0].tolist(), turn
        # All but the newest token of the last turn.
        assert tokens.reused == (len(ids) - 12 - 1 if turn else 0)
        conversation = tokens.conversation
        assert (
            list(conversation.ids)
            == ids + answer[:-1]
            == ids + answer[: int(conversation.cache.cursor) - len(ids)]
        )
        ids = [*ids, *answer, *range(3 + turn, 15 + turn)]
    assert conversation.cache.length == 128


def test_a_conversation_that_was_rewritten_and_used_twice():
    """The part that stayed is reused; a conversation is not used up by going on from it."""
    model, params = language_model()
    first = stream(model, params, {"input_ids": [[3, 9, 4, 7]]}, 6, stop_ids=())
    answer = [int(token[0]) for token in first]
    for rest in ([30, 31], [32], answer[:3] + [33]):
        batch = {"input_ids": [[3, 9, 4, *rest]]}
        again = stream(model, params, batch, 6, stop_ids=(), conversation=first.conversation)
        found = [int(token[0]) for token in again]
        assert again.reused == 3
        assert found == mmjax.generate(model, params, batch, 6, stop_ids=())[0].tolist()
    other = stream(model, params, {"input_ids": [[8, 9]]}, 6, conversation=first.conversation)
    assert other.reused == 0


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_conversations_whose_length_turns_their_tokens(kind):
    """Keys are reused up to the original context, 8 tokens here, and by no text that is or was longer."""
    model, params = model_by_length(kind)
    conversation = None
    texts = (([3, 9, 4], 0), ([3, 9, 4, 7, 8, 6], 3), (range(3, 15), 0), (range(3, 8), 0), (range(3, 9), 5))
    for ids, reused in texts:
        batch = {"input_ids": [[*ids]]}
        new = 12 if reused else 2
        tokens = stream(model, params, batch, new, stop_ids=(), conversation=conversation)
        found = [int(token[0]) for token in tokens]
        assert tokens.reused == reused
        assert found == mmjax.generate(model, params, batch, new, stop_ids=())[0].tolist()
        conversation = tokens.conversation


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_conversation_that_grows_beyond_the_original_context(kind):
    model, params = model_by_length(kind)
    rows = np.random.default_rng(0).integers(3, 40, (8, 20))
    for row in rows:
        first = stream(model, params, {"input_ids": row[None, :5]}, 3, stop_ids=())
        ids = [*row[:5], *(int(token[0]) for token in first), *row[5:]]
        batch = {"input_ids": [ids]}
        again = stream(model, params, batch, 8, stop_ids=(), conversation=first.conversation)
        found = [int(token[0]) for token in again]
        assert found == mmjax.generate(model, params, batch, 8, stop_ids=())[0].tolist()


def test_turns_of_a_conversation_compile_few_programs():
    model, params = language_model()
    conversation, ids = None, [5]
    before = start._cache_size(), rewind._cache_size()
    for turn in range(12):
        tokens = stream(model, params, {"input_ids": [ids]}, 4, stop_ids=(), conversation=conversation)
        ids = [*ids, *(int(token[0]) for token in tokens), *range(3, 4 + turn)]
        conversation = tokens.conversation
    # One for each length of the cache: 32, 64, 128, and one as the first texts grow.
    assert start._cache_size() - before[0] <= 4 and rewind._cache_size() - before[1] <= 5


@pytest.mark.parametrize(
    "batch, options, words",
    [
        ({"input_ids": [[3]]}, {"sampler": BeamSearch()}, "sampler: beams are known at the end only"),
        ({"input_ids": [[3], [4]]}, {"conversation": True}, "conversation: goes on with one row"),
        ({"input_ids": [[3]], "extra": 1}, {"conversation": True}, "conversation: goes on with one row"),
        ({"input_ids": [[3]]}, {"max_new_tokens": 0}, "max_new_tokens: 0"),
    ],
)
def test_what_is_refused_before_anything_is_computed(batch, options, words):
    model, params = language_model()
    with pytest.raises(MmjaxError) as caught:
        stream(model, params, batch, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_there_is_no_conversation_of_nothing_or_several():
    model, params = language_model()
    for batch in ({"input_ids": [[3]]}, {"input_ids": [[3], [4]]}):
        tokens = stream(model, params, batch)
        if len(batch["input_ids"]) == 2:
            next(tokens)
        with pytest.raises(ConfigError, match="conversation: there is one after the first token"):
            _ = tokens.conversation
