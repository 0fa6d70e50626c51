"""The README's Python example runs as it stands, in a folder as the digits experiment leaves it."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import mmjax
from mmjax.language import train_clip_tokenizer
from mmjax.models import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, Processor
from mmjax.vision import ImageProcessor

README = Path(__file__).parent.parent / "README.md"


def digits_folder(root: Path) -> None:
    tokenizer = train_clip_tokenizer(["a seven", "a two"], vocab_size=520, max_length=8)
    config = CLIPConfig(
        vision_config=CLIPVisionConfig(
            image_size=8,
            patch_size=4,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        text_config=CLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            max_position_embeddings=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        projection_dim=4,
    )
    model = CLIPModel(config)
    params = model.init(jax.random.key(0), **model.example_batch())["params"]
    images = ImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False)
    processor = Processor(image_processor=images, tokenizer=tokenizer)
    mmjax.save(root / "models" / "digits", model, params, processor)
    output = root / "output" / "digits"
    output.mkdir(parents=True)
    for name in ("seven", "two"):
        Image.fromarray(np.full((8, 8), len(name) * 30, np.uint8)).save(output / f"{name}.png")


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    digits_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    assert "[[" in capsys.readouterr().out
    _, before, _ = mmjax.load("models/digits")
    _, after, _ = mmjax.load("models/mine")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    assert not same["visual_projection"]["kernel"]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README.read_text("utf-8")):
        assert (README.parent / target).exists(), target
