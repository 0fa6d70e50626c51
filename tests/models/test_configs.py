"""Configs: every field is read by a model, and checked when it is made."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import jax
import pytest

from mmjax.errors import ConfigError
from mmjax.models import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from tests.tiny import CLIP, MASKED, MODELS, SIGLIP, VIT, random_batch

# Every field is read


def _checking(frame: Any) -> bool:
    """Whether a read comes from checking, copying or comparing the config, not from using it."""
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name in ("__eq__", "__hash__", "__repr__", "replace", "_replace"):
            return True
        if name == "__post_init__" and "mmjax" in file:
            return True
        if name == "test_every_field_is_read":
            return False
        frame = frame.f_back
    return False


# What was read from the hub is for writing back; names of classes are for people.
KEPT = ("hub", "generation_config", "labels")


def recording(config: Any, read: set[tuple[str, str]]) -> Any:
    """The same config as an instance of a subclass that notes which fields are used."""
    cls = type(config)
    names = {field.name for field in dataclasses.fields(config)}

    def note(self, name):
        if name in names and not _checking(sys._getframe(1)):
            read.add((owner(cls, name), name))
        return super(subclass, self).__getattribute__(name)

    subclass = type(cls.__name__, (cls,), {"__getattribute__": note})
    values = {name: getattr(config, name) for name in names}
    return subclass(
        **{n: recording(v, read) if dataclasses.is_dataclass(v) else v for n, v in values.items()}
    )


def owner(cls: type, name: str) -> str:
    """The class that introduced a field."""
    return [base.__name__ for base in cls.__mro__ if name in inspect.get_annotations(base)][-1]


def test_every_field_is_read():
    """A field that no model reads is a setting that does nothing."""
    read: set[tuple[str, str]] = set()
    fields: set[tuple[str, str]] = set()
    for name, model in MODELS.items():
        config = model.config
        for part in (config, *(getattr(config, f"{tower}_config", None) for tower in ("vision", "text"))):
            if part is not None:
                fields |= {(owner(type(part), f.name), f.name) for f in dataclasses.fields(part)}
        recorded = type(model)(recording(config, read))
        batch = random_batch(model, 2)

        def run(model=recorded, batch=batch):
            params = model.init(jax.random.key(0), **batch)
            return model.apply(params, **batch, deterministic=False, rngs={"dropout": jax.random.key(1)})

        jax.eval_shape(run)
        assert read, name
    unread = fields - read
    assert {(cls, name) for cls, name in unread if name not in KEPT} == set()
    assert len(fields) > 40


CONFIGS = [VIT, MASKED, CLIP, CLIP.vision_config, CLIP.text_config]
CONFIGS += [SIGLIP, SIGLIP.vision_config, SIGLIP.text_config]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_frozen_hashable_and_compared_by_value(config):
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    again = type(config)(**values)
    assert again == config and hash(again) == hash(config) and again is not config
    for name in values:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, values[name])
    # The text that was read is no part of what the model is.
    other = dataclasses.replace(config, hub='{"a": 1}')
    assert other == config and hash(other) == hash(config) and "hub" not in repr(other)
    with pytest.raises(TypeError):
        type(config)(8)
    if hasattr(config, "hidden_size"):
        assert dataclasses.replace(config, layer_norm_eps=0.5) != config


def test_sizes_become_pairs():
    config = ViTConfig(image_size=[32, 48], patch_size=16)
    assert config == ViTConfig(image_size=(32, 48), patch_size=(16, 16))
    assert (config.image_size, config.patch_size, config.grid, config.num_patches) == (
        (32, 48), (16, 16), (2, 3), 6,
    )  # fmt: skip
    assert hash(config) == hash(ViTConfig(image_size=(32, 48), patch_size=(16, 16)))
    assert ViTConfig(image_size=(33, 50), patch_size=(16, 5)).grid == (2, 10)


TOWERS = (ViTConfig, CLIPVisionConfig, CLIPTextConfig, SiglipVisionConfig, SiglipTextConfig)
BAD_ANYWHERE: list[dict[str, Any]] = [
    {"hidden_size": 0},
    {"hidden_size": 768.0},
    {"hidden_size": True},
    {"hidden_size": "768"},
    {"intermediate_size": -1},
    {"num_attention_heads": 0},
    {"num_attention_heads": 7},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 1.5},
    {"hidden_act": "gelu_10"},
    {"layer_norm_eps": -1e-6},
    {"layer_norm_eps": float("nan")},
    {"attention_dropout": 1.0},
    {"attention_dropout": float("nan")},
    {"hidden_dropout": -0.1},
]
BAD: list[tuple[type, dict[str, Any]]] = [
    *((cls, values) for cls in TOWERS for values in BAD_ANYWHERE),
    *(
        (cls, {"image_size": value})
        for cls in (ViTConfig, CLIPVisionConfig)
        for value in (0, 3, (8, 3), (1,), "8")
    ),
    *(
        (cls, {"patch_size": value})
        for cls in (ViTConfig, SiglipVisionConfig)
        for value in (0, (4, 4, 4), 4.0)
    ),
    (ViTConfig, {"num_channels": 0}),
    (ViTConfig, {"num_labels": -1}),
    (ViTConfig, {"num_labels": 2.0}),
    (ViTConfig, {"num_labels": 3, "labels": ("a", "b")}),
    (ViTConfig, {"encoder_stride": 0}),
    (ViTConfig, {"encoder_stride": "16"}),
    (ViTConfig, {"pooler_size": 0}),
    (ViTConfig, {"pooler_size": 8.0}),
    (ViTConfig, {"pooler_act": "gelu_10"}),
    (ViTConfig, {"pooling": "tanh", "class_token": False}),
    (CLIPVisionConfig, {"projection_dim": 0}),
    (CLIPTextConfig, {"projection_dim": "x"}),
    (CLIPTextConfig, {"vocab_size": 0}),
    (CLIPTextConfig, {"max_position_embeddings": -1}),
    (SiglipTextConfig, {"projection_size": 0}),
    (CLIPConfig, {"projection_dim": 0}),
    (CLIPConfig, {"projection_dim": None}),
    (CLIPConfig, {"num_labels": -1}),
    (SiglipConfig, {"text_config": SiglipTextConfig(projection_size=7)}),
]


@pytest.mark.parametrize(
    ("cls", "values"), BAD, ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:40]
)
def test_impossible_fields_are_named(cls, values):
    with pytest.raises(ConfigError) as info:
        cls(**values)
    assert "\n" not in str(info.value)
    named = [*values, "projection_size"] if "text_config" in values else list(values)
    assert any(name in str(info.value) for name in named)
