"""Fills a model with published weights, parameter by parameter."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from slam_jax.errors import InputError
from slam_jax.interop.tensors import Layout, Params, Path, Tensor
from slam_jax.interop.weights import Source, shown

# The dtype of parameters by that of weights. We compute in no float16, and in no float8.
_PARAMETERS = {
    "F32": jnp.dtype("float32"),
    "BF16": jnp.dtype("bfloat16"),
    "F16": jnp.dtype("float32"),
    "I8": jnp.dtype("int8"),
}
_SHOWN = 5


def fill(
    make: Callable[[], Any],
    layout_of: Callable[[Params], Layout],
    source: Source,
    *,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    check_finite: bool = True,
) -> Any:
    """The model that `make` makes, with stored weights; it is never built with others.

    layout_of: from the shapes of its parameters. param_dtype: of all parameters, None = that of the
    weights, with float32 for float16; a parameter of several weights has the widest. One line of
    the log says which weights are cast. mesh: the devices that hold the parameters, by
    `slam_jax.training.sharding.RULES`; None = the default device. A process reads only what its own
    devices hold. check_finite: whether NaN and infinity are refused in what is read.

    Raises InputError where weights do not fit.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    tree = nnx.to_pure_dict(state)
    shapes: Any = flatten_dict(tree)
    layout = layout_of(shapes)
    _check(layout, shapes, source)
    dtypes = _dtypes(layout, source, param_dtype)
    shardings = _shardings(tree, mesh)
    shapes = {
        path: jax.ShapeDtypeStruct(x.shape, dtypes[path], sharding=shardings.get(path))
        for path, x in shapes.items()
    }
    _log_casts(layout, shapes, source)
    params = read_parameters(layout, shapes, source, check_finite=check_finite)
    return nnx.merge(graphdef, nnx.State(unflatten_dict(params)))


def read_parameters(
    layout: Layout,
    shapes: Params,
    source: Source,
    wanted: Collection[Path] | None = None,
    *,
    check_finite: bool = True,
) -> dict[Path, jax.Array]:
    """The parameters on their devices, one after the other.

    shapes: with dtypes and shardings, for all tensors of the layout. wanted: None = all parameters.
    Raises InputError where NaN or infinity is found and refused.
    """
    params: dict[Path, jax.Array] = {}
    for tensors in _groups(layout):
        params |= _read(tensors, shapes, source, check_finite)
    return params if wanted is None else {path: x for path, x in params.items() if path in wanted}


def parameter_dtypes(layout: Layout, shapes: Params, source: Source) -> dict[Path, Any]:
    """The dtype of each parameter, which is that of its weights, with float32 for float16.

    Raises InputError where the weights do not fit these shapes.
    """
    _check(layout, shapes, source)
    return _dtypes(layout, source, None)


def main_dtype(source: Source) -> str:
    """The dtype of most parameters, where each has that of its weights."""
    sizes: Counter[str] = Counter()
    for _, shape, dtype in source.stored.values():
        sizes[_PARAMETERS.get(dtype, _PARAMETERS["F32"]).name] += math.prod(shape)
    return max(sizes, key=sizes.__getitem__, default="float32")


def _check(layout: Layout, shapes: Params, source: Source) -> None:
    """Checks keys, shapes and dtypes."""
    problems, missing = [], [key for key in layout if key not in source.stored]
    left_over = sorted(source.stored.keys() - layout.keys())
    for what, keys in (("missing", missing), ("left over", left_over)):
        names = ", ".join(map(shown, keys[:_SHOWN])) + (", .." if len(keys) > _SHOWN else "")
        problems += [f"{len(keys):,} {what} ({names})"] if keys else []
    if problems:
        raise InputError(f"{source.name}: weights do not fit config.json: {'; '.join(problems)}")
    for key, tensor in layout.items():
        (file, found, dtype), expected = source.stored[key], tensor.shape(shapes)
        if found != expected:
            expected = f"config.json makes it {list(expected)}"
            raise InputError(f"{file}: {key} is {list(found)}; {expected}")
        eight = shapes[tensor.paths[0]].dtype == np.int8
        known = [name for name, own in _PARAMETERS.items() if (own == np.int8) == eight]
        if dtype not in known:
            raise InputError(f"{file}: {key} is {dtype}; expected one of {', '.join(known)}")


