"""One measured process of `llava.py`: it builds one case in one library and times it on request.

Started as `llava_workers.py LIBRARY FORM CASE FOLDER`; see `turns.py` for what it reads and writes. FOLDER
has the model in "model" and a new adapter, as peft writes it, in "adapter".
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tower_workers import mmjax_training, torch_training
from turns import Program, serve

PROMPT = 32  # tokens of text after the image, where text is generated
TEXT, LEARNED = (
    64,
    32,
)  # tokens of text after the image, where it is trained on, and how many of them are learned
COMPARED = 1000  # logits by which the libraries are compared
# AdamW as both stages of the recipe have it; their highest rates.
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
RATES = {"alignment": 1e-3, "lora": 2e-4}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed, for one image and the text after it.

    Attributes:
        kind: "generate" (greedy text), or a training step: "alignment" (the bridge trains) or "lora" (the
            bridge, and an adapter on all linear layers of the brain).
        new_tokens: of "generate".
    """

    kind: str
    new_tokens: int = 0

    @classmethod
    def parse(cls, name: str) -> Case:
        """The inverse of `name`."""
        kind, new_tokens = name.split("-")
        return cls(kind, int(new_tokens))

    @property
    def name(self) -> str:
        """For example "generate-33"."""
        return f"{self.kind}-{self.new_tokens}"


def make_inputs(case: Case, size: int, tokens: int, image_id: int) -> dict[str, np.ndarray]:
    """The same inputs for every library: pixels [1, H, W, C], ids [1, T], and labels where there is training.

    Args:
        case: how much text.
        size: height and width of the image.
        tokens: how often the image's id stands in front of the text.
        image_id: that id; all ids below it may be text.
    """
    rng = np.random.default_rng(0)
    text = rng.integers(3, image_id, (1, PROMPT if case.kind == "generate" else TEXT))
    ids = np.concatenate([np.full((1, tokens), image_id), text], axis=1).astype(np.int32)
    inputs = {"input_ids": ids, "pixel_values": rng.standard_normal((1, size, size, 3), dtype=np.float32)}
    if case.kind != "generate":
        inputs["labels"] = np.where(np.arange(ids.shape[1]) < ids.shape[1] - LEARNED, -100, ids)
    return inputs


def with_transformers(case: Case, form: str, folder: Path) -> Program:
    """Forms: "eager" or "compiled", then the dtype.

    With "bfloat16" what trains is float32 all the same, and multiplied under autocast.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    how, name = form.split()
    dtype = getattr(torch, name)
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        folder / "model", dtype=dtype, attn_implementation="sdpa"
    )
    config = model.config
    made = make_inputs(case, config.vision_config.image_size, config.image_seq_length, config.image_token_id)
    inputs: dict[str, Any] = {key: torch.from_numpy(array) for key, array in made.items()}
    for key in inputs.keys() & {"input_ids", "labels"}:
        inputs[key] = inputs[key].long()
    inputs["pixel_values"] = inputs["pixel_values"].permute(0, 3, 1, 2).contiguous().to(dtype)
    if case.kind == "generate":
        return _torch_generation(case, model.eval(), inputs, how == "compiled")
    bridge = model.model.multi_modal_projector
    model.requires_grad_(False)
    if case.kind == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    bridge.requires_grad_(True).float()
    if how == "compiled":
        model.compile()
    adamw = {**ADAMW, "learning_rate": RATES[case.kind]}
    return torch_training(model, {**inputs, "use_cache": False}, name == "bfloat16", adamw)


def _torch_generation(case: Case, model: Any, inputs: Any, compiled: bool) -> Program:
    import torch

    options: dict[str, Any] = {"min_new_tokens": case.new_tokens, "max_new_tokens": case.new_tokens}
    if compiled:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward)
    mask = torch.ones_like(inputs["input_ids"])
    seen: list[Any] = []

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(**inputs, attention_mask=mask, do_sample=False, **options)
        seen[:] = [out[0, mask.shape[1] :]]

    def result() -> list[float]:
        if case.new_tokens > 1:
            return seen[0].float().tolist()
        with torch.inference_mode():
            logits = type(model).forward(model, **inputs, logits_to_keep=1).logits
        return logits[0, -1, :COMPARED].float().tolist()

    return Program(run, result)


def with_mmjax(case: Case, form: str, folder: Path) -> Program:
    """The form is the dtype, and "transposed" for kernels that are stored so; what trains is float32."""
    import jax

    import mmjax
    from mmjax.nn import Execution
    from mmjax.parallel import keep_freed_memory, make_mesh

    keep_freed_memory()  # but not where the environment has settled it: to write text
    dtype, *stored = form.split()
    options: dict[str, Any] = dict(execution=Execution(dtype=dtype), transpose_kernels=bool(stored))
    # Training takes parameters that are on a mesh, as `mmjax train` does: a step can then use their memory.
    mesh = None if case.kind == "generate" else make_mesh()
    model, params, _ = mmjax.load(folder / "model", dtype, mesh, **options)
    config = model.config
    made = make_inputs(case, config.tile[0], config.tile_rows, config.image_token_id)
    if case.kind == "generate":
        return _mmjax_generation(case, model, params, made)
    return _mmjax_stage(case, model, params, jax.device_put(model.lay_out(made)), folder)


def _mmjax_generation(case: Case, model: Any, params: Any, inputs: Any) -> Program:
    import jax

    import mmjax

    seen: list[Any] = []

    def run() -> None:
        seen[:] = [np.asarray(mmjax.generate(model, params, inputs, case.new_tokens, stop_ids=()))]

    def result() -> list[float]:
        if case.new_tokens > 1:
            return seen[0][0].astype(float).tolist()
        forward = jax.jit(lambda params, batch: model.apply({"params": params}, **batch, logits_to_keep=1))
        logits = forward(params, model.lay_out(inputs)).logits
        return np.asarray(logits[0, -1, :COMPARED], np.float32).tolist()

    return Program(run, result)


def _mmjax_stage(case: Case, model: Any, params: Any, inputs: Any, folder: Path) -> Program:
    """A step of a stage's own: the bridge in float32, all else as it was opened, and frozen."""
    from mmjax.training import NextToken
    from mmjax.training.lora import LoraModel
    from mmjax.training.parts import BRIDGE, chosen
    from mmjax.training.peft import load_adapter
    from mmjax.training.state import flatten, merge

    bridge = {path: x.astype("float32") for path, x in chosen(params, BRIDGE).items()}
    flat, trained = {**flatten(params), **bridge}, frozenset(bridge)
    if case.kind == "lora":
        adapter, config = load_adapter(folder / "adapter", model)
        model = LoraModel(model, (("default", config),))
        flat = flatten({"base": merge(flat), "lora": {"default": adapter}})
        trained = frozenset(
            path for path in flat if path.startswith("lora/") or path.removeprefix("base/") in bridge
        )
    adamw = {**ADAMW, "learning_rate": RATES[case.kind]}
    return mmjax_training(model, flat, trained, NextToken(), inputs, adamw)


LIBRARIES = {"transformers": with_transformers, "mmjax": with_mmjax}


def main() -> None:
    """Build what the command line names and serve it."""
    library, form, case, folder = sys.argv[1:5]
    serve(lambda: LIBRARIES[library](Case.parse(case), form, Path(folder)))


if __name__ == "__main__":
    main()
