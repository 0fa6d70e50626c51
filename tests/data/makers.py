"""Small files for data tests: images of every kind, tables, tars."""

import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image


def picture(number, size=(10, 8)):
    """An image whose colour tells its number."""
    return Image.new("RGB", size, (number * 7 % 256, number * 13 % 256, number * 29 % 256))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(number):
    return encoded(picture(number))


def bomb():
    """A PNG whose header claims 20000 x 20000 pixels."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return (
        b"\x89PNG\r\n\x1a\n" + data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


def noise_jpeg():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG", quality=95)


BROKEN_IMAGES = {
    "truncated": noise_jpeg()[:-900],
    "empty": b"",
    "not_an_image": b"<html>404 not found</html>",
    "too_large": bomb(),
    "corrupt": png(1).replace(b"IDAT", b"IDAX"),
}


def odd_images():
    """Images of unusual modes that are nevertheless good, as (name, bytes, size after decoding)."""
    rgb = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        ("cmyk.jpg", encoded(rgb.convert("CMYK"), "JPEG"), (6, 4)),
        ("palette.png", encoded(rgb.convert("P"), "PNG", transparency=3), (6, 4)),
        ("deep.png", encoded(Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000)), (6, 4)),
        ("gray_alpha.png", encoded(rgb.convert("LA")), (6, 4)),
        ("rotated.jpg", encoded(rgb, "JPEG", exif=exif), (4, 6)),
    ]


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar of (name, bytes) pairs, or of TarInfo objects without data."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder, shards=3, samples=5, start=0):
    """Good shards 00000.tar ... with KEY.png and KEY.txt; keys count through the shards."""
    folder.mkdir(exist_ok=True)
    number = start
    for shard in range(shards):
        members = []
        for _ in range(samples):
            key = f"{number:09d}"
            members += [(f"{key}.png", png(number)), (f"{key}.txt", f"picture {number}".encode())]
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def write_table(folder, rows, name="captions.tsv", header=("filepath", "title"), separator="\t"):
    folder.mkdir(exist_ok=True)
    lines = [separator.join(row) for row in [header, *rows]]
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)
