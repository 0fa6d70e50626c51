"""Attributes of the hub's configs: each goes to its field and back, or is known to change nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

import mmjax
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
from mmjax.models.family import family_of_type
from tests.models import legacy
from tests.models.folders import CONFIG
from tests.tiny import MODELS, random_params

EVERYWHERE = """_name_or_path architectures chunk_size_feed_forward dtype id2label is_encoder_decoder label2id
    model_type output_attentions output_hidden_states problem_type return_dict transformers_version"""
TEXT = """attention_dropout bos_token_id eos_token_id hidden_act hidden_size intermediate_size layer_norm_eps
    max_position_embeddings num_attention_heads num_hidden_layers pad_token_id vocab_size"""
VISION = """attention_dropout hidden_act hidden_size image_size intermediate_size layer_norm_eps
    num_attention_heads num_channels num_hidden_layers patch_size"""
# All that transformers 5.23 knows of these configs; tests/parity compares the list with the library.
ATTRIBUTES: dict[str, str] = {
    "vit": """attention_probs_dropout_prob encoder_stride hidden_act hidden_dropout_prob hidden_size
        image_size initializer_range intermediate_size layer_norm_eps num_attention_heads num_channels
        num_hidden_layers
        patch_size pooler_act pooler_output_size qkv_bias""",
    "clip": "initializer_factor logit_scale_init_value projection_dim text_config vision_config",
    "clip_text_model": f"{TEXT} initializer_factor initializer_range projection_dim",
    "clip_vision_model": f"{VISION} initializer_factor initializer_range projection_dim",
    "siglip": "initializer_factor text_config vision_config",
    "siglip_text_model": f"{TEXT} projection_size",
    "siglip_vision_model": f"{VISION} vision_use_head",
}


def attributes(model_type: str) -> set[str]:
    return {*ATTRIBUTES[model_type].split(), *EVERYWHERE.split()}


def read(hub: dict[str, Any], architecture: str, names: frozenset[str] = frozenset()) -> Any:
    """Our config of a config.json, by way of its text."""
    hub = json.loads(json.dumps(hub))
    return family_of_type(hub["model_type"], "here").read_config(hub, architecture, names, "here")


def write(config: Any, architecture: str, model_type: str) -> dict[str, Any]:
    return json.loads(json.dumps(family_of_type(model_type, "here").write_config(config, architecture)))


# hub attribute: (a value that is not the default, the fields that it changes, and to what).
COMMON_FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "attention_dropout": (0.25, {"attention_dropout": 0.25}),
    "hidden_act": ("relu", {"hidden_act": "relu"}),
    "hidden_size": (1536, {"hidden_size": 1536}),
    "intermediate_size": (96, {"intermediate_size": 96}),
    "layer_norm_eps": (0.125, {"layer_norm_eps": 0.125}),
    "num_attention_heads": (4, {"num_attention_heads": 4}),
    "num_hidden_layers": (0, {"num_hidden_layers": 0}),
}
TEXT_FIELDS = {
    **COMMON_FIELDS,
    "max_position_embeddings": (9, {"max_position_embeddings": 9}),
    "vocab_size": (50, {"vocab_size": 50}),
}
VISION_FIELDS = {
    **COMMON_FIELDS,
    "image_size": ([64, 96], {"image_size": (64, 96)}),
    "num_channels": (1, {"num_channels": 1}),
    "patch_size": (8, {"patch_size": (8, 8)}),
}
CLIP_FIELDS = {
    "initializer_factor": (0.5, {"initializer_factor": 0.5}),
    "initializer_range": (0.5, {"initializer_range": 0.5}),
    "projection_dim": (48, {"projection_dim": 48}),
}
FIELDS: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "vit": {
        **{k: v for k, v in VISION_FIELDS.items() if k != "attention_dropout"},
        "attention_probs_dropout_prob": (0.25, {"attention_dropout": 0.25}),
        "hidden_dropout_prob": (0.5, {"hidden_dropout": 0.5}),
        "initializer_range": (0.5, {"initializer_range": 0.5}),
        "encoder_stride": (8, {"encoder_stride": 8}),
        "pooler_act": ("relu", {"pooler_act": "relu"}),
        "pooler_output_size": (48, {"pooler_size": 48}),
        "qkv_bias": (False, {"qkv_bias": False}),
        "id2label": ({"1": "b", "0": "a", "2": "c"}, {"labels": ("a", "b", "c"), "num_labels": 3}),
    },
    "clip_text_model": {**TEXT_FIELDS, **CLIP_FIELDS, "eos_token_id": (2, {"eos_token_id": 2})},
    "clip_vision_model": {**VISION_FIELDS, **CLIP_FIELDS},
    "siglip_text_model": {
        **TEXT_FIELDS,
        "hidden_size": (1536, {"hidden_size": 1536, "projection_size": 1536}),
        "projection_size": (48, {"projection_size": 48}),
    },
    "siglip_vision_model": {**VISION_FIELDS, "vision_use_head": (False, {"pooling": "none"})},
    "clip": {
        "initializer_factor": (0.5, {"initializer_factor": 0.5}),
        "logit_scale_init_value": (1.5, {"logit_scale_init_value": 1.5}),
        "projection_dim": (48, {"projection_dim": 48}),
        "id2label": ({"0": "a"}, {"labels": ("a",), "num_labels": 1}),
    },
    "siglip": {
        "initializer_factor": (0.5, {"initializer_factor": 0.5}),
        "id2label": ({"0": "a"}, {"labels": ("a",), "num_labels": 1}),
    },
}
ARCHITECTURES = {
    "vit": "ViTForImageClassification",
    "clip": "CLIPForImageClassification",
    "clip_text_model": "CLIPTextModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipForImageClassification",
    "siglip_text_model": "SiglipTextModel",
    "siglip_vision_model": "SiglipVisionModel",
}
DEFAULTS = {
    "vit": ViTConfig(pooling="none"),
    "clip": CLIPConfig(),
    "clip_text_model": CLIPTextConfig(),
    "clip_vision_model": CLIPVisionConfig(),
    "siglip": SiglipConfig(),
    "siglip_text_model": SiglipTextConfig(),
    "siglip_vision_model": SiglipVisionConfig(),
}
ONE_BY_ONE = [(kind, name) for kind, table in FIELDS.items() for name in table]


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_an_empty_config_has_the_defaults(kind):
    assert read({"model_type": kind}, ARCHITECTURES[kind]) == DEFAULTS[kind]


@pytest.mark.parametrize(("kind", "name"), ONE_BY_ONE)
def test_one_attribute_changes_its_field_and_comes_back(kind, name):
    assert name in attributes(kind)
    value, changes = FIELDS[kind][name]
    config = read({"model_type": kind, name: value}, ARCHITECTURES[kind])
    assert config == dataclasses.replace(DEFAULTS[kind], **changes)
    assert config != DEFAULTS[kind]
    assert write(config, ARCHITECTURES[kind], kind)[name] == value


@pytest.mark.parametrize("section", ["vision_config", "text_config"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_attributes_of_a_section(kind, section):
    tower = f"{kind}_{section.removesuffix('_config')}_model"
    for name, (value, _) in FIELDS[tower].items():
        if kind == "siglip" and name in ("hidden_size", "projection_size"):
            continue  # The towers have to agree about these.
        alone = read({"model_type": tower, name: value}, ARCHITECTURES[tower])
        joint = read({"model_type": kind, section: {name: value}}, ARCHITECTURES[kind])
        assert joint == dataclasses.replace(DEFAULTS[kind], **{section: alone}), name
        assert write(joint, ARCHITECTURES[kind], kind)[section][name] == value, name


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_every_attribute_of_transformers_is_known(kind):
    """Those that are no field change nothing, and what is no attribute is refused."""
    for name in attributes(kind) - set(FIELDS[kind]) - {"model_type", "text_config", "vision_config"}:
        value = {"is_encoder_decoder": False, "label2id": {"a": 0, "b": 1}}.get(name)
        config = read({"model_type": kind, name: value}, ARCHITECTURES[kind])
        assert config == DEFAULTS[kind], name
    for name in ("hidden_sizes", "num_labels_", "layer_norm_epsilon", "attention_bias"):
        with pytest.raises(ConfigError, match=f"here: unknown attribute {name}=1; .*Remove it"):
            read({"model_type": kind, name: 1}, ARCHITECTURES[kind])


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_what_is_written_is_read_as_the_same(kind):
    config = DEFAULTS[kind]
    for name, (_, changes) in FIELDS[kind].items():
        if not (kind == "siglip_text_model" and name == "hidden_size"):
            config = dataclasses.replace(config, **changes)
    hub = write(config, ARCHITECTURES[kind], kind)
    assert read(hub, ARCHITECTURES[kind]) == config
    assert hub["model_type"] == kind
    assert set(hub) <= attributes(kind)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("token", [True, False])
def test_a_vits_pooler_and_mask_token_are_what_the_tensors_say(token, bias):
    names = {"embeddings.mask_token"} if token else set()
    names |= {"pooler.dense.weight"} if bias else set()
    config = read({"model_type": "vit"}, "ViTModel", frozenset(names))
    assert (config.mask_token, config.pooling) == (token, "tanh" if bias else "none")
    assert read({"model_type": "vit"}, "ViTForImageClassification", frozenset(names)).pooling == "none"


# Old folders

OLD_TEXT = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_hidden_layers=24,
    hidden_act="gelu",
    eos_token_id=2,
)
OLD_VISION = CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_attention_heads=16,
    num_hidden_layers=32,
    patch_size=14,
    hidden_act="gelu",
)
OLD = CLIPConfig(text_config=OLD_TEXT, vision_config=OLD_VISION, projection_dim=1024)


def test_clip_of_2022():
    hub = legacy.clip()
    assert len(hub["text_config"]) > 60
    assert read(hub, "CLIPModel") == OLD
    # All of it at the top too, as tools that dump the whole object do.
    assert read({**legacy.GENERIC, **hub}, "CLIPModel") == OLD


def test_a_section_named_dict_decides_about_every_field():
    hub = legacy.clip(text_config_dict=legacy.TEXT_DICT, vision_config_dict=legacy.VISION_DICT)
    # The dict does not name the end-of-text id, so that it has its default.
    expected = dataclasses.replace(OLD, text_config=dataclasses.replace(OLD_TEXT, eos_token_id=49407))
    assert read(hub, "CLIPModel") == expected
    assert read(legacy.clip(text_config=None, text_config_dict=legacy.TEXT_DICT), "CLIPModel") == expected
    short = {**legacy.TEXT_DICT, "num_hidden_layers": 2}
    text = read(legacy.clip(text_config_dict=short), "CLIPModel").text_config
    assert text == dataclasses.replace(expected.text_config, num_hidden_layers=2)
    assert read(legacy.clip(vision_config_dict=legacy.VISION_DICT), "CLIPModel").vision_config == OLD_VISION
    with pytest.raises(ConfigError, match="text_config: unknown attribute what=1"):
        read(legacy.clip(text_config_dict={"what": 1}), "CLIPModel")


def test_an_old_folder_loads_and_is_written_back_whole(tmp_path):
    model = MODELS["CLIPModel"]
    mmjax.save(tmp_path, model, random_params(model))
    now = json.loads((tmp_path / CONFIG).read_text())
    hub = legacy.clip(projection_dim=now["projection_dim"])
    for section in ("text_config", "vision_config"):
        hub[section] |= now[section]
    (tmp_path / CONFIG).write_text(json.dumps(hub))
    again, params, _ = mmjax.load(tmp_path)
    assert again.config == model.config
    mmjax.save(tmp_path / "again", again, params)
    written = json.loads((tmp_path / "again" / CONFIG).read_text())
    gone = {"torch_dtype", "text_config_dict", "vision_config_dict"}
    assert written == {**{k: v for k, v in hub.items() if k not in gone}, "dtype": "float32"}
    assert np.array_equal(params["logit_scale"], mmjax.load(tmp_path / "again")[1]["logit_scale"])
