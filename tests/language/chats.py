"""Chat templates in the shapes that published models have, conversations, and a tokenizer that fits them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from mmjax.language.learned import train_bpe_tokenizer
from mmjax.language.tokenizer import Tokenizer

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATES = {
    "chatml": """{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""",
    "llama-2": """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
{% else %}
{% set loop_messages = messages %}{% set system = '' %}
{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles have to take turns: user, assistant, user ...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
{%- else %}
{% generation %}{{ ' ' ~ message['content'] | trim ~ ' ' ~ eos_token }}{% endgeneration %}
{%- endif %}
{% endfor %}
""",
    "llama-3": """{{- bos_token }}
{%- for message in messages %}
    {%- if message.content is string %}{% set text = message.content %}
    {%- else %}{% set ns = namespace(text='') %}
        {%- for part in message.content if part.type == 'text' %}
            {%- set ns.text = ns.text ~ part.text %}{% endfor %}
        {%- set text = ns.text %}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + text | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """{%- set ns = namespace(last=-1) -%}
{%- for message in messages if message.role == 'user' -%}{%- set ns.last = ns.last + 1 -%}{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if tools and loop.last -%}
            {{- '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST] ' ~ message.content ~ '[/INST]' -}}
    {%- elif message.role == 'assistant' -%}
        {{- ' ' ~ message.content ~ eos_token -}}
    {%- else -%}
        {%- continue -%}
    {%- endif -%}
{%- endfor -%}
""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{%- macro turn(role, text) -%}
<start_of_turn>{{ role }}
{{ text | trim }}<end_of_turn>
{% endmacro -%}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ turn(role, message['content']) }}
{%- endfor %}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""",
    "images": """{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}
{% if part.type == 'image' %}<image>
{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}""",
}
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<image>"),
)
ASK = {"role": "user", "content": "  What is 2 + 2?\n"}
ANSWER = {"role": "assistant", "content": "It is 4."}
THANK = {"role": "user", "content": "Thänks \U0001f389 <b>really</b> a < b"}
SYSTEM = {"role": "system", "content": "Be short."}
SEE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
SAID = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}

CONVERSATIONS: dict[str, list[list[dict[str, Any]]]] = {
    name: [[ASK], [ASK, ANSWER], [ASK, ANSWER, THANK]] for name in TEMPLATES if name != "images"
}
CONVERSATIONS["images"] = [[SEE], [SEE, SAID], [SEE, SAID, SEE]]
CONVERSATIONS["llama-3"].append([SEE, ANSWER])
for _name in ("chatml", "llama-2", "llama-3", "mistral"):
    CONVERSATIONS[_name].append([SYSTEM, ASK, {**ANSWER, "tool_calls": None}, THANK])


def written(folder: Path, vocabulary: tokenizers.Tokenizer, template: str, **named: str) -> Tokenizer:
    """The tokenizer of a folder with this vocabulary, these tokens by their roles, and this template."""
    vocabulary.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_folder(folder)


def byte_level(normalizer: normalizers.Normalizer | None, tokens: list[AddedToken]) -> tokenizers.Tokenizer:
    """Every byte is a token, and texts are changed before tokens are looked for."""
    made = tokenizers.Tokenizer(models.BPE({b: n for n, b in enumerate(_BYTES)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens(tokens)
    return made


def first_llama(**flags: bool) -> tokenizers.Tokenizer:
    """LLaMA's first form: a normalizer writes the spaces, and unknown characters become bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581"]
    words += [*"abcdefghijklmnopqrstuvwxyz<>/[]I", "\u2581h", "he", "ll"]
    merges = [("\u2581", "h"), ("h", "e"), ("l", "l")]
    vocab = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    spaces = normalizers.Replace(" ", "\u2581")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
    back = decoders.Replace("\u2581", " ")
    made.decoder = decoders.Sequence(
        [back, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(word, special=True, **flags) for word in words[:3]])
    return made


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    """A small vocabulary with everybody's special tokens, and one published shape of a template."""
    return train_bpe_tokenizer(
        ["What is 2 + 2? It is 4. Thanks, really. user assistant system model"],
        vocab_size=300,
        special_tokens=SPECIAL,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATES[name],
    )


def ids_of(name: str, chat: list, **options) -> list[int]:
    return tokenizer(name).apply_chat_template(chat, **options)["input_ids"][0].tolist()


def special_ids(name: str, ids: list[int]) -> list[int]:
    known = {tokenizer(name).token_to_id(token) for token in (*SPECIAL, "<s>", "</s>")}
    return [number for number in ids if number in known]
