"""LoRA on parameter trees: exact beside and merged, several at once, dropout, int8 bases, stages, folders."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.errors import CheckpointError, ConfigError
from mmjax.language import DecoderConfig, train_bpe_tokenizer
from mmjax.models import CausalLM, Processor
from mmjax.nn import Execution, transpose_kernels
from mmjax.nn.kernels import AdaptedKernel
from mmjax.nn.quantized import dequantize, quantize
from mmjax.training import FROZEN, Constant, Experiment, FromFolder, NextToken, Stage, Train, flatten, train
from mmjax.training.lora import (
    LoraConfig,
    LoraFromFolder,
    LoraModel,
    adapt,
    init_lora,
    merge_lora,
    unmerge_lora,
)
from mmjax.training.peft import CONFIG, export_adapter, export_merged, load_adapter, save_adapter

SIZES: dict[str, Any] = {
    "vocab_size": 270,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ATTENTION = LoraConfig(targets=r".*self_attn/(q|v)_proj/kernel", rank=3, alpha=5.0)
ALL = LoraConfig(rank=2, alpha=4.0, rslora=True)


def llama(**execution: Any) -> CausalLM:
    return CausalLM(DecoderConfig(**SIZES), execution=Execution(**execution))


def random_tree(shapes: Any, seed: int, size: float = 0.2) -> Any:
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(size * generator.standard_normal(x.shape), x.dtype), shapes)


def params_of(model: CausalLM) -> dict[str, Any]:
    return random_tree(jax.eval_shape(model.init, jax.random.key(0), **model.example_batch())["params"], 0)


def adapter_of(params: Any, config: LoraConfig, seed: int = 1) -> Any:
    return random_tree(init_lora(jax.random.key(0), params, config), seed)


IDS = np.random.default_rng(0).integers(0, 270, (2, 7)).astype(np.int32)


def logits(model: Any, params: Any, **options: Any) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, IDS, **options).logits)


def assert_close(ours: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= tolerance * np.abs(np.asarray(theirs)).max()


@pytest.mark.parametrize("execution", [{}, {"scan_layers": True, "remat": True}], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("config", [ATTENTION, ALL], ids=["attention", "all"])
def test_beside_equals_merged(config, execution):
    model = llama(**execution)
    params = params_of(model)
    adapters, configs = {"one": adapter_of(params, config)}, {"one": config}
    beside = logits(model, adapt(params, adapters, configs))
    assert_close(beside, logits(model, merge_lora(params, adapters, configs)), 5e-6)
    assert np.abs(beside - logits(model, params)).max() > 0.01 * np.abs(beside).max()


def test_a_merged_kernel_is_the_formula_and_comes_apart_again():
    params = params_of(llama())
    adapters, configs = {"one": adapter_of(params, ALL)}, {"one": ALL}
    path = "model/layers_1/mlp/down_proj/"
    w, a, b = (flatten(tree)[path + name] for tree, name in
               ((params, "kernel"), (adapters["one"], "a"), (adapters["one"], "b")))  # fmt: skip
    merged = merge_lora(params, adapters, configs)
    expected = np.asarray(w, "f8") + 4 / np.sqrt(2) * np.asarray(a, "f8") @ np.asarray(b, "f8")
    np.testing.assert_allclose(flatten(merged)[path + "kernel"], expected, rtol=1e-5, atol=1e-6)
    again = flatten(unmerge_lora(merged, adapters, configs))
    for name, value in flatten(params).items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5, atol=1e-6)
        if "layers" not in name or "norm" in name:
            np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize("store", [None, quantize, transpose_kernels], ids=["array", "int8", "transposed"])
def test_text_is_generated_with_adapters_beside(store):
    """The same greedy tokens as from merged parameters, whatever the base is stored as."""
    model = llama()
    base = params_of(model)
    base = base if store is None else store(base)
    params = {"base": base, "lora": {"one": adapter_of(params_of(model), ALL)}}
    tuned = LoraModel(model, (("one", ALL),))
    prompts = {"input_ids": IDS}
    tokens = mmjax.generate(tuned, params, prompts, 12, stop_ids=())
    merged = mmjax.generate(model, tuned.merged(params), prompts, 12, stop_ids=())
    np.testing.assert_array_equal(tokens, merged)
    plain = mmjax.generate(model, dequantize(base), prompts, 12, stop_ids=())
    assert not np.array_equal(tokens, plain)


def table_adapter(rank: int = 2) -> tuple[dict[str, Any], LoraConfig]:
    shapes = {"model": {"embed_tokens": {"a": jnp.zeros((270, rank)), "b": jnp.zeros((rank, 24))}}}
    config = LoraConfig(targets="model/embed_tokens/embedding", rank=rank, alpha=5.0, dropout=0.5)
    return random_tree(shapes, 5), config


def test_an_embedding_table_takes_the_sum(tmp_path):
    model = llama()
    params = params_of(model)
    adapter, config = table_adapter()
    both, configs = {"table": adapter, "all": adapter_of(params, ALL)}, {"table": config, "all": ALL}
    a, b = (np.asarray(adapter["model"]["embed_tokens"][name], "f8") for name in "ab")
    expected = np.asarray(params["model"]["embed_tokens"]["embedding"], "f8") + 2.5 * a @ b
    # Tables have no dropout, with a key either.
    for key in (None, jax.random.key(0)):
        table = adapt(params, both, configs, key=key)["model"]["embed_tokens"]["embedding"]
        np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)
    beside = logits(model, adapt(params, both, configs))
    assert_close(beside, logits(model, merge_lora(params, both, configs)), 5e-6)
    save_adapter(tmp_path, model, adapter, config)
    again, same = load_adapter(tmp_path, model)
    assert (same.rank, same.alpha, same.scale_of(config.targets)) == (2, 5.0, 2.5)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_a_tied_table_has_no_adapter_in_peft(tmp_path):
    tied = CausalLM(DecoderConfig(**SIZES, tie_word_embeddings=True))
    adapter, config = table_adapter()
    with pytest.raises(CheckpointError, match="embed_tokens/embedding: .* one matrix for both"):
        save_adapter(tmp_path / "new", tied, adapter, config)
    assert not (tmp_path / "new").exists()


def test_several_adapters_add_up():
    model = llama()
    params = params_of(model)
    adapters = {"q": adapter_of(params, ATTENTION), "all": adapter_of(params, ALL, seed=2)}
    configs = {"q": ATTENTION, "all": ALL}
    one_by_one = merge_lora(params, {"q": adapters["q"]}, configs)
    one_by_one = merge_lora(one_by_one, {"all": adapters["all"]}, configs)
    assert_close(logits(model, adapt(params, adapters, configs)), logits(model, one_by_one), 5e-6)


def test_a_new_adapter_changes_nothing():
    model = llama()
    params = params_of(model)
    adapters = {"new": init_lora(jax.random.key(1), params, ALL)}
    np.testing.assert_array_equal(logits(model, adapt(params, adapters, {"new": ALL})), logits(model, params))


def test_exceptions_in_rank_and_alpha():
    config = dataclasses.replace(ALL, rslora=False, exceptions=((".*q_proj/kernel", 5, 1.0),))
    params = params_of(llama())
    found = flatten(init_lora(jax.random.key(0), params, config))
    assert found["model/layers_0/self_attn/q_proj/a"].shape == (24, 5)
    assert found["model/layers_0/self_attn/k_proj/a"].shape == (24, 2)
    changed = flatten(adapt(params, {"x": adapter_of(params, config)}, {"x": config}))
    assert changed["model/layers_0/self_attn/q_proj/kernel"].changes[0].scale == 0.2
    assert changed["model/layers_0/self_attn/k_proj/kernel"].changes[0].scale == 2.0


def test_dropout_is_in_front_of_a_alone():
    kernel, a, b = random_tree((jnp.zeros((6, 5)), jnp.zeros((6, 2)), jnp.zeros((2, 5))), 3)
    config = LoraConfig(targets=".*", rank=2, alpha=3.0, dropout=0.5)
    params, adapters = {"m": {"kernel": kernel}}, {"x": {"m": {"a": a, "b": b}}}
    x = jnp.ones((200, 6))
    noisy = adapt(params, adapters, {"x": config}, key=jax.random.key(0))["m"]["kernel"].product(x, x.dtype)
    # What is left of x is 0 or 2: each row is one of 2^6 sums, and the base's part is always whole.
    masks = 2.0 * ((np.arange(64)[:, None] >> np.arange(6)) & 1)
    possible = np.asarray(kernel).sum(0) + 1.5 * (masks @ np.asarray(a)) @ np.asarray(b)
    nearest = np.abs(np.asarray(noisy)[:, None] - possible[None]).max(-1).min(1)
    assert nearest.max() < 1e-5 and len(np.unique(np.asarray(noisy).round(4), axis=0)) > 30
    still = adapt(params, adapters, {"x": config})["m"]["kernel"].product(x, x.dtype)
    assert_close(still, x @ merge_lora(params, adapters, {"x": config})["m"]["kernel"])


def test_only_adapters_have_gradients_and_int8_bases_train_too():
    model = llama()
    params = params_of(model)
    wrapped = LoraModel(model, (("x", ALL),))
    lora = {"x": adapter_of(params, ALL)}
    batch = {"input_ids": IDS}

    def loss(lora: Any, base: Any, module: Any = wrapped) -> Any:
        terms = NextToken()(module, {"base": base, "lora": lora}, batch, jax.random.key(0))
        return terms["next_token"]

    def merged_loss(lora: Any, base: Any) -> Any:
        merged = merge_lora(base, lora, {"x": ALL})
        return NextToken()(model, merged, batch, jax.random.key(0))["next_token"]

    for base in (params, quantize(params)):
        value, grads = jax.jit(jax.value_and_grad(loss))(lora, base)
        expected, expected_grads = jax.jit(jax.value_and_grad(merged_loss))(lora, dequantize(base))
        assert_close(value, expected, 1e-5)
        for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            assert_close(ours, theirs, 1e-4)


def test_frozen_kernels_cost_no_gradient():
    """Nothing of a kernel's shape is computed in the backward pass, unlike where kernels train."""
    model = llama()
    params = params_of(model)
    wrapped, lora = LoraModel(model, (("x", ALL),)), {"x": adapter_of(params, ALL)}

    def loss(lora: Any, base: Any) -> Any:
        return wrapped.apply({"params": {"base": base, "lora": lora}}, IDS).logits.sum()

    shape = "f32[24,40]"
    text = [jax.jit(jax.grad(loss, which)).lower(lora, params).compile().as_text() for which in (0, 1)]
    made = [sum(f"= {shape}" in line and "parameter" not in line for line in t.splitlines()) for t in text]
    assert made[0] < made[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "ranks are positive integers"),
        ({"dropout": 1.0}, r"dropout=1.0 has to be in \[0, 1\)"),
        ({"targets": "("}, "no regular expression"),
        ({"exceptions": (("a", -1, 1.0),)}, "ranks are positive"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**change)


