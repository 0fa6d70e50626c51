"""What each family calls the decoder's settings in its hub config, and its defaults (transformers' own)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from mmjax.errors import ConfigError
from mmjax.language.config import DecoderConfig, ExpertsConfig
from mmjax.models.causal_lm import rope_config
from mmjax.models.hub_config import ConfigTable, short

Hub = Mapping[str, Any]
Reader = Callable[[dict[str, Any], Hub, str], dict[str, Any]]
Writer = Callable[[DecoderConfig], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class DecoderFamily:
    """One model_type of the hub.

    Attributes:
        architecture: its class in transformers.
        table: hub attributes to fields.
        defaults: fields whose default is another than DecoderConfig's, which is LLaMA's.
        read: (fields so far, hub config, file) to more fields.
        write: config to more hub attributes.
        own_code: whether its published folders bring their code along; it is not run.
    """

    architecture: str
    table: ConfigTable
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Reader = lambda values, hub, where: {}
    write: Writer = lambda config: {}
    own_code: bool = False


def _names(names: str) -> dict[str, str]:
    """ "theirs=ours", or one name for both, to a table's fields."""
    pairs = [name.partition("=") for name in names.split()]
    return {theirs: ours or theirs for theirs, _, ours in pairs}


COMMON = _names(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings hidden_act attention_dropout initializer_range tie_word_embeddings "
    "bos_token_id eos_token_id pad_token_id rms_norm_eps=norm_eps"
)
IGNORED: Mapping[str, str] = {
    **rope_config.IGNORED,
    "pretraining_tp": "splits the work, not the result",
    "cache_implementation": "chosen at call time here",
    "id2label": "classifiers only",
    "label2id": "classifiers only",
    "num_labels": "classifiers only",
    "max_sequence_length": "an early name for what max_position_embeddings says",
    "is_llama_config": "a note of the folder's makers",
    "transformers.js_config": "another framework's",
}
SLIDING: Mapping[str, str] = {
    name: "read as sliding_window and layer_types"
    for name in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
}
# Attention in both directions makes these models text encoders.
CAUSAL: Mapping[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, False)}


def _whole(hub: Hub, name: str, default: Any, where: str, most: int = 2**20) -> Any:
    """A whole number or a flag, as the default is; None only where it means that there is no window."""
    value = hub.get(name, default)
    fits = isinstance(value, int) and isinstance(value, bool) == isinstance(default, bool)
    if not fits and not (value is None and name == "sliding_window"):
        raise ConfigError(f"{where}: {name} should be {type(default).__name__}, got {short(value)}")
    if fits and abs(value) > most:
        raise ConfigError(f"{where}: {name}={value} is beyond any model; download the file again")
    return value


def _layer_types(hub: Hub, where: str) -> list[str] | None:
    types = hub.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(name, str) for name in types)):
        raise ConfigError(f"{where}: layer_types should be a list of names, got {short(types)}")
    return types


def _types(config: DecoderConfig) -> list[str]:
    kinds = ("full_attention", "sliding_attention")
    return [kinds[config.slides(i)] for i in range(config.num_hidden_layers)]


def _bias(values: dict[str, Any], hub: Hub, where: str) -> dict[str, Any]:
    """One attribute for the biases of all four products of attention."""
    return {"attention_output_bias": values.get("qkv_bias", False)}


def _later_layers_slide(values: dict[str, Any], hub: Hub, where: str) -> dict[str, Any]:
    """Qwen: a window if it is used, in the layers from max_window_layers on."""
    window = _whole(hub, "sliding_window", 4096, where)
    window = window if _whole(hub, "use_sliding_window", False, where) else None
    types = _layer_types(hub, where)
    if types is None and window is not None:
        first = _whole(hub, "max_window_layers", 28, where)
        depth = _whole(hub, "num_hidden_layers", 32, where)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    return {"sliding_window": window, "layer_types": types}


def _write_sliding(config: DecoderConfig) -> dict[str, Any]:
    window = config.sliding_window if "sliding_attention" in _types(config) else None
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": _types(config),
    }


def _qwen3(values: dict[str, Any], hub: Hub, where: str) -> dict[str, Any]:
    return {**_later_layers_slide(values, hub, where), **_bias(values, hub, where)}


_EXPERTS = _names(
    "num_experts num_experts_per_tok moe_intermediate_size=intermediate_size norm_topk_prob=normalize "
    "decoder_sparse_step=sparse_step"
)


