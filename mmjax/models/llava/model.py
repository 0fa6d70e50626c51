"""LLaVA's assembly: eyes, a projector, and a decoder that reads projected features in place of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.connectors import Projector
from mmjax.errors import ConfigError, DataError
from mmjax.language.decoder import DecoderOutput
from mmjax.models.assemblies import Model
from mmjax.models.causal_lm.model import CausalLM, CausalLMOutput
from mmjax.models.llava.config import LlavaConfig
from mmjax.models.llava.layout import index_of_batch, layout_arrays
from mmjax.nn import KVCache, param
from mmjax.nn.initializers import normal
from mmjax.parallel import shard_rows
from mmjax.vision.transformer import VisionTransformer

Array = jax.Array


class LlavaOutput(CausalLMOutput):
    """What a LLaVA model returns: a causal language model's output, and what it saw.

    Attributes:
        image_features: the projected features, [I, P, D] or [I, N, P, D], where there were images.
    """

    image_features: Array | None = None


class Llava(Model):
    """Eyes, bridge and brain; see LlavaConfig for what varies.

    Images come as `pixel_values` and are laid out by `image_index`, which the processor makes. All features
    of the batch form one table: first those of the images (tile by tile), then those of the videos, then the
    embedding that ends a row (NeXT, OneVision); a token of an image is the sum of some of its rows.

    >>> import jax
    >>> from mmjax.language import DecoderConfig
    >>> from mmjax.models import CLIPVisionConfig
    >>> sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    >>> config = LlavaConfig(
    ...     vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **sizes),
    ...     text_config=DecoderConfig(vocab_size=11, **sizes),
    ...     image_token_id=10,
    ... )
    >>> model = Llava(config)
    >>> params = model.init(jax.random.key(0), **model.example_batch())["params"]
    >>> ids, image = jnp.array([[3, 10, 10, 10, 10, 5]]), jnp.ones((1, 8, 8, 3))
    >>> out = model.apply({"params": params}, ids, pixel_values=image)
    >>> out.logits.shape, out.image_features.shape
    ((1, 6, 11), (1, 4, 8))
    """

    config: LlavaConfig

    def setup(self) -> None:
        config, execution = self.config, self.execution
        width = config.text_config.embedding_width
        self.vision_tower = VisionTransformer(config.vision_config, execution)
        self.multi_modal_projector = Projector(
            config.projector, width, config.projector_hidden_act, config.projector_bias, execution
        )
        self.language_model = CausalLM(config.text_config, execution)
        if config.tiled:
            self.image_newline = param(self, "image_newline", normal(width**-0.5), (width,), ("embed",))

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        """A short text with one image each, all zero, of which the first feature is read."""
        config = self.config
        tiles = (batch_size, 2) if config.tiled else (batch_size,)
        shape = (*tiles, *config.tile, config.vision_config.num_channels)
        index = np.full((batch_size, 8, config.index_width), -1, np.int32)
        index[:, 0, 0] = np.arange(batch_size) * tiles[-1] * config.tile_rows if config.tiled else 0
        return {
            "input_ids": np.zeros((batch_size, 8), np.int32),
            "pixel_values": np.zeros(shape, np.float32),
            "image_index": index,
        }

    def init_cache(self, batch_size: int, length: int, dtype: Any = None) -> KVCache:
        """An empty cache of the brain's, as `CausalLM.init_cache`."""
        brain = CausalLM(self.config.text_config, self.execution, parent=None)
        return brain.init_cache(batch_size, length, dtype)

    def lay_out(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with image_index (and image_weights), from its ids and the sizes of its images.

        Args:
            batch: concrete arrays as `__call__` takes them.
        """
        config, result = self.config, dict(batch)
        if result.get("input_ids") is None:
            raise ConfigError("image_index: inputs_embeds do not say where images stand; give it too")

        def shape(name: str, rank: int) -> tuple[int, ...] | None:
            value = result.get(name)
            return None if value is None else (*np.shape(value)[:-rank], config.tile_rows)

        index, weights = layout_arrays(
            config,
            np.asarray(result["input_ids"]),
            shape("pixel_values", 3) or shape("image_features", 2),
            shape("pixel_values_videos", 3),
            result.get("image_sizes"),
            result.get("batch_num_images"),
        )
        result["image_index"] = index
        return result if weights is None else {**result, "image_weights": weights}

    def embed_tokens(self, input_ids: Array) -> Array:
        """int [B, T] to the brain's embeddings [B, T, D]."""
        return self.language_model.embed_tokens(input_ids)

    def output_kernel(self) -> Array:
        """The kernel [D, V] of the product with the vocabulary."""
        return self.language_model.output_kernel()

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] to logits [..., V]."""
        return self.language_model.logits(hidden)

    def vision_features(self, pixel_values: Array, deterministic: bool = True) -> Array:
        """What the eyes give the bridge: images [..., H, W, C] to features [..., P, Dv].

        The eyes' features alone, so that they can be computed once and kept while the eyes do not learn;
        the model takes them as `image_features`.
        """
        config = self.config
        lead = pixel_values.shape[:-3]
        flat = pixel_values.reshape(-1, *pixel_values.shape[-3:])
        out: Any = self.vision_tower(flat, output_hidden_states=True, deterministic=deterministic)
        if self.is_initializing():
            seen = [out.last_hidden_state] * len(config.feature_layers)
        else:
            seen = [out.hidden_states[layer] for layer in config.feature_layers]
        first = 1 if config.vision_feature_select_strategy == "default" else 0
        features = jnp.concatenate([states[:, first:] for states in seen], axis=-1)
        return features.reshape(*lead, *features.shape[1:])

    def encode_images(self, pixel_values: Array) -> Array:
        """Images [..., H, W, C] to projected features [..., P, D]."""
        return self.multi_modal_projector(self.vision_features(pixel_values))

    def embed_inputs(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        **images: Any,
    ) -> Array:
        """What the brain reads, [B, T, D], padding too; arguments as in `__call__`."""
        return self._embeds_and_seen(input_ids, inputs_embeds, **images)[0]

    def _embeds_and_seen(
        self,
        input_ids: Array | None,
        inputs_embeds: Array | None,
        pixel_values: Array | None = None,
        image_index: Array | None = None,
        image_weights: Array | None = None,
        image_features: Array | None = None,
        image_sizes: Any = None,
        batch_num_images: Any = None,
        pixel_values_videos: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Array | None]:
        """What the brain reads, and the projected features of images."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("input_ids, inputs_embeds: give one of the two")
        if pixel_values is not None and image_features is not None:
            raise ConfigError("pixel_values, image_features: give one of the two")
        if pixel_values is not None:
            image_features = self.vision_features(pixel_values, deterministic)
        seen = None if image_features is None else self.multi_modal_projector(image_features)
        videos = None
        if pixel_values_videos is not None:
            videos = self.multi_modal_projector(self.vision_features(pixel_values_videos, deterministic))
        if seen is not None or videos is not None:
            if image_index is None:
                image_index, image_weights = index_of_batch(
                    self.config, input_ids, seen, videos, image_sizes, batch_num_images
                )
            # Any row may look at any other's images: columns are split, so that nobody needs the whole table.
            table = shard_rows(self._table(seen, videos), axis=-1)
            if inputs_embeds is None:
                # An image's id may lie outside of the vocabulary.
                ids: Any = input_ids
                inputs_embeds = self.embed_tokens(jnp.where(image_index[..., 0] >= 0, 0, ids))
            merged = merge_features(inputs_embeds, table, image_index, image_weights)
            # First as the table lies, then by rows: else both sides of the merge are sent, not its result.
            return shard_rows(shard_rows(merged, axis=-1)), seen
        embeds = self.language_model.embed_inputs(input_ids, inputs_embeds=inputs_embeds)
        if image_index is not None:
            # As in `merge_features`: what is not there shows.
            embeds = jnp.where(image_index[..., :1] >= 0, jnp.nan, embeds)
        return embeds, None

    def decode(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        pixel_values: Array | None = None,
        *,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int | Array = 0,
        **images: Any,
    ) -> tuple[DecoderOutput, Array | None]:
        """Everything but the logits, and the projected features; arguments as in `__call__`."""
        images |= {"pixel_values": pixel_values, "deterministic": deterministic}
        embeds, seen = self._embeds_and_seen(input_ids, inputs_embeds, **images)
        out = self.language_model.decode(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=embeds,
            segment_ids=segment_ids,
            cache=cache,
            deterministic=deterministic,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            logits_to_keep=logits_to_keep,
        )
        return out, seen

    def _table(self, seen: Array | None, videos: Array | None) -> Array:
        """Rows that tokens are made of: features of images, of videos, and the end of a row."""
        rows = [x.reshape(-1, x.shape[-1]) for x in (seen, videos) if x is not None]
        if self.config.tiled:
            rows.append(self.image_newline.astype(rows[0].dtype)[None])
        return jnp.concatenate(rows)

    def hidden(self, *arguments: Any, **options: Any) -> tuple[Array, KVCache | None]:
        """What the logits are made of, [B, T', D], and the cache; arguments as in `__call__`."""
        out, _ = self.decode(*arguments, **options)
        return out.last_hidden_state, out.cache

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        pixel_values: Array | None = None,
        image_index: Array | None = None,
        image_weights: Array | None = None,
        image_features: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        image_sizes: Any = None,
        batch_num_images: Any = None,
        pixel_values_videos: Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int | Array = 0,
    ) -> LlavaOutput:
        """Predict the token after each one.

        Args:
            input_ids: int [B, T], with an image's id once per row of features; or give inputs_embeds.
            attention_mask, position_ids, inputs_embeds, segment_ids, cache, deterministic, logits_to_keep,
                output_hidden_states, output_attentions: as for `CausalLM`.
            pixel_values: float [I, H, W, C], or tiles [I, N, H, W, C], of all images of the batch in order;
                tiles that an image does not have are never read.
            image_index: int32 [B, T, K]: the rows of the table that make each token; -1 in [..., 0] for a
                token of text, elsewhere for nothing.
            image_weights: float32 [B, T, K]; None means 1.
            image_features: [..., Dv], `vision_features` of the images, in place of pixel_values.
            image_sizes, batch_num_images: int [I, 2], (height, width) of each image, and how many images each
                row has: where there is no image_index, images are laid out by them, outside of `jax.jit`.
            pixel_values_videos: float [videos, frames, H, W, C].

        Raises:
            ConfigError, DataError: inputs that do not fit each other, the model, or the cache.
        """
        out, seen = self.decode(
            input_ids,
            attention_mask,
            pixel_values,
            image_index=image_index,
            image_weights=image_weights,
            image_features=image_features,
            image_sizes=image_sizes,
            batch_num_images=batch_num_images,
            pixel_values_videos=pixel_values_videos,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            cache=cache,
            deterministic=deterministic,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            logits_to_keep=logits_to_keep,
        )
        return LlavaOutput(
            logits=self.logits(out.last_hidden_state),
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            cache=out.cache,
            image_features=seen,
        )