def test_adapters_that_do_not_fit():
    params = params_of(llama())
    adapter = adapter_of(params, ATTENTION)
    with pytest.raises(ConfigError, match="matches no parameter"):
        init_lora(jax.random.key(0), params, LoraConfig(targets="nothing"))
    with pytest.raises(ConfigError, match="input_layernorm/scale, which is no kernel"):
        init_lora(jax.random.key(0), params, LoraConfig(targets=".*layers_0.*"))
    with pytest.raises(ConfigError, match="'x' has no config; there are y"):
        adapt(params, {"x": adapter}, {"y": ATTENTION})
    with pytest.raises(ConfigError, match="has rank 3, its config says otherwise"):
        adapt(params, {"x": adapter}, {"x": ALL})
    del adapter["model"]["layers_0"]["self_attn"]["q_proj"]["b"]
    with pytest.raises(ConfigError, match="q_proj has no kernel in the model, or lacks a or b"):
        adapt(params, {"x": adapter}, {"x": ATTENTION})
    wide = {"model": {"layers_0": {"self_attn": {"q_proj": {"a": np.ones((9, 3)), "b": np.ones((3, 24))}}}}}
    with pytest.raises(ConfigError, match="do not fit model/layers_0/self_attn/q_proj/kernel"):
        adapt(params, {"x": wide}, {"x": ATTENTION})


