"""LLaVA's models and processors without the reference: prompts, samples, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import mmjax
from mmjax.errors import ConfigError, DataError
from mmjax.models import ImageTokens, Llava, LlavaConfig, LlavaProcessor
from mmjax.vision.processing import ImageProcessor
from mmjax.vision.tiles import SquareImageProcessor
from tests.generation.seeing import IMAGE, TOKENIZER, make, picture, said

KINDS = ("llava", "llava_next", "llava_onevision")


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"][0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_make_the_batch_that_a_call_makes(kind):
    """encode and collate are the call, in whatever numbers of images and tiles the batch is padded to."""
    model, params, processor = make(kind)
    prompts = ["<image>What is this?", "A cat", "red <image> and <image>"]
    images = [[picture(9, 20)], [], [picture(30, 10), picture(8, 8)]]
    whole = processor(images=images, text=prompts, padding=True)
    samples = [processor.encode(text, group) for text, group in zip(prompts, images, strict=True)]
    plain = processor.collate(samples, padding_side="right")
    for name, value in plain.items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)
    more = processor.collate(samples, length=plain["input_ids"].shape[1] + 3, images=5, tiles=6)
    shape = (5,) if kind == "llava" else (5, 6)
    assert more["pixel_values"].shape[: len(shape)] == shape
    run = jax.jit(lambda batch: model.apply({"params": params}, **batch).logits)
    mask = plain["attention_mask"] > 0
    expected, found = np.asarray(run(plain))[mask], np.asarray(run(more))[:, : mask.shape[1]][mask]
    # Two programs: products of other sizes are summed in another order.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_features_may_be_computed_before():
    model, params, processor = make("llava_next")
    batch = processor(images=[picture(9, 20), picture(30, 10)], text="<image>a<image>")
    expected = model.apply({"params": params}, **batch).logits
    features = model.apply({"params": params}, batch.pop("pixel_values"), method="vision_features")
    found = model.apply({"params": params}, **batch, image_features=features).logits
    np.testing.assert_array_equal(found, expected)


def test_typed_image_tokens_stay_text():
    """What a person typed takes no place of an image; in a finished prompt the same text does."""
    _, _, processor = make()
    message = said(picture(9, 20), "a <image> b")
    ids = processor(messages=[message])["input_ids"][0]
    assert (ids == IMAGE).sum() == processor.image_tokens.rows
    text = "a <image> b"
    assert TOKENIZER.decode([i for i in ids.tolist() if i != IMAGE]).count(text) == 1
    with pytest.raises(DataError, match="1 image parts .1 of them without a image., and 0 images are left"):
        processor.encode([{"role": "user", "content": [{"type": "image"}]}])


def test_answers_are_marked():
    _, _, processor = make()
    talk = [said(picture(9, 20), "What?"), said("A cat", role="assistant")]
    sample = processor.encode(talk, return_assistant_tokens_mask=True)
    answer = sample["input_ids"][sample["assistant_masks"] > 0]
    assert TOKENIZER.decode(answer.tolist()).strip() == "A cat"
    assert not (sample["assistant_masks"][sample["input_ids"] == IMAGE]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_without_images(kind):
    model, params, processor = make(kind)
    batch = processor(text=["a cat", "dog"], padding=True)
    assert "pixel_values" not in batch and (batch["image_index"] == -1).all()
    with_index = model.apply({"params": params}, **batch).logits
    alone = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"]).logits
    np.testing.assert_array_equal(with_index, alone)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (700, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_extreme_shapes(kind, size):
    """A right answer with as many tokens as features, or one clear line."""
    model, params, processor = make(kind)
    height, width = size
    image = Image.new("RGB", (width, height), (120, 90, 200))
    sample = processor.encode("<image>a", image)
    features = processor.image_tokens.layout(size)
    assert (sample["input_ids"] == IMAGE).sum() == len(features)
    logits = model.apply({"params": params}, **processor.collate([sample])).logits
    assert np.isfinite(logits).all()


def test_an_image_padded_to_a_square_that_is_too_large():
    tokens = ImageTokens.of(make("llava")[0].config)
    tile = tokens.tile[0]
    square = SquareImageProcessor(size=tile, crop_size=tile, do_pad=True)
    processor = LlavaProcessor(square, TOKENIZER, image_tokens=tokens)
    sample = processor.encode("<image>", Image.new("RGB", (1, 10_000), (120, 90, 200)))
    assert np.isfinite(sample["pixel_values"]).all()
    with pytest.raises(
        DataError, match="1 x 60000 would be padded to a square of 60000 x 60000: too elongated"
    ):
        processor.encode("<image>", Image.new("RGB", (1, 60_000)))


def test_an_image_too_long_to_resize():
    processor = LlavaProcessor(
        ImageProcessor(size=336, crop_size=336), TOKENIZER, image_tokens=ImageTokens.of(LlavaConfig())
    )
    with pytest.raises(DataError, match="10000 x 1 would be resized to 3360000 x 336: too elongated"):
        processor.encode("<image>", Image.new("RGB", (10_000, 1)))


@pytest.mark.parametrize(
    ("images", "text", "words"),
    [
        (None, "<image>a", "0 given, but the texts have 1 image places"),
        ("one", "a", "1 given, but the texts have 0 image places"),
        ("one", "<image> <image>", "1 given, but the texts have 2 image places"),
        ("nested", ["<image>", "<image>"], "text 0 has 1 image places, but 2 images"),
        ("missing", "<image>", "nowhere.png: cannot be read"),
        ("broken", "<image>", "image of 12 bytes: truncated"),
        (None, None, "nothing to process"),
        (None, [], "no texts given"),
        (None, 5, "text is a int"),
    ],
)
def test_what_is_refused(images, text, words):
    _, _, processor = make()
    given = {
        "one": [picture(9, 20)],
        "nested": [[picture(9, 20), picture(8, 8)], []],
        "missing": "nowhere.png",
        "broken": b"\x89PNG\r\n\x1a\nxxxx",
        None: None,
    }[images]
    with pytest.raises(DataError, match=words):
        processor(images=given, text=text)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "expected a list of messages, got a str"),
        ({"role": "user", "content": "hello"}, "expected a list of messages, got a dict"),
        (["hello"], "message 0 is a str"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "user", "content": [5]}], "message 0 has a part of type None"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}]}],
            'part of type \'image_url\'; give parts such as .*"type": "image"',
        ),
    ],
)
def test_messages_that_a_template_would_show_as_nothing(messages, words):
    _, _, processor = make()
    with pytest.raises(DataError, match=words):
        processor(messages=messages)


def test_an_empty_prompt_is_its_special_tokens():
    """The reference's tokenizer gives the start token alone, and so do we; without one there is nothing."""
    _, _, processor = make()
    assert processor(text="")["input_ids"].tolist() == [[TOKENIZER.bos_token_id]]
    with pytest.raises(DataError, match="empty"):
        processor(messages=[])


