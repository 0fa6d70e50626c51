"""Hub configs in and out: every attribute is handled, or ignored with a reason, or an error.

A family declares one `ConfigTable` per config class: which attribute is which field. What it does not name
has to stand in `COMMON` below; anything else is refused by name, so that no setting is dropped silently.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from mmjax.errors import ConfigError
from mmjax.vision.config import VisionConfig, pair

# Attributes that any hub config may carry and that change no output of the models here.
COMMON: Mapping[str, str] = {
    name: reason
    for reason, names in {
        "a name or version, not a setting": "_name_or_path _commit_hash architectures model_type "
        "transformers_version "
        "finetuning_task problem_type task_specific_params tokenizer_class name_or_path",
        "chosen at call time here": "output_attentions output_hidden_states return_dict use_return_dict "
        "use_cache _attn_implementation _attn_implementation_autoset _attn_implementation_internal "
        "attn_implementation gradient_checkpointing",
        "the folder's tensors say it": "dtype torch_dtype use_bfloat16",
        "text generation only": "bad_words_ids begin_suppress_tokens decoder_start_token_id "
        "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
        "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty "
        "max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
        "num_return_sequences output_scores prefix "
        "remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id "
        "suppress_tokens temperature top_k top_p typical_p",
        "the tokenizer's matter, unless a table says otherwise": "bos_token_id eos_token_id pad_token_id",
        "splits the work, not the result": "chunk_size_feed_forward",
        "another framework's": "torchscript tf_legacy_loss xla_device",
    }.items()
    for name in names.split()
}

# Attributes whose default changes nothing; another value asks for something that these models are not.
REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
    "tie_word_embeddings": (True, False, None),
}


_shortener = reprlib.Repr()
_shortener.maxstring = 80
short = _shortener.repr

# Far above every published model. What is larger is damage, and would hang or fill the memory while the
# model's shapes are worked out, before any tensor could contradict it.
_LARGEST: Mapping[str, int] = {"num_hidden_layers": 1024}
_LARGEST_SIZE = 2**20
_LARGEST_IMAGE = 2**26
_LONGEST_NAME = 100
# Fields that are one number or several.
_LISTS_TOO = ("image_size", "patch_size", "vision_feature_layer")


@dataclasses.dataclass(frozen=True)
class ConfigTable:
    """How one hub config class maps to one config dataclass.

    Attributes:
        fields: hub attribute to field name; a missing attribute takes the dataclass's default, which is
            transformers' default.
        fixed: hub attribute to the values it may have here.
        ignored: hub attribute to the reason why it changes nothing.
    """

    fields: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, hub: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Field values from a hub config.

        Args:
            hub: the attributes.
            where: file, and section within it, for messages.

        Raises:
            ConfigError: an attribute that is not known, or has a value that is not supported.
        """
        refuse_code_and_quantisation(hub, where)
        values: dict[str, Any] = {}
        for name, value in hub.items():
            if name in self.fields:
                _check_plausible(name, value, where)
                values[self.fields[name]] = value
            elif name in self.fixed or name in REQUIRED:
                allowed = self.fixed.get(name, REQUIRED.get(name, ()))
                if value not in allowed:
                    raise ConfigError(
                        f"{where}: {name}={short(value)} is not supported here; only {allowed[0]!r} is"
                    )
            elif name not in self.ignored and name not in COMMON:
                shown = name if name.isprintable() and len(name) <= _LONGEST_NAME else short(name)
                raise ConfigError(
                    f"{where}: unknown attribute {shown}={short(value)}; mmjax will not guess what it "
                    "changes. Remove it if it changes nothing"
                )
        return values

    def write(self, config: Any) -> dict[str, Any]:
        """Hub attributes from a config."""
        hub = {name: _plain(getattr(config, field)) for name, field in self.fields.items()}
        return {**hub, **{name: values[0] for name, values in self.fixed.items()}}


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Make a config dataclass, with the file named in any error."""
    hints = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        default = hints[name].default
        wrong = isinstance(default, (int, float, str)) and not _fits(value, default)
        if wrong and not (isinstance(value, (list, tuple)) and name in _LISTS_TOO):
            raise ConfigError(f"{where}: {name} should be {type(default).__name__}, got {short(value)}")
    try:
        config = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if isinstance(config, VisionConfig):
        height, width = pair(config.image_size, "image_size")
        pixels = height * width * config.num_channels
        if pixels > _LARGEST_IMAGE:
            raise ConfigError(f"{where}: image_size: {pixels} values per image; no such model is known")
    return config


def _check_plausible(name: str, value: Any, where: str) -> None:
    """Raise ConfigError for numbers that are infinite or beyond any model, and for endless texts."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, int):
            wrong = abs(part) > _LARGEST.get(name, _LARGEST_SIZE)
        elif isinstance(part, float):
            wrong = not math.isfinite(part)
        else:
            wrong = isinstance(part, str) and len(part) > _LONGEST_NAME
        if wrong:
            raise ConfigError(f"{where}: {name}={short(value)} is beyond any model; download the file again")


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, type(default)) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _plain(value: Any) -> Any:
    """JSON form: a square pair is one number, a tuple a list."""
    if isinstance(value, tuple):
        return value[0] if len(value) == 2 and value[0] == value[1] else list(value)
    return value


def refuse_code_and_quantisation(hub: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for folders that bring their own code or quantised weights."""
    if hub.get("auto_map"):
        raise ConfigError(
            f"{where}: auto_map asks to run code from the folder; mmjax never does. "
            "Use a folder of a family that mmjax knows"
        )
    if hub.get("quantization_config"):
        raise ConfigError(
            f"{where}: quantization_config: quantised weights are not read; use the original folder"
        )


def read_labels(hub: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Class names in order of their ids, from id2label or num_labels; transformers' default is two."""
    id2label = hub.get("id2label")
    if id2label is None:
        count = hub.get("num_labels", 2)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _LARGEST_SIZE:
            raise ConfigError(f"{where}: num_labels should be a whole number, got {short(count)}")
        return tuple(f"LABEL_{i}" for i in range(count))
    try:
        by_id = {int(i): str(label) for i, label in dict(id2label).items()}
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: id2label should map class numbers to names") from None
    if sorted(by_id) != list(range(len(by_id))):
        raise ConfigError(f"{where}: id2label skips class numbers: {sorted(by_id)[:5]} ...")
    return tuple(by_id[i] for i in range(len(by_id)))


def write_labels(labels: tuple[str, ...]) -> dict[str, Any]:
    """id2label and label2id as transformers writes them."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def merge(original: str, new: Mapping[str, Any]) -> dict[str, Any]:
    """The hub config that was read, with the values of the model that is written; sections are merged."""
    result: dict[str, Any] = json.loads(original)
    for name, value in new.items():
        old = result.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and name.endswith("_config"):
            result[name] = {**old, **value}
        else:
            result[name] = value
    return result