@dataclasses.dataclass(frozen=True)
class Words:
    """Endless batches of one text."""

    def build(self, *, processor: Any, batch_size: int, **_: Any) -> Any:
        from tests.training.toy import Tally

        ids = np.tile(processor.tokenizer("the cat sat on the mat")["input_ids"][:1], (batch_size, 1))

        class Endless:
            tally = Tally()

            def __iter__(self) -> Any:
                return self

            def __next__(self) -> Any:
                return {"input_ids": ids}

            def get_state(self) -> dict[str, int]:
                return {}

            def set_state(self, state: Any) -> None:
                assert state == {}

            def check_faults(self) -> None:
                assert self.tally.seen == 0

            def close(self) -> None:
                self.tally.counts.clear()

        return Endless()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    model = llama()
    mmjax.save(place, model, params_of(model), Processor(tokenizer=train_bpe_tokenizer(["the cat sat"], 262)))
    return place


@pytest.mark.parametrize("int8", [False, True])
def test_a_stage_trains_an_adapter_and_nothing_else(folder, tmp_path, int8):
    config = LoraConfig(rank=2, alpha=4.0, dropout=0.1)
    experiment = Experiment(
        name="tune",
        model=LoraFromFolder(path=str(folder), lora=config, int8=int8),
        data=Words(),
        stages=(
            Stage(
                name="lora",
                loss=NextToken(),
                rules=(("base/.*", FROZEN), ("lora/.*", Constant(value=0.02))),
            ),
        ),
        train=Train(steps=4, batch_size=8, checkpoint_every=4, log_every=4),
        mesh={"data": 8},
        export=export_adapter,
    )
    outcome = train(experiment, workdir=tmp_path)
    losses = outcome.history()["loss"]
    assert losses[-1] < losses[0] - 0.1
    model, params, _ = mmjax.load(folder)
    expected = flatten(quantize(params) if int8 else params)
    for path, value in flatten(outcome.params["base"]).items():
        jax.tree.map(np.testing.assert_array_equal, value, expected[path])
    # What was written is what was trained, and a run goes on from it.
    adapter, again = load_adapter(tmp_path / "models/tune", model)
    assert (again.rank, again.alpha, again.dropout) == (2, 4.0, 0.1)
    for path, value in flatten(outcome.params["lora"]["default"]).items():
        np.testing.assert_array_equal(flatten(adapter)[path], value)
    export_merged(outcome, tmp_path / "merged")
    merged_model, merged, processor = mmjax.load(tmp_path / "merged")
    assert_close(logits(merged_model, merged), logits(outcome.model, outcome.params), 1e-5)
    assert processor.tokenizer.vocab_size == 262
    source = LoraFromFolder(path=str(folder), adapter=str(tmp_path / "models/tune"), int8=int8)
    opened = source.open(None, jax.random.key(0), outcome.mesh)
    found = opened.params()
    for path, value in flatten(outcome.params).items():
        jax.tree.map(np.testing.assert_array_equal, value, found[path])
    assert opened.shapes.keys() == opened.shardings.keys() == found.keys()


