"""Adapters against peft: its folders opened here, ours opened there, equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import mmjax  # noqa: E402
from mmjax.errors import CheckpointError  # noqa: E402
from mmjax.training.lora import LoraConfig, adapt, init_lora, merge_lora  # noqa: E402
from mmjax.training.parts import BRIDGE, chosen, with_parts  # noqa: E402
from mmjax.training.peft import load_adapter, load_tuned, save_adapter  # noqa: E402
from tests.parity import llava  # noqa: E402
from tests.parity import reference as ref  # noqa: E402

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
IDS = np.random.default_rng(0).integers(0, 37, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(**SIZES)
    model = ref.randomise(transformers.LlamaForCausalLM(config))
    return ref.save_reference(model, tmp_path_factory.mktemp("llama"))


def reference_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": r".*layers\.1\.mlp\.(up|down)_proj|.*o_proj",
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {r"layers\.1\.self_attn\.o_proj": 16},
    },
    "output": {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head", "k_proj"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_of_peft_open_here(name, folder, tmp_path):
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGS[name])).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_" in key:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = reference_logits(theirs)
    model, params, _ = mmjax.load(folder)
    adapter, config = load_adapter(tmp_path, model)
    adapters, configs = {"x": adapter}, {"x": config}
    for effective in (adapt(params, adapters, configs), merge_lora(params, adapters, configs)):
        ref.assert_close(model.apply({"params": effective}, IDS).logits, expected)
    assert (
        np.abs(expected - reference_logits(transformers.LlamaForCausalLM.from_pretrained(folder))).max() > 0.1
    )


OURS = {
    "attention": LoraConfig(targets=r".*self_attn/(q|v)_proj/kernel", rank=3, alpha=5.0),
    "all": LoraConfig(rank=2, alpha=4.0, rslora=True, dropout=0.2),
    "exceptions": LoraConfig(
        targets=r".*layers_1/mlp/(up|down)_proj/kernel",
        rank=2,
        alpha=4.0,
        exceptions=((".*up_proj/kernel", 6, 3.0), (".*down_proj/kernel", 2, 1.5)),
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_our_adapters_open_in_peft(name, folder, tmp_path):
    model, params, _ = mmjax.load(folder)
    config, generator = OURS[name], np.random.default_rng(4)
    adapter = jax.tree.map(
        lambda x: (0.2 * generator.standard_normal(x.shape)).astype(np.float32),
        init_lora(jax.random.key(0), params, config),
    )
    save_adapter(tmp_path, model, adapter, config, base=str(folder))
    ours = model.apply({"params": adapt(params, {"x": adapter}, {"x": config})}, IDS).logits
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ref.assert_close(ours, reference_logits(theirs))
    again, same = load_adapter(tmp_path, model)
    for one, other in zip(jax.tree.leaves(adapter), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    merged = merge_lora(params, {"x": again}, {"x": same})
    ref.assert_close(model.apply({"params": merged}, IDS).logits, reference_logits(theirs.merge_and_unload()))


VOCABULARY: dict[str, dict[str, Any]] = {
    "output": {"r": 3, "lora_alpha": 5, "target_modules": ["lm_head", "k_proj"]},
    "embedding": {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens"], "lora_dropout": 0.1},
    "both": {
        "r": 2,
        "target_modules": ["embed_tokens", "lm_head", "v_proj"],
        "rank_pattern": {"embed_tokens": 4},
        "alpha_pattern": {"embed_tokens": 3, "lm_head": 9},
    },
}


def vocabulary_adapter(base: Any, config: dict[str, Any], place: Path) -> Any:
    """An adapter of peft's, saved as peft does on its own: with the matrices that it is beside."""
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            # The base's matrix is not the folder's, so that it shows whose counts.
            if "lora_" in key or "base_layer" in key and "proj" not in key:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    theirs.save_pretrained(place, save_embedding_layers=True)
    return theirs


