"""ViT, CLIP and SigLIP against transformers: outputs, gradients, and folders there and back."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="live comparison needs the parity extra: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="live comparison needs the parity extra: pip install -e '.[parity]'"
)

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax.traverse_util import flatten_dict

import mmjax
from mmjax.nn import Execution
from tests.parity import reference as ref

VISION = [
    dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    ),
    dict(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=21,
        patch_size=6,
    ),
]
TEXT = [
    dict(hidden_size=20, num_hidden_layers=2, num_attention_heads=4, intermediate_size=28, vocab_size=60,
         max_position_embeddings=9, eos_token_id=57, bos_token_id=58, pad_token_id=0),
    dict(hidden_size=36, num_hidden_layers=1, num_attention_heads=3, intermediate_size=24, vocab_size=31,
         max_position_embeddings=5, eos_token_id=2, bos_token_id=1, pad_token_id=0),
]  # fmt: skip


def clip_config(case: int, act: str) -> transformers.CLIPConfig:
    return transformers.CLIPConfig(
        vision_config={**VISION[case], "hidden_act": act, "layer_norm_eps": 1e-3},
        text_config={**TEXT[case], "hidden_act": act},
        projection_dim=12 + case,
    )


def siglip_config(case: int) -> transformers.SiglipConfig:
    return transformers.SiglipConfig(
        vision_config=VISION[case], text_config={**TEXT[case], "projection_size": VISION[case]["hidden_size"]}
    )


def text_inputs(case: int, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    config = TEXT[case]
    length = config["max_position_embeddings"] - 1
    ids = torch.randint(3, 30, (batch, length), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, real in enumerate((length, length - 1, length - 3)):
        ids[row, real - 1 :] = config["eos_token_id"]
        mask[row, real:] = 0
    return ids, mask


def open_reference(model, tmp_path):
    ref.randomise(model)
    return mmjax.load(ref.save_reference(model, tmp_path / "reference"))


def reopened(tmp_path, model, params, cls):
    """Save ours and open it with transformers, which must find every key and nothing else."""
    mmjax.save(tmp_path / "ours", model, params)
    again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return again.eval()


def assert_same_folder(tmp_path, reference, model, params, cls):
    again = reopened(tmp_path, model, params, cls)
    expected = reference.state_dict()
    actual = again.state_dict()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    _, params_again, _ = mmjax.load(tmp_path / "ours")
    ours, theirs = flatten_dict(params, sep="/"), flatten_dict(params_again, sep="/")
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[path]), err_msg=path)


DUAL = {
    "clip-quick-gelu": lambda case: transformers.CLIPModel(clip_config(case, "quick_gelu")),
    "clip-gelu": lambda case: transformers.CLIPModel(clip_config(case, "gelu")),
    "siglip": lambda case: transformers.SiglipModel(siglip_config(case)),
}


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("family", DUAL)
def test_dual_encoders(family, case, tmp_path):
    reference = DUAL[family](case)
    model, params, processor = open_reference(reference, tmp_path)
    assert processor is None
    ids, mask = text_inputs(case)
    pixels = ref.random_pixels(2, VISION[case]["image_size"], VISION[case]["image_size"])
    with torch.no_grad():
        expected = reference(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            output_hidden_states=True,
            output_attentions=True,
        )
    batch = dict(input_ids=ids.numpy(), attention_mask=mask.numpy(), pixel_values=ref.channels_last(pixels))
    out = model.apply({"params": params}, **batch, output_hidden_states=True, output_attentions=True)
    for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        ref.assert_close(out[name], expected[name], what=name)
    for tower in ("vision_model_output", "text_model_output"):
        ours, theirs = out[tower], expected[tower]
        ref.assert_close(ours.last_hidden_state, theirs.last_hidden_state, what=tower)
        assert len(ours.hidden_states) == len(theirs.hidden_states)
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            ref.assert_close(a, b, what=f"{tower} hidden state")
    for method, name, arguments in (
        ("encode_image", "image_embeds", (batch["pixel_values"],)),
        ("encode_text", "text_embeds", (batch["input_ids"], batch["attention_mask"])),
    ):
        embeds = model.apply({"params": params}, *arguments, method=method, normalize=True)
        ref.assert_close(embeds, expected[name], what=method)
    assert_same_folder(tmp_path, reference, model, params, type(reference))


@pytest.mark.parametrize("family", DUAL)
def test_gradients(family, tmp_path):
    reference = DUAL[family](0)
    model, params, _ = open_reference(reference, tmp_path)
    ids, mask = text_inputs(0)
    pixels = ref.random_pixels(3, 16, 16).requires_grad_()
    loss = reference(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True).loss
    loss.backward()
    batch = dict(input_ids=ids.numpy(), attention_mask=mask.numpy())
    pixel_values = ref.channels_last(pixels.detach())

    def loss_fn(params, pixel_values):
        out = model.apply({"params": params}, **batch, pixel_values=pixel_values)
        scale = jnp.exp(params["logit_scale"])
        if "logit_bias" in params:
            return mmjax.losses.sigmoid(out.image_embeds, out.text_embeds, scale, params["logit_bias"])
        return mmjax.losses.infonce(out.image_embeds, out.text_embeds, scale)

    value, (grads, pixel_grads) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, pixel_values)
    ref.assert_close(value, loss, what="loss")
    ref.assert_close(np.transpose(pixel_grads, (0, 3, 1, 2)), pixels.grad, ref.GRADIENT, "pixel gradient")
    # Gradients go back through the same key rules as weights, so that every name is compared.
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    _, expected, _ = mmjax.load(ref.save_reference(reference, tmp_path / "gradients"))
    expected, actual = flatten_dict(expected, sep="/"), flatten_dict(grads, sep="/")
    for path, gradient in expected.items():
        # A shift of all keys leaves the softmax as it is: that gradient is zero but for rounding.
        scale_path = path.replace("k_proj/bias", "q_proj/bias")
        worst = float(jnp.abs(actual[path] - gradient).max() / jnp.abs(expected[scale_path]).max())
        assert worst <= ref.GRADIENT, f"{path}: {worst:.2e}"


VIT = [
    {**VISION[0], "image_size": (16, 24), "qkv_bias": False, "hidden_act": "gelu_new"},
    {**VISION[1], "pooler_output_size": 10, "pooler_act": "relu", "num_channels": 1},
]


@pytest.mark.parametrize("case", [0, 1])
def test_vit_tower(case, tmp_path):
    reference = transformers.ViTModel(transformers.ViTConfig(**VIT[case], attn_implementation="eager"))
    model, params, _ = open_reference(reference, tmp_path)
    size = model.config.image_size
    pixels = ref.random_pixels(2, *size, channels=model.config.num_channels)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True, output_attentions=True)
    out = model.apply(
        {"params": params}, ref.channels_last(pixels), output_hidden_states=True, output_attentions=True
    )
    ref.assert_close(out.last_hidden_state, expected.last_hidden_state)
    ref.assert_close(out.pooler_output, expected.pooler_output)
    for name in ("hidden_states", "attentions"):
        assert len(out[name]) == len(expected[name])
        for a, b in zip(out[name], expected[name], strict=True):
            ref.assert_close(a, b, what=name)
    assert_same_folder(tmp_path, reference, model, params, transformers.ViTModel)


@pytest.mark.parametrize("case", [0, 1])
def test_vit_classifier(case, tmp_path):
    config = transformers.ViTConfig(**VIT[case], id2label={0: "cat", 1: "dog", 2: "eel"})
    reference = transformers.ViTForImageClassification(config)
    model, params, _ = open_reference(reference, tmp_path)
    assert model.config.labels == ("cat", "dog", "eel")
    pixels = ref.random_pixels(2, *model.config.image_size, channels=model.config.num_channels)
    with torch.no_grad():
        expected = reference(pixels).logits
    ref.assert_close(model.apply({"params": params}, ref.channels_last(pixels)).logits, expected)
    assert_same_folder(tmp_path, reference, model, params, transformers.ViTForImageClassification)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").id2label == config.id2label


def test_vit_masked_image_modelling(tmp_path):
    config = transformers.ViTConfig(**VISION[0], encoder_stride=4)
    reference = transformers.ViTForMaskedImageModeling(config)
    model, params, _ = open_reference(reference, tmp_path)
    pixels = ref.random_pixels(2, 16, 16)
    hidden = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.4
    with torch.no_grad():
        expected = reference(pixels, bool_masked_pos=hidden)
    out = model.apply({"params": params}, ref.channels_last(pixels), hidden.numpy())
    ref.assert_close(np.transpose(out.reconstruction, (0, 3, 1, 2)), expected.reconstruction)
    loss = mmjax.losses.masked_l1(out.reconstruction, ref.channels_last(pixels), hidden.numpy())
    ref.assert_close(loss, expected.loss)
    assert_same_folder(tmp_path, reference, model, params, transformers.ViTForMaskedImageModeling)


def vision_only(name: str, case: int) -> torch.nn.Module:
    clip, siglip = clip_config(case, "quick_gelu"), siglip_config(case)
    clip.num_labels = siglip.num_labels = 5
    clip.vision_config.projection_dim = 7
    config = {
        "CLIPVisionModel": clip.vision_config,
        "CLIPVisionModelWithProjection": clip.vision_config,
        "CLIPForImageClassification": clip,
        "SiglipVisionModel": siglip.vision_config,
        "SiglipForImageClassification": siglip,
    }[name]
    return getattr(transformers, name)(config)


VISION_ONLY = {
    "CLIPVisionModel": ("last_hidden_state", "pooler_output"),
    "CLIPVisionModelWithProjection": ("last_hidden_state", "image_embeds"),
    "CLIPForImageClassification": ("logits",),
    "SiglipVisionModel": ("last_hidden_state", "pooler_output"),
    "SiglipForImageClassification": ("logits",),
}


@pytest.mark.parametrize("name", VISION_ONLY)
def test_vision_only_models(name, tmp_path):
    reference = vision_only(name, 1)
    model, params, _ = open_reference(reference, tmp_path)
    pixels = ref.random_pixels(2, 21, 21)
    with torch.no_grad():
        expected = reference(pixels)
    out = model.apply({"params": params}, ref.channels_last(pixels))
    for part in VISION_ONLY[name]:
        ref.assert_close(out[part], expected[part], what=part)
    assert_same_folder(tmp_path, reference, model, params, type(reference))


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection", "SiglipTextModel"])
@pytest.mark.parametrize("case", [0, 1])
def test_text_only_models(name, case, tmp_path):
    config = siglip_config(case) if name.startswith("Siglip") else clip_config(case, "gelu")
    if name.startswith("CLIP"):
        config.text_config.projection_dim = 11
    reference = getattr(transformers, name)(config.text_config)
    model, params, _ = open_reference(reference, tmp_path)
    ids, mask = text_inputs(case)
    positions = torch.flip(torch.arange(ids.shape[1]), (0,)).expand_as(ids)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, position_ids=positions)
    out = model.apply({"params": params}, ids.numpy(), mask.numpy(), positions.numpy())
    pooled = "text_embeds" if "Projection" in name else "pooler_output"
    ref.assert_close(out.last_hidden_state, expected.last_hidden_state)
    ref.assert_close(out[pooled], expected[pooled])
    assert_same_folder(tmp_path, reference, model, params, type(reference))


@pytest.mark.parametrize("size", [(16, 24), (8, 8), (21, 50), (13, 16), (64, 4), (16, 17)])
@pytest.mark.parametrize("family", ["vit", "clip", "siglip"])
def test_interpolated_positions(family, size, tmp_path):
    reference = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION[0])),
        "clip": lambda: transformers.CLIPVisionModel(clip_config(0, "gelu").vision_config),
        "siglip": lambda: transformers.SiglipVisionModel(siglip_config(0).vision_config),
    }[family]()
    model, params, _ = open_reference(reference, tmp_path)
    pixels = ref.random_pixels(2, *size)
    with torch.no_grad():
        expected = reference(pixels, interpolate_pos_encoding=True)
    out = model.apply({"params": params}, ref.channels_last(pixels), interpolate_pos_encoding=True)
    ref.assert_close(out.last_hidden_state, expected.last_hidden_state)
    ref.assert_close(out.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("family", DUAL)
def test_execution_choices_agree(family, tmp_path):
    reference = DUAL[family](0)
    model, params, _ = open_reference(reference, tmp_path)
    ids, mask = text_inputs(0)
    batch = dict(
        input_ids=ids.numpy(),
        attention_mask=mask.numpy(),
        pixel_values=ref.channels_last(ref.random_pixels(2, 16, 16)),
    )
    plain = model.apply({"params": params}, **batch)
    for execution in (
        Execution(scan_layers=True),
        Execution(remat=True),
        Execution(scan_layers=True, remat=True),
    ):
        other = model.clone(execution=execution).apply({"params": params}, **batch)
        ref.assert_close(other.logits_per_image, np.asarray(plain.logits_per_image), 1e-6)
    half = model.clone(execution=Execution(dtype="bfloat16")).apply({"params": params}, **batch)
    assert half.image_embeds.dtype == jnp.bfloat16
    ref.assert_close(half.image_embeds, np.asarray(plain.image_embeds), 5e-2)


def test_bfloat16_folder_keeps_its_dtype(tmp_path):
    reference = ref.randomise(DUAL["clip-gelu"](0)).to(torch.bfloat16)
    folder = ref.save_reference(reference, tmp_path / "reference")
    model, params, _ = mmjax.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    _, wide, _ = mmjax.load(folder, dtype="float32")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(wide), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b))
    mmjax.save(tmp_path / "ours", model, params)
    back = transformers.CLIPModel.from_pretrained(tmp_path / "ours", dtype="auto")
    for name, value in reference.state_dict().items():
        assert back.state_dict()[name].dtype == value.dtype
        assert torch.equal(value, back.state_dict()[name]), name
