"""LoRA: small trained changes beside frozen kernels, as pure functions on parameter trees.

An adapter is a nested dict in the shape of the model's parameters, with {"a": [D, R], "b": [R, F]} in place
of each kernel [D, F] that it changes. Several adapters add up. `adapt` puts them beside the kernels, so that
a model computes x @ kernel + scale * (dropout(x) @ a) @ b; `merge_lora` makes one kernel of them.

An adapter that was opened (see `mmjax.training.peft`) may change an embedding table [V, D] as well, with a
[V, R] and b [R, D]. Rows are looked up in a table and no product is taken, so `adapt` puts the sum in its
place, as `merge_lora` does, without dropout.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Container, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax.errors import ConfigError
from mmjax.nn.kernels import AdaptedKernel, LowRank, StoredKernel, as_array
from mmjax.nn.quantized import LAYER_KERNELS, quantize
from mmjax.parallel import replicated
from mmjax.training.source import FromFolder, OpenedModel
from mmjax.training.state import flatten, merge

Array = jax.Array
Adapter = Mapping[str, Any]
TABLE = "/embedding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What an adapter changes, and how strongly.

    Args:
        targets: regular expression that has to match a kernel's whole path.
        rank: R.
        alpha: the change is multiplied by alpha / rank, or alpha / sqrt(rank) with `rslora`.
        dropout: share of the adapter's inputs that training zeroes; each kernel draws its own.
        rslora: see alpha.
        exceptions: (pattern of a whole path, rank, alpha) where they differ; the first match wins.

    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for
    Fine-Tuning with LoRA".

    >>> LoraConfig(rank=4, alpha=8).scale_of("a/kernel"), LoraConfig(rank=4, rslora=True).scale_of("a/kernel")
    (2.0, 8.0)
    """

    targets: str = LAYER_KERNELS
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    exceptions: tuple[tuple[str, int, float], ...] = ()

    def __post_init__(self) -> None:
        ranks = [self.rank, *(rank for _, rank, _ in self.exceptions)]
        if any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in ranks):
            raise ConfigError(f"LoraConfig: ranks are positive integers, got {ranks}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoraConfig.dropout={self.dropout} has to be in [0, 1)")
        for pattern in (self.targets, *(pattern for pattern, _, _ in self.exceptions)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"LoraConfig: {pattern!r} is no regular expression: {error}") from None

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """Of one kernel."""
        found = (rest for pattern, *rest in self.exceptions if re.fullmatch(pattern, path))
        rank, alpha = next(found, [self.rank, self.alpha])
        return int(rank), float(alpha)

    def scale_of(self, path: str) -> float:
        """What multiplies a @ b at one kernel."""
        rank, alpha = self.rank_and_alpha(path)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def init_lora(key: Array, params: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """A new adapter, which changes nothing yet: `a` is drawn, `b` is zero.

    Args:
        key: PRNG key.
        params: the model's parameters, nested; shapes are enough.
        config: which kernels, which rank.

    Returns:
        The adapter, float32; `a` is uniform within 1 / sqrt(D), as peft draws it.

    Raises:
        ConfigError: no kernel matches, or something that does is no kernel [D, F].

    >>> params = {"mlp": {"kernel": jnp.ones((3, 4))}}
    >>> tree = init_lora(jax.random.key(0), params, LoraConfig(targets=".*", rank=2))
    >>> tree["mlp"]["a"].shape, tree["mlp"]["b"].shape
    ((3, 2), (2, 4))
    """
    flat = _kernels(params)
    chosen = [path for path in flat if re.fullmatch(config.targets, path)]
    if not chosen:
        raise ConfigError(
            f"LoraConfig.targets={config.targets!r} matches no parameter; one is {next(iter(flat))!r}"
        )
    wrong = [path for path in chosen if not path.endswith("kernel") or len(flat[path].shape) != 2]
    if wrong:
        raise ConfigError(
            f"LoraConfig.targets={config.targets!r} matches {wrong[0]}, which is no kernel [D, F]"
        )
    adapter = {}
    for path in chosen:
        (width, features), (rank, _) = flat[path].shape, config.rank_and_alpha(path)
        module, bound = path.removesuffix("/kernel"), 1 / math.sqrt(width)
        adapter[f"{module}/a"] = jax.random.uniform(
            _key_of(key, path), (width, rank), minval=-bound, maxval=bound
        )
        adapter[f"{module}/b"] = jnp.zeros((rank, features))
    return merge(adapter)


def adapt(
    params: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    configs: Mapping[str, LoraConfig],
    *,
    key: Array | None = None,
) -> dict[str, Any]:
    """Parameters with adapters beside their kernels, as a model takes them; no kernel is changed or copied.

    Exactly peft's arithmetic: each adapter has a dropout of its own in front of `a`, the base's input has
    none, and without a key there is no dropout. Embedding tables become the sum (see the module).

    Args:
        params: nested parameters; kernels may be int8 (see `mmjax.nn.quantized`).
        adapters: adapters by name, any number.
        configs: their configs, by the same names.
        key: PRNG key for dropout; None: none.

    Returns:
        The tree with an `AdaptedKernel` in place of each kernel that an adapter changes, and the changed
        table in place of each table.

    Raises:
        ConfigError: an adapter without config, or one that does not fit the parameters.
    """
    flat, changes = _kernels(params), _changes(params, adapters, configs, key)
    adapted = {path: AdaptedKernel(flat[path], tuple(found)) for path, found in changes.items()}
    return merge(flat, {path: x.array() if path.endswith(TABLE) else x for path, x in adapted.items()})


def merge_lora(
    params: Mapping[str, Any], adapters: Mapping[str, Adapter], configs: Mapping[str, LoraConfig]
) -> dict[str, Any]:
    """Parameters with kernel + the sum of scale * a @ b in place of each kernel that an adapter changes.

    The sums are taken in float32 and rounded once to the kernel's dtype; int8 kernels become arrays.

    Args, Raises: as `adapt`.
    """
    return _added(params, adapters, configs, 1.0)


def unmerge_lora(
    params: Mapping[str, Any], adapters: Mapping[str, Adapter], configs: Mapping[str, LoraConfig]
) -> dict[str, Any]:
    """The inverse of `merge_lora`, up to the rounding of the kernels' dtype."""
    return _added(params, adapters, configs, -1.0)


def changed_path(module: str, paths: Container[str]) -> str:
    """The parameter that an adapter changes at a module: its table, where it has one, else its kernel.

    Args:
        module: path of the module.
        paths: of all of the model's parameters.

    >>> changed_path("embed", {"embed/embedding"}), changed_path("head", {"head/kernel"})
    ('embed/embedding', 'head/kernel')
    """
    return module + TABLE if module + TABLE in paths else f"{module}/kernel"


def _added(
    params: Mapping[str, Any], adapters: Mapping[str, Adapter], configs: Mapping[str, LoraConfig], sign: float
) -> dict[str, Any]:
    flat, merged = _kernels(params), {}
    for path, found in _changes(params, adapters, configs, None).items():
        signed = tuple(dataclasses.replace(change, scale=sign * change.scale) for change in found)
        merged[path] = AdaptedKernel(flat[path], signed).array()
    return merge(flat, merged)


def _kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    return flatten(dict(params))


def _changes(
    params: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    configs: Mapping[str, LoraConfig],
    key: Array | None,
) -> dict[str, list[LowRank]]:
    """What each kernel is changed by, in the adapters' order."""
    flat = _kernels(params)
    changes: dict[str, list[LowRank]] = {}
    for number, (name, adapter) in enumerate(adapters.items()):
        if name not in configs:
            raise ConfigError(f"adapter {name!r} has no config; there are {', '.join(configs) or 'none'}")
        config, leaves = configs[name], _kernels(adapter)
        for module in dict.fromkeys(path.rpartition("/")[0] for path in leaves):
            path = changed_path(module, flat)
            a, b = leaves.get(f"{module}/a"), leaves.get(f"{module}/b")
            if path not in flat or a is None or b is None:
                raise ConfigError(f"adapter {name!r}: {module} has no kernel in the model, or lacks a or b")
            if (a.shape[0], b.shape[1]) != tuple(flat[path].shape) or a.shape[1] != b.shape[0]:
                shapes = f"a {list(a.shape)} and b {list(b.shape)}"
                raise ConfigError(f"adapter {name!r}: {shapes} do not fit {path} {list(flat[path].shape)}")
            if a.shape[1] != config.rank_and_alpha(path)[0]:
                raise ConfigError(
                    f"adapter {name!r}: {module} has rank {a.shape[1]}, its config says otherwise"
                )
            drawn = None
            if key is not None and config.dropout:
                drawn = jax.random.key_data(_key_of(jax.random.fold_in(key, number), path))
            change = LowRank(a, b, config.scale_of(path), config.dropout, drawn)
            changes.setdefault(path, []).append(change)
    return changes


def _key_of(key: Array, path: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


@dataclasses.dataclass(frozen=True)
class LoraModel:
    """A model with adapters: its parameters are {"base": the model's, "lora": {name: adapter}}.

    Called as the model itself is; everything else it is asked for is the model's. Dropout of the adapters
    needs `deterministic=False` and a "dropout" key, as the model's own does.

    Args:
        model: the Linen module.
        configs: pairs of an adapter's name and config.
        base: the folder or hub id that the model comes from.
    """

    model: nn.Module
    configs: tuple[tuple[str, LoraConfig], ...]
    base: str | None = None

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`model.apply` with adapted parameters."""
        noisy = not kwargs.get("deterministic", True) and kwargs.get("rngs")
        key = jax.random.fold_in(kwargs["rngs"]["dropout"], zlib.crc32(b"lora")) if noisy else None
        params = variables["params"]
        effective = adapt(params["base"], params["lora"], dict(self.configs), key=key)
        return self.model.apply({**variables, "params": effective}, *args, **kwargs)

    def merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of the plain model, adapters merged, int8 kernels made arrays."""
        merged = merge_lora(params["base"], params["lora"], dict(self.configs))
        return jax.tree.map(as_array, merged, is_leaf=lambda leaf: isinstance(leaf, StoredKernel))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraFromFolder(FromFolder):
    """The model of a hub folder with a new adapter; its stage freezes "base/.*" and trains "lora/.*".

    Args:
        path, dtype, execution, processor: as in `FromFolder`.
        lora: the adapter's config.
        name: the adapter's name.
        adapter: folder in PEFT's format to go on from; its config then counts, and what was trained whole
            beside the adapter replaces the base's.
        whole: regular expression of whole paths; parameters of the base that match it, such as a bridge's,
            train too, so they are kept in float32.
        int8: store the base's layer kernels as int8 (see `mmjax.nn.quantized`); each device then holds them
            whole.
    """

    lora: LoraConfig = LoraConfig()
    name: str = "default"
    adapter: str | None = None
    whole: str = ""
    int8: bool = False

    def open(self, data: Any, key: Array, mesh: Mesh) -> OpenedModel:
        """Read all but the folder's weights; the adapter stands beside them when they are asked for."""
        opened = super().open(data, key, mesh)
        own: Any = None
        config, trained = self.lora, dict[str, Array]()
        if self.adapter is not None:
            from mmjax.training.peft import load_tuned

            own, config, trained = load_tuned(self.adapter, opened.model)
        key = jax.random.fold_in(key, zlib.crc32(b"lora"))

        def beside(flat: dict[str, Any]) -> dict[str, Any]:
            # Copies: whoever trains parameters may donate them.
            made = (lambda base: init_lora(key, base, config)) if own is None else (lambda _: _copy(own))
            return self._beside(flat, _copy(trained), made)

        shapes = jax.eval_shape(beside, opened.shapes)
        return self._opened(opened, config, shapes, mesh, lambda: beside(opened.params()))

    def open_shapes(self, mesh: Mesh) -> OpenedModel:
        """The same as shapes, for a plan: the folder's headers are read, and a new adapter is taken."""
        from mmjax.training.plan_shapes import folder_shapes

        opened = folder_shapes(self, mesh)

        def beside(flat: dict[str, Any]) -> dict[str, Any]:
            return self._beside(flat, {}, lambda base: init_lora(jax.random.key(0), base, self.lora))

        return self._opened(opened, self.lora, jax.eval_shape(beside, opened.shapes), mesh, dict)

    def _beside(
        self, flat: dict[str, Any], trained: Mapping[str, Any], adapter: Callable[[dict[str, Any]], Adapter]
    ) -> dict[str, Any]:
        """The base's parameters, some of them trained before, and an adapter's, which is made for it."""
        from mmjax.training.parts import chosen, with_parts

        if self.whole:
            flat = flat | {path: x.astype("float32") for path, x in chosen(merge(flat), self.whole).items()}
        base = merge(flat)
        if self.int8:
            base = quantize(base)
        made = adapter(base)
        base = with_parts(base, trained) if trained else base
        return _kernels({"base": base, "lora": {self.name: made}})

    def _opened(
        self,
        opened: OpenedModel,
        config: LoraConfig,
        shapes: dict[str, Any],
        mesh: Mesh,
        params: Callable[[], dict[str, Any]],
    ) -> OpenedModel:
        whole = replicated(mesh)
        return OpenedModel(
            model=LoraModel(opened.model, ((self.name, config),), self.path),  # type: ignore[arg-type]
            processor=opened.processor,
            shapes=shapes,
            shardings={path: opened.shardings.get(path.removeprefix("base/"), whole) for path in shapes},
            params=params,
        )


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