def test_a_model_refuses_what_does_not_fit():
    model, params, processor = make("llava_next")
    batch = processor(images=[picture(9, 20)], text="<image>a")
    named = {name: batch[name] for name in ("input_ids", "pixel_values", "image_sizes")}
    with pytest.raises(ConfigError, match="laid out on the host"):
        jax.jit(lambda b: model.apply({"params": params}, **b).logits)(named)
    with pytest.raises(DataError, match="image tokens, but the images have"):
        model.apply({"params": params}, **{**named, "input_ids": batch["input_ids"][:, :-3]})
    with pytest.raises(ConfigError, match="pixel_values, image_features: give one"):
        model.apply({"params": params}, **batch, image_features=np.zeros((1, 4, 8)))
    plain, params, processor = make("llava")
    batch = processor(images=[picture(9, 20)], text="<image>a")
    del batch["pixel_values"]
    assert np.isnan(plain.apply({"params": params}, **batch).logits).any()
    with pytest.raises(DataError, match="2 image tokens, but the images have 4 features"):
        plain.apply({"params": params}, np.array([[IMAGE, IMAGE, 5]]), pixel_values=np.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="llava_video"), "model_type: 'llava_video'"),
        (dict(projector="resampler"), "projector: unknown kind"),
        (dict(vision_feature_layer=7), "vision_feature_layer: 7 is none of the 3 hidden states"),
        (dict(vision_feature_select_strategy="cls"), "neither 'default' nor 'full'"),
        (dict(image_grid_pinpoints=()), "needs at least one"),
        (dict(image_grid_pinpoints=((8, 12),)), "is not a multiple of image_size"),
        (dict(vision_feature_select_strategy="full"), "use 'default' for eyes with a CLS token"),
        (dict(model_type="llava_onevision"), "vision_aspect_ratio: 'anyres' is not 'anyres_max_n'"),
    ],
)
def test_configs_that_are_refused(changes, words):
    config = make("llava_next")[0].config
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(config, **changes)


