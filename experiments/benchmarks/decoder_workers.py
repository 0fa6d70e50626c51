"""One measured process of `decoders.py`.

Started as `decoder_workers.py LIBRARY FORM CASE FOLDER` it opens the folder and generates on request; see
`turns.py` for what it reads and writes. With "load", "prefill" or "decode" for the case it does that once and
prints one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from turns import Program, peak_bytes, resident_bytes, serve

PROMPT = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """What is generated, greedily, from prompts of 256 random ids.

    Attributes:
        batch: prompts at a time.
        new_tokens: 1 gives the time to the first token; with more the rest is decoding.
    """

    batch: int
    new_tokens: int

    @classmethod
    def parse(cls, name: str) -> Case:
        """The inverse of `name`."""
        return cls(*map(int, name.split("-")))

    @property
    def name(self) -> str:
        """For example "8-33"."""
        return f"{self.batch}-{self.new_tokens}"


def make_prompts(case: Case, vocabulary: int) -> np.ndarray:
    """The same ids [B, 256] for every library."""
    return np.random.default_rng(0).integers(3, vocabulary, (case.batch, PROMPT)).astype(np.int32)


def with_transformers(case: Case, form: str, folder: Path) -> Program:
    """Forms: "eager" or "compiled" (static cache, torch.compile), then the dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    how, dtype = form.split()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    options: dict[str, Any] = {"min_new_tokens": case.new_tokens, "max_new_tokens": case.new_tokens}
    if how == "compiled":
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward)
    ids = torch.from_numpy(make_prompts(case, model.config.vocab_size)).long()
    seen: list[Any] = []

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        seen[:] = [out[:, PROMPT:]]

    return Program(run, lambda: seen[0].flatten().float().tolist())


def with_mmjax(case: Case, form: str, folder: Path) -> Program:
    """The form is the dtype of parameters and products, and "transposed" for kernels that are stored so."""
    import mmjax

    dtype, *stored = form.split()
    model, params, _ = mmjax.load(folder, dtype=dtype, transpose_kernels=bool(stored))
    batch = {"input_ids": make_prompts(case, model.config.vocab_size)}
    seen: list[Any] = []

    def run() -> None:
        seen[:] = [np.asarray(mmjax.generate(model, params, batch, case.new_tokens, stop_ids=()))]

    return Program(run, lambda: seen[0].ravel().astype(float).tolist())


def load_once(library: str, devices: str, folder: Path) -> dict[str, float]:
    """Open the folder; what the process then holds and at most held, without what its libraries take."""
    import jax

    import mmjax

    mesh = None
    if library == "mmjax":
        jax.block_until_ready(jax.numpy.zeros(1))
        mmjax.load  # noqa: B018  imports what it needs
        mesh = None if devices == "1" else mmjax.parallel.make_mesh({"tensor": int(devices)})
    else:
        import transformers

        transformers.LlamaForCausalLM  # noqa: B018  likewise
    before, begin = resident_bytes(), time.perf_counter()
    if library == "mmjax":
        _, params, _ = mmjax.load(folder, mesh=mesh)
        arrays = jax.block_until_ready(jax.tree.leaves(params))
    else:
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="bfloat16")
        arrays = list(model.parameters())
    seconds = time.perf_counter() - begin
    weights = sum(array.nbytes for array in arrays)
    return {"seconds": seconds, "peak_bytes": peak_bytes() - before, "weight_bytes": weights}


def compile_once(layers: str, what: str) -> dict[str, float]:
    """Trace and compile one program of LLaMA-2-7B's shapes, without parameters."""
    import jax
    import jax.numpy as jnp

    from mmjax.language import DecoderConfig
    from mmjax.models import CausalLM
    from mmjax.nn import Execution

    config = DecoderConfig(max_position_embeddings=4096)  # the defaults are LLaMA-2-7B's
    model = CausalLM(config, execution=Execution(dtype="bfloat16", scan_layers=layers == "scanned"))
    key = jax.random.key(0)
    example: Any = model.example_batch()
    params = jax.eval_shape(lambda: model.init(key, **example)["params"])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    cache = jax.eval_shape(lambda: model.init_cache(1, 2 * PROMPT))
    ids = jax.ShapeDtypeStruct((1, PROMPT if what == "prefill" else 1), jnp.int32)

    def run(params: Any, ids: Any, cache: Any) -> Any:
        return model.apply({"params": params}, ids, cache=cache, logits_to_keep=1)

    begin = time.perf_counter()
    lowered = jax.jit(run, donate_argnums=2).lower(params, ids, cache)
    traced = time.perf_counter()
    lowered.compile()
    return {"lower": traced - begin, "compile": time.perf_counter() - traced}


LIBRARIES = {"transformers": with_transformers, "mmjax": with_mmjax}


def main() -> None:
    """Do what the command line names."""
    library, form, case, folder = sys.argv[1:5]
    if case == "load":
        print(json.dumps(load_once(library, form, Path(folder))))
    elif case in ("prefill", "decode"):
        print(json.dumps(compile_once(form, case)))
    else:
        serve(lambda: LIBRARIES[library](Case.parse(case), form, Path(folder)))


if __name__ == "__main__":
    main()
