"""The configurations of the text encoders and of the decoder."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mmjax.errors import ConfigError
from mmjax.nn import RopeConfig, RopeScaling, TransformerConfig, activation
from mmjax.nn.config import check_int, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
    """A text transformer with learned positions.

    Attributes:
        vocab_size: V.
        max_position_embeddings: longest sequence.
        causal: whether a token sees only those before it.
        pooling: "eos": the token at the end-of-text id; "last": the last position, padding or not.
        eos_token_id: the end-of-text id. The value 2 stands for "the largest id of the row", as in configs
            written before the field was right.
        projection_size: width of a linear layer with bias on the pooled token, or None for no such layer.
    """

    vocab_size: int = 32000
    max_position_embeddings: int = 64
    causal: bool = False
    pooling: Literal["eos", "last"] = "last"
    eos_token_id: int = 1
    projection_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "vocab_size", "max_position_embeddings")
        if self.projection_size is not None:
            check_positive(self, "projection_size")


LayerType = Literal["full_attention", "sliding_attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Perceptrons of which every token takes a few (Shazeer et al. 2017).

    Attributes:
        num_experts: how many there are in a layer.
        num_experts_per_tok: how many a token takes.
        intermediate_size: F of one expert.
        normalize: whether the weights of the experts taken add up to one.
        sparse_step: every so many layers has experts; the others have one perceptron.
        dense_layers: layers that have one perceptron whatever `sparse_step` says.

    >>> ExpertsConfig(num_experts=4, num_experts_per_tok=2, sparse_step=2).in_layer(1)
    True
    """

    num_experts: int = 128
    num_experts_per_tok: int = 8
    intermediate_size: int = 768
    normalize: bool = False
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_positive(self, "num_experts", "num_experts_per_tok", "intermediate_size", "sparse_step")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok: {self.num_experts_per_tok} of only {self.num_experts} experts"
            )

    def in_layer(self, index: int) -> bool:
        """Whether layer `index` has experts."""
        return index not in self.dense_layers and (index + 1) % self.sparse_step == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal language model: what LLaMA, Qwen, Mistral, OPT, InternLM2 and Gemma are settings of.

    Attributes:
        model_type: the family, by its hub name, whose folders the model is read from and written to.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_hidden_layers: number of layers.
        num_attention_heads, num_key_value_heads: N and K; K divides N, None means N.
        head_dim: H; None means D / N.
        max_position_embeddings: the longest text that the model was made for.
        hidden_act: activation by its hub name.
        gated_mlp: act(gate) * up in place of act(up).
        norm: root-mean-square or layer norm.
        norm_eps: epsilon of every norm.
        norm_offset: added to the scales of root-mean-square norms.
        norm_affine: whether layer norms have scale and bias.
        norm_order: where a block's norm stands: before it, after the residual sum, or before and after it.
        final_norm: whether the last layer's output is normed.
        qk_norm: a norm over H on every query and key head.
        qkv_bias, attention_output_bias, mlp_bias: which products have a bias.
        query_scale: attention logits are divided by its root; None means H.
        attention_softcap, logits_softcap: bounds of attention logits and of the vocabulary's; None: no bound.
        sliding_window: how many tokens back a sliding layer sees, itself included; None: all.
        layer_types: each layer's kind; None means that all slide if there is a window.
        positions: rotary, or a learned table added to the embeddings.
        position_offset: rows of the learned table before that of position 0.
        rope_theta, rope_scaling, rope_sections, rope_interleaved: see `mmjax.nn.RopeConfig`.
        embedding_size: width of the embeddings, if another than D; two products join the widths.
        scale_embeddings: multiply embeddings by the root of D.
        tie_word_embeddings: the output product is the embedding table's transpose.
        experts: mixture-of-experts layers, or None.
        attention_dropout, hidden_dropout: rates on attention weights and on each residual branch.
        initializer_range: standard deviation of fresh kernels and tables.
        bos_token_id, eos_token_id, pad_token_id: special ids; several may end a text.
        hub: the config.json that was read, for what changes nothing here but is written back.
        generation_config: the text of the generation_config.json beside it, which is written back as it is;
            "": none.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_affine: bool = True
    norm_order: Literal["pre", "post", "both"] = "pre"
    final_norm: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] | None = None
    positions: Literal["rope", "learned"] = "rope"
    position_offset: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_sections: tuple[int, ...] = ()
    rope_interleaved: bool = False
    embedding_size: int | None = None
    scale_embeddings: bool = False
    tie_word_embeddings: bool = False
    experts: ExpertsConfig | None = None
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    hub: str = dataclasses.field(default="{}", compare=False, repr=False)
    generation_config: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
            "max_position_embeddings",
        )
        check_int(self, "num_hidden_layers", least=1)
        for name in ("num_key_value_heads", "head_dim", "sliding_window", "embedding_size"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        self._check_heads()
        activation(self.hidden_act)
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}: {getattr(self, name)} is not in [0, 1)")
        for name in ("query_scale", "attention_softcap", "logits_softcap"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise ConfigError(f"{name}: {value!r} is not a number above 0")
        if not self.norm_eps >= 0:
            raise ConfigError(f"norm_eps: {self.norm_eps} is not a number >= 0")
        self._check_layers()
        self._check_ids()
        if self.positions == "rope":
            _ = self.rope

    def _check_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ConfigError(
                f"num_attention_heads: {heads} does not divide hidden_size {self.hidden_size}; give head_dim"
            )
        if heads % kv_heads:
            raise ConfigError(f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")

    def _check_ids(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            many = value if isinstance(value, tuple) and name == "eos_token_id" else (value,)
            for number in many:
                if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                    raise ConfigError(f"{name}: expected an integer, got {number!r}")

    def _check_layers(self) -> None:
        types = self.layer_types
        if types is None:
            return
        if len(types) != self.num_hidden_layers:
            raise ConfigError(f"layer_types: {len(types)} names for {self.num_hidden_layers} layers")
        for name in types:
            if name not in ("full_attention", "sliding_attention"):
                raise ConfigError(
                    f"layer_types: {name!r} is neither 'full_attention' nor 'sliding_attention'"
                )
        if "sliding_attention" in types and self.sliding_window is None:
            raise ConfigError("layer_types: a layer slides, but sliding_window is not given")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """H."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings and of the output product's input."""
        return self.embedding_size or self.hidden_size

    @property
    def rope(self) -> RopeConfig:
        """Rotary positions of one head."""
        return RopeConfig(
            head_dim=self.head_size,
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            sections=self.rope_sections,
            interleaved=self.rope_interleaved,
        )

    def slides(self, index: int) -> bool:
        """Whether layer `index` sees only its window."""
        if self.layer_types is None:
            return self.sliding_window is not None
        return self.layer_types[index] == "sliding_attention"
