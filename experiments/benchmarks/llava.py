"""LLaVA-1.5 with a brain of 1.1B on CPU: text about an image, and steps of both stages, beside transformers.

    python experiments/benchmarks/llava.py [--tiny] [--only generate alignment lora] [--also compiled]

- generate: greedy text after one image (576 tokens) and 32 tokens of text. A turn of one new token gives the
  time to the first token; what a turn of 33 takes more is the time of 32 further ones.
- alignment: a step of the first stage. The bridge trains; eyes and brain are frozen.
- lora: a step of the second stage by LoRA (rank 128 on all linear layers of the brain, without dropout; peft
  beside transformers). The adapter and the bridge train; both libraries begin with the same adapter.

A step has one image and 64 tokens of text, of which the last 32 are learned; AdamW. What is frozen is
bfloat16, what trains is float32, products are bfloat16. Every library, and every form of it, runs in a
process of its own with the same random weights and inputs, and the processes take turns. All of a case live
at once, each with weights of 2.8 GB (in float32 5.6) and what its program needs; --also adds forms of
transformers where memory has room for more. Results go to LLAVA.md and llava.json beside this file; --tiny,
which is for trying this script, to output/llava.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from decoders import NEW, TINY_LLAMA, leave_first
from llava_workers import LEARNED, PROMPT, TEXT, Case
from towers import compare, form_cells, milliseconds
from turns import HERE, MEMORY, Runner, describe, machine, take_turns

WORKER = "llava_workers.py"
PARTS = ("generate", "alignment", "lora")
FORMS = {
    "generate": [
        ("mmjax", "bfloat16"),
        ("mmjax", "bfloat16 transposed"),
        ("transformers", "eager bfloat16"),
    ],
    "alignment": [("mmjax", "bfloat16"), ("transformers", "eager bfloat16")],
    "lora": [("mmjax", "bfloat16"), ("transformers", "eager bfloat16")],
}
# The reference's other forms: each takes a whole process's memory more.
ALSO = {"compiled": "compiled bfloat16", "float32": "eager float32"}
TITLES = {
    "first": "first token",
    "decode": f"decoding, {NEW - 1} tokens",
    "alignment": "step of stage 1, the bridge trains",
    "lora": "step of stage 2, LoRA and the bridge train",
}
AIM = 1.0
CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TINY_EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TINY_BRAIN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}
ADAPTER: dict[str, Any] = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.0}
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def prepare(folder: Path, eyes: dict[str, Any], brain: dict[str, Any], adapter: bool) -> None:
    """Write the model with random weights as a hub folder, bfloat16, and a new adapter as peft writes it."""
    import peft
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**eyes),
        text_config=LlamaConfig(**brain, eos_token_id=2),
        image_token_index=brain["vocab_size"] - 1,
        image_seq_length=(eyes["image_size"] // eyes["patch_size"]) ** 2,
    )
    torch.set_default_dtype(torch.bfloat16)
    model: Any = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model")
    if adapter:
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=ADAPTED, **ADAPTER))
        adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)


def measure(case: Case, also: Sequence[str], folder: Path, rounds: int, retakes: int) -> list[Runner]:
    """All forms of a case, taking turns."""
    print(case.name, flush=True)
    forms = FORMS[case.kind] + [("transformers", ALSO[name]) for name in also]
    worker = functools.partial(Runner.start, WORKER, writes_text=case.kind == "generate")
    start = [functools.partial(worker, *form, case.name, str(folder)) for form in forms]
    return take_turns(start, rounds, retakes)


def generation(run: Callable[[Case], list[Runner]]) -> list[dict[str, Any]]:
    """The first token, compared by its logits, and the further ones, by how many are the same."""
    first, whole = (run(Case("generate", new)) for new in (1, NEW))
    leave_first(first, whole)
    rows = [{"case": "first", "aim": AIM, **compare(first)}, {"case": "decode", "aim": AIM, **compare(whole)}]
    best = rows[1]["best"]
    ours, theirs = (r.setup["result"] for r in whole if best[r.library] == r.form)
    differing = [number for number, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    rows[1] |= {"difference": None, "equal_tokens": differing[0] if differing else NEW}
    return rows


def step(kind: str, run: Callable[[Case], list[Runner]]) -> list[dict[str, Any]]:
    """A training step, compared by its first losses."""
    return [{"case": kind, "aim": AIM, **compare(run(Case(kind)))}]


def report(results: dict[str, Any]) -> str:
    """LLAVA.md."""
    rounds = results["rounds"]
    lines = [
        "# LLaVA-1.5 on CPU: mmjax beside transformers",
        "",
        "Made by `python experiments/benchmarks/llava.py`; see its first lines for what is measured.",
        "",
        describe(results["machine"], rounds),
        "",
        f"{results['shapes']}. One image; after it {PROMPT} tokens of text where text is generated, {TEXT} "
        f"in a step, of which {LEARNED} are learned.",
        "",
        "The ratio is transformers' time over mmjax's, best form against best form (above 1: mmjax is "
        "faster). The difference is the largest between the two libraries' results (logits, or the first "
        "three losses) over the largest value; for decoding, how many greedy tokens are the same up to the "
        "first that is not, which comes soon: the highest logits of random weights lie close together.",
        "",
        "| case | mmjax | transformers | ratio (range) | aim | difference |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for part in PARTS for row in results[part]]
    lines += [_comparison(row) for row in rows]
    lines += [
        "",
        "Every form. Where mmjax trains, compiling is apart from the first call; all else that compiles does "
        "so in its first call. Peak memory is the process's high-water mark, libraries included.",
        "",
        "| case | library | form | median | processor time | compile | first call | peak memory "
        "| noisy turns |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines += [f"| {TITLES[row['case']]} | {form_cells(form, rounds)} |" for form in row["forms"]]
    return "\n".join(lines) + "\n"


def _comparison(row: dict[str, Any]) -> str:
    """A case's line of the first table."""
    best = {f["library"]: f for f in row["forms"] if row["best"][f["library"]] == f["form"]}
    cells = [_cell(row["case"], best[name]) for name in ("mmjax", "transformers")]
    low, high = row["ratio_range"]
    if row["difference"] is None:
        difference = f"{row['equal_tokens']} of {NEW} tokens"
    else:
        difference = f"{row['difference']:.0e}"
    return (
        f"| {TITLES[row['case']]} | {' | '.join(cells)} | **{row['ratio']:.2f}** ({low:.2f} to {high:.2f}) "
        f"| {row['aim']} | {difference} |"
    )


