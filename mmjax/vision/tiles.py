"""Image processors of models that cut images into tiles, or pad them to squares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mmjax.errors import ConfigError, DataError
from mmjax.vision.anyres import best_resolution, fitted
from mmjax.vision.config import pair
from mmjax.vision.images import MAX_PIXELS, ImageError
from mmjax.vision.processing import DEFAULTS, ImageProcessor, size_in, to_array, type_in
from mmjax.vision.sizes import Size

_ONEVISION = [[h, w] for h in range(384, 2305, 384) for w in range(384, 2305, 384)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareImageProcessor(ImageProcessor):
    """Images padded to squares first: LLaVA's image_aspect_ratio "pad".

    Args:
        do_pad: Put the image on a square of its longer edge, coloured like the mean that is subtracted.

    Example:
        >>> processor = SquareImageProcessor(size=8, crop_size=8, do_pad=True)
        >>> processor(np.zeros((4, 8, 3), np.uint8))["pixel_values"].shape
        (1, 8, 8, 3)
    """

    types: ClassVar[Mapping[str, Mapping[str, Any]]] = {"LlavaImageProcessor": {"do_pad": False}}

    image_processor_type: str = "LlavaImageProcessor"
    do_pad: bool | None = False

    def _pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        return super()._pixels(pad_to_square(image, self.image_mean) if self.do_pad else image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileImageProcessor(ImageProcessor):
    """Images as a whole, and cut into the tiles of the resolution that suits them best (AnyRes).

    Args:
        image_grid_pinpoints: (height, width) of the resolutions that there are.
        do_pad: Give all images of a batch the same number of tiles, zeros where one has fewer. Always done.

    Example:
        >>> processor = TileImageProcessor(size=8, crop_size=8, image_grid_pinpoints=[[8, 16], [16, 8]])
        >>> batch = processor(np.zeros((9, 20, 3), np.uint8))
        >>> batch["pixel_values"].shape, batch["image_sizes"].tolist()
        ((1, 3, 8, 8, 3), [[9, 20]])
    """

    types: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "LlavaNextImageProcessor": {
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "do_pad": True,
        },
        "LlavaOnevisionImageProcessor": {
            "image_grid_pinpoints": _ONEVISION,
            "size": {"height": 384, "width": 384},
            "do_center_crop": None,
            "crop_size": None,
            "do_pad": True,
        },
    }

    image_processor_type: str = "LlavaNextImageProcessor"
    image_grid_pinpoints: Sequence[Sequence[int]] = ((336, 672),)
    do_pad: bool | None = True

    def __post_init__(self) -> None:
        super().__post_init__()
        points = self.image_grid_pinpoints
        if not isinstance(points, list | tuple) or not points:
            raise ConfigError(f"image_grid_pinpoints: expected a list of [height, width], got {points!r}")
        points = tuple(pair(point, "image_grid_pinpoints") for point in points)  # type: ignore[arg-type]
        object.__setattr__(self, "image_grid_pinpoints", points)
        height, width = self.tile
        for point in points:
            if point[0] % height or point[1] % width:
                raise ConfigError(f"image_grid_pinpoints: {point} is not a multiple of the tile {self.tile}")

    @property
    def tile(self) -> tuple[int, int]:
        """(height, width) of a tile in pixels."""
        size, crop = self.size, self.crop_size
        if isinstance(crop, Size) and crop.height:
            return crop.height, crop.height
        if not isinstance(size, Size) or not (size.height or size.shortest_edge):
            raise ConfigError("size: tiles need a height and width, or a shortest_edge")
        edge = size.height or size.shortest_edge
        return edge, edge  # type: ignore[return-value]

    @property
    def cuts_companions(self) -> bool:
        """Whether an image is cut also where its text has others (not so in OneVision)."""
        return self.image_processor_type != "LlavaOnevisionImageProcessor"

    def tiles(self, source: Any, companions: int = 1) -> tuple[np.ndarray, tuple[int, int]]:
        """One image's tiles, the whole image first.

        Args:
            source: As in a call.
            companions: How many images its text has, itself included.

        Returns:
            float32 [N, H, W, C], and the image's (height, width).
        """
        image = self._prepare(source)
        size = size_in(image)
        if companions == 1 or self.cuts_companions:
            pieces = self._cut(image)
        else:
            pieces = [pad_to_square(image, self.image_mean)]
        done = [self._crop(self._resize(piece)) for piece in pieces]
        out = np.empty((len(done), *done[0].shape), np.float32)
        for number, piece in enumerate(done):
            if piece.shape != done[0].shape:
                raise ConfigError(
                    f"size: tiles come out as {piece.shape} and {done[0].shape}; make it square"
                )
            self._scale_into(out[number], piece)
        return out, size

    def frame(self, source: Any) -> np.ndarray:
        """One frame of a video, whole: float32 [H, W, C]."""
        image = self._crop(self._resize_to(self._prepare(source), *self.tile))
        out = np.empty(image.shape, np.float32)
        self._scale_into(out, image)
        return out

    def _cut(self, image: Image.Image | np.ndarray) -> list[np.ndarray]:
        height, width = best_resolution(size_in(image), self.image_grid_pinpoints)  # type: ignore[arg-type]
        picture = self._resize_to(image, *fitted(size_in(image), (height, width)))
        top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
        padded = np.zeros((height, width, picture.shape[2]), picture.dtype)
        padded[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        rows, columns = self.tile
        size = self.size if isinstance(self.size, Size) else Size()
        edges = (size.height or size.shortest_edge, size.width or size.shortest_edge)
        return [
            self._resize_to(image, *edges),  # type: ignore[arg-type]
            *(
                padded[y : y + rows, x : x + columns]
                for y in range(0, height, rows)
                for x in range(0, width, columns)
            ),
        ]

    def _resize(self, image: Image.Image | np.ndarray) -> np.ndarray:
        # A tile has its size already; only bytes come back from Pillow unchanged.
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and isinstance(self.size, Size):
            target = self.size.resolve(*size_in(image)) if self.do_resize else size_in(image)
            if target == size_in(image):
                return image
        return super()._resize(image)

    def __call__(self, images: Any) -> dict[str, np.ndarray]:
        """Process one image, several, or several of each text.

        Args:
            images: As `ImageProcessor` takes them; a list of lists has the images of each text.

        Returns:
            ``pixel_values`` float32 [I, N, H, W, C], zeros where an image has fewer than N tiles;
            ``image_sizes`` int32 [I, 2], (height, width) of each image; where several images of a text make
            a difference, ``batch_num_images`` int32, how many each text with images has.
        """
        groups = image_groups(images)
        found = [self.tiles(image, len(group)) for group in groups for image in group]
        if not found:
            raise DataError("no images given: pass at least one")
        batch = {
            "pixel_values": stack_tiles([tiles for tiles, _ in found]),
            "image_sizes": np.asarray([size for _, size in found], np.int32),
        }
        if not self.cuts_companions:
            batch["batch_num_images"] = np.asarray([len(group) for group in groups if group], np.int32)
        return batch


def image_groups(images: Any) -> list[list[Any]]:
    """Images as a list for each text; images that are in one list have a text each.

    Example:
        >>> image_groups(["a.png", "b.png"]), image_groups([["a.png", "b.png"], []])
        ([['a.png'], ['b.png']], [['a.png', 'b.png'], []])
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return [[image] for image in images]
    if not isinstance(images, list | tuple):
        return [[images]]
    if any(isinstance(group, list | tuple) for group in images):
        return [list(group) if isinstance(group, list | tuple) else [group] for group in images]
    return [[image] for image in images]


