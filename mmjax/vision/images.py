"""Open one image from a path, bytes, file, array or Pillow image, safely, as 8-bit RGB."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmjax.errors import DataError

Bytes: TypeAlias = bytes | bytearray | memoryview
ImageSource: TypeAlias = Image.Image | np.ndarray | str | os.PathLike | Bytes | IO[bytes]

#: Most pixels an image may have by default, as many as Pillow opens without complaint.
MAX_PIXELS = 89_478_485

#: Values of ``ImageError.cause``.
CAUSES = ("unreadable", "empty", "not_an_image", "truncated", "corrupt", "too_large", "bad_array")

# Formats of photographs and scans. The others that Pillow knows are left out on purpose: EPS starts
# Ghostscript, ICO hides an image of another size than its header says, TGA claims arbitrary bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000")
_DEEP_GRAY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_SIGNS_OF_TRUNCATION = ("truncat", "not enough", "not large enough", "only got", "unexpected end", "eof")


class ImageError(DataError):
    """An image that cannot be used; ``cause`` is one of ``CAUSES``, for counting."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.cause)


def open_image(source: ImageSource, *, exif: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image and convert it to 8-bit RGB.

    Transparency (an alpha channel, a transparent palette entry or colour) is composited onto white;
    CMYK, palettes, grayscale and 1-bit images become RGB; 16-bit grayscale is scaled to 8 bits, where
    Pillow alone would clip it to white. Of several frames the first is taken.

    Args:
        source: A Pillow image, a path, the bytes of an image file, a binary file object (read from
            where it stands), or an array as `array_to_image` takes it. It is not changed.
        exif: Apply the EXIF orientation, so that the image stands upright.
        max_pixels: An image whose header names more pixels is refused before anything is decoded.

    Returns:
        A decoded RGB image; the source itself where that already is one.

    Raises:
        ImageError: The source cannot be used; the message names it and ``cause`` says why.

    Example:
        >>> open_image(np.full((2, 3), 7, np.uint8)).size
        (3, 2)
    """
    if isinstance(source, np.ndarray):
        return array_to_image(source, max_pixels=max_pixels)
    name = _name_of(source)
    if isinstance(source, Image.Image):
        return _finish(source, name, None, exif, max_pixels)
    try:
        if isinstance(source, str | os.PathLike):
            with open(source, "rb") as file:
                return _finish(_read_header(file, name), name, file, exif, max_pixels)
        data = source if isinstance(source, bytes | bytearray | memoryview) else _read_all(source)
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error})", "unreadable") from error
    stream = io.BytesIO(data)
    return _finish(_read_header(stream, name), name, stream, exif, max_pixels)


def image_size(
    path: str | os.PathLike, *, exif: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The size that `open_image` would give an image file, from its header alone where that says it.

    Args:
        path: Of the file.
        exif, max_pixels: As in `open_image`.

    Returns:
        (height, width) in pixels.

    Raises:
        ImageError: As `open_image`; damage beyond the header is not seen.
    """
    name = _name_of(path)
    try:
        with open(path, "rb") as file:
            image = _read_header(file, name)
            _check_size(image.size, name, max_pixels)
            width, height = image.size
            return (width, height) if exif and _lies_down(image) else (height, width)
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error})", "unreadable") from error