def _qwen3_moe(values: dict[str, Any], hub: Hub, where: str) -> dict[str, Any]:
    """Qwen3 with experts; a window, if used, is every layer's."""
    given = dict(hub)
    if "num_local_experts" in given:
        given.setdefault("num_experts", given["num_local_experts"])
    defaults = {field.name: field.default for field in dataclasses.fields(ExpertsConfig)}
    fields = {ours: _whole(given, theirs, defaults[ours], where, 2**14) for theirs, ours in _EXPERTS.items()}
    dense = hub.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise ConfigError(f"{where}: mlp_only_layers should be a list of layer numbers, got {short(dense)}")
    window = _whole(hub, "sliding_window", 4096, where)
    try:
        experts = ExpertsConfig(**fields, dense_layers=tuple(dense)) if fields["num_experts"] else None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return {
        "experts": experts,
        "sliding_window": window if _whole(hub, "use_sliding_window", False, where) else None,
        **_bias(values, hub, where),
    }


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    experts = config.experts or ExpertsConfig()
    hub = {theirs: getattr(experts, ours) for theirs, ours in _EXPERTS.items()}
    hub["num_experts"] = experts.num_experts if config.experts else 0
    window = config.sliding_window if config.slides(0) else None
    return {
        **hub,
        "mlp_only_layers": list(experts.dense_layers),
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _gemma(values: dict[str, Any], hub: Hub, where: str) -> dict[str, Any]:
    """The first folders say "gelu" and mean its tanh form, which the weights were trained with."""
    tanh = {"hidden_act": "gelu_pytorch_tanh"} if values.get("hidden_act") == "gelu" else {}
    return {**tanh, **_bias(values, hub, where)}


def _gemma2(values: dict[str, Any], hub: Hub, where: str) -> dict[str, Any]:
    types = _layer_types(hub, where)
    if types is None:
        depth = _whole(hub, "num_hidden_layers", 26, where)
        types = [("sliding_attention", "full_attention")[i % 2] for i in range(depth)]
    return {"layer_types": types, **_bias(values, hub, where)}


def _opt(values: dict[str, Any], hub: Hub, where: str) -> dict[str, Any]:
    before = _whole(hub, "do_layer_norm_before", True, where)
    bias = _whole(hub, "enable_bias", True, where)
    removed = _whole(hub, "_remove_final_layer_norm", False, where)
    width = values.get("embedding_size")
    return {
        "embedding_size": None if width == values["hidden_size"] else width,
        "norm_order": "pre" if before else "post",
        "final_norm": before and not removed,
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bias,
    }


def _write_opt(config: DecoderConfig) -> dict[str, Any]:
    return {
        "do_layer_norm_before": config.norm_order == "pre",
        "_remove_final_layer_norm": config.norm_order == "pre" and not config.final_norm,
        "enable_bias": config.mlp_bias,
        "word_embed_proj_dim": config.embedding_width,
    }


def _internlm2(values: dict[str, Any], hub: Hub, where: str) -> dict[str, Any]:
    return {"attention_output_bias": values["qkv_bias"]}


QWEN: dict[str, Any] = dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768
)
GEMMA: dict[str, Any] = dict(
    vocab_size=256000,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    max_position_embeddings=8192,
    norm_offset=1.0,
    scale_embeddings=True,
    tie_word_embeddings=True,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
# GemmaConfig and LlamaConfig give one attribute to all four products.
BIASED = {**COMMON, "attention_bias": "qkv_bias"}

DECODERS: Mapping[str, DecoderFamily] = MappingProxyType(
    {
        "llama": DecoderFamily(
            "LlamaForCausalLM",
            ConfigTable(
                {**BIASED, "mlp_bias": "mlp_bias"}, fixed={"rope_interleaved": (False,)}, ignored=IGNORED
            ),
            dict(bos_token_id=1, eos_token_id=2),
            _bias,
        ),
        "mistral": DecoderFamily(
            "MistralForCausalLM",
            ConfigTable({**COMMON, "sliding_window": "sliding_window"}, ignored={**IGNORED, **SLIDING}),
            dict(
                intermediate_size=14336,
                num_key_value_heads=8,
                max_position_embeddings=131072,
                sliding_window=4096,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        "qwen2": DecoderFamily(
            "Qwen2ForCausalLM",
            ConfigTable(COMMON, fixed={"use_mrope": (False,)}, ignored={**IGNORED, **SLIDING}),
            {**QWEN, "qkv_bias": True},
            _later_layers_slide,
            _write_sliding,
        ),
        "qwen3": DecoderFamily(
            "Qwen3ForCausalLM",
            ConfigTable(BIASED, ignored={**IGNORED, **SLIDING}),
            {**QWEN, "qk_norm": True, "head_dim": 128},
            _qwen3,
            _write_sliding,
        ),
        "qwen3_moe": DecoderFamily(
            "Qwen3MoeForCausalLM",
            ConfigTable(
                BIASED,
                ignored={
                    **IGNORED,
                    **SLIDING,
                    **dict.fromkeys((*_EXPERTS, "mlp_only_layers", "num_local_experts"), "read as experts"),
                    "output_router_logits": "chosen at call time in transformers",
                    "router_aux_loss_coef": "a training loss of its own, which no forward has",
                },
            ),
            dict(
                vocab_size=151936,
                hidden_size=2048,
                intermediate_size=6144,
                num_hidden_layers=24,
                num_key_value_heads=4,
                max_position_embeddings=32768,
                qk_norm=True,
            ),
            _qwen3_moe,
            _write_qwen3_moe,
        ),
        "gemma": DecoderFamily(
            "GemmaForCausalLM",
            ConfigTable(
                BIASED, fixed={**CAUSAL, "hidden_activation": (None, "gelu_pytorch_tanh")}, ignored=IGNORED
            ),
            {
                **GEMMA,
                **dict(hidden_size=3072, intermediate_size=24576, num_hidden_layers=28),
                **dict(num_attention_heads=16, num_key_value_heads=16),
            },
            _gemma,
        ),
        "gemma2": DecoderFamily(
            "Gemma2ForCausalLM",
            ConfigTable(
                {
                    **{name: field for name, field in BIASED.items() if name != "hidden_act"},
                    **_names(
                        "hidden_activation=hidden_act query_pre_attn_scalar=query_scale sliding_window "
                        "attn_logit_softcapping=attention_softcap final_logit_softcapping=logits_softcap"
                    ),
                },
                fixed=CAUSAL,
                ignored={**IGNORED, **SLIDING, "hidden_act": "hidden_activation decides"},
            ),
            {
                **GEMMA,
                **dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26),
                **dict(num_attention_heads=8, num_key_value_heads=4, norm_order="both"),
                **dict(query_scale=256, sliding_window=4096, attention_softcap=50.0, logits_softcap=30.0),
            },
            _gemma2,
            lambda config: {"layer_types": _types(config)},
        ),
        "internlm2": DecoderFamily(
            "InternLM2ForCausalLM",
            ConfigTable(
                {
                    **{name: field for name, field in COMMON.items() if name not in ("head_dim",)},
                    "bias": "qkv_bias",
                },
                ignored=IGNORED,
            ),
            dict(vocab_size=103168, qkv_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2),
            _internlm2,
            own_code=True,
        ),
        "opt": DecoderFamily(
            "OPTForCausalLM",
            ConfigTable(
                _names(
                    "vocab_size hidden_size ffn_dim=intermediate_size num_hidden_layers num_attention_heads "
                    "max_position_embeddings activation_function=hidden_act attention_dropout "
                    "dropout=hidden_dropout init_std=initializer_range tie_word_embeddings "
                    "bos_token_id eos_token_id pad_token_id word_embed_proj_dim=embedding_size "
                    "layer_norm_elementwise_affine=norm_affine"
                ),
                fixed={"layerdrop": (0.0,)},
                ignored={
                    **{name: reason for name, reason in IGNORED.items() if name not in rope_config.IGNORED},
                    "activation_dropout": "not in the reference's layers",
                    **dict.fromkeys(
                        ("do_layer_norm_before", "_remove_final_layer_norm"),
                        "read as norm_order and final_norm",
                    ),
                    "enable_bias": "read as the products' biases",
                },
            ),
            dict(
                vocab_size=50272,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                hidden_act="relu",
                gated_mlp=False,
                norm="layer",
                norm_eps=1e-5,
                positions="learned",
                position_offset=2,
                hidden_dropout=0.1,
                tie_word_embeddings=True,
                pad_token_id=1,
                bos_token_id=2,
                eos_token_id=2,
            ),
            _opt,
            _write_opt,
        ),
    }
)
