"""Where the features of images and videos stand in texts: index arrays, made on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import ConfigError, DataError
from mmjax.vision.anyres import NEWLINE, NOTHING, Layout, anyres_layout, plain_layout, pooled_layout

if TYPE_CHECKING:
    from mmjax.models.llava.config import LlavaConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """How many tokens images have, and which features make them: all that does not depend on weights.

    Attributes:
        kind: "llava", "llava_next" or "llava_onevision".
        tile: (height, width) of a tile in pixels.
        patches: rows and columns of its features.
        rows: P, how many features a tile has.
        pinpoints: (height, width) of the resolutions that images are fitted into.
        most_tiles: more features than so many tiles have are scaled down; None: never.

    >>> tokens = ImageTokens(kind="llava", tile=(28, 28), patches=(2, 2), rows=4)
    >>> len(tokens.layout((90, 50)))
    4
    """

    kind: str
    tile: tuple[int, int]
    patches: tuple[int, int]
    rows: int
    pinpoints: tuple[tuple[int, int], ...] = ()
    most_tiles: int | None = None

    @classmethod
    def of(cls, config: LlavaConfig) -> ImageTokens:
        """Those of a model."""
        return cls(
            kind=config.model_type,
            tile=config.tile,
            patches=config.patches,
            rows=config.tile_rows,
            pinpoints=config.image_grid_pinpoints if config.tiled else (),
            most_tiles=config.most_tiles,
        )

    @property
    def tiled(self) -> bool:
        """Whether images are cut into tiles."""
        return self.kind != "llava"

    @property
    def width(self) -> int:
        """K."""
        return 4 if self.kind == "llava_onevision" else 1

    def is_cut(self, companions: int) -> bool:
        """Whether an image is cut into tiles that is one of so many of its text."""
        return self.tiled and (companions == 1 or self.kind == "llava_next")

    def layout(self, size: Sequence[int], companions: int = 1) -> Layout:
        """The tokens of one image.

        Args:
            size: (height, width) in pixels.
            companions: how many images its text has, itself included.
        """
        if self.is_cut(companions):
            height, width = (int(edge) for edge in size)
            return anyres_layout(
                (height, width),
                self.pinpoints,
                self.tile,
                self.patches,
                most_tiles=self.most_tiles,
                width=self.width,
            )
        return plain_layout(self.rows, newline=self.tiled, width=self.width)

    def video_layout(self, frames: int) -> Layout:
        """The tokens of a video of so many frames."""
        if self.kind != "llava_onevision":
            raise DataError(f"videos: a {self.kind} model takes images only")
        return pooled_layout(frames, self.patches)


def place(layout: Layout, first: int, newline: int) -> np.ndarray:
    """A layout's rows as rows of a table: int32 [L, K].

    Args:
        first: the table's row that the image's features begin at.
        newline: the row that ends rows.

    >>> place(plain_layout(2, newline=True), 10, 99)[:, 0].tolist()
    [10, 11, 99]
    """
    index = np.where(layout.index >= 0, layout.index + first, NOTHING)
    return np.where(layout.index == NEWLINE, newline, index).astype(np.int32)


def fill(
    ids: np.ndarray,
    token_id: int | None,
    rows: np.ndarray,
    weights: np.ndarray,
    index: Any,
    shares: Any,
    what: str,
) -> None:
    """Write the rows of all images of a text (or a batch) to where their ids stand, in order.

    Args:
        ids: int [...].
        token_id: the id that stands for a row.
        rows, weights: [L, K].
        index, shares: [..., K], written to.
        what: "image" or "video", for messages.

    Raises:
        DataError: there are not as many ids as rows.
    """
    places = ids == token_id
    count = int(places.sum())
    if count != len(rows):
        raise DataError(
            f"input_ids: {count} {what} tokens, but the {what}s have {len(rows)} features; a text needs one "
            f"{what} token per feature, in the order of the {what}s (was the text cut off?)"
        )
    index[places], shares[places] = rows, weights


def index_of_batch(
    config: LlavaConfig,
    input_ids: Any,
    seen: Array | None,
    videos: Array | None,
    image_sizes: Any = None,
    batch_num_images: Any = None,
) -> tuple[Any, Any]:
    """image_index and image_weights of a batch that comes without them.

    Images that are one tile need no sizes, and are counted inside of the program; others are laid out on the
    host, for which ids and sizes have to be known.

    Args:
        config: of the model.
        input_ids: int [B, T].
        seen, videos: projected features of the images, [I, P, D] or [I, N, P, D], and videos [V, F, P, D].
        image_sizes: int [I, 2]; batch_num_images: int, how many images each row with images has.
    """
    if input_ids is None:
        raise ConfigError(
            "image_index: with inputs_embeds there are no ids that say where images stand; give it"
        )
    if not config.tiled and videos is None:
        is_image = jnp.asarray(input_ids) == config.image_token_id
        total = int(np.prod(seen.shape[:-1]))  # type: ignore[union-attr]
        if not isinstance(is_image, jax.core.Tracer) and int(is_image.sum()) != total:
            raise DataError(
                f"input_ids: {int(is_image.sum())} image tokens, but the images have {total} features"
            )
        counted = jnp.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
        return jnp.where(is_image, counted, NOTHING)[..., None].astype(jnp.int32), None
    traced = any(isinstance(x, jax.core.Tracer) for x in (input_ids, image_sizes, batch_num_images))
    if traced or (seen is not None and image_sizes is None):
        raise ConfigError(
            "image_index: images of several sizes are laid out on the host; give the processor's image_index "
            "(and image_weights), or image_sizes outside of jax.jit"
        )
    images, films = (None if x is None else x.shape[:3] for x in (seen, videos))
    return layout_arrays(config, np.asarray(input_ids), images, films, image_sizes, batch_num_images)


def layout_arrays(
    config: LlavaConfig,
    ids: np.ndarray,
    images: tuple[int, ...] | None,
    videos: tuple[int, ...] | None,
    image_sizes: Any = None,
    batch_num_images: Any = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """image_index int32 [B, T, K] and image_weights (None where K is 1), from shapes and sizes.

    Args:
        config: of the model.
        ids: int [B, T].
        images: I, N and P of the images' features (I and P where images are one tile); None: no images.
        videos: V, F and P.
        image_sizes, batch_num_images: as in `index_of_batch`.
    """
    tokens = ImageTokens.of(config)
    index = np.full((*ids.shape, tokens.width), NOTHING, np.int32)
    weights = np.zeros(index.shape, np.float32)
    stride = 0 if images is None else int(np.prod(images[1:]))
    total = 0 if images is None else images[0] * stride
    newline = total + (0 if videos is None else int(np.prod(videos)))
    if images is not None:
        counts = [1] * images[0] if batch_num_images is None else np.asarray(batch_num_images).tolist()
        companions = [count for count in counts for _ in range(count)]
        sizes = [(0, 0)] * images[0] if image_sizes is None else np.asarray(image_sizes).tolist()
        if len(companions) != images[0] or len(sizes) != images[0]:
            raise DataError(
                f"image_sizes, batch_num_images: for {len(sizes)} and {len(companions)} images, but there "
                f"are {images[0]}"
            )
        layouts = [tokens.layout(size, count) for size, count in zip(sizes, companions, strict=True)]
        most = max(layout.tiles for layout in layouts)
        if tokens.tiled and most > images[1]:
            raise DataError(f"pixel_values: {images[1]} tiles an image, but one of these sizes has {most}")
        rows = [place(layout, number * stride, newline) for number, layout in enumerate(layouts)]
        shares = [layout.weights for layout in layouts]
        fill(
            ids, config.image_token_id, np.concatenate(rows), np.concatenate(shares), index, weights, "image"
        )
    if videos is not None:
        layout = tokens.video_layout(videos[1])
        each = videos[1] * videos[2]
        rows = [place(layout, total + number * each, newline) for number in range(videos[0])]
        shares = [layout.weights] * videos[0]
        fill(
            ids, config.video_token_id, np.concatenate(rows), np.concatenate(shares), index, weights, "video"
        )
    return index, weights if tokens.width > 1 else None


__all__ = ["ImageTokens", "fill", "index_of_batch", "layout_arrays", "place"]
