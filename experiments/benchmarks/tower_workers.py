"""One measured process of `towers.py`: it builds one case in one library and times it on request.

Started as `tower_workers.py LIBRARY FORM CASE FOLDER`; see `turns.py` for what it reads and writes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from turns import Program, serve

ADAMW = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.2}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
        model: "vit" (ViT-B/16 with 1000 classes, forward) or "clip" (CLIP ViT-B/32, one training step).
        batch: images, and texts for "clip".
        dtype: "float32" or "bfloat16", the dtype of activations and products.
    """

    model: str
    batch: int
    dtype: str

    @classmethod
    def parse(cls, name: str) -> Case:
        """The inverse of `name`."""
        model, batch, dtype = name.split("-")
        return cls(model, int(batch), dtype)

    @property
    def name(self) -> str:
        """For example "vit-8-float32"."""
        return f"{self.model}-{self.batch}-{self.dtype}"


def make_inputs(case: Case) -> dict[str, np.ndarray]:
    """The same inputs for every library: pixels [B, H, W, C] and, for "clip", ids [B, T] that end in EOS."""
    rng = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {
        "pixel_values": rng.standard_normal((case.batch, 224, 224, 3), dtype=np.float32)
    }
    if case.model == "clip":
        ids = rng.integers(0, 49405, (case.batch, 77)).astype(np.int32)
        ids[:, -1] = 49407
        inputs["input_ids"] = ids
    return inputs


def with_transformers(case: Case, form: str, folder: Path) -> Program:
    """The case in torch; forms: "eager" or "compiled", with "autocast" or "weights" for bfloat16."""
    import torch
    from transformers import CLIPModel, ViTForImageClassification

    inputs: dict[str, Any] = {}
    for name, array in make_inputs(case).items():
        tensor = torch.from_numpy(array)
        inputs[name] = tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor.long()
    family: Any = ViTForImageClassification if case.model == "vit" else CLIPModel
    model = family.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    if "weights" in form:
        model = model.to(torch.bfloat16)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    if "compiled" in form:
        model.compile()
    if case.model == "vit":
        return _torch_forward(model, inputs, "autocast" in form)
    return torch_training(model, {**inputs, "return_loss": True}, "autocast" in form, ADAMW)


def _torch_forward(model: Any, inputs: Any, autocast: bool) -> Program:
    import torch

    model.eval()
    seen: list[Any] = []

    def infer() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            seen[:] = [model(**inputs).logits]

    return Program(infer, lambda: seen[0][:2, :64].float().flatten().tolist())


def torch_training(model: Any, inputs: Any, autocast: bool, adamw: dict[str, float]) -> Program:
    """Steps of AdamW over the parameters that take gradients, with the loss that the model itself returns."""
    import torch

    model.train()
    betas = (adamw["b1"], adamw["b2"])
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=adamw["learning_rate"],
        betas=betas,
        eps=adamw["eps"],
        weight_decay=adamw["weight_decay"],
        fused=True,
    )
    losses: list[float] = []

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return Program(train, lambda: losses[:3])


def with_mmjax(case: Case, form: str, folder: Path) -> Program:
    """The case in mmjax; forms: "jit", and "jit weights" for parameters that are bfloat16 too."""
    import jax

    import mmjax
    from mmjax.nn import Execution
    from mmjax.parallel import keep_freed_memory
    from mmjax.training.state import flatten
    from mmjax.training.tasks import Contrastive

    keep_freed_memory()
    stored = "bfloat16" if "weights" in form else "float32"
    model, params, _ = mmjax.load(folder, dtype=stored, execution=Execution(dtype=case.dtype))
    inputs = jax.device_put(make_inputs(case))
    if case.model == "vit":
        return _mmjax_forward(model, params, inputs)
    flat = flatten(params)
    return mmjax_training(model, flat, frozenset(flat), Contrastive(), inputs, ADAMW)


def _mmjax_forward(model: Any, params: Any, inputs: Any) -> Program:
    import jax

    jitted = jax.jit(lambda params, inputs: model.apply({"params": params}, **inputs).logits)
    forward, seconds = _compile(jitted, params, inputs)
    seen: list[Any] = []

    def infer() -> None:
        seen[:] = [jax.block_until_ready(forward(params, inputs))]

    return Program(infer, lambda: np.asarray(seen[0][:2, :64], np.float32).ravel().tolist(), seconds)


def mmjax_training(
    model: Any, flat: dict[str, Any], trained: frozenset[str], task: Any, inputs: Any, adamw: dict[str, float]
) -> Program:
    """mmjax's own train state and step, with plain AdamW over the trained paths."""
    import jax
    import optax

    from mmjax.training.state import create_state
    from mmjax.training.step import make_train_step

    optimizer = optax.adamw(**adamw)
    states = [create_state(flat, trained, optimizer, jax.random.key(0))]
    train_step = make_train_step(model, task, optimizer)
    step, seconds = _compile(jax.jit(train_step, donate_argnums=0), states[0], inputs)
    losses: list[float] = []

    def train() -> None:
        state, metrics = step(states.pop(), inputs)
        states.append(jax.block_until_ready(state))
        losses.append(float(metrics["loss"]))

    return Program(train, lambda: losses[:3], seconds)


def _compile(jitted: Any, *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - start


LIBRARIES = {"transformers": with_transformers, "mmjax": with_mmjax}


def main() -> None:
    """Build what the command line names and serve it."""
    library, form, case, folder = sys.argv[1:5]
    serve(lambda: LIBRARIES[library](Case.parse(case), form, Path(folder)))


if __name__ == "__main__":
    main()
