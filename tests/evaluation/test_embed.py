"""Batched embedding: equal to one call, compiled once, refused when shapes would make it compile again."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import linen as nn

from mmjax.errors import DataError
from mmjax.evaluation import embed_images, embed_texts
from mmjax.evaluation.embed import _encode, takes
from mmjax.models import CLIPVisionModel, ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling
from mmjax.models.clip.config import CLIPVisionConfig
from mmjax.nn import parameter_specs
from tests.evaluation.fakes import TwoTowers, unit

MODEL = TwoTowers()
PIXELS = np.random.default_rng(0).normal(size=(11, 4, 5, 3)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 128, (7, 8)).astype(np.int32)
PARAMS = MODEL.init(jax.random.key(0), PIXELS, IDS)["params"]


def batches(array, size):
    return [array[start : start + size] for start in range(0, len(array), size)]


@pytest.mark.parametrize("size", [1, 4, 11])
def test_images_equal_one_call(size):
    wanted = unit(MODEL.apply({"params": PARAMS}, PIXELS, method="encode_image"))
    found = embed_images(MODEL, PARAMS, ({"pixel_values": batch} for batch in batches(PIXELS, size)))
    assert found.dtype == np.float32 and isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_texts_use_the_mask():
    mask = (np.arange(8) < np.arange(1, 8)[:, None]).astype(np.int32)
    wanted = unit(MODEL.apply({"params": PARAMS}, IDS, mask, method="encode_text"))
    given = [
        {"input_ids": i, "attention_mask": m} for i, m in zip(batches(IDS, 3), batches(mask, 3), strict=True)
    ]
    np.testing.assert_allclose(embed_texts(MODEL, PARAMS, given), wanted, atol=1e-6)
    assert np.abs(embed_texts(MODEL, PARAMS, batches(IDS, 3)) - wanted).max() > 0.01


def test_raw_embeddings_on_request():
    wanted = MODEL.apply({"params": PARAMS}, PIXELS, method="encode_image")
    np.testing.assert_allclose(embed_images(MODEL, PARAMS, [PIXELS], normalize=False), wanted, atol=1e-6)


def test_compiles_once_for_all_batches_and_calls():
    _encode.clear_cache()
    for _ in range(2):
        embed_images(MODEL, PARAMS, batches(PIXELS, 4))
    assert _encode._cache_size() == 1


def test_low_precision_gives_float32():
    class Half(nn.Module):
        def encode_image(self, pixel_values, normalize=False):
            return pixel_values.mean((1, 2)).astype("bfloat16")

    found = embed_images(Half(), {}, [PIXELS])
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.ones(11), atol=1e-6)


def test_an_embedding_of_zeros_stays_finite():
    class Zero(nn.Module):
        def encode_image(self, pixel_values, normalize=False):
            return 0 * pixel_values.mean((1, 2))

    np.testing.assert_array_equal(embed_images(Zero(), {}, [PIXELS]), np.zeros((11, 3), np.float32))


def test_batches_spread_over_devices_give_the_same():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    found = embed_images(MODEL, PARAMS, batches(PIXELS, 4), sharding=sharding)
    np.testing.assert_allclose(found, embed_images(MODEL, PARAMS, [PIXELS]), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to embed"),
        ([PIXELS[:0]], "first batch is empty"),
        ([PIXELS[:2], PIXELS[:3]], "batch 1 has 3 rows"),
        ([PIXELS[:2], PIXELS[:2, :2]], "would compile again"),
        ([{"pixels": PIXELS}], "batch 0 has no 'pixel_values'"),
    ],
)
def test_bad_batches(given, message):
    with pytest.raises(DataError, match=message):
        embed_images(MODEL, PARAMS, given)


def test_a_mask_of_another_length():
    with pytest.raises(DataError, match="unequal rows"):
        embed_texts(MODEL, PARAMS, [{"input_ids": IDS, "attention_mask": np.ones((3, 8), np.int32)}])


def test_a_model_without_that_tower():
    with pytest.raises(DataError, match="Dense takes no input_ids"):
        embed_texts(nn.Dense(3), {}, [IDS])


SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TOWER = {"image_size": 8, "patch_size": 4, **SIZES}
IMAGES = np.random.default_rng(2).normal(size=(3, 8, 8, 3)).astype(np.float32)


def filled(model):
    rng = np.random.default_rng(3)
    specs = parameter_specs(model)
    return jax.tree.map(lambda spec: rng.normal(0, 0.3, spec.shape).astype(np.float32), specs)


def test_a_tower_gives_its_pooled_output():
    model = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    params = filled(model)
    wanted = model.apply({"params": params}, IMAGES).pooler_output
    np.testing.assert_allclose(embed_images(model, params, [IMAGES], normalize=False), wanted, atol=1e-5)
    assert takes(model, "pixel_values") and not takes(model, "input_ids")
    with pytest.raises(DataError, match="CLIPVisionModel takes no input_ids"):
        embed_texts(model, params, [IDS])


def test_a_classifier_gives_the_features_before_its_head():
    model = ViTForImageClassification(ViTConfig(num_labels=3, **TOWER))
    params = filled(model)
    features = embed_images(model, params, [IMAGES], normalize=False)
    head = params["classifier"]
    wanted = model.apply({"params": params}, IMAGES).logits
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], wanted, atol=1e-5)


def test_a_model_without_embeddings_says_what_it_gives():
    config = ViTConfig(mask_token=True, encoder_stride=4, **TOWER)
    model = ViTForMaskedImageModeling(config)
    with pytest.raises(DataError, match="ViTForMaskedImageModeling gives no embedding, only reconstruction"):
        embed_images(model, filled(model), [IMAGES])
