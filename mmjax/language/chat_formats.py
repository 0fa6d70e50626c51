"""Chat templates in the forms that published systems were trained with, by name.

Each takes contents that are texts or lists of parts, writes `<image>` for an image, and says by generation
tags what the assistant wrote, the token that ends it included. Images that come before all text of a message
are each followed by a line break, others stand where they are.
"""

from __future__ import annotations

from mmjax.errors import ConfigError

_CONTENT = """{%- macro said(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- set seen = namespace(text=false) -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{ '<image>' if seen.text else '<image>\n' }}
{%- else -%}{{ part.text }}{%- set seen.text = true -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = said(messages[0].content) if messages[0].role == 'system' else @SYSTEM@ -%}
{{- bos_token -}}
"""

_VICUNA = """{{- system ~ ' ' if system else '' -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ 'USER: ' ~ said(message.content) ~ ' ' }}
{%- elif message.role == 'assistant' -%}
{{ 'ASSISTANT: ' }}{% generation %}{{ said(message.content) ~ eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}
"""

_LLAMA_2 = """{%- set header = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' if system else '' -%}
{%- set before = namespace(text=header, turn=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- bos_token if before.turn else '' -}}{{- '[INST] ' ~ before.text ~ said(message.content) ~ ' [/INST]' -}}
{%- set before.text = '' -%}{%- set before.turn = 1 -%}
{%- elif message.role == 'assistant' -%}
{{ ' ' }}{% generation %}{{ said(message.content) ~ ' ' ~ eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
"""

_MISTRAL = """{%- set before = namespace(text=system ~ '\n\n' if system else '') -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '[INST] ' ~ before.text ~ said(message.content) ~ ' [/INST]' -}}{%- set before.text = '' -%}
{%- elif message.role == 'assistant' -%}
{{ ' ' }}{% generation %}{{ said(message.content) ~ eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
"""

_CHATML = """{{- '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' if system else '' -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{ '<|im_start|>assistant\n' -}}
{% generation %}{{ said(message.content) ~ '<|im_end|>' }}{% endgeneration %}{{ '\n' -}}
{%- elif message.role != 'system' -%}
{{ '<|im_start|>' ~ message.role ~ '\n' ~ said(message.content) ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' -}}
"""

# What a person says is left out: an image, then its caption.
_PLAIN = """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{% generation %}{{ said(message.content) ~ '\n' }}{% endgeneration %}
{%- elif message.content is not string -%}
{%- for part in message.content if part.type == 'image' -%}{{ '<image>' }}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""

_FORMS = {
    "vicuna": (
        _VICUNA,
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
    ),
    "llama-2": (
        _LLAMA_2,
        "You are a helpful language and vision assistant. You are able to understand the visual content "
        "that the user provides, and assist the user with a variety of tasks using natural language.",
    ),
    "mistral": (_MISTRAL, ""),
    "chatml": (_CHATML, "You are a helpful assistant."),
    "plain": (_PLAIN, ""),
}
CHAT_FORMATS = tuple(_FORMS)
"""Names that `chat_format` knows."""


def chat_format(name: str) -> str:
    """The chat template of a published form, as `Tokenizer.with_chat_template` takes it.

    Args:
        name: "vicuna" (v1.1: LLaVA-1.5), "llama-2" and "mistral" ([INST]), "chatml" (Qwen: LLaVA-OneVision),
            or "plain" (an image, its caption and a line break: LLaVA's alignment).

    Raises:
        ConfigError: there is no such form.

    Source: the forms `vicuna_v1`, `llava_llama_2`, `mistral_instruct`, `qwen_1_5` and `plain` of LLaVA's
    conversation.py, written anew as templates.

    >>> from mmjax.language.templates import ChatTemplate
    >>> chat = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A cat."}]
    >>> ChatTemplate(chat_format("plain")).render(messages=chat)
    '<image>A cat.\\n'
    """
    if name not in _FORMS:
        raise ConfigError(f"chat form {name!r} is not known: choose one of {', '.join(_FORMS)}")
    body, system = _FORMS[name]
    quoted = "'" + system.replace("'", "\\'") + "'"
    return _CONTENT.replace("@SYSTEM@", quoted) + body


__all__ = ["CHAT_FORMATS", "chat_format"]
