"""open_image: every mode comes out as RGB, every fault as an ImageError with its cause."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmjax.errors import DataError
from mmjax.vision.images import CAUSES, MAX_PIXELS, ImageError, array_to_image, open_image

PIXELS = ((np.arange(9 * 14 * 3) * 37) % 256).astype(np.uint8).reshape(9, 14, 3)
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000"]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(source: object, **options: object) -> np.ndarray:
    image = open_image(source, **options)  # type: ignore[arg-type]
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(PIXELS))
    path = tmp_path / "image.png"
    path.write_bytes(data)
    sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data)]
    sources += [Image.fromarray(PIXELS), Image.open(path), PIXELS, PIXELS.transpose(2, 0, 1)]
    for source in sources:
        np.testing.assert_array_equal(rgb(source), PIXELS)
    with path.open("rb") as file:
        np.testing.assert_array_equal(rgb(file), PIXELS)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_open_as_pillow_opens_them(kind: str) -> None:
    data = encoded(Image.fromarray(PIXELS), kind)
    np.testing.assert_array_equal(rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_are_converted_as_pillow_does(mode: str) -> None:
    image = Image.fromarray(PIXELS)
    image = image.convert(mode) if mode != "LAB" else Image.frombytes("LAB", image.size, PIXELS.tobytes())
    before = image.tobytes()
    np.testing.assert_array_equal(rgb(image), np.asarray(image.convert("RGB")))
    assert image.tobytes() == before and image.mode == mode


def test_transparency_goes_onto_white() -> None:
    gray_alpha = np.array([[[10, 0], [10, 255]]], np.uint8)
    np.testing.assert_array_equal(rgb(Image.fromarray(gray_alpha)), [[[255] * 3, [10] * 3]])
    colour = np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)
    np.testing.assert_array_equal(rgb(Image.fromarray(colour)), [[[255] * 3, [10, 20, 30]]])
    columns = np.repeat(colour, 5, axis=0)
    np.testing.assert_array_equal(rgb(columns), np.repeat(rgb(Image.fromarray(colour)), 5, axis=0))


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"], ids=["one entry", "bytes"])
def test_palette_with_transparency_goes_onto_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putdata([0, 1])
    data = encoded(image, "PNG", transparency=transparency)
    np.testing.assert_array_equal(rgb(data), [[[200, 0, 0], [255, 255, 255]]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_and_not_clipped(kind: str) -> None:
    deep = np.array([[0, 256, 32768, 65535]], np.uint16)
    expected = np.repeat(np.round(deep / 257).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(deep), kind)), expected)
    np.testing.assert_array_equal(rgb(Image.fromarray(deep.astype(np.int32))), expected)
    big_endian = Image.frombytes("I;16B", (4, 1), deep.astype(">u2").tobytes())
    np.testing.assert_array_equal(rgb(big_endian), expected)


def test_deep_gray_with_a_transparent_value_goes_onto_white() -> None:
    image = Image.fromarray(np.array([[0, 9000]], np.uint16))
    image.info["transparency"] = 9000
    np.testing.assert_array_equal(rgb(image), [[[0] * 3, [255] * 3]])


def test_mode_i_that_fits_in_8_bits_stays() -> None:
    np.testing.assert_array_equal(rgb(Image.fromarray(np.array([[0, 200]], np.int32)))[..., 0], [[0, 200]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_only_when_asked(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), "PNG", exif=exif)
    np.testing.assert_array_equal(rgb(data), PIXELS)
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: np.rot90(PIXELS, 2).transpose(1, 0, 2),
        8: np.rot90(PIXELS, 1),
    }
    np.testing.assert_array_equal(rgb(data, exif=True), turned[orientation])


def test_damaged_exif_leaves_the_image_as_it_is() -> None:
    image = Image.fromarray(PIXELS)
    image.info["exif"] = b"Exif\x00\x00II*\x00\xff\xff"
    np.testing.assert_array_equal(rgb(image, exif=True), PIXELS)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]]), [[0, 127, 255]]),
        (np.array([[0.0, 128.0, 255.0]], np.float32), [[0, 128, 255]]),
        (np.array([[False, True]]), [[0, 1]]),
        (np.array([[0, 255]], np.int64), [[0, 255]]),
    ],
    ids=["fractions", "whole floats", "bool", "int"],
)
def test_arrays_of_other_types(array: np.ndarray, expected: list[list[int]]) -> None:
    keep = array.copy()
    np.testing.assert_array_equal(rgb(array)[..., 0], expected)
    np.testing.assert_array_equal(array, keep)


@pytest.mark.parametrize(
    ("array", "cause"),
    [
        (np.zeros((5, 4, 2), np.uint8), "bad_array"),
        (np.zeros((2, 3, 4, 3), np.uint8), "bad_array"),
        (np.zeros(5, np.uint8), "bad_array"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.full((4, 4), 256), "bad_array"),
        (np.full((4, 4), -1), "bad_array"),
        (np.full((4, 4), 1.5), "bad_array"),
        (np.full((4, 4), np.nan), "bad_array"),
        (np.full((4, 4), np.inf), "bad_array"),
        (np.full((4, 4), 1j), "bad_array"),
        (np.array([["a"]]), "bad_array"),
        (np.full((5, 5, 4), 7.0), "bad_array"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, cause: str) -> None:
    with pytest.raises(ImageError) as caught:
        array_to_image(array)
    assert caught.value.cause == cause


@pytest.mark.parametrize("size", [(13_001, 13_001), (9_459, 9_460), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert caught.value.cause == "too_large"
    for part in (str(path), f"{size[0]} x {size[1]}", str(MAX_PIXELS)):
        assert part in str(caught.value)
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_the_callers() -> None:
    image = Image.fromarray(PIXELS)
    for source in (encoded(image), image, PIXELS):
        assert rgb(source, max_pixels=PIXELS[..., 0].size).shape == PIXELS.shape
        with pytest.raises(ImageError, match="over the limit of 125"):
            open_image(source, max_pixels=PIXELS[..., 0].size - 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_say_so_wherever_they_end(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    data = encoded(Image.fromarray(np.tile(PIXELS, (4, 4, 1))), kind)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match="cut: truncated") as caught:
            open_image(path)
        assert caught.value.cause == "truncated"


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_raise_nothing_else(kind: str) -> None:
    data = encoded(Image.fromarray(PIXELS), kind)
    random = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 4):
            damaged[place] = random.integers(0, 256)
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except ImageError as error:
            assert error.cause in CAUSES and "\n" not in str(error)


def test_a_damaged_middle_is_corrupt() -> None:
    data = bytearray(encoded(Image.fromarray(PIXELS)))
    data[60] ^= 0xFF
    with pytest.raises(ImageError) as caught:
        open_image(bytes(data))
    assert caught.value.cause == "corrupt"


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty"),
        (b"hello, this is text and no image", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (bytes(64), "not_an_image"),
    ],
    ids=["empty", "text", "a program in PostScript", "zeros"],
)
def test_files_that_are_no_images(content: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="x.jpg") as caught:
        open_image(path)
    assert caught.value.cause == cause


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    for source in (tmp_path / "none.png", tmp_path, 3, None, io.StringIO("text")):
        with pytest.raises(ImageError) as caught:
            open_image(source)  # type: ignore[arg-type]
        assert caught.value.cause == "unreadable"


def test_the_error_is_a_data_error_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png: truncated", "truncated")))
    assert isinstance(error, DataError) and isinstance(error, ValueError)
    assert (str(error), error.cause) == ("a.png: truncated", "truncated")