@pytest.mark.parametrize("name", VOCABULARY)
def test_adapters_of_the_vocabulary_come_with_its_matrices(name, folder, tmp_path):
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    expected = reference_logits(vocabulary_adapter(base, VOCABULARY[name], tmp_path / "theirs"))
    model, params, _ = mmjax.load(folder)
    adapter, config, whole = load_tuned(tmp_path / "theirs", model)
    paths = {"lm_head": "lm_head/kernel", "embed_tokens": "model/embed_tokens/embedding"}
    assert whole.keys() == {paths[x] for x in VOCABULARY[name]["target_modules"] if x in paths}
    base_params, adapters, configs = with_parts(params, whole), {"x": adapter}, {"x": config}
    for effective in (adapt(base_params, adapters, configs), merge_lora(base_params, adapters, configs)):
        ref.assert_close(model.apply({"params": effective}, IDS).logits, expected)
    with pytest.raises(CheckpointError, match="it holds .* whole: use load_tuned"):
        load_adapter(tmp_path / "theirs", model)
    # Ours opens there: with the matrices, and without them on the base that has them.
    save_adapter(tmp_path / "ours", model, adapter, config, whole=whole)
    mmjax.save(tmp_path / "changed", model, base_params)
    save_adapter(tmp_path / "small", model, adapter, config)
    for base_folder, ours in ((folder, "ours"), (tmp_path / "changed", "small")):
        fresh = transformers.LlamaForCausalLM.from_pretrained(base_folder)
        ref.assert_close(
            reference_logits(peft.PeftModel.from_pretrained(fresh, tmp_path / ours).eval()), expected
        )
    again, same = load_adapter(tmp_path / "small", model)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_a_matrix_of_another_size_beside_an_adapter_is_refused(folder, tmp_path):
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(41)
    vocabulary_adapter(base, VOCABULARY["output"], tmp_path)
    model, _, _ = mmjax.load(folder)
    with pytest.raises(
        CheckpointError, match=r"lm_head.base_layer.weight is \[41, 24\], expected \[37, 24\]"
    ):
        load_tuned(tmp_path, model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_one_of_two_tied_matrices_is_refused(target, tmp_path):
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    base = ref.randomise(transformers.LlamaForCausalLM(config))
    ref.save_reference(base, tmp_path / "base")
    vocabulary_adapter(base, {"r": 2, "target_modules": [target, "q_proj"]}, tmp_path / "theirs")
    model, _, _ = mmjax.load(tmp_path / "base")
    with pytest.raises(CheckpointError, match=f"{target}.lora_.* one matrix for both .*: leave both out"):
        load_tuned(tmp_path / "theirs", model)


def their_logits(model: Any, batch: dict[str, Any]) -> np.ndarray:
    """Of a LLaVA model of the reference's for a batch of ours."""
    batch = {name: torch.tensor(np.asarray(value)) for name, value in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].movedim(-1, -3)
    with torch.no_grad():
        return model(**batch | {"input_ids": batch["input_ids"].long()}).logits.numpy()


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_an_adapter_with_the_bridge_beside_it_opens_in_peft_and_comes_back(kind, tmp_path):
    llava.save(tmp_path / "base", llava.make(kind))
    model, params, processor = mmjax.load(tmp_path / "base")
    config = LoraConfig(targets=r"language_model/.*layers_\d+/.*/kernel", rank=2, alpha=4.0)
    generator = np.random.default_rng(4)

    def noisy(x: Any) -> Any:
        return (0.2 * generator.standard_normal(x.shape)).astype(np.float32)

    adapter = jax.tree.map(noisy, init_lora(jax.random.key(0), params, config))
    whole = {path: x + noisy(x) for path, x in chosen(params, BRIDGE).items()}
    save_adapter(tmp_path / "tuned", model, adapter, config, base=str(tmp_path / "base"), whole=whole)
    again, same, parts = load_tuned(tmp_path / "tuned", model)
    for one, other in zip(jax.tree.leaves((adapter, whole)), jax.tree.leaves((again, parts)), strict=True):
        np.testing.assert_array_equal(one, other)
    batch = processor(images=llava.pictures((30, 50)), text="<image>What is this?")
    tuned = merge_lora(with_parts(params, parts), {"x": again}, {"x": same})
    ours = model.apply({"params": tuned}, **batch).logits
    base = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "tuned").eval()
    ref.assert_close(ours, their_logits(theirs, batch))
    # What peft writes of it is read here as well.
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapter_back, _, whole_back = load_tuned(tmp_path / "theirs", model)
    back = jax.tree.leaves((adapter_back, whole_back))
    # peft saves whole modules, and the newline is a parameter of none.
    kept = {path: x for path, x in whole.items() if path != "image_newline"}
    for one, other in zip(jax.tree.leaves((adapter, kept)), back, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(CheckpointError, match="holds (multi_modal_projector/.*|image_newline) whole: use"):
        load_adapter(tmp_path / "tuned", model)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_the_newline_opens_under_both_of_its_names(kind, tmp_path):
    llava.save(tmp_path / "base", llava.make(kind))
    model, params, _ = mmjax.load(tmp_path / "base")
    config = LoraConfig(targets=r"language_model/.*layers_0/.*/q_proj/kernel", rank=2)
    adapter = init_lora(jax.random.key(0), params, config)
    whole = {"image_newline": 1.5 * params["image_newline"]}
    save_adapter(tmp_path / "tuned", model, adapter, config, whole=whole)
    file = tmp_path / "tuned" / "adapter_model.safetensors"
    tensors = load_file(file)
    # The name that folders of the whole model have.
    tensors["base_model.model.image_newline"] = tensors.pop("base_model.model.model.image_newline")
    _, _, found = load_tuned(tmp_path / "tuned", model)
    save_file(tensors, file)
    _, _, older = load_tuned(tmp_path / "tuned", model)
    for parts in (found, older):
        np.testing.assert_array_equal(parts["image_newline"], whole["image_newline"])
