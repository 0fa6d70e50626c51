"""Vocabularies learned from texts, for language models that start from nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mmjax.errors import ConfigError
from mmjax.language.fast import FastBackend
from mmjax.language.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"


def train_bpe_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    eos_token: str = END_OF_TEXT,
    bos_token: str | None = None,
    pad_token: str | None = None,
    special_tokens: Sequence[str] = (),
    phrases: Sequence[str] = (),
    max_length: int | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """Learn a byte-level BPE vocabulary as GPT-2's: any text can be written, and comes back as it was.

    Args:
        texts: What to learn from. The same texts give the same vocabulary.
        vocab_size: Number of ids: the special tokens, which come first, 256 for bytes, the merges and the
            phrases. Fewer if the texts have no more pairs to merge.
        eos_token: Ends a text.
        bos_token: Begins one; put in front by the tokenizer. None: there is none.
        pad_token: Fills; None: the end token.
        special_tokens: More of them, such as those of a chat template.
        phrases: Texts of several words that have one id each wherever they are met, spaces included; these
            ids come last.
        max_length: Longest text in tokens; None: no limit.
        chat_template: Saved with the tokenizer.

    Returns:
        A tokenizer whose saved folder transformers' AutoTokenizer opens.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.

    Example:
        >>> tokenizer = train_bpe_tokenizer(["two cats", "two dogs"], vocab_size=260)
        >>> tokenizer.vocab_size, tokenizer.eos_token_id
        (260, 0)
        >>> tokenizer.decode(tokenizer("any Text")["input_ids"][0])
        'any Text'
        >>> named = train_bpe_tokenizer([], vocab_size=260, phrases=[" top left"])
        >>> int(named("at the top left")["input_ids"][0][-1]) == named.vocab_size - 1
        True
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = list(dict.fromkeys(t for t in (eos_token, bos_token, pad_token, *special_tokens) if t))
    phrases = list(dict.fromkeys(phrases))
    given = len(alphabet) + len(special) + len(phrases)
    if vocab_size < given:
        raise ConfigError(f"vocab_size: bytes, special tokens and phrases need {given}, got {vocab_size}")
    learner = _byte_level(models.BPE())
    # Ties between pairs are decided by id: given as special tokens, the bytes have the same ids every time.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(phrases), show_progress=False, special_tokens=[*special, *alphabet]
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [(left, right) for left, right in learned["merges"]]
    tokens = [*special, *alphabet, *dict.fromkeys(left + right for left, right in merges)]
    tokenizer = _byte_level(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in phrases])
    if bos_token:
        number = tokenizer.token_to_id(bos_token)
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos_token} $A",
                    pair=f"{bos_token} $A {bos_token}:1 $B:1",
                    special_tokens=[(bos_token, number)],
                ),
            ]
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "bos_token": bos_token,
        "pad_token": pad_token or eos_token,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    config = {name: value for name, value in config.items() if value is not None}
    made = Tokenizer(FastBackend(tokenizer, config), config)
    return made if chat_template is None else made.with_chat_template(chat_template)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


__all__ = ["train_bpe_tokenizer"]
