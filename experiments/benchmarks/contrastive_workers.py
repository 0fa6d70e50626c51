"""One measured process of `contrastive.py`: `contrastive_workers.py LIBRARY FORM CASE`.

Cases: "infonce-N-D" and "sigmoid-N-D" (value and gradients of a loss over N pairs of width D), "matmul-N"
(one float32 product of N x N matrices), "step-B" (a CLIP ViT-B/32 training step of B pairs).
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from turns import Program, keeps_memory, serve

SCALE, BIAS = 100.0, -10.0


def make_embeddings(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sides [N, D] of length 1; pairs are closer than strangers."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((count, width), np.float32)
    text = 0.3 * image + rng.standard_normal((count, width), np.float32)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))  # type: ignore[return-value]


def dense_infonce(image: Any, text: Any, scale: Any) -> Any:
    """The textbook form in JAX, with the N x N matrix."""
    import jax
    import jax.numpy as jnp

    logits = scale * image @ text.T
    diagonal = jnp.diagonal(logits)
    by_row, by_col = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
    return (by_row - diagonal + by_col - diagonal).mean() / 2


def dense_sigmoid(image: Any, text: Any, scale: Any, bias: Any) -> Any:
    """The textbook form in JAX, with the N x N matrix."""
    import jax
    import jax.numpy as jnp

    signs = 2 * jnp.eye(len(image), dtype=image.dtype) - 1
    return -jax.nn.log_sigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def loss_in_jax(name: str, form: str) -> Any:
    """A loss as a function of (image, text, scale) or (image, text, scale, bias)."""
    if form.startswith("dense"):
        return {"infonce": dense_infonce, "sigmoid": dense_sigmoid}[name]
    from mmjax import losses

    return getattr(losses, name)


def with_jax(case: str, form: str) -> Program:
    """Forms: "blocks" (mmjax), "dense" and "dense, memory kept"; jitted, value and all gradients."""
    import jax

    name, count, width = case.split("-")
    loss = loss_in_jax(name, form)
    rest = (np.float32(SCALE),) if name == "infonce" else (np.float32(SCALE), np.float32(BIAS))
    arguments = jax.device_put((*make_embeddings(int(count), int(width)), *rest))
    gradient = jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))
    compiled = jax.jit(gradient).lower(*arguments).compile()
    seen: list[Any] = []

    def call() -> None:
        seen[:] = [jax.block_until_ready(compiled(*arguments))]

    def result() -> list[float]:
        value, (to_image, *_) = seen[0]
        return [float(value), *np.asarray(to_image[:2, :8]).ravel().tolist()]

    return Program(call, result, facts={"temporary_bytes": temporary_bytes(compiled)})


def temporary_bytes(compiled: Any) -> int:
    """What a compiled program needs besides its inputs and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def open_clip_losses() -> ModuleType:
    """open_clip's loss module alone: the package's own import wants torchvision and timm."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("needs open_clip: pip install --no-deps open_clip_torch")
    path = Path(package.submodule_search_locations[0], "loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_open_clip(case: str, form: str) -> Program:
    """Forms: "eager" and "compiled" (torch.compile), value and all gradients."""
    import torch

    name, count, width = case.split("-")
    module = open_clip_losses()
    loss: Any = module.ClipLoss() if name == "infonce" else module.SigLipLoss()
    if form == "compiled":
        loss = torch.compile(loss)
    inputs = [torch.from_numpy(x).requires_grad_() for x in make_embeddings(int(count), int(width))]
    inputs += [
        torch.tensor(x, requires_grad=True) for x in ((SCALE,) if name == "infonce" else (SCALE, BIAS))
    ]
    seen: list[Any] = []

    def call() -> None:
        for x in inputs:
            x.grad = None
        value = loss(*inputs)
        value.backward()
        seen[:] = [value.item()]

    def result() -> list[float]:
        gradient = inputs[0].grad
        assert gradient is not None
        return [*seen, *gradient[:2, :8].flatten().tolist()]

    return Program(call, result)


def matmul(case: str, form: str) -> Program:
    """The machine's float32 matrix product, in "jax" or "torch"."""
    size = int(case.split("-")[1])
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) / math.sqrt(size) for _ in range(2))
    seen: list[Any] = []
    if form == "jax":
        import jax

        product = jax.jit(lambda a, b: a @ b)
        a, b = jax.device_put((a, b))

        def call() -> None:
            seen[:] = [jax.block_until_ready(product(a, b))]
    else:
        import torch

        x, y = torch.from_numpy(a), torch.from_numpy(b)

        def call() -> None:
            seen[:] = [x @ y]

    return Program(call, lambda: [float(seen[0][0, 0])])


def training_step(case: str, form: str) -> Program:
    """A CLIP ViT-B/32 step; the form is the number of micro-batches."""
    import jax

    step, state, batch = clip_step(int(case.split("-")[1]), int(form))
    compiled = step.lower(state, batch).compile()
    states, losses = [state], []

    def call() -> None:
        state, metrics = compiled(states.pop(), batch)
        states.append(jax.block_until_ready(state))
        losses.append(float(metrics["loss"]))

    facts = {"temporary_bytes": temporary_bytes(compiled)}
    return Program(call, lambda: losses[:3], facts=facts)


def clip_step(size: int, accumulate: int, *, shapes_only: bool = False) -> tuple[Any, Any, Any]:
    """mmjax's own jitted step of CLIP ViT-B/32, a state and a batch (or their shapes)."""
    import jax
    import optax
    from tower_workers import ADAMW, Case, make_inputs

    from mmjax.models import CLIPConfig, CLIPModel
    from mmjax.training.state import create_state, flatten
    from mmjax.training.step import make_train_step
    from mmjax.training.tasks import Contrastive

    model, optimizer = CLIPModel(CLIPConfig()), optax.adamw(**ADAMW)

    def fresh() -> Any:
        example: Any = model.example_batch(1)
        flat = flatten(model.init(jax.random.key(0), **example)["params"])
        return create_state(flat, frozenset(flat), optimizer, jax.random.key(0))

    train_step = make_train_step(model, Contrastive(), optimizer, accumulate=accumulate)
    step = jax.jit(train_step, donate_argnums=0)
    if shapes_only:
        example = model.example_batch(1)
        batch = {k: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for k, x in example.items()}
        return step, jax.eval_shape(fresh), batch
    return step, jax.jit(fresh)(), jax.device_put(make_inputs(Case("clip", size, "float32")))


def main() -> None:
    """Build what the command line names and serve it."""
    library, form, case = sys.argv[1:4]
    if keeps_memory(library, form):
        from mmjax.parallel import keep_freed_memory

        keep_freed_memory()
    if case.startswith("matmul"):
        serve(lambda: matmul(case, form))
    elif case.startswith("step"):
        serve(lambda: training_step(case, form))
    else:
        make = with_open_clip if library == "open_clip" else with_jax
        serve(lambda: make(case, form))


if __name__ == "__main__":
    main()
