"""Folders of causal language models: other words for the same, what is refused, and fresh models written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import mmjax
from mmjax.errors import CheckpointError, ConfigError
from mmjax.language import DecoderConfig, ExpertsConfig
from mmjax.models import CausalLM
from mmjax.nn import Execution
from tests.models.folders import CONFIG
from tests.models.test_decoders import FOLDER, golden
from tests.tiny import random_params

pytestmark = pytest.mark.usefixtures("no_network")


def edited(name, tmp_path, **changes):
    """A golden folder whose config has other attributes; None removes one."""
    shutil.copytree(FOLDER / name, tmp_path, dirs_exist_ok=True)
    hub = json.loads((tmp_path / CONFIG).read_text()) | changes
    (tmp_path / CONFIG).write_text(json.dumps({k: v for k, v in hub.items() if v is not None}))
    return tmp_path


def test_older_words_for_rotary_positions(tmp_path):
    """rope_theta and rope_scaling, "type" for "rope_type": the same model, and the same words written."""
    model, params, _ = golden("llama")
    hub = json.loads((FOLDER / "llama" / CONFIG).read_text())
    scaling = dict(hub["rope_parameters"])
    theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
    folder = edited(
        "llama",
        tmp_path / "old",
        rope_parameters=None,
        rope_theta=theta,
        rope_scaling={**scaling, "type": kind},
    )
    again, _, _ = mmjax.load(folder)
    assert again.config == model.config
    mmjax.save(tmp_path / "new", again, params)
    written = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert written["rope_theta"] == theta and written["rope_scaling"] == {**scaling, "rope_type": kind}
    assert written["rope_parameters"] == hub["rope_parameters"]
    assert mmjax.load(tmp_path / "new")[0].config == model.config


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        (
            "llama",
            dict(num_key_value_heads=3),
            "num_key_value_heads: 3 does not divide num_attention_heads 4",
        ),
        (
            "llama",
            dict(num_attention_heads=0),
            "num_attention_heads: expected an integer of at least 1, got 0",
        ),
        ("llama", dict(head_dim=5), "head_dim: 5 is not even"),
        ("llama", dict(hidden_act="swiglu"), "hidden_act: unknown activation 'swiglu'"),
        ("llama", dict(rms_norm_eps="small"), "norm_eps should be float, got 'small'"),
        ("llama", dict(attention_dropout=1.5), r"attention_dropout: 1.5 is not in \[0, 1\)"),
        ("llama", dict(eos_token_id="</s>"), "eos_token_id: expected an integer, got '</s>'"),
        ("llama", dict(rope_parameters=[1]), "rope_parameters should be an object"),
        ("llama", dict(rope_parameters={"rope_type": "ntk"}), "rope_type 'ntk' is not known; known: default"),
        ("llama", dict(rope_parameters={"rope_type": "linear"}), "rope_type 'linear' needs factor"),
        ("llama", dict(rope_parameters={"rope_type": "default", "factor": 2.0}), "factor means nothing"),
        ("llama", dict(rope_parameters={"rope_type": "linear", "factor": "x"}), "factor has the wrong type"),
        ("llama", dict(rope_parameters={"rope_type": "linear", "factor": -2}), "factor should be a positive"),
        (
            "llama",
            dict(rope_parameters={"partial_rotary_factor": 0.5}),
            "partial_rotary_factor is not supported",
        ),
        ("llama", dict(rope_parameters={"rope_theta": "x"}), "rope_theta should be a number, got 'x'"),
        ("llama", dict(use_parallel_residual=True), "unknown attribute use_parallel_residual=True"),
        ("llama", dict(auto_map={"AutoModel": "x.Y"}), "auto_map asks to run code"),
        (
            "llama",
            dict(architectures=["LlamaForSequenceClassification"]),
            "is not supported; this family has",
        ),
        ("qwen2", dict(layer_types=["full_attention"]), "layer_types: 1 names for 2 layers"),
        ("qwen2", dict(layer_types=["full_attention", "chunked"]), "layer_types: 'chunked' is neither"),
        ("qwen2", dict(layer_types="full_attention"), "layer_types should be a list of names"),
        (
            "qwen2",
            dict(layer_types=["sliding_attention"] * 2),
            "a layer slides, but sliding_window is not given",
        ),
        ("qwen2", dict(use_sliding_window="yes"), "use_sliding_window should be bool, got 'yes'"),
        ("qwen3_moe", dict(num_experts_per_tok=5), "num_experts_per_tok: 5 of only 4 experts"),
        ("qwen3_moe", dict(num_experts=10**8), "num_experts=100000000 is beyond any model"),
        ("qwen3_moe", dict(mlp_only_layers=["0"]), "mlp_only_layers should be a list of layer numbers"),
        ("gemma2", dict(query_pre_attn_scalar=0), "query_scale: 0 is not a number above 0"),
        (
            "gemma2",
            dict(use_bidirectional_attention=True),
            "use_bidirectional_attention=True is not supported",
        ),
        ("opt", dict(layerdrop=0.1), "layerdrop=0.1 is not supported here; only 0.0 is"),
        ("opt", dict(rope_theta=1e4), "unknown attribute rope_theta"),
        ("opt", dict(num_attention_heads=3), "num_attention_heads: 3 does not divide hidden_size 16"),
    ],
)
def test_bad_configs_are_refused(name, changes, match, tmp_path):
    with pytest.raises(ConfigError, match=f"{CONFIG}: .*{match}"):
        mmjax.load(edited(name, tmp_path, **changes))


def test_tensors_of_experts_and_heads_are_all_counted(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: model.layers.1.mlp.experts.4.down_proj.weight"):
        mmjax.load(edited("qwen3_moe", tmp_path / "more", num_experts=5))
    with pytest.raises(CheckpointError, match=r"extra: model.layers.1.mlp.experts.3.up_proj.weight"):
        mmjax.load(edited("qwen3_moe", tmp_path / "fewer", num_experts=3))
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight"):
        mmjax.load(edited("qwen2", tmp_path / "untied", tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            dict(qk_norm=True),
            "qk_norm: a llama folder cannot say True .it would be read as False.; choose another",
        ),
        (dict(model_type="qwen2", qkv_bias=True, mlp_bias=True), "mlp_bias: a qwen2 folder cannot say True"),
        (dict(model_type="gemma", norm_offset=0.0), "norm_offset: a gemma folder cannot say 0.0"),
    ],
)
def test_a_model_that_its_family_cannot_write_is_not_saved(settings, match, tmp_path):
    sizes = dict(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = CausalLM(DecoderConfig(**sizes, **settings))
    with pytest.raises(ConfigError, match=match):
        mmjax.save(tmp_path, model, random_params(model))


def test_a_fresh_model_is_saved_and_opened(tmp_path):
    experts = ExpertsConfig(num_experts=3, num_experts_per_tok=1, intermediate_size=4, sparse_step=2)
    config = DecoderConfig(
        model_type="qwen3_moe", vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, qk_norm=True, experts=experts, eos_token_id=(1, 2),
    )  # fmt: skip
    model = CausalLM(config)
    params = random_params(model)
    mmjax.save(tmp_path, model, params)
    again, params_again, _ = mmjax.load(tmp_path)
    assert again.config.experts == experts and again.config.eos_token_id == (1, 2)
    batch = model.example_batch(2)
    np.testing.assert_array_equal(
        model.apply({"params": params}, **batch).logits, again.apply({"params": params_again}, **batch).logits
    )


def test_what_ends_an_answer_is_written_again(tmp_path):
    """generation_config.json as it is, and in a model that is otherwise the same."""
    model, params, _ = golden("llama")
    folder, text = edited("llama", tmp_path / "chat"), '{"eos_token_id": [2, 7],\n "temperature": 0.6}'
    (folder / "generation_config.json").write_text(text)
    again, params, processor = mmjax.load(folder)
    assert again.config == model.config and hash(again.config) == hash(model.config)
    assert "temperature" not in repr(again.config)
    mmjax.save(tmp_path / "new", again.clone(execution=Execution(dtype="bfloat16")), params, processor)
    assert (tmp_path / "new" / "generation_config.json").read_text() == text
    # A model that was not read from such a folder has none.
    mmjax.save(tmp_path / "plain", model, params)
    assert not (tmp_path / "plain" / "generation_config.json").exists()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json: not valid JSON"):
        mmjax.load(folder)
