"""Images to model inputs, bit for bit as transformers' Pillow image processors with the same Pillow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mmjax.errors import ConfigError, DataError
from mmjax.vision.images import MAX_PIXELS, ImageError, channels_last, drop_alpha, open_image, to_uint8
from mmjax.vision.sizes import Size, size_of

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_PLAIN = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": None,
    "crop_size": None,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}

#: What a preprocessor_config.json of each type leaves unsaid, where that differs from CLIP's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {},
    "ViTImageProcessor": {
        **_PLAIN,
        "default_to_square": True,
        "resample": Image.Resampling.BILINEAR,
        "do_convert_rgb": None,
    },
    "SiglipImageProcessor": _PLAIN,
}

#: Attributes of a preprocessor_config.json that change nothing here, and why.
IGNORED = {
    "_valid_processor_keys": "a list of argument names, kept by older versions",
    "aspect_ratio_setting": "image_grid_pinpoints say how images are cut",
    "auto_map": "points to code in the folder, which is never run",
    "data_format": "pixels are always channels last here",
    "device": "images are processed on the host",
    "disable_grouping": "changes the speed of another implementation, not values",
    "feature_extractor_type": "the old name of image_processor_type, read as that",
    "image_seq_length": "belongs to processors that expand image tokens, not to pixels",
    "processor_class": "names the class that joins images and text",
    "return_tensors": "arrays are always numpy's",
}

# Attributes of the reference that would change values: fine while they are off.
_UNSUPPORTED = ("do_pad", "input_data_format", "pad_size")

_RESIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Resize, crop, rescale and normalise images; the fields are those of preprocessor_config.json.

    The defaults are CLIP's; `from_dict` fills in those of the type that a folder names.

    Args:
        image_processor_type: transformers' class name, one of ``DEFAULTS``.
        do_convert_rgb: Convert to RGB first, transparency onto white.
        do_resize, size, resample: Resize with a filter of Pillow's (0 nearest, 1 Lanczos, 2 bilinear,
            3 bicubic, 4 box, 5 Hamming). A plain number is the shortest edge, or that of a square with
            default_to_square.
        do_center_crop, crop_size: Cut the centre out, with zeros around what is smaller.
        do_rescale, rescale_factor: Multiply.
        do_normalize, image_mean, image_std: Subtract and divide, per channel or one number for all.

    Example:
        >>> processor = ImageProcessor(size=8, crop_size=6)
        >>> processor(np.zeros((10, 20, 3), np.uint8))["pixel_values"].shape
        (1, 6, 6, 3)
    """

    #: The types that the class is for, and what their files leave unsaid.
    types: ClassVar[Mapping[str, Mapping[str, Any]]] = DEFAULTS

    image_processor_type: str = "CLIPImageProcessor"
    do_convert_rgb: bool | None = True
    do_resize: bool | None = True
    size: Size | Mapping[str, int] | Sequence[int] | int | None = Size(shortest_edge=224)
    default_to_square: bool | None = False
    resample: int | None = int(Image.Resampling.BICUBIC)
    do_center_crop: bool | None = True
    crop_size: Size | Mapping[str, int] | Sequence[int] | int | None = Size(height=224, width=224)
    do_rescale: bool | None = True
    rescale_factor: float | None = 1 / 255
    do_normalize: bool | None = True
    image_mean: Sequence[float] | float | None = _CLIP_MEAN
    image_std: Sequence[float] | float | None = _CLIP_STD

    def __post_init__(self) -> None:
        self._known_type(self.image_processor_type)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith(("do_", "default")) and not isinstance(value, bool | None):
                raise ConfigError(f"{field.name}: expected true or false, got {value!r}")
        size = size_of("size", self.size, bool(self.default_to_square))
        crop_size = size_of("crop_size", self.crop_size, True)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "crop_size", crop_size)
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, _channel_values(name, getattr(self, name)))
        if self.do_resize:
            keys = set(size.to_dict()) if size else set()
            if keys not in _RESIZE_KEYS:
                forms = " or ".join("+".join(sorted(form)) for form in _RESIZE_KEYS)
                raise ConfigError(f"size: do_resize needs {forms}, got {sorted(keys) or None}")
            if isinstance(self.resample, bool) or self.resample not in range(6):
                raise ConfigError(f"resample: expected a filter of Pillow's, 0 to 5, got {self.resample!r}")
        if self.do_center_crop and not (crop_size and set(crop_size.to_dict()) == {"height", "width"}):
            raise ConfigError(f"crop_size: do_center_crop needs height and width, got {self.crop_size}")
        if self.do_rescale and not _is_number(self.rescale_factor):
            raise ConfigError(f"rescale_factor: do_rescale needs a number, got {self.rescale_factor!r}")
        if self.do_normalize and (self.image_mean is None or self.image_std is None):
            raise ConfigError("image_mean and image_std: do_normalize needs both")
        if self.do_normalize and not np.all(self.image_std):
            raise ConfigError(f"image_std: a channel cannot be divided by 0, got {self.image_std}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, default_type: str | None = None) -> ImageProcessor:
        """Read the contents of a preprocessor_config.json, old forms included.

        Args:
            config: The parsed JSON.
            default_type: The type where the file names none (old ViT folders).

        Returns:
            The processor; what the file does not say is its type's default.

        Raises:
            ConfigError: An attribute is unknown, unsupported or out of range; the message names it.

        Example:
            >>> old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336}
            >>> ImageProcessor.from_dict(old).size.shortest_edge
            336
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"image processor settings: expected an object, got {type(config).__name__}")
        kind = type_in(config) or default_type
        if kind is None:
            raise ConfigError(f"image_processor_type is missing: add one of {', '.join(cls.types)}")
        cls._known_type(kind)
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in _UNSUPPORTED:
            if config.get(name) and name not in fields:
                raise ConfigError(f"{name} = {config[name]!r} is not supported: remove it from the settings")
        unknown = sorted(set(config) - fields - set(IGNORED) - set(_UNSUPPORTED))
        if unknown:
            raise ConfigError(f"image processor settings: unknown {', '.join(unknown)} (type {kind})")
        values = {name: value for name, value in config.items() if name in fields}
        return cls(**{**cls.types[kind], **values, "image_processor_type": kind})

    def to_dict(self) -> dict[str, Any]:
        """Contents of a preprocessor_config.json that transformers' AutoImageProcessor opens.

        Example:
            >>> ImageProcessor.from_dict(ImageProcessor().to_dict()) == ImageProcessor()
            True
        """
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Size):
                value = value.to_dict()
            elif isinstance(value, tuple):
                value = list(value)
            # What is missing means the type's default: null is written where that is something else.
            if value is not None or self.types[self.image_processor_type].get(field.name, field.default):
                result[field.name] = value
        return result

    def __call__(self, images: Any) -> dict[str, np.ndarray]:
        """Process one image or several.

        Args:
            images: A Pillow image, path, bytes, binary file or array ([H, W, C] or [C, H, W], see
                `array_to_image`), a list of such, or an array [B, H, W, C] or [B, C, H, W]. Files are
                turned upright by their EXIF orientation, Pillow images and arrays taken as they are.

        Returns:
            ``{"pixel_values": float32 [B, H, W, C]}``.

        Raises:
            DataError: An image cannot be read, or the images come out in different sizes.

        Deviations:
            Transparency in a file goes onto white as in a Pillow image, where the reference drops it;
            16-bit grayscale is scaled to 8 bits, where the reference clips it. Without rescaling and
            normalising the reference keeps uint8.
        """
        batch: np.ndarray | None = None
        sources = _flatten(images)
        for index, source in enumerate(sources):
            pixels = self._pixels(self._prepare(source))
            if batch is None:
                batch = np.empty((len(sources), *pixels.shape), np.float32)
            if pixels.shape != batch.shape[1:]:
                sizes = f"image 0 becomes {_shape(batch[0])}, image {index} becomes {_shape(pixels)}"
                raise DataError(
                    f"{sizes}: a batch needs one, so set do_center_crop or size's height and width"
                )
            self._scale_into(batch[index], pixels)
        if batch is None:
            raise DataError("no images given: pass at least one")
        return {"pixel_values": batch}

    @classmethod
    def _known_type(cls, name: Any) -> None:
        if name not in cls.types:
            known = ", ".join(cls.types)
            raise ConfigError(f"image_processor_type {name!r} is not known: use one of {known}")

    def _pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """[H, W, C] of one image, still unscaled."""
        return self._crop(self._resize(image))

    def _prepare(self, source: Any) -> Image.Image | np.ndarray:
        """A decoded image, or an array [H, W, C] where Pillow has no such image or was not given one."""
        if isinstance(source, np.ndarray):
            pixels = channels_last(source)
            return drop_alpha(pixels) if self.do_convert_rgb else pixels
        if not isinstance(source, Image.Image):
            return open_image(source, exif=True)
        if self.do_convert_rgb:
            return open_image(source)
        return source if source.mode in ("L", "RGB", "RGBA") else to_array(source)

    def _resize(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """[H, W, C], resized by Pillow through uint8; fractions come back as fractions (float32)."""
        if not self.do_resize or not isinstance(self.size, Size):
            return to_array(image)
        return self._resize_to(image, *self.size.resolve(*size_in(image)))

    def _resize_to(self, image: Image.Image | np.ndarray, new_height: int, new_width: int) -> np.ndarray:
        """As `_resize`, to a size of the caller's."""
        height, width = size_in(image)
        if not 0 < new_height * new_width <= MAX_PIXELS:
            sizes = f"an image of {width} x {height} would be resized to {new_width} x {new_height}"
            raise ImageError(f"{sizes}: too elongated", "too_large" if new_height * new_width else "empty")
        fractions = False
        if not isinstance(image, Image.Image):
            pixels, fractions = to_uint8(image)
            image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
        resized = to_array(image.resize((new_width, new_height), resample=self.resample))
        return (resized.astype(np.float64) * (1 / 255)).astype(np.float32) if fractions else resized

    def _crop(self, pixels: np.ndarray) -> np.ndarray:
        size = self.crop_size
        if not self.do_center_crop or not isinstance(size, Size) or not size.height or not size.width:
            return pixels
        rows, row_place = _centre(pixels.shape[0], size.height)
        columns, column_place = _centre(pixels.shape[1], size.width)
        part = pixels[rows, columns]
        if part.shape[:2] == (size.height, size.width):
            return part
        padded = np.zeros((size.height, size.width, pixels.shape[2]), pixels.dtype)
        padded[row_place, column_place] = part
        return padded

    def _scale_into(self, out: np.ndarray, pixels: np.ndarray) -> None:
        """Rescale in float64, normalise in float32, as the reference; flat rows make the loops long."""
        height, width, channels = pixels.shape
        rows = pixels.reshape(height, width * channels)
        flat = out.reshape(height, width * channels)
        if self.do_rescale and self.rescale_factor is not None:
            np.multiply(rows, self.rescale_factor, out=flat, dtype=np.float64, casting="unsafe")
            rows = flat
        if self.do_normalize:
            # The reference keeps the type of floats that were not rescaled.
            kind = rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float32)
            mean = np.tile(_per_channel("image_mean", self.image_mean, channels).astype(kind), width)
            std = np.tile(_per_channel("image_std", self.image_std, channels).astype(kind), width)
            work = flat if kind == np.float32 else np.empty_like(rows)
            np.subtract(rows, mean, out=work, dtype=kind)
            rows = np.divide(work, std, out=work)
        if rows is not flat:
            flat[...] = rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flatten(images: Any) -> list[Any]:
    """One image, a batch array, or (nested) lists of these as one list."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    return list(images) if isinstance(images, np.ndarray) and images.ndim == 4 else [images]


def type_in(config: Mapping[str, Any]) -> str | None:
    """The type that the contents of a preprocessor_config.json name, without an implementation's suffix.

    >>> type_in({"feature_extractor_type": "ViTFeatureExtractor"})
    'ViTImageProcessor'
    """
    kind = config.get("image_processor_type") or config.get("feature_extractor_type")
    if kind is None:
        return None
    return str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def size_in(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of an image or an array [H, W, C].

    >>> size_in(np.zeros((2, 3, 1)))
    (2, 3)
    """
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


def to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """[H, W, C].

    >>> to_array(Image.new("L", (3, 2))).shape
    (2, 3, 1)
    """
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _shape(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]} with {pixels.shape[2]} channels"


def _centre(have: int, want: int) -> tuple[slice, slice]:
    """Which part of an axis to take, and where it lies in the result."""
    if have >= want:
        start = (have - want) // 2
        return slice(start, start + want), slice(0, want)
    start = math.ceil((want - have) / 2)
    return slice(0, have), slice(start, start + have)


def _per_channel(name: str, values: Any, channels: int) -> np.ndarray:
    if isinstance(values, tuple) and len(values) != channels:
        mismatch = f"the image has {channels} channels and {name} {len(values)} values"
        raise DataError(f"{mismatch}: set do_convert_rgb, or convert the image first")
    return np.broadcast_to(np.asarray(values), (channels,))


def _channel_values(name: str, value: Any) -> tuple[float, ...] | float | None:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if value is not None and not (values and all(map(_is_number, values))):
        raise ConfigError(f"{name}: expected a number per channel, got {value!r}")
    return values if isinstance(value, list | tuple) else value


__all__ = ["DEFAULTS", "IGNORED", "ImageProcessor", "Size", "size_in", "to_array", "type_in"]