def test_a_linear_bridge_there_and_back(tmp_path):
    """LLaVA 1.0: one linear layer."""
    from tests.tiny import random_params

    model, _, processor = make("llava")
    linear = Llava(dataclasses.replace(model.config, projector="linear", projector_bias=True))
    params = random_params(linear)
    assert set(params["multi_modal_projector"]) == {"linear_1"}
    mmjax.save(tmp_path, linear, params, processor)
    again, params_again, opened = mmjax.load(tmp_path)
    assert again.config == linear.config and opened.image_tokens == processor.image_tokens
    ours, theirs = flatten_dict(params, sep="/"), flatten_dict(params_again, sep="/")
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path])


def test_published_names_are_kept(tmp_path):
    """A folder whose eyes stand below vision_tower.vision_model goes back under the same names."""
    from safetensors.numpy import load_file

    model, params, _ = make("llava")
    mmjax.save(tmp_path / "a", model, params)
    names = set(load_file(tmp_path / "a" / "model.safetensors"))
    assert any(name.startswith("vision_tower.vision_model.encoder") for name in names)
    again, params, _ = mmjax.load(tmp_path / "a")
    mmjax.save(tmp_path / "b", again, params)
    assert set(load_file(tmp_path / "b" / "model.safetensors")) == names
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (
        config["image_token_index"] == IMAGE and config["vision_config"]["model_type"] == "clip_vision_model"
    )


def test_videos_are_pooled():
    model, params, processor = make("llava_onevision")
    frames = [np.full((8, 8, 3), 40 * n, np.uint8) for n in range(3)]
    sample = processor.encode("<video> and <image>", picture(9, 20), [frames])
    assert (sample["input_ids"] == processor._id_of("<video>")).sum() == 3 * 1 + 1
    batch = processor.collate([sample])
    logits = model.apply({"params": params}, **batch).logits
    seen = model.apply({"params": params}, batch["pixel_values_videos"], method="encode_images")
    # A grid of 2 x 2 features becomes their mean.
    embeds = model.apply({"params": params}, batch["input_ids"], method="embed_tokens")
    assert seen.shape == (1, 3, 4, 8) and embeds.shape[-1] == 8
    whole = processor(videos=np.stack(frames), text="<video>")
    assert (whole["pixel_values_videos"] == batch["pixel_values_videos"]).all()
    for videos, words in (([[]], "video 0 has no frames"), (["a.mp4"], "'a.mp4' is no array of frames")):
        with pytest.raises(DataError, match=words):
            processor(videos=videos, text="<video>")
    other = {**batch, "pixel_values_videos": batch["pixel_values_videos"][:, ::-1]}
    assert np.abs(logits - model.apply({"params": params}, **other).logits).max() > 1e-4


