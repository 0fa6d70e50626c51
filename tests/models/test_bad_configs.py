"""Every config.json that `load` refuses: the file and the attribute are named, nothing is run."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest

import mmjax
from mmjax.errors import CheckpointError, ConfigError
from tests.models.folders import CONFIG, WEIGHTS, edit_config, edit_tensors, parts, refused, write_parts

pytestmark = pytest.mark.usefixtures("no_network")

KERNEL = "classifier.weight"


def test_no_config(folder):
    (folder / CONFIG).unlink()
    refused(folder, "no such file; a hub folder needs one", error=CheckpointError, file=CONFIG)
    (folder / CONFIG).mkdir()
    refused(folder, "cannot be read", error=CheckpointError, file=CONFIG)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON .*download the file again"),
        (b'{"model_type": "vit",}', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"\x00" * 64, "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not valid JSON"),
        (b'{"hidden_size": NaN}', "not valid JSON"),
        (b'{"hidden_size": -Infinity}', "not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 2_000_000, "not valid JSON"),
        (b'{"a":' * 500_000 + b"1" + b"}" * 500_000, "not valid JSON|nested"),
        (b"[]", "expected a JSON object, found list"),
        (b'"vit"', "expected a JSON object, found str"),
        (b"null", "expected a JSON object, found NoneType"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_config_that_is_not_json(folder, text, match):
    (folder / CONFIG).write_bytes(text)
    refused(folder, match, error=CheckpointError, file=CONFIG)


@pytest.mark.parametrize("depth", [50, 200, 400, 480, 600, 800, 950, 990, 1500, 3000])
def test_nested_config(folder, depth):
    """Depths that one part of Python still follows and another does not."""
    config = json.loads((folder / CONFIG).read_text())
    nested = '{"a":' * depth + "1" + "}" * depth
    for name in ("task_specific_params", "unknown"):
        text = json.dumps({**config, name: "HERE"}).replace('"HERE"', nested)
        (folder / CONFIG).write_text(text)
        if name == "unknown" or depth > 100:
            refused(folder, "unknown attribute|nested|not valid JSON", file=CONFIG)
        else:
            mmjax.load(folder)


@pytest.mark.parametrize("value", ["kosmos", "", None, 7, ["vit"], {"vit": 1}])
def test_unknown_family(folder, value):
    edit_config(folder, model_type=value)
    refused(
        folder, "model_type .* is not a family that mmjax knows; it knows", error=ConfigError, file=CONFIG
    )


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (["ViTForObjectDetection"], "'ViTForObjectDetection' is not supported; this family has ViTModel"),
        (["CLIPModel"], "'CLIPModel' is not supported"),
        ("ViTModel", "architectures should be a list of names"),
        ([1], "architectures should be a list of names"),
        ({"ViTModel": 1}, "architectures should be a list of names"),
    ],
)
def test_unknown_architecture(folder, value, match):
    edit_config(folder, architectures=value)
    refused(folder, match, error=ConfigError, file=CONFIG)


def test_unhandled_attribute(folder, clip):
    edit_config(folder, rope_theta=1e4)
    refused(folder, "unknown attribute rope_theta=10000.0; .*Remove it", error=ConfigError, file=CONFIG)
    edit_config(clip, "vision_config", use_mean_pooling=True)
    refused(clip, "vision_config: unknown attribute use_mean_pooling=True", error=ConfigError, file=CONFIG)


def test_unhandled_attribute_of_several_megabytes_makes_a_short_message(folder):
    edit_config(folder, what=["x" * 100] * 30_000)
    refused(folder, "unknown attribute what=", file=CONFIG)
    edit_config(folder, what=None, hidden_act="y" * 3_000_000)
    refused(folder, file=CONFIG)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("cross_attention_hidden_size", 8),
    ],
)
def test_attribute_with_unsupported_value(folder, clip, name, value):
    edit_config(folder, **{name: value})
    refused(folder, f"{name}=.* is not supported here; only", error=ConfigError, file=CONFIG)
    edit_config(clip, "text_config", **{name: value})
    refused(clip, f"text_config: {name}=", error=ConfigError, file=CONFIG)


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "patch_size",
    "num_channels",
    "image_size",
)


@pytest.mark.parametrize(
    "value", [0, -8, 8.0, 8.5, "8", True, None, [], {}, [8, 8, 8], 1e308, 10**12, 10**400]
)
@pytest.mark.parametrize("name", SIZES)
def test_impossible_sizes(folder, name, value):
    edit_config(folder, **{name: value})
    text = refused(folder, file=CONFIG)
    assert name in text or "not valid JSON" in text


@pytest.mark.parametrize("value", [-1, 1.0, "1", False, None, 10**9, 10**15])
def test_impossible_depth(folder, value):
    edit_config(folder, num_hidden_layers=value)
    refused(folder, "num_hidden_layers", error=ConfigError, file=CONFIG)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads: 3 does not divide hidden_size 8"),
        ({"image_size": 3}, r"image_size: \(3, 3\) is smaller than one patch of \(4, 4\)"),
        ({"image_size": [8, 3]}, "smaller than one patch"),
        ({"image_size": [8, "8"]}, "image_size"),
        ({"image_size": [8, True]}, "image_size"),
        ({"image_size": [8, [8]]}, "image_size"),
        ({"image_size": [-8, 8]}, "image_size"),
        ({"patch_size": [0, 4]}, "patch_size"),
        ({"image_size": 100_000}, "image_size"),
        ({"image_size": [10**9, 4]}, "image_size"),
        ({"encoder_stride": 0}, "encoder_stride"),
        ({"encoder_stride": "4"}, "encoder_stride"),
        ({"hidden_act": "gelu_10"}, "hidden_act: unknown activation 'gelu_10'; known: "),
        ({"hidden_act": None}, "hidden_act"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"pooler_act": "gelu_10"}, "pooler_act"),
        ({"pooler_output_size": 0}, "pooler_output_size|pooler_size"),
        ({"pooler_output_size": "8"}, "pooler_output_size|pooler_size"),
        ({"pooler_output_size": 8.0}, "pooler_output_size|pooler_size"),
        ({"layer_norm_eps": -1e-6}, "layer_norm_eps"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps"),
        ({"layer_norm_eps": True}, "layer_norm_eps"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout: 1.0 is not in \[0, 1\)"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_dropout"),
        ({"qkv_bias": 1}, "qkv_bias"),
        ({"qkv_bias": "true"}, "qkv_bias"),
        ({"num_labels": -1, "id2label": None}, "num_labels"),
        ({"num_labels": 2.0, "id2label": None}, "num_labels"),
        ({"num_labels": 10**12, "id2label": None}, "num_labels"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label skips class numbers"),
        ({"id2label": {"a": "b"}}, "id2label should map class numbers to names"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"id2label": "ab"}, "id2label"),
    ],
    ids=str,
)
def test_impossible_values(folder, changes, match):
    edit_config(folder, **changes)
    refused(folder, match, error=ConfigError, file=CONFIG)


NUMBERS = ("layer_norm_eps", "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_none(folder, name, text):
    edit_config(folder, **{name: "HERE"})
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"HERE"', text))
    refused(folder, file=CONFIG)


@pytest.mark.parametrize(
    ("section", "changes", "match"),
    [
        ("text_config", {"vocab_size": 0}, "text_config: vocab_size"),
        ("text_config", {"max_position_embeddings": -1}, "text_config: max_position_embeddings"),
        ("text_config", {"eos_token_id": "49407"}, "text_config: eos_token_id"),
        ("text_config", {"eos_token_id": 1.5}, "text_config: eos_token_id"),
        ("text_config", {"num_attention_heads": 3}, "text_config: num_attention_heads: 3 does not divide"),
        ("vision_config", {"image_size": 2}, "vision_config: image_size"),
        (None, {"projection_dim": 0}, "projection_dim"),
        (None, {"projection_dim": None}, "projection_dim"),
        (None, {"logit_scale_init_value": "x"}, "logit_scale_init_value"),
        (None, {"vision_config": [1]}, "vision_config should be an object"),
        (None, {"text_config": "small"}, "text_config should be an object"),
        (None, {"text_config_dict": 3}, "text_config_dict should be an object"),
    ],
    ids=str,
)
def test_impossible_sections(clip, section, changes, match):
    edit_config(clip, section, **changes)
    refused(clip, match, error=ConfigError, file=CONFIG)


@pytest.mark.parametrize(
    ("section", "changes", "match"),
    [
        (
            "text_config",
            {"projection_size": 7},
            "projection_size: the text tower gives 7 features, the image",
        ),
        ("text_config", {"projection_size": "16"}, "text_config: projection_size"),
        ("vision_config", {"vision_use_head": 1}, "vision_config: vision_use_head should be true or false"),
        ("vision_config", {"vision_use_head": False}, "pooling: .*the tower has none"),
        ("vision_config", {"hidden_size": 32}, "projection_size: .* they must agree"),
        (None, {"text_config_dict": {}}, "unknown attribute text_config_dict"),
    ],
    ids=str,
)
def test_impossible_sections_of_siglip(siglip, section, changes, match):
    edit_config(siglip, section, **changes)
    refused(siglip, match, error=ConfigError, file=CONFIG)


def test_remote_code_is_refused_and_not_run(folder, monkeypatch):
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("modeling_evil", "configuration_evil", "sitecustomize"):
        (folder / f"{name}.py").write_text(code)
    before = set(sys.modules)
    auto_map = {"AutoConfig": "configuration_evil.C", "AutoModel": "modeling_evil.M"}
    edit_config(folder, auto_map=auto_map)
    refused(
        folder, "auto_map asks to run code from the folder; mmjax never does", error=ConfigError, file=CONFIG
    )
    assert not marker.exists()
    edit_config(folder, auto_map=None, trust_remote_code=True)
    refused(folder, "unknown attribute", error=ConfigError, file=CONFIG)
    assert not marker.exists()
    assert not {name for name in set(sys.modules) - before if "evil" in name or "sitecustomize" in name}


def test_remote_code_in_a_section(clip):
    edit_config(clip, "vision_config", auto_map={"AutoModel": "modeling_evil.M"})
    refused(clip, "vision_config: auto_map asks to run code", error=ConfigError, file=CONFIG)


def test_quantised_folders(folder, clip):
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_config(folder, quantization_config=quantised)
    refused(folder, "quantised weights are not read; use the original folder", error=ConfigError, file=CONFIG)
    edit_config(clip, "text_config", quantization_config=quantised)
    refused(clip, "text_config: quantization_config", error=ConfigError, file=CONFIG)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
def test_integer_tensors(folder, dtype):
    edit_tensors(folder, lambda t: t.update({KERNEL: t[KERNEL].astype(dtype)}))
    refused(folder, f"tensor {KERNEL} has dtype .*use a floating-point folder", file=WEIGHTS)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "C64", "Q4"])
def test_unsupported_dtypes(folder, dtype):
    header, data = parts(folder)
    start, end = header[KERNEL]["data_offsets"]
    header[KERNEL]["dtype"] = dtype
    write_parts(folder, header, data)
    refused(
        folder, f"{KERNEL}.* dtype {dtype}|not a whole safetensors file", error=CheckpointError, file=WEIGHTS
    )
    header[KERNEL]["shape"] = [end - start]
    write_parts(folder, header, data)
    refused(
        folder, f"{KERNEL}.* dtype {dtype}|not a whole safetensors file", error=CheckpointError, file=WEIGHTS
    )


def test_float64_needs_jax_to_have_it(folder):
    edit_tensors(folder, lambda t: t.update({k: v.astype(np.float64) for k, v in t.items()}))
    refused(folder, "float64.*jax_enable_x64.*dtype=.float32", error=CheckpointError)
    _, params, _ = mmjax.load(folder, dtype="float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    with jax.enable_x64(True):
        _, params, _ = mmjax.load(folder)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float64"}


@pytest.mark.parametrize("dtype", ["int8", "float", "nonsense", "float8_e4m3fn", 7, object()])
def test_dtype_that_is_no_float(folder, dtype):
    with pytest.raises(ConfigError, match="dtype: .* use one of float16, bfloat16, float32"):
        mmjax.load(folder, dtype=dtype)
