"""Which parameters train: chosen by path patterns, and trees of parameters split by them.

Trees are nested dicts of arrays. Names are slash paths of single layers, such as
`decoder/layers/0/mlp/up/kernel`, also where the layers are stacked.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from slam_jax.errors import ConfigError, InputError
from slam_jax.layers.stacked import names_of
from slam_jax.patterns import matching
from slam_jax.training.optimizer import OptimizerConfig

Tree = dict[Any, Any]


class Split(NamedTuple):
    """How the parameters of a model are split into those that train and the frozen ones.

    shapes: of all parameters; frozen ones have the dtype that their base stores. frozen: names of
    those that do not train. provided: of them, those of a base.
    """

    shapes: Tree
    frozen: frozenset[str] = frozenset()
    provided: frozenset[str] = frozenset()

    def of(self, params: Tree) -> tuple[Tree, Tree | None]:
        """The parameters that train, and the frozen ones, None where there are none."""
        return partition(params, self.frozen) if self.frozen else (params, None)

    def stored(self, frozen: Tree | None) -> Tree | None:
        """The frozen parameters that checkpoints store, None where there are none."""
        return partition(frozen, self.provided)[0] or None if frozen else None


def split_of(shapes: Tree, config: OptimizerConfig, provided: Mapping[str, Any] = {}) -> Split:
    """How parameters of these shapes are split; see `OptimizerConfig.train`.

    provided: shape and stored dtype by name of the parameters that a base provides.

    Raises:
      ConfigError: a pattern matches nothing, or a part of an array, or no parameter is left.
      InputError: what is provided does not fit the model.
    """
    names = names_in(shapes)
    if unknown := provided.keys() - names:
        raise InputError(f"a base has the parameter {min(unknown)!r}, which the model does not")
    frozen = set(provided)
    if config.train:
        frozen = names - matching(names, config.train, "optimizer.train")
    frozen |= matching(names, config.freeze, "optimizer.freeze")
    if frozen >= names:
        raise ConfigError("optimizer.train and optimizer.freeze leave no parameter that trains")
    new: Tree = {}
    for keys, leaf in _entries(shapes):
        [name, *others], axis = names_of("/".join(map(str, keys)))
        for kind in (frozen, provided):
            _require_alike([name, *others], kind)
        if name in provided:
            leaf = _checked(leaf, axis, name, provided[name], cast=name not in frozen)
        _put(new, keys, leaf)
    return Split(new, frozenset(frozen), frozenset(frozen & provided.keys()))


def _require_alike(layers: Sequence[str], names: Collection[str]) -> None:
    """Raises ConfigError where some of the layers of a stacked array are among the names."""
    inside = [name for name in layers if name in names]
    if 0 < len(inside) < len(layers):
        [other, *_] = [name for name in layers if name not in names]
        raise ConfigError(
            f"{inside[0]} is frozen and {other}, which is stacked with it, trains; set "
            "model.scan_layers=False, or choose the same for both"
        )


def _checked(leaf: Any, axis: int | None, name: str, given: Any, *, cast: bool) -> Any:
    """The shape of a parameter with the dtype of what a base provides for it."""
    one = leaf.shape if axis is None else (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
    if tuple(given.shape) != one:
        raise InputError(f"{name} is {list(given.shape)} in its base and {list(one)} in the model")
    return leaf if cast else jax.ShapeDtypeStruct(leaf.shape, given.dtype)


def partition(params: Tree, names: Collection[str]) -> tuple[Tree, Tree]:
    """The other arrays, and those of `names`; both as trees of the same paths, {} = none."""
    rest: Tree = {}
    chosen: Tree = {}
    for keys, x in _entries(params):
        name = names_of("/".join(map(str, keys)))[0][0]
        _put(chosen if name in names else rest, keys, x)
    return rest, chosen


def merge(params: Any, others: Any) -> Any:
    """The arrays of two trees as one; the inverse of `partition`. None = no arrays."""
    if not others:
        return params
    if not params:
        return others
    merged = dict(params)
    for key, value in others.items():
        both = key in merged and isinstance(merged[key], Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def names_layers(patterns: Iterable[str]) -> bool:
    """Whether the patterns may treat some layers unlike others."""
    return any({*"?[0123456789"} & {*pattern} for pattern in patterns)


def names_in(params: Tree | None) -> set[str]:
    """The names of all arrays of a tree."""
    paths = ("/".join(map(str, keys)) for keys, _ in _entries(params or {}))
    return {name for path in paths for name in names_of(path)[0]}


def _put(tree: Tree, keys: tuple[Any, ...], x: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = x


def _entries(params: Tree, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _entries(dict(value), (*keys, key))
        else:
            yield (*keys, key), value
