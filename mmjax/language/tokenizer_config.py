"""What a hub folder says about its tokenizer besides the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mmjax.errors import CheckpointError

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"

#: Files of a folder of which a tokenizer is made.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)

#: What to do with a vocabulary that is not read.
OTHER_TOKENIZER = "write the folder's tokenizer.json with transformers' AutoTokenizer and save_pretrained"

#: What transformers' classes assume where a folder says nothing.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPTokenizer": {
        "bos_token": CLIP_START,
        "eos_token": CLIP_END,
        "unk_token": CLIP_END,
        "pad_token": CLIP_END,
    },
    "SiglipTokenizer": {
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "model_max_length": 64,
    },
    "LlamaTokenizer": {"padding_side": "left"},
    "CodeLlamaTokenizer": {"padding_side": "left"},
    "GemmaTokenizer": {"padding_side": "left"},
}


def added_tokens(config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Tokens that the configuration gives an id, by that id."""
    decoder = config.get("added_tokens_decoder") or {}
    named = {token.content for token in named_tokens(config)}
    tokens = [(int(number), _added_token(value)) for number, value in decoder.items()]
    for _, token in tokens:
        token.special = token.special or token.content in named
    return sorted(tokens, key=lambda pair: pair[0])


def named_tokens(config: Mapping[str, Any]) -> list[AddedToken]:
    """Special tokens that the configuration names: roles, a model's own, and extra ones, in that order."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = [config.get(role) for role in ROLES]
    values += [v for k, v in config.items() if k.endswith("_token") and k not in ROLES and content_of(v)]
    values += list(extra.values() if isinstance(extra, dict) else extra)
    tokens = [_added_token(value) for value in values if value is not None]
    for token in tokens:
        token.special = True
    return tokens


def _added_token(value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{flag: bool(value[flag]) for flag in flags if flag in value})


def content_of(value: Any) -> str | None:
    """Text of a token, written as a string or as an object with its flags.

    Example:
        >>> content_of({"content": "</s>", "lstrip": False})
        '</s>'
    """
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def class_of(config: Mapping[str, Any]) -> str:
    """transformers' class, without the suffix of older versions."""
    return str(config.get("tokenizer_class") or "").removesuffix("Fast")


def read_config(folder: Path, tokenizer_class: str | None) -> dict[str, Any]:
    """Contents of tokenizer_config.json, joined with the files that older versions wrote beside it.

    Args:
        folder: The hub folder; every file in it may be missing.
        tokenizer_class: Used if the folder does not name a class.

    Raises:
        CheckpointError: A file is no JSON object, or a special token in it has no text.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if tokenizer_class and not config.get("tokenizer_class"):
        config["tokenizer_class"] = tokenizer_class
    if "added_tokens_decoder" not in config:  # folders of older versions spread this over more files
        for name in ("special_tokens_map.json", "added_tokens.json"):
            file = folder / name
            values = read_json(file) if file.is_file() else {}
            if name == "special_tokens_map.json":
                config.update(values)
            elif values:
                special = {token.content for token in named_tokens(config)}
                flags = {
                    t: {"content": t, "special": t in special, "normalized": t not in special} for t in values
                }
                config["added_tokens_decoder"] = {str(n): flags[token] for token, n in values.items()}
    try:
        added_tokens(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: a special token in it has no text ({error!r})") from error
    return config


TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
_OLD_TEMPLATE_FILE = "chat_template.json"  # beside the processors of older versions
_TEMPLATE_BYTES = 4 << 20


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Chat templates of a folder: name to (text, the file it comes from); the usual one is "default".

    Args:
        folder: The hub folder.
        config: Contents of its tokenizer_config.json.

    Raises:
        CheckpointError: A template is no text, or cannot be read.
    """
    files = {"default": folder / TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    files = {name: path for name, path in files.items() if path.is_file()}
    if files:
        return {name: (_template_text(path), str(path)) for name, path in files.items()}
    where, given = folder / "tokenizer_config.json", config.get("chat_template")
    if given is None and (folder / _OLD_TEMPLATE_FILE).is_file():
        where = folder / _OLD_TEMPLATE_FILE
        given = read_json(where).get("chat_template")
    named = {"default": given} if isinstance(given, str) else given or {}
    try:
        if isinstance(named, list):
            named = {entry["name"]: entry["template"] for entry in named}
        texts = {str(name): (text + "", f"{where}: chat_template") for name, text in named.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: chat_template is neither a text nor a list of names with templates"
        ) from error
    return texts


def write_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Write chat templates as transformers does, and remove those of an earlier save."""
    (folder / _OLD_TEMPLATE_FILE).unlink(missing_ok=True)
    for path in (folder / TEMPLATE_FILE, *(folder / TEMPLATE_FOLDER).glob("*.jinja")):
        path.unlink(missing_ok=True)
    for name, text in templates.items():
        path = folder / TEMPLATE_FILE
        if name != "default":
            if not name or set(name) & set("/\\:\0") or name.startswith("."):
                raise CheckpointError(f"chat template {name!r}: its name cannot be that of a file")
            path = folder / TEMPLATE_FOLDER / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode("utf-8"))


def _template_text(path: Path) -> str:
    try:
        if path.stat().st_size > _TEMPLATE_BYTES:
            raise CheckpointError(f"{path}: larger than any chat template ({_TEMPLATE_BYTES} bytes)")
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a text that can be read ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or a CheckpointError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
