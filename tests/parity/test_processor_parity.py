"""Pixels, ids and folders beside transformers, run live on random inputs."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="live comparison needs the parity extra: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="live comparison needs the parity extra: pip install -e '.[parity]'"
)
sentencepiece = pytest.importorskip(
    "sentencepiece", reason="live comparison needs the parity extra: pip install -e '.[parity]'"
)

from mmjax.errors import MmjaxError  # noqa: E402
from mmjax.language.tokenizer import Tokenizer, train_clip_tokenizer  # noqa: E402
from mmjax.models.processor import Processor  # noqa: E402
from mmjax.vision.processing import DEFAULTS, ImageProcessor  # noqa: E402
from tests.golden.make_processor_golden import CORPUS  # noqa: E402

transformers.logging.set_verbosity_error()
# The reference remarks on arguments that it ignores and on end tokens that are there already.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PIECES = [
    *CORPUS,
    "",
    "  ",
    "\n\t x",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<|startoftext|> x <|ENDOFTEXT|>",
    "</s>",
    "a </s> b",
    "<unk>",
    " \u2581x \u2581",
    "q</s>",
    "!!!",
    "\u00c9 \u00e9 \u212b a\u00a0b \ufb01 \u0130 \x00a",
    "x" * 50,
    "\U0001f389\U0001f389 北京",
    "don't I'LL we've",
    "Hello, World!",
]


def reference(config: dict[str, Any]) -> Any:
    return getattr(transformers, config["image_processor_type"] + "Pil")(**config)


def random_image(chance: random.Random) -> Any:
    """Every mode and kind of array, from one pixel to several times the target."""
    edges = [(1, 1), (1, chance.randint(1, 40)), (chance.randint(1, 40), 1)]
    edges += [(chance.randint(1, 90), chance.randint(1, 90)), (chance.randint(1, 9), chance.randint(1, 9))]
    height, width = chance.choice(edges)
    numbers = np.random.default_rng(chance.getrandbits(32))
    pixels = numbers.integers(0, 256, (height, width, 4), dtype=np.uint8)
    colour = pixels[..., :3].copy()
    kind = chance.choice(["image", "alpha", "array"])
    if kind == "image":
        return Image.fromarray(colour).convert(chance.choice(["RGB", "L", "P", "1", "CMYK", "YCbCr"]))
    if kind == "alpha":
        return Image.fromarray(pixels[..., : chance.choice([2, 4])].copy())
    first = np.ascontiguousarray(colour.transpose(2, 0, 1))
    fractions = numbers.random((height, width, 3))
    arrays = [colour, first, pixels, pixels[..., :1], colour.astype(np.float32), fractions]
    arrays += [fractions.astype(np.float32), fractions.astype(np.float16)]
    return chance.choice(arrays)


def random_settings(chance: random.Random) -> dict[str, Any]:
    def edge() -> int:
        return chance.choice([1, 2, 7, 16, 31, 48])

    sizes: list[Any] = [
        {"height": edge(), "width": edge()},
        {"shortest_edge": edge()},
        edge(),
        [edge(), edge()],
    ]
    sizes += [
        {"shortest_edge": edge(), "longest_edge": 48 + edge()},
        {"max_height": edge(), "max_width": edge()},
    ]
    config: dict[str, Any] = {
        "image_processor_type": chance.choice(list(DEFAULTS)),
        "resample": chance.randint(0, 5),
        "size": chance.choice(sizes),
    }
    if chance.random() < 0.6:
        config["do_center_crop"] = chance.random() < 0.7
        config["crop_size"] = chance.choice([edge(), {"height": edge(), "width": edge()}])
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if chance.random() < 0.25:
            config[name] = chance.choice([True, False, None])
    if chance.random() < 0.2:
        config["rescale_factor"] = chance.choice([1 / 127.5, 0.01])
        config["image_mean"] = chance.choice([0.4, [0.1, 0.2, 0.3]])
    return config


@pytest.mark.parametrize("seed", range(6))
def test_pixels_are_equal_bit_for_bit(seed: int) -> None:
    chance = random.Random(seed)
    compared = 0
    for _ in range(250):
        config, image = random_settings(chance), random_image(chance)
        before = np.array(image)
        try:
            expected = reference(config)(image, return_tensors="np")["pixel_values"]
        except ValueError:
            with pytest.raises(MmjaxError):
                ImageProcessor.from_dict(config)(image)
            continue
        actual = ImageProcessor.from_dict(config)(image)["pixel_values"]
        np.testing.assert_array_equal(actual, expected.transpose(0, 2, 3, 1).astype(np.float32), str(config))
        np.testing.assert_array_equal(np.array(image), before)
        compared += 1
    assert compared > 100


@pytest.mark.parametrize("kind", list(DEFAULTS))
def test_photographs_are_equal_at_full_size(kind: str) -> None:
    numbers = np.random.default_rng(0)
    images = [
        Image.fromarray(numbers.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((480, 641), (333, 200))
    ]
    expected = reference({"image_processor_type": kind})(images, return_tensors="np")["pixel_values"]
    actual = ImageProcessor.from_dict({"image_processor_type": kind})(images)["pixel_values"]
    np.testing.assert_array_equal(actual, expected.transpose(0, 2, 3, 1))


def test_files_are_read_as_the_reference_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 8
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    for kind in DEFAULTS:
        config = {"image_processor_type": kind, "size": {"height": 20, "width": 24}}
        expected = reference(config)(str(path), return_tensors="np")["pixel_values"]
        actual = ImageProcessor.from_dict(config)(str(path))["pixel_values"]
        np.testing.assert_array_equal(actual, expected.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("seed", range(4))
def test_settings_are_equal_after_a_save(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    for number in range(10):
        config = random_settings(chance)
        try:
            ours = ImageProcessor.from_dict(config)
        except MmjaxError:
            continue
        folder = tmp_path / str(number)
        Processor(ours).save(folder)
        opened = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        expected = reference(config)
        assert type(opened) is type(expected)
        for name in ours.to_dict():
            assert getattr(opened, name, None) == getattr(expected, name, None), name
        expected.save_pretrained(folder)
        again = Processor.from_folder(folder)
        assert again is not None and again.image_processor == ours


def random_call(chance: random.Random) -> dict[str, Any]:
    call: dict[str, Any] = {"padding": chance.choice([False, True, "longest", "max_length"])}
    if chance.random() < 0.7:
        call["truncation"] = chance.choice([True, False])
    if chance.random() < 0.7 or call["padding"] == "max_length":
        call["max_length"] = chance.choice([2, 3, 5, 8, 16, 32])
    if chance.random() < 0.2:
        call["add_special_tokens"] = False
    if chance.random() < 0.3:
        call["pad_to_multiple_of"] = chance.choice([4, 8])
    if chance.random() < 0.3:
        call["padding_side"] = chance.choice(["left", "right"])
    return call


def assert_tokenizers_agree(ours: Tokenizer, other: Any, rounds: int = 60) -> None:
    chance = random.Random(0)
    compared = 0
    for _ in range(rounds):
        texts = [
            " ".join(chance.choices(PIECES, k=chance.randint(1, 4))) for _ in range(chance.randint(1, 4))
        ]
        call = random_call(chance)
        try:
            expected = {k: np.asarray(v) for k, v in other(texts, return_tensors="np", **call).items()}
            refused = any(array.dtype == object for array in expected.values())
        except ValueError:
            refused = True
        if refused:
            with pytest.raises(MmjaxError):
                ours(texts, **call)
            continue
        actual = ours(texts, **call)
        assert set(actual) == set(expected)
        for name in actual:
            np.testing.assert_array_equal(actual[name], expected[name], str((texts, call)))
        for row in actual["input_ids"]:
            for skip in (False, True):
                assert ours.decode(row, skip_special_tokens=skip) == other.decode(
                    row, skip_special_tokens=skip
                )
        compared += 1
    assert compared > rounds // 4
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{role}_token_id") == getattr(other, f"{role}_token_id")
    assert ours.vocab_size == len(other) and ours.padding_side == other.padding_side


def assert_folder_agrees(folder: Path, saved: Path) -> None:
    """A folder opens alike in both, and so does what each of them saves of it."""
    opened = Processor.from_folder(folder)
    assert opened is not None and opened.tokenizer is not None
    other = transformers.AutoTokenizer.from_pretrained(folder)
    assert_tokenizers_agree(opened.tokenizer, other)
    for name, save in (("ours", opened.tokenizer.save), ("theirs", other.save_pretrained)):
        save(saved / name)
        (saved / name / "config.json").write_bytes((folder / "config.json").read_bytes())
        assert_tokenizers_agree(
            opened.tokenizer, transformers.AutoTokenizer.from_pretrained(saved / name), 20
        )
        assert_tokenizers_agree(
            Tokenizer.from_folder(saved / name, tokenizer_class="CLIPTokenizer"), other, 20
        )


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


NORMALIZED = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
STRIPPED = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize("old", [False, True], ids=["tokenizer.json", "vocab.json and merges.txt"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pad_token": "!", "model_max_length": 20},
        {"padding_side": "left", "truncation_side": "left", "model_max_length": 12},
        {"additional_special_tokens": ["<image>"], "image_token": "cat"},
        {"model_input_names": ["input_ids"], "extra_special_tokens": ["photo"]},
        {"split_special_tokens": True},
        {"added_tokens_decoder": {"559": {"content": "<|endoftext|>", **STRIPPED}}},
        {
            "added_tokens_decoder": {
                "560": {"content": "red", **STRIPPED, "special": False, "single_word": True}
            }
        },
        {
            "special_tokens_map": {
                role: {"content": "<|endoftext|>", **NORMALIZED} for role in ("eos_token", "unk_token")
            }
        },
    ],
    ids=lambda config: "+".join(config) or "plain",
)
def test_clip_folders_give_equal_ids(config: dict[str, Any], old: bool, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    train_clip_tokenizer(CORPUS, vocab_size=560).save(folder)
    write(folder / "config.json", {"model_type": "clip"})
    if old:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        write(folder / "vocab.json", model["vocab"])
        lines = ["#version: 0.2", *map(" ".join, model["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "tokenizer.json").unlink()
    config = dict(config)
    if "special_tokens_map" in config:
        write(folder / "special_tokens_map.json", config.pop("special_tokens_map"))
    write(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **config})
    assert_folder_agrees(folder, tmp_path / "out")


def test_a_trained_tokenizer_opens_in_clips_own_class(tmp_path: Path) -> None:
    ours = train_clip_tokenizer(CORPUS, vocab_size=550, max_length=20)
    ours.save(tmp_path)
    other = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert other.model_max_length == ours.model_max_length == 20
    assert_tokenizers_agree(ours, other)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "tokenizer_class": "SiglipTokenizer",
            "model_max_length": 16,
            "model_input_names": ["input_ids"],
            "clean_up_tokenization_spaces": True,
            "added_tokens_decoder": {
                "1": {"content": "</s>", **STRIPPED},
                "2": {"content": "<unk>", **STRIPPED},
            },
        },
        {
            "extra_special_tokens": ["x"],
            "do_lower_case": False,
            "padding_side": "left",
            "truncation_side": "left",
        },
    ],
    ids=["plain", "as on the hub", "other settings"],
)
def test_siglip_folders_give_equal_ids(config: dict[str, Any], tmp_path: Path) -> None:
    folder, model = tmp_path / "in", io.BytesIO()
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.lower() for text in CORPUS] * 5),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=9,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    write(folder / "config.json", {"model_type": "siglip"})
    if config:
        write(folder / "tokenizer_config.json", config)
    assert_folder_agrees(folder, tmp_path / "out")


def test_damaged_pieces_are_named(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(MmjaxError, match="spiece.model: not a sentencepiece model"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(("family", "kind"), [("clip", "CLIPProcessor"), ("siglip", "SiglipProcessor")])
def test_processors_are_equal_there_and_back(family: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    tokenizer = train_clip_tokenizer(CORPUS, vocab_size=560, max_length=20)
    settings = {
        "image_processor_type": kind.replace("Processor", "ImageProcessor"),
        "size": {"height": 20, "width": 20},
    }
    ours = Processor(ImageProcessor.from_dict(settings), tokenizer)
    ours.save(folder)
    write(folder / "config.json", {"model_type": family})
    other = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    assert type(other).__name__ == kind
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    inputs: dict[str, Any] = {"images": [image, image[::-1]], "text": CORPUS, "padding": True}
    expected = other(**inputs, return_tensors="np")
    other.save_pretrained(tmp_path / "theirs")
    for opened in (ours, Processor.from_folder(folder), Processor.from_folder(tmp_path / "theirs")):
        assert opened is not None
        actual = opened(**inputs)
        assert list(actual) == list(expected)
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(actual[name], expected[name])
        np.testing.assert_array_equal(actual["pixel_values"], expected["pixel_values"].transpose(0, 2, 3, 1))
