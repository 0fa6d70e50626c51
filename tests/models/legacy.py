"""config.json as transformers wrote it in 2022: every generation setting repeated in every section."""

from __future__ import annotations

import json
from typing import Any

GENERIC = json.loads(
    """{
    "_name_or_path": "", "add_cross_attention": false, "architectures": null, "bad_words_ids": null,
    "begin_suppress_tokens": null, "bos_token_id": null, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": null, "decoder_start_token_id": null, "diversity_penalty": 0.0,
    "do_sample": false, "early_stopping": false, "encoder_no_repeat_ngram_size": 0, "eos_token_id": null,
    "exponential_decay_length_penalty": null, "finetuning_task": null, "forced_bos_token_id": null,
    "forced_eos_token_id": null, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": false,
    "is_encoder_decoder": false, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": false, "output_hidden_states": false,
    "output_scores": false, "pad_token_id": null, "prefix": null, "problem_type": null, "pruned_heads": {},
    "remove_invalid_values": false, "repetition_penalty": 1.0, "return_dict": true,
    "return_dict_in_generate": false, "sep_token_id": null, "suppress_tokens": null,
    "task_specific_params": null, "temperature": 1.0, "tf_legacy_loss": false, "tie_encoder_decoder": false,
    "tie_word_embeddings": true, "tokenizer_class": null, "top_k": 50, "top_p": 1.0, "torch_dtype": null,
    "torchscript": false, "transformers_version": "4.24.0.dev0", "typical_p": 1.0, "use_bfloat16": false
    }"""
)


def tower(model_type: str, **own: Any) -> dict[str, Any]:
    """A section with all generic attributes and its own."""
    common = {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "model_type": model_type,
    }
    return {**GENERIC, **common, **own}


def clip(**changes: Any) -> dict[str, Any]:
    """A CLIP's config.json."""
    return {
        "_commit_hash": None,
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 1024,
        "text_config": tower(
            "clip_text_model",
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
            hidden_size=1024,
            intermediate_size=4096,
            max_position_embeddings=77,
            num_attention_heads=16,
            num_hidden_layers=24,
            projection_dim=512,
            vocab_size=49408,
        ),
        "text_config_dict": None,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": tower(
            "clip_vision_model",
            hidden_size=1280,
            image_size=224,
            intermediate_size=5120,
            num_attention_heads=16,
            num_channels=3,
            num_hidden_layers=32,
            patch_size=14,
            projection_dim=512,
        ),
        "vision_config_dict": None,
        **changes,
    }


# What such folders repeat beside the sections; in transformers it decides about every field of the section.
TEXT_DICT = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
VISION_DICT = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
}