def _dtypes(layout: Layout, source: Source, param_dtype: str | None) -> dict[Path, Any]:
    """The dtype of each parameter."""
    dtypes: dict[Path, Any] = {}
    for key, tensor in layout.items():
        stored = _PARAMETERS[source.stored[key].dtype]
        eight = param_dtype is None or stored == np.int8
        own = stored if eight else jnp.dtype(param_dtype)
        for path in tensor.paths:
            dtypes[path] = jnp.promote_types(dtypes.get(path, own), own)
    return dtypes


def _log_casts(layout: Layout, shapes: Params, source: Source) -> None:
    casts: Counter[str] = Counter()
    for key, tensor in layout.items():
        dtype = source.stored[key].dtype
        for new in {shapes[path].dtype for path in tensor.paths} - {_PARAMETERS.get(dtype)}:
            casts[f"{dtype} to {new}"] += 1
    if casts:
        each = ", ".join(f"{count:,} from {cast}" for cast, count in sorted(casts.items()))
        logging.getLogger("slam_jax").info("%s: weights are cast: %s", source.name, each)


def _groups(layout: Layout) -> Iterator[dict[str, Tensor]]:
    """The tensors of one parameter after the other, or of a few that share each tensor."""
    groups: dict[tuple[Path, ...], dict[str, Tensor]] = {}
    for key, tensor in layout.items():
        groups.setdefault(tensor.paths, {})[key] = tensor
    yield from groups.values()


def _shardings(tree: Any, mesh: Mesh | None) -> Mapping[Path, Any]:
    if mesh is None:
        return {}
    from slam_jax.training.sharding import shardings_of  # imports the checkpoints

    return flatten_dict(shardings_of(tree, mesh))


# A part of an array: where it begins and ends along each axis.
_Part = tuple[tuple[int, int], ...]


def _part(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Part:
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))


def _own_parts(x: jax.ShapeDtypeStruct) -> dict[_Part, np.ndarray]:
    """Room for each different part of a parameter that devices of this process hold."""
    indices: Any = [tuple(slice(None) for _ in x.shape)]
    if x.sharding is not None:
        indices = x.sharding.addressable_devices_indices_map(x.shape).values()
    parts = {_part(index, x.shape) for index in indices}
    return {part: np.empty([stop - start for start, stop in part], x.dtype) for part in parts}


def _on_devices(x: jax.ShapeDtypeStruct, parts: dict[_Part, np.ndarray]) -> jax.Array:
    if x.sharding is None:
        [whole] = parts.values()
        return jax.device_put(whole)
    return jax.make_array_from_callback(
        x.shape, x.sharding, lambda index: parts[_part(index or (), x.shape)]
    )


def _read(
    group: dict[str, Tensor], shapes: Params, source: Source, check_finite: bool
) -> dict[Path, jax.Array]:
    """The parameters of some tensors, on their devices."""
    paths = next(iter(group.values())).paths
    parts = {path: _own_parts(shapes[path]) for path in paths}
    for key, tensor in group.items():
        targets = {path: _targets(parts[path], tensor.index) for path in paths}
        if not any(targets.values()):
            continue
        for path, published in zip(paths, tensor.parts(source.read(key), shapes), strict=True):
            for target, index in targets[path]:
                found = published[index]
                if check_finite and not _is_finite(found):
                    raise InputError(
                        f"{source.stored[key].file}: {key} has NaN or infinity; download it again, "
                        "or load it with check_finite=False"
                    )
                target[...] = found
    arrays = {path: _on_devices(shapes[path], parts.pop(path)) for path in paths}
    return jax.block_until_ready(arrays)  # the next ones may take the memory of these


def _targets(
    parts: dict[_Part, np.ndarray], entry: tuple[int, ...]
) -> list[tuple[np.ndarray, tuple[slice, ...]]]:
    """Where a tensor goes that is an entry of stacked parameters, and which part of it."""
    found = []
    for part, array in parts.items():
        leading, rest = part[: len(entry)], part[len(entry) :]
        if all(start <= i < stop for i, (start, stop) in zip(entry, leading, strict=True)):
            at = tuple(i - start for i, (start, _) in zip(entry, leading, strict=True))
            found.append((array[(*at, ...)], tuple(slice(*each) for each in rest)))
    return found


def _is_finite(x: np.ndarray) -> bool:
    """Without a copy: as whole numbers, NaN and infinity are the largest of either sign."""
    if x.dtype == np.int8:
        return True
    largest = np.array(np.inf, x.dtype)
    for kind, bound in (("i", largest), ("u", -largest)):
        bits = f"{kind}{x.itemsize}"
        if x.size and x.view(bits).max() >= bound.view(bits):
            return False
    return True