@pytest.mark.parametrize("source", [FromFolder, LoraFromFolder])
def test_a_folders_weights_are_in_memory_once(folder, tmp_path, source):
    """While a stage trains, also one that was resumed; what was read is not kept beside what trains."""

    def size(arrays):
        return sum(array.nbytes for array in arrays)

    def held():
        gc.collect()
        return size(array for array in jax.live_arrays() if len(array.sharding.device_set) > 1)

    before, seen = held(), []
    experiment = Experiment(
        name="once",
        model=source(path=str(folder)),
        data=Words(),
        stages=(
            Stage(
                name="some",
                loss=NextToken(),
                rules=(("lora/.*|.*norm/.*", Constant(value=0.02)), (".*", FROZEN)),
            ),
        ),
        train=Train(steps=2, batch_size=8, checkpoint_every=2),
        export=lambda outcome, place: seen.append((held() - before, size(jax.tree.leaves(outcome.params)))),
    )
    train(experiment, workdir=tmp_path)
    longer = dataclasses.replace(experiment.train, steps=4)
    train(dataclasses.replace(experiment, train=longer), workdir=tmp_path, resume=True)
    weights = size(jax.tree.leaves(mmjax.load(folder)[1]))
    # An adapter has two moments beside it.
    assert len(seen) == 2
    for there, params in seen:
        assert params <= there < 1.3 * weights + 3 * (params - weights)


def test_folders_that_are_not_plain_lora_are_refused(tmp_path):
    model = llama()
    params = params_of(model)
    save_adapter(tmp_path, model, adapter_of(params, ATTENTION), ATTENTION, base="a/b")
    hub = json.loads((tmp_path / CONFIG).read_text())
    assert hub["target_modules"] == ["q_proj", "v_proj"] and hub["base_model_name_or_path"] == "a/b"
    for change, words in [
        ({"peft_type": "LOHA"}, "'LOHA' is not LORA"),
        ({"bias": "all"}, "trained biases"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'., but .* has no tensors"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base model"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"lora_dropout": 2}, "dropout=2.0 has to be"),
    ]:
        (tmp_path / CONFIG).write_text(json.dumps({**hub, **change}))
        with pytest.raises(CheckpointError, match=words) as caught:
            load_adapter(tmp_path, model)
        assert "\n" not in str(caught.value)
    (tmp_path / CONFIG).write_text(json.dumps(hub))
    shallow = CausalLM(DecoderConfig(**{**SIZES, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.*has no place in this model"):
        load_adapter(tmp_path, shallow)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file, and no adapter_model.bin either"):
        load_adapter(tmp_path, model)


def test_a_kernel_with_changes_is_a_pytree():
    kernel = AdaptedKernel(jnp.ones((3, 2)), ())
    assert jax.tree.structure(jax.tree.map(lambda x: 2 * x, kernel)) == jax.tree.structure(kernel)
    assert kernel.shape == (3, 2) and kernel.dtype == jnp.float32