def stack_tiles(images: Sequence[np.ndarray], tiles: int = 0) -> np.ndarray:
    """Tiles of several images [N, H, W, C] as one array [I, N, H, W, C], filled with zeros.

    Args:
        images: each with any number of tiles.
        tiles: N at least.

    Raises:
        DataError: tiles of different sizes.
    """
    most = max(tiles, *(len(image) for image in images))
    shapes = {image.shape[1:] for image in images}
    if len(shapes) > 1:
        raise DataError(f"images come out as tiles of {sorted(shapes)}; a batch needs one size")
    batch = np.zeros((len(images), most, *images[0].shape[1:]), np.float32)
    for number, image in enumerate(images):
        batch[number, : len(image)] = image
    return batch


def pad_to_square(image: Image.Image | np.ndarray, mean: Any) -> np.ndarray:
    """The image in the middle of a square of its longer edge.

    Args:
        image: Pillow's, or [H, W, C].
        mean: of each channel, in 0..1, which colours the rest; None: black.

    Raises:
        DataError: the square would take more than half a gigabyte.

    Example:
        >>> pad_to_square(np.ones((1, 3, 1), np.uint8), (0.5,))[:, 0, 0].tolist()
        [127, 1, 127]
    """
    pixels = to_array(image)
    height, width, channels = pixels.shape
    if height == width:
        return pixels
    edge = max(height, width)
    if edge * edge > 2 * MAX_PIXELS:
        words = f"an image of {width} x {height} would be padded to a square of {edge} x {edge}"
        raise ImageError(f"{words}: too elongated; cut it, or make it smaller", "too_large")
    values = [0.0] if mean is None else mean if isinstance(mean, tuple) else [mean]
    square = np.empty((edge, edge, channels), pixels.dtype)
    square[...] = np.asarray([int(value * 255) for value in values]).astype(pixels.dtype)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def read_image_processor(config: Mapping[str, Any], *, default_type: str | None = None) -> ImageProcessor:
    """The image processor that the contents of a preprocessor_config.json describe.

    Args:
        config: The parsed JSON.
        default_type: The type where the file names none.

    Raises:
        ConfigError: As `ImageProcessor.from_dict`.

    Example:
        >>> type(read_image_processor({"image_processor_type": "LlavaOnevisionImageProcessor"})).__name__
        'TileImageProcessor'
    """
    kind = (type_in(config) if isinstance(config, Mapping) else None) or default_type
    for cls in (SquareImageProcessor, TileImageProcessor):
        if kind in cls.types:
            return cls.from_dict(config, default_type=default_type)
    if kind is not None and kind not in DEFAULTS:
        known = ", ".join((*DEFAULTS, *SquareImageProcessor.types, *TileImageProcessor.types))
        raise ConfigError(f"image_processor_type {kind!r} is not known: use one of {known}")
    return ImageProcessor.from_dict(config, default_type=default_type)


__all__ = [
    "SquareImageProcessor",
    "TileImageProcessor",
    "image_groups",
    "pad_to_square",
    "read_image_processor",
    "stack_tiles",
]
