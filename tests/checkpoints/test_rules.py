"""The key-rule engine: what it makes of a table, and the faults it reports together."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.checkpoints import (
    CONV,
    LINEAR,
    POINTWISE,
    SAME,
    Chain,
    Fused,
    KeyRules,
    Permute,
    Reshape,
    Rule,
    prefixed,
    rule,
)
from mmjax.checkpoints.rules import Link, expand, link
from mmjax.checkpoints.weights import load_params, named_tensors
from mmjax.errors import CheckpointError
from mmjax.models.family import family_of_model
from mmjax.nn import parameter_specs
from mmjax.parallel import ParamSpec
from tests.tiny import MODELS, random_params

TABLE = KeyRules(
    rules=(
        rule("stem.weight", "stem/kernel", LINEAR, "old_stem.weight"),
        rule("blocks.{i}.norm.weight", "layers_{i}/norm/scale"),
        rule("blocks.{i}.qkv", ["layers_{i}/q", "layers_{i}/k", "layers_{i}/v"], Fused(3)),
        rule("scale", "scale", Reshape(before=1)),
    ),
    ignored=((r"blocks\.\d+\.positions", "counted"),),
)


def spec(*shape: int) -> ParamSpec:
    return ParamSpec(shape, "float32", (None,) * len(shape))


TARGETS = {
    "stem/kernel": spec(4, 3),
    **{f"layers_{i}/norm/scale": spec(5) for i in (0, 1, 10)},
    **{f"layers_{i}/{part}": spec(2) for i in (0, 1, 10) for part in "qkv"},
    "scale": spec(),
}
SOURCES = {
    "stem.weight": (3, 4),
    **{f"blocks.{i}.norm.weight": (5,) for i in (0, 1, 10)},
    **{f"blocks.{i}.qkv": (6,) for i in (0, 1, 10)},
    "scale": (1,),
}


def test_expand_fills_every_number_in():
    found = expand(TABLE, TARGETS)
    assert {r.source for r in found} == set(SOURCES)
    assert len(found) == len(SOURCES)
    by_source = {r.source: r for r in found}
    assert by_source["blocks.10.qkv"] == Rule(
        "blocks.10.qkv", ("layers_10/q", "layers_10/k", "layers_10/v"), Fused(3)
    )
    assert by_source["stem.weight"].aliases == ("old_stem.weight",)


def test_expand_leaves_out_what_the_model_has_not():
    found = expand(TABLE, ["scale", "layers_3/norm/scale"])
    assert {r.source: r.targets for r in found} == {
        "scale": ("scale",),
        "blocks.3.norm.weight": ("layers_3/norm/scale",),
    }


def test_a_table_that_misses_or_doubles_a_parameter_is_a_fault_of_the_table():
    with pytest.raises(CheckpointError, match=r"not filled exactly once: {'bias': \[\]}"):
        expand(TABLE, [*TARGETS, "bias"])
    twice = KeyRules((*TABLE.rules, rule("again", "scale")))
    with pytest.raises(CheckpointError, match=re.escape("{'scale': ['scale', 'again']}")):
        expand(twice, TARGETS)
    # One part of a fused tensor that the model does not have.
    with pytest.raises(CheckpointError, match=re.escape("{'layers_4/k': [], 'layers_4/v': []}")):
        expand(KeyRules((rule("blocks.{i}.q", "layers_{i}/q"),)), ["layers_4/q", "layers_4/k", "layers_4/v"])


def test_numbers_match_whole_names_only():
    table = KeyRules((rule("b.{i}.w", "l_{i}/w"),))
    assert expand(table, ["l_12/w"])[0].source == "b.12.w"
    for path in ("l_/w", "l_1/w2", "xl_1/w", "l_a/w", "l_1/1/w", "l_-1/w"):
        with pytest.raises(CheckpointError, match="not filled exactly once"):
            expand(table, [path])
    # A dot in a name is a dot.
    with pytest.raises(CheckpointError, match="extra: bx0xw"):
        link(table, {"bx0xw": (1,), "b.0.w": (1,)}, {"l_0/w": spec(1)}, "here")


def test_link_uses_every_source_and_fills_every_target_once():
    links = link(TABLE, {**SOURCES, "blocks.0.positions": (7,)}, TARGETS, "here")
    assert sorted(entry.source for entry in links) == sorted(SOURCES)
    filled = [target for entry in links for target in entry.targets]
    assert sorted(filled) == sorted(TARGETS)
    assert Link("stem.weight", ("stem/kernel",), LINEAR) in links


def test_link_reads_aliases():
    sources = {("old_stem.weight" if name == "stem.weight" else name): s for name, s in SOURCES.items()}
    [entry] = [e for e in link(TABLE, sources, TARGETS, "here") if e.targets == ("stem/kernel",)]
    assert entry.source == "old_stem.weight"


def test_all_faults_are_reported_together():
    sources = {
        "stem.weight": (4, 3),
        "old_stem.weight": (3, 4),
        "blocks.0.norm.weight": (5,),
        "blocks.1.norm.weight": (5, 1),
        "blocks.0.qkv": (6,),
        "blocks.1.qkv": (9,),
        "blocks.2.qkv": (6,),
        "blocks.0.positions": (7,),
        "blocks.x.positions": (7,),
        "blocks.0.positions.more": (7,),
        "scale": (),
    }
    with pytest.raises(CheckpointError) as info:
        link(TABLE, sources, TARGETS, "folder")
    first, *faults = str(info.value).splitlines()
    assert first == (
        "folder: 10 tensors do not fit the model that config.json describes; "
        "check that weights and config belong together:"
    )
    assert faults == [
        "  doubled: stem.weight and old_stem.weight are the same parameter",
        "  extra: blocks.0.positions.more [7] has no place in this model",
        "  extra: blocks.2.qkv [6] has no place in this model",
        "  extra: blocks.x.positions [7] has no place in this model",
        "  misshapen: blocks.1.norm.weight is [5, 1], expected [5]",
        "  misshapen: blocks.1.qkv is [9], expected [6]",
        "  misshapen: scale is [], expected [1]",
        "  misshapen: stem.weight is [4, 3], expected [3, 4]",
        "  missing: blocks.10.norm.weight (for layers_10/norm/scale)",
        "  missing: blocks.10.qkv (for layers_10/q, layers_10/k, layers_10/v)",
    ]


@settings(max_examples=50, deadline=None, database=None)
@given(st.data())
def test_any_set_of_faults_is_listed_whole(data):
    missing = data.draw(st.sets(st.sampled_from(sorted(SOURCES))))
    misshapen = data.draw(st.sets(st.sampled_from(sorted(SOURCES)))) - missing
    extra = data.draw(st.sets(st.sampled_from(["a", "b.c", "blocks.0", "blocks.2.norm.weight", "stem"])))
    sources = {name: shape for name, shape in SOURCES.items() if name not in missing}
    sources |= {name: (*SOURCES[name], 9) for name in misshapen} | dict.fromkeys(extra, (1,))
    expected = {*(("missing:", n) for n in missing), *(("misshapen:", n) for n in misshapen)}
    expected |= {("extra:", name) for name in extra}
    try:
        link(TABLE, sources, TARGETS, "here")
        found = set()
    except CheckpointError as error:
        found = {tuple(line.split()[:2]) for line in str(error).splitlines()[1:]}
        assert f"here: {len(expected)} tensors" in str(error)
    assert found == expected


def test_prefixes():
    base = (rule("a", "x"), rule("b.{i}", ["y_{i}", "z_{i}"], Fused(2), "c.{i}"))
    made = prefixed(base, "new.", "tower/", ["", "old."])
    assert made == (
        Rule("new.a", ("tower/x",), SAME, ("a", "old.a")),
        Rule(
            "new.b.{i}",
            ("tower/y_{i}", "tower/z_{i}"),
            Fused(2),
            ("b.{i}", "old.b.{i}", "new.c.{i}", "c.{i}", "old.c.{i}"),
        ),
    )


# Transforms

SIZE = st.integers(0, 4)
PERMUTES = (
    st.integers(1, 4).flatmap(lambda n: st.permutations(range(n))).map(lambda axes: Permute(tuple(axes)))
)
RESHAPES = st.builds(Reshape, before=st.integers(0, 2), after=st.integers(0, 2))


@st.composite
def transforms(draw):
    """A transform with fitting target shapes."""
    kind = draw(st.sampled_from(["permute", "reshape", "chain", "fused"]))
    if kind == "reshape":
        return draw(RESHAPES), [tuple(draw(st.lists(SIZE, max_size=3)))]
    permute = draw(PERMUTES)
    shape = tuple(draw(st.lists(SIZE, min_size=len(permute.axes), max_size=len(permute.axes))))
    if kind == "permute":
        return permute, [shape]
    if kind == "chain":
        return Chain(draw(RESHAPES), permute), [shape]
    parts = draw(st.integers(1, 3))
    return Fused(parts, permute), [shape] * parts


@settings(max_examples=150, deadline=None, database=None)
@given(transforms(), st.sampled_from([np.float32, np.float16, np.int8]), st.integers(0, 99))
def test_transforms_are_exact_inverses(made, dtype, seed):
    transform, shapes = made
    rng = np.random.default_rng(seed)
    targets = [rng.integers(-99, 99, shape).astype(dtype) for shape in shapes]
    assert transform.parts == len(shapes)
    source = transform.save(targets)
    assert source.shape == transform.source_shape(shapes)
    assert source.dtype == dtype
    again = transform.load(source)
    assert len(again) == len(targets)
    for a, b in zip(again, targets, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(transform.save(again), source)


def test_the_named_transforms_by_hand():
    x = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(LINEAR.load(x)[0], [[0, 3], [1, 4], [2, 5]])
    assert SAME.load(x)[0].shape == (2, 3)
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # torch: out, in, height, width
    loaded = CONV.load(kernel)[0]
    assert loaded.shape == (4, 5, 3, 2)
    assert loaded[1, 2, 0, 1] == kernel[1, 0, 1, 2]
    pointwise = POINTWISE.load(np.arange(6).reshape(2, 3, 1, 1))[0]
    np.testing.assert_array_equal(pointwise, LINEAR.load(x)[0])
    parts = Fused(2, LINEAR).load(np.arange(12).reshape(4, 3))
    np.testing.assert_array_equal(parts[0], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(parts[1], [[6, 9], [7, 10], [8, 11]])
    np.testing.assert_array_equal(Reshape(before=1).save([np.float32(3.0)]), [3.0])


def test_loading_copies_nothing():
    """Views, so that only one tensor is in memory."""
    x = np.arange(24.0).reshape(2, 3, 4, 1)
    for transform in (SAME, CONV, Chain(Reshape(after=1), Permute((1, 0, 2))), Fused(2, CONV)):
        assert all(np.shares_memory(piece, x) for piece in transform.load(x))


# The families' tables


@pytest.mark.parametrize("name", MODELS)
def test_a_familys_table_covers_its_models(name):
    """Every parameter has one tensor, every tensor one place, and back is the same bits."""
    model = MODELS[name]
    family, architecture = family_of_model(model)
    assert architecture == name
    rules, specs = family.rules(model), flatten_dict(parameter_specs(model), sep="/")
    params = random_params(model)
    tensors = dict(named_tensors(rules, params))
    assert len(tensors) == len(expand(rules, specs))
    assert sum(x.size for x in tensors.values()) == sum(spec.size for spec in specs.values())
    assert all(x.flags.c_contiguous for x in tensors.values())
    reader = SimpleNamespace(
        shapes={name: x.shape for name, x in tensors.items()},
        dtypes=dict.fromkeys(tensors, "F32"),
        read=tensors.__getitem__,
    )
    again = flatten_dict(load_params(reader, rules, parameter_specs(model), where="here"), sep="/")
    params = flatten_dict(params, sep="/")
    assert again.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    for pattern, reason in rules.ignored:
        assert reason and not any(re.fullmatch(pattern, tensor) for tensor in tensors)