def array_to_image(array: np.ndarray, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Turn an array into an RGB image, reading it as transformers' Pillow processors do.

    Args:
        array: [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels. Where both ends could be the
            channels, the first axis is taken. Whole numbers (floats too) lie in 0..255, others in 0..1.
        max_pixels: A larger array is refused.

    Returns:
        The image; a fourth channel is opacity, blended onto white.

    Raises:
        ImageError: The shape or the values fit none of these forms.

    Example:
        >>> array_to_image(np.zeros((3, 4, 5), np.float32)).size
        (5, 4)
    """
    pixels = channels_last(array)
    _check_size((pixels.shape[1], pixels.shape[0]), "array", max_pixels)
    return Image.fromarray(np.ascontiguousarray(to_uint8(drop_alpha(pixels))[0]))


def channels_last(array: np.ndarray) -> np.ndarray:
    """View an image array as [H, W, C]; `array_to_image` says which shapes there are.

    Example:
        >>> channels_last(np.zeros((3, 4, 5))).shape
        (4, 5, 3)
    """
    if array.ndim == 2:
        view = array[..., None]
    elif array.ndim == 3 and array.shape[0] in (1, 3, 4):
        view = np.moveaxis(array, 0, -1)
    elif array.ndim == 3 and array.shape[2] in (1, 3, 4):
        view = array
    else:
        forms = "[H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels"
        raise ImageError(f"array of shape {array.shape} is not an image: give {forms}", "bad_array")
    if view.size == 0:
        raise ImageError(f"array of shape {array.shape} has no pixels", "empty")
    return view


def to_uint8(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Convert pixel values to bytes; say whether they were fractions (times 255, rounded down).

    Example:
        >>> to_uint8(np.array([0.0, 0.5, 1.0]))
        (array([  0, 127, 255], dtype=uint8), True)
    """
    if pixels.dtype == np.uint8:
        return pixels, False
    if pixels.dtype.kind not in "buif":
        raise ImageError(f"array of {pixels.dtype} is not an image: give uint8 or float values", "bad_array")
    floating = pixels.dtype.kind == "f"
    if floating and not np.isfinite(pixels).all():
        raise ImageError("array has NaN or infinite values: replace them first", "bad_array")
    low, high = pixels.min(), pixels.max()
    countable = not floating or max(abs(float(low)), abs(float(high))) < 2**53
    whole = not floating or (countable and np.allclose(pixels, pixels.astype(np.int64)))
    if low < 0 or high > (255 if whole else 1):
        ranges = "whole numbers into 0..255 or fractions into 0..1"
        raise ImageError(f"array values lie in [{low}, {high}]: bring {ranges}", "bad_array")
    if whole:
        return pixels.astype(np.uint8), False
    return (pixels.astype(np.float64) * 255).astype(np.float32).astype(np.uint8), True


def drop_alpha(pixels: np.ndarray) -> np.ndarray:
    """Bring [H, W, 1 | 3 | 4] pixels to three channels: gray is repeated, opacity blended onto white.

    Example:
        >>> drop_alpha(np.array([[[10, 20, 30, 0]]], np.uint8)).tolist()
        [[[255, 255, 255]]]
    """
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] == 3:
        return pixels
    floating = pixels.dtype.kind == "f"
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > (1 if floating else 255):
        ranges = "floats into 0..1, integers into 0..255"
        raise ImageError(f"array with opacity has values in [{low}, {high}]: bring {ranges}", "bad_array")
    # The order of operations is the reference's, so that the last bit agrees.
    white = 1.0 if floating else 255
    alpha = pixels[..., 3:4] / white
    blend = alpha * pixels[..., :3] + (1 - alpha) * white
    return blend.astype(pixels.dtype) if floating else np.round(blend).astype(pixels.dtype)


def _name_of(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {len(source)} bytes"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return name if isinstance(name, str) and name else "image"


def _read_all(source: Any) -> bytes:
    if not hasattr(source, "read"):
        kinds = "a path, bytes, a binary file, a Pillow image or an array"
        raise ImageError(f"cannot open {type(source).__name__} as an image: pass {kinds}", "unreadable")
    data = source.read()
    if not isinstance(data, bytes):
        raise ImageError(f"{_name_of(source)}: open the file in binary mode", "unreadable")
    return data


def _readers(prefix: bytes) -> Iterator[Any]:
    """Pillow's readers whose signature fits; its rarer plug-ins are imported only when needed."""
    tried = set()
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for name in _FORMATS:
            if name not in tried and name in Image.OPEN:
                tried.add(name)
                reader, accepts = Image.OPEN[name]
                if accepts is not None and accepts(prefix) is True:
                    yield reader


def _read_header(file: IO[bytes], name: str) -> Image.Image:
    """Identify a file by its signature and read its header, without Pillow's own check of the size.

    `PIL.Image.open` warns of a large image before its size can be asked: a line too many on a terminal,
    an exception where warnings are errors, and filters cannot be changed safely beside other threads.
    """
    prefix = file.read(16)
    if not prefix:
        raise ImageError(f"{name}: the file is empty", "empty")
    fault: Exception | None = None
    for reader in _readers(prefix):
        file.seek(0)
        try:
            return reader(file, "")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(f"{name}: refused, {error}", "too_large") from error
        except Exception as error:  # a damaged header can raise nearly anything
            fault = error
    if fault is None:
        raise ImageError(f"{name}: not an image in a known format ({', '.join(_FORMATS)})", "not_an_image")
    cause = _damage(fault, file)
    raise ImageError(f"{name}: {cause}, the header cannot be read ({_text(fault)})", cause) from fault


def _finish(
    image: Image.Image, name: str, file: IO[bytes] | None, exif: bool, max_pixels: int
) -> Image.Image:
    _check_size(image.size, name, max_pixels)
    try:
        image.load()
        return _to_rgb(_upright(image) if exif else image)
    except Exception as error:  # a damaged body can raise nearly anything
        cause = _damage(error, file)
        raise ImageError(f"{name}: {cause}, the image cannot be decoded ({_text(error)})", cause) from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width <= 0 or height <= 0:
        raise ImageError(f"{name}: the image has no pixels ({width} x {height})", "empty")
    if width * height > max_pixels:
        count = f"{width} x {height} = {width * height} pixels"
        raise ImageError(f"{name}: {count}, over the limit of {max_pixels} (max_pixels)", "too_large")


def _damage(error: Exception, file: IO[bytes] | None) -> str:
    """Tell an image that ends too early ("truncated") from one that is damaged otherwise ("corrupt")."""
    if isinstance(error, EOFError | IndexError) or any(s in str(error).lower() for s in _SIGNS_OF_TRUNCATION):
        return "truncated"
    return "truncated" if file is not None and _ends_early(file) else "corrupt"


def _ends_early(file: IO[bytes]) -> bool:
    """Whether the file lacks the end that its format prescribes; Pillow's messages do not tell."""
    file.seek(0)
    head = file.read(16)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    tail = file.read()
    if head.startswith(b"\xff\xd8") or head.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
        return b"\xff\xd9" not in tail
    if head.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    if head.startswith(b"GIF"):
        return not tail.rstrip(b"\0").endswith(b";")
    if head.startswith(b"RIFF") and size >= 8:
        return size < struct.unpack("<I", head[4:8])[0] + 8
    return head[4:8] == b"ftyp" and _boxes_end(file) > size


def _boxes_end(file: IO[bytes]) -> int:
    """Where the last top-level box of an ISO media file (AVIF) says it ends."""
    end = 0
    while True:
        file.seek(end)
        header = file.read(8)
        if len(header) < 8:
            return end + 8 if header else end
        length = struct.unpack(">I", header[:4])[0]
        if length < 8:  # to the end of the file, or a 64-bit length, which no image in sight has
            return end
        end += length


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _lies_down(image: Image.Image) -> bool:
    """Whether EXIF says that rows of the file are columns of the image."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # orientation is a hint: with damaged EXIF the pixels are still good
        return False


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # orientation is a hint: with damaged EXIF the pixels are still good
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_GRAY:
        return _from_deep_gray(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits (rounded, 65535 to 255); in mode I values up to 255 stay as they are."""
    values = np.asarray(image).astype(np.int64)
    if image.mode == "I" and values.min() >= 0 and values.max() <= 255:
        gray = values.astype(np.uint8)
    else:
        gray = ((np.clip(values, 0, 65535) * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


__all__ = ["CAUSES", "MAX_PIXELS", "ImageError", "ImageSource", "array_to_image", "image_size", "open_image"]