def merge_features(embeds: Array, table: Array, index: Array, weights: Array | None = None) -> Array:
    """Embeddings with tokens of images replaced by sums of rows.

    Args:
        embeds: [B, T, D].
        table: [R, D].
        index: int [B, T, K], rows of the table; -1 in [..., 0] keeps the embedding, elsewhere adds nothing.
        weights: [B, T, K], or None for 1.

    Returns:
        [B, T, D] in the embeddings' dtype.

    >>> embeds, table = jnp.zeros((1, 2, 3)), jnp.ones((4, 3))
    >>> merge_features(embeds, table, jnp.array([[[2], [-1]]]))[0, :, 0].tolist()
    [1.0, 0.0]
    """
    if index.shape[:2] != embeds.shape[:2] or (weights is not None and weights.shape != index.shape):
        shapes = (index.shape, None if weights is None else weights.shape)
        raise DataError(f"image_index, image_weights: shapes {shapes} for tokens {embeds.shape[:2]}")
    table = jnp.asarray(table)
    merged = jnp.zeros(embeds.shape, jnp.promote_types(table.dtype, jnp.float32))
    for k in range(index.shape[-1]):
        share = (index[..., k] >= 0).astype(merged.dtype)
        if weights is not None:
            share = share * weights[..., k].astype(merged.dtype)
        # A row outside of the table would be another image's: NaN shows it.
        rows = table.at[jnp.maximum(index[..., k], 0)].get(mode="fill", fill_value=jnp.nan)
        merged = merged + share[..., None] * rows.astype(merged.dtype)
    return jnp.where(index[..., :1] >= 0, merged.astype(embeds.dtype), embeds)


__all__ = ["Llava", "LlavaOutput", "merge_features"]