def _cell(case: str, form: dict[str, Any]) -> str:
    """A time, with the rate of decoding, and the form that had it."""
    seconds = form["median_seconds"]
    rate = f", {(NEW - 1) / seconds:.2f} tokens/s" if case == "decode" else ""
    return f"{milliseconds(seconds)}{rate} ({form['form']})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try this script")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each form (default 3)")
    parser.add_argument("--retakes", type=int, default=4, help="of a turn that others disturbed (default 4)")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="measure these, keep the rest"
    )
    parser.add_argument(
        "--also", nargs="+", choices=list(ALSO), default=[], help="further forms of transformers"
    )
    options = parser.parse_args(arguments)
    eyes, brain = (TINY_EYES, TINY_BRAIN) if options.tiny else (CLIP_L_336, TINY_LLAMA)
    output = Path("output", "llava") if options.tiny else HERE
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "llava.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    results |= {
        "machine": {**machine("jax", "flax", "torch", "transformers", "peft"), "memory": MEMORY},
        "rounds": options.rounds,
        "shapes": "Tiny shapes" if options.tiny else "CLIP ViT-L/14-336 and LLaMA shapes of 1.1B",
    }
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), eyes, brain, "lora" in options.only)

        def run(case: Case) -> list[Runner]:
            return measure(case, options.also, Path(name), options.rounds, options.retakes)

        for part in options.only:
            results[part] = generation(run) if part == "generate" else step(part, run)
            kept.write_text(json.dumps(results, indent=1) + "\n")
            for row in results[part]:
                print(f"  {row['case']}: ratio {row['ratio']:.2f}", flush=True)
    if all(part in results for part in PARTS):
        text = report(results)
        (output / "LLAVA.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
