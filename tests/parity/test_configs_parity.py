"""What we know of transformers' configs is what transformers knows."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="live comparison needs the parity extra: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="live comparison needs the parity extra: pip install -e '.[parity]'"
)

import transformers

from tests.models import legacy
from tests.models.test_hub_attributes import ATTRIBUTES, attributes, read

CLASSES = {
    "vit": transformers.ViTConfig,
    "clip": transformers.CLIPConfig,
    "clip_text_model": transformers.CLIPTextConfig,
    "clip_vision_model": transformers.CLIPVisionConfig,
    "siglip": transformers.SiglipConfig,
    "siglip_text_model": transformers.SiglipTextConfig,
    "siglip_vision_model": transformers.SiglipVisionConfig,
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_the_list_of_attributes_is_the_librarys(kind):
    assert attributes(kind) == set(CLASSES[kind]().to_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_config_dict": legacy.TEXT_DICT, "vision_config_dict": legacy.VISION_DICT},
        {"text_config": None, "text_config_dict": legacy.TEXT_DICT},
        {"text_config_dict": {}, "vision_config": None},
        {"vision_config_dict": {**legacy.VISION_DICT, "layer_norm_eps": 0.5}},
    ],
)
def test_old_configs_mean_the_same(changes):
    ours = read(legacy.clip(**changes), "CLIPModel")
    theirs = transformers.CLIPConfig.from_dict(legacy.clip(**changes))
    assert ours.projection_dim == theirs.projection_dim
    for mine, other in ((ours.text_config, theirs.text_config), (ours.vision_config, theirs.vision_config)):
        names = set(ATTRIBUTES[other.model_type].split()) - {"bos_token_id", "pad_token_id"}
        for name in names:
            value = getattr(mine, name)
            pair = name in ("image_size", "patch_size")
            assert (value[0] if pair else value) == getattr(other, name), name
