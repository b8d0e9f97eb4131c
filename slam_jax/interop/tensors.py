"""Tables of published tensors: a row has a name in the files and the parameters behind it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import einops
import numpy as np

from slam_jax.layers.stacked import names_of

Path = tuple[str | int, ...]
Params = Mapping[Path, Any]


class Tensor(NamedTuple):
    """A published tensor: our parameters joined along their last axis, and rearranged.

    For example, `HEADS_IN` and the kernels [R, N, H] of keys and values give DeepSeek's
    `kv_b_proj`: in each head the rows of the keys, then those of the values.

    index: of stacked parameters only this entry, such as one expert, or one expert of a layer.
    """

    paths: tuple[Path, ...]
    pattern: str
    index: tuple[int, ...] = ()

    def publish(self, params: Params) -> np.ndarray:
        """The published tensor of these parameters, contiguous in the memory of the host."""
        # Indexed on the device first: it may have room for one more expert, not for all.
        each = [np.asarray(params[p][self.index]) for p in self.paths]
        joined = each[0] if len(each) == 1 else np.concatenate(each, axis=-1)
        return np.ascontiguousarray(einops.rearrange(joined, self.pattern))

    def shape(self, params: Params) -> tuple[int, ...]:
        """The shape of the published tensor; `params` may be shapes alone."""
        joined = np.broadcast_to(np.int8(0), self._joined(params))  # takes no memory
        return einops.rearrange(joined, self.pattern).shape

    def parts(self, published: np.ndarray, params: Params) -> list[np.ndarray]:
        """The part of the published tensor that belongs to each parameter, in its shape."""
        ours, theirs = self.pattern.split(" -> ")
        sizes = dict(zip(ours.split(), self._joined(params), strict=True))
        joined = einops.rearrange(published, f"{theirs} -> {ours}", **sizes)
        ends = np.cumsum([params[path].shape[-1] for path in self.paths])
        return np.split(joined, ends[:-1], axis=-1)

    def _joined(self, params: Params) -> tuple[int, ...]:
        shape = params[self.paths[0]].shape[len(self.index) :]
        return (*shape[:-1], sum(params[path].shape[-1] for path in self.paths))


class Row(NamedTuple):
    """The parameters of one published name, of which "{i}" is the layer and "{e}" the expert.

    paths: of one parameter or of several, with spaces between. In a layer they begin at its block.
    pattern: see `Tensor`. when: whether a file has the row, by the configuration and by whether the
      file is fused, which means one tensor for all experts of a layer.
    """

    paths: str
    pattern: str
    when: Callable[[Any, bool], bool] = lambda config, fused: True


Table = Mapping[str, Row]
Layout = dict[str, Tensor]


def expand(
    table: Table, config: Any, shapes: Params, blocks: Sequence[Path], *, fused: bool = False
) -> Layout:
    """The tensor behind every name that files of a model have.

    shapes: of its parameters; a row is left out where the model has no such parameter with as many
    axes. blocks: the path of each layer.
    """
    rows = [(key, row, ()) for key, row in table.items() if "{i}" not in key]
    for i, block in enumerate(blocks):
        rows += [(k.replace("{i}", str(i)), row, block) for k, row in table.items() if "{i}" in k]
    places, layout = _places(shapes), {}
    for key, row, block in rows:
        names = [_name((*block, *path.split("."))) for path in row.paths.split()]
        axes = len(row.pattern.split(" -> ")[0].split()) + ("{e}" in key)
        if names[0] not in places or not row.when(config, fused):
            continue
        first, index = places[names[0]]  # all of them are in the same layer
        shape = shapes[first].shape[len(index) :]
        if len(shape) != axes:
            continue
        paths = tuple(places[name][0] for name in names)
        for e in np.ndindex(shape[0]) if "{e}" in key else [()]:
            name = key.replace("{e}", str(*e))
            layout[name] = Tensor(paths, row.pattern, (*index, *e))
    return layout


def _name(path: Path) -> str:
    return "/".join(map(str, path))


def _places(shapes: Params) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Where the parameters of single layers are: their path, and of stacked ones the entry."""
    places = {}
    for path in shapes:
        names, axis = names_of(_name(path))
        for i, name in enumerate(names):
            places[name] = path, () if axis is None else (i,)
    return places