def test_specs_and_sharding_axes():
    """What init makes is what is declared, and every parameter has its logical axes."""
    from mmjax.nn import parameter_specs

    for kind in KINDS:
        model, params, _ = make(kind)
        made = jax.eval_shape(lambda m=model: m.init(jax.random.key(0), **m.example_batch()))["params"]
        made, specs = flatten_dict(made, sep="/"), flatten_dict(parameter_specs(model), sep="/")
        assert made.keys() == specs.keys() == flatten_dict(params, sep="/").keys()
        assert ("image_newline" in made) == (kind != "llava")
        for path, spec in specs.items():
            assert made[path].shape == spec.shape and len(spec.axes) == len(spec.shape), path


def test_gradients_reach_bridge_and_eyes():
    """Every part that an answer depends on has a gradient: the layers that are seen, and those alone."""
    model, params, processor = make("llava_next")
    batch = processor(images=picture(9, 20), text="<image>a cat")

    def loss(params):
        return jax.nn.logsumexp(model.apply({"params": params}, **batch).logits).sum()

    gradients = flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    for path, gradient in gradients.items():
        # Of two layers the last one's output is not seen, nor what comes after it.
        unseen = path.startswith(("vision_tower/encoder/layers_1", "vision_tower/post_layernorm"))
        # A shift of all keys leaves the softmax as it is.
        flat = path.endswith("k_proj/bias")
        assert np.asarray(gradient).any() != unseen or flat, path


@pytest.mark.parametrize("options", [dict(dtype="bfloat16"), dict(scan_layers=True), dict(remat=True)])
def test_execution_is_a_choice(options):
    from mmjax.nn import Execution

    model, params, processor = make("llava_onevision")
    batch = processor(images=[picture(30, 10)], text="<image>a cat")
    expected = model.apply({"params": params}, **batch).logits
    other = model.clone(execution=Execution(**options))
    found = jax.jit(other.apply)({"params": params}, **batch).logits
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.2 if "dtype" in options else 1e-5)


EYES = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    "vocab_size": 32000,
}  # fmt: skip
POINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
PUBLISHED = {
    "llava-1.5": {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
        "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
            "torch_dtype": "float16", "vocab_size": 32064,
        },
        "torch_dtype": "float16", "transformers_version": "4.36.0.dev0", "vision_config": EYES,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
    },
    "llava-1.6-mistral": {
        "architectures": ["LlavaNextForConditionalGeneration"], "ignore_index": -100,
        "image_grid_pinpoints": POINTS, "image_token_index": 32000, "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "architectures": ["MistralForCausalLM"],
            "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
            "torch_dtype": "bfloat16", "vocab_size": 32064,
        },
        "torch_dtype": "float16", "transformers_version": "4.39.0.dev0", "use_image_newline_parameter": True,
        "vision_config": EYES, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    },
    "onevision": {"model_type": "llava_onevision", "torch_dtype": "float16"},
}  # fmt: skip


def settled(config):
    """With what folders have written out."""
    brain = config.text_config
    brain = dataclasses.replace(brain, num_key_value_heads=brain.kv_heads, layer_types=None)
    return dataclasses.replace(config, text_config=brain)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    """What the folders say is read, and written so that it is read again as the same."""
    from mmjax.models.family import family_of_type

    hub = PUBLISHED[name]
    family = family_of_type(hub["model_type"], "here")
    config = family.read_config(hub, "", frozenset(), "here")
    rows, layers = {"onevision": (729, 26)}.get(name, (576, 24))
    assert config.tile_rows == rows and config.vision_config.num_hidden_layers == layers
    assert config.text_config.model_type in hub.get("text_config", {"model_type": "qwen2"})["model_type"]
    assert not config.text_config.tie_word_embeddings
    again = family.read_config(
        json.loads(json.dumps(family.write_config(config, ""))), "", frozenset(), "here"
    )
    assert settled(again) == settled(config)
    if name == "onevision":
        assert len(config.image_grid_pinpoints) == 36 and config.most_tiles == 9
        assert config.image_token_id == 151646 and config.video_token_id == 151647
    else:
        assert config.image_token_id == 32000 and config.text_config.vocab_size == 32064
