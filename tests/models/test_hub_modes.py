"""Saved weights can be read by whoever may read the folder's other files."""

from __future__ import annotations

import mmjax
from tests.tiny import MODELS, random_params


def test_weights_have_the_mode_of_any_new_file(tmp_path):
    model = MODELS["ViTModel"]
    mmjax.save(tmp_path, model, random_params(model))
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes
