"""What transformers gave once, without transformers: outputs, losses and gradients of tiny folders.

`tests/golden/make_models_golden.py` wrote them.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import mmjax
from mmjax.nn import Execution
from tests.models.folders import CONFIG

pytestmark = pytest.mark.usefixtures("no_network")

FOLDER = Path(__file__).parents[1] / "golden" / "models"
NAMES = sorted(path.name for path in FOLDER.iterdir())
# As in the comparison with the library itself: the largest difference over the largest value.
FORWARD = 1e-5
GRADIENT = 1e-4
LABELS = np.array([2, 0, 1])


@functools.cache
def golden(name):
    model, params, processor = mmjax.load(FOLDER / name)
    assert processor is None
    with np.load(FOLDER / name / "expected.npz") as file:
        arrays = dict(file)
    batch = {key.removeprefix("input."): arrays.pop(key) for key in list(arrays) if key.startswith("input.")}
    return model, params, batch, arrays


def assert_close(actual, expected, tolerance=FORWARD, what="", like=None):
    assert actual.shape == expected.shape, what
    worst = np.abs(np.asarray(actual) - expected).max() / np.abs(expected if like is None else like).max()
    assert worst <= tolerance, f"{what}: {worst:.1e}"


def part_of(out, name):
    for key in name.removeprefix("vision.").removeprefix("text.").split("."):
        out = out[int(key)] if key.isdigit() else out[key]
    return out


def test_all_of_them_are_here():
    assert NAMES == [
        "clip-gelu-named-id",
        "clip-quick-gelu-largest-id",
        "siglip",
        "vit",
        "vit-classifier",
        "vit-masked",
    ]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_outputs(name):
    model, params, batch, expected = golden(name)
    out = jax.jit(functools.partial(model.apply, output_hidden_states=True))({"params": params}, **batch)
    compared = 0
    for key, value in expected.items():
        kind, _, part = key.partition(".")
        if kind != "output" or part.startswith("resized."):
            continue
        tower = {"vision": "vision_model_output", "text": "text_model_output"}.get(part.split(".")[0])
        assert_close(part_of(out if tower is None else out[tower], part), value, what=part)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("vit", "vit-masked")])
def test_other_resolutions(name):
    model, params, batch, expected = golden(name)
    [part] = [key for key in expected if key.startswith("output.resized.")]
    inputs = {**batch, "pixel_values": expected["resized.pixel_values"]}
    run = jax.jit(functools.partial(model.apply, interpolate_pos_encoding=True))
    out = run({"params": params}, **inputs)
    assert_close(out[part.removeprefix("output.resized.")], expected[part], what=part)
    if "image_embeds" in part:
        embed = functools.partial(
            model.apply, method="encode_image", interpolate_pos_encoding=True, normalize=True
        )
        assert_close(jax.jit(embed)({"params": params}, inputs["pixel_values"]), expected[part], what=part)


def loss_of(model, params, batch):
    out = model.apply({"params": params}, **batch)
    if "reconstruction" in out:
        return mmjax.losses.masked_l1(out.reconstruction, batch["pixel_values"], batch["bool_masked_pos"])
    if "logits" in out:
        return mmjax.losses.cross_entropy(out.logits, LABELS)
    if "logits_per_image" not in out:
        return jnp.square(out.last_hidden_state).mean() + jnp.square(out.pooler_output).mean()
    scale = jnp.exp(params["logit_scale"])
    if "logit_bias" in params:
        return mmjax.losses.sigmoid(out.image_embeds, out.text_embeds, scale, params["logit_bias"])
    return mmjax.losses.infonce(out.image_embeds, out.text_embeds, scale)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name, tmp_path):
    model, params, batch, expected = golden(name)
    # The reference's gradients lie in a folder like weights, so that the key rules bring them here.
    shutil.copytree(FOLDER / name / "gradients", tmp_path, dirs_exist_ok=True)
    shutil.copy(FOLDER / name / CONFIG, tmp_path)
    gradients = flatten_dict(mmjax.load(tmp_path)[1], sep="/")
    loss, actual = jax.jit(jax.value_and_grad(functools.partial(loss_of, model)))(params, batch)
    assert_close(loss, expected["loss"], what="loss")
    actual = flatten_dict(actual, sep="/")
    assert actual.keys() == gradients.keys()
    for path, value in gradients.items():
        # A shift of all keys leaves the softmax as it is: that gradient is zero but for rounding.
        like = gradients[path.replace("k_proj/bias", "q_proj/bias")]
        if not np.any(like):  # A mask token that no patch uses, a norm that no output reads.
            assert not np.any(actual[path]), path
        else:
            assert_close(actual[path], value, GRADIENT, path, like)


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_the_same_folder(name, tmp_path):
    model, params, _, _ = golden(name)
    mmjax.save(tmp_path, model, params)
    again, params_again, _ = mmjax.load(tmp_path)
    assert again.config == model.config
    ours, theirs = (flatten_dict(p, sep="/") for p in (params_again, params))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)
    ours, theirs = ((folder / CONFIG).read_text() for folder in (tmp_path, FOLDER / name))
    ours, theirs = json.loads(ours), json.loads(theirs)
    assert {key: ours[key] for key in theirs} == theirs


def test_scanned_layers_give_the_same():
    model, params, batch, expected = golden("clip-quick-gelu-largest-id")
    model = model.clone(execution=Execution(scan_layers=True, remat=True))
    out = jax.jit(model.apply)({"params": params}, **batch)
    assert_close(out.logits_per_image, expected["output.logits_per_image"], what="logits_per_image")


def test_the_two_rules_of_end_of_text_matter():
    """The folders' texts tell the rules apart: pooled by the other one, the embeddings differ."""
    model, params, batch, expected = golden("clip-gelu-named-id")
    assert model.config.text_config.eos_token_id == 19
    assert golden("clip-quick-gelu-largest-id")[0].config.text_config.eos_token_id == 2
    ids = batch["input_ids"].copy()
    ids[:, 0] = 23
    embed = jax.jit(functools.partial(model.apply, method="encode_text", normalize=True))
    by_name = embed({"params": params}, ids, batch["attention_mask"])
    assert np.abs(np.asarray(by_name) - expected["output.text_embeds"]).max() > 1e-3
