"""The sharding of every array of a run: one table from parameter paths to mesh axes.

Layers do not know it; they only name dimensions of activations (`layers.constrain`).
"""

import contextlib
import functools
import re
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from slam_jax.layers.constrain import AXES, fit
from slam_jax.layers.stacked import names_of
from slam_jax.training.checkpoint.trees import num_bytes

Axes = tuple[str | EllipsisType | None, ...]
WHOLE: Axes = ()

# The end of a path -> the mesh axis of each dimension. None = replicated, ... = as many replicated
# dimensions as are needed; dimensions after the last are replicated. Kernels are sharded along
# heads, hidden units or vocabulary (`tensor`) and along the width D (`fsdp`). Paths are those of
# single layers; stacked layers follow the same rules and are not divided among devices.
RULES: tuple[tuple[str, Axes], ...] = (
    # Embeddings of V tokens or T positions, and the output head.
    (r"(embedding|positions)/embedding", ("tensor", "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    # Projections to heads and hidden units: D or R by (N, H), F or I.
    (r"(?<!experts/)(query|key|value|q|k|v|gate|up)/kernel", ("fsdp", "tensor")),
    (r"(q_nope|q_rope|k_up|v_up)/kernel", ("fsdp", "tensor")),
    (r"query_bias", ("tensor",)),
    # Projections from them: (N, H_v), F or I by D.
    (r"(\w*attention|isolated|mixer|stack|layers/\d+)/out/kernel", ("tensor", ..., "fsdp")),
    (r"(mlp|shared|specialist)/down/kernel", ("tensor", "fsdp")),
    # Projections of two concatenated results, (2, D) by D.
    (r"(blocks/\d+|layer|specialist|rest)/out/kernel", (None, "tensor", "fsdp")),
    # D by a latent or a rotary key that all heads share.
    (r"(q_down|kv_down|k_rope|(memory_bank|latents)/down)/kernel", ("fsdp",)),
    # Expert parallelism: (E, D, F) and (E, F, D).
    (r"experts/(gate|up)/kernel", ("tensor", "fsdp")),
    (r"experts/down/kernel", ("tensor", None, "fsdp")),
    # (P times D) by D: each encoder process has its own part.
    (r"concat/kernel", ("process", "fsdp")),
    # Mamba: channels I, by states or the rank of dt.
    (r"(a_log|skip|conv_bias|(b|c|dt_down)/kernel|dt_up/bias)", ("tensor",)),
    (r"(conv_filter|dt_up/kernel)", (None, "tensor")),
    # Projections of images, vectors and the embeddings of a published language model, and to the
    # retrieval embedding: the last dimension is D.
    (r"(stem|conv1|conv2|shortcut|project|aux|streams/text)/kernel", (..., "fsdp")),
    # Learned positions (S, D) of vision towers.
    (r"positions", (None, "fsdp")),
    # Biases of heads and hidden units.
    (r"(query|key|value|gate|up)/bias", ("tensor",)),
    # Adapters: inputs by their rank, and their rank by outputs.
    (r"lora_a", ("fsdp",)),
    (r"lora_b", (..., "fsdp")),
    # Small parameters.
    (r"(router/scores|weights)/kernel", WHOLE),
    (r"\w*norm\w*(/\d+)?/(scale|bias)", WHOLE),
    (r"(stem|project|aux|alignment|out|down)/bias", WHOLE),
    (r"(log_temperature|choice_bias|type|slot|image_index|instruction|queries)", WHOLE),
    (r"text_convolution/filter", WHOLE),
    (r"readers/\d+/gate", WHOLE),
    (r"(class_token|registers|(attention|mlp)_scale)", WHOLE),
)


def matching_rules(path: str) -> list[Axes]:
    """The axes of each rule that matches the path of a parameter; exactly one rule matches."""
    return [axes for pattern, axes in RULES if re.search(rf"(^|/){pattern}$", path)]


def shardings_of(state: PyTree[Any], mesh: Mesh | None, *, zero: bool = False) -> PyTree[Sharding]:
    """The sharding of each array, or shape, of a `TrainState` or of its parameters.

    Optimizer state and average are sharded as their parameter, because their paths end in its path.
    An axis that does not divide its dimension is left out. Without a mesh everything is on the
    first device. zero: see `MeshConfig`.
    """

    def sharding(path, leaf) -> Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        over_data = zero and not name.startswith(("params/", "frozen/"))
        return NamedSharding(mesh, fit(leaf.shape, _axes(name, leaf.ndim, over_data), mesh.shape))

    return jax.tree.map_with_path(sharding, state)


def with_shardings(shapes: PyTree[Any], mesh: Mesh | None, *, zero: bool = False) -> PyTree[Any]:
    """The shapes of a state with their shardings; see `shardings_of`."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings_of(shapes, mesh, zero=zero),
    )


def _axes(name: str, ndim: int, zero: bool) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension."""
    if ndim == 0 or name.endswith("/ns_coeffs"):  # counters, keys, coefficients of Muon
        return []
    [name, *_], layers = names_of(name)
    found = matching_rules(name)
    if len(found) != 1:
        raise ValueError(f"{name} matches {len(found)} rules of sharding; expected one, see RULES")
    [axes] = found
    # Stacked modules run in parallel: the processes, and the blocks of a level of SLAM v4 and v5.
    stacked: list[tuple[str, ...]] = [("process",)] if "stack" in name.split("/") else []
    if layers is not None:
        stacked.insert(layers, ())
    if ... in axes:
        at, missing = axes.index(...), ndim - len(stacked) - (len(axes) - 1)
        axes = (*axes[:at], *[None] * missing, *axes[at + 1 :])
    named = [() if axis is None else (str(axis),) for axis in axes]
    if zero:
        named = [("fsdp", "data") if axis == ("fsdp",) else axis for axis in named]
    return [*stacked, *named]


def bytes_per_device(tree: PyTree[Any]) -> int:
    """The memory that sharded arrays, or their shapes, take on each device."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    return num_bytes(list(map(jax.ShapeDtypeStruct, shapes, [leaf.dtype for leaf in leaves])))


def local_rows(batch_size: int, mesh: Mesh | None) -> Sequence[int]:
    """The rows of a batch that are on devices of this host process, ascending.

    They need not be contiguous, as a mesh orders TPU devices by topology. Several host processes
    may hold the same rows.
    """
    if mesh is None:
        return range(batch_size)
    sharding = _of_rows(batch_size, mesh)
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part for row in range(batch_size)[part[0]]})


def place(batch: PyTree[Any], mesh: Mesh | None, batch_size: int) -> PyTree[Any]:
    """Shards a batch over the devices; without a mesh it is returned unchanged.

    Each host process passes its `local_rows` of the `batch_size` rows, in order.
    """
    if mesh is None:
        return batch
    sharding = _of_rows(batch_size, mesh)
    put = functools.partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(lambda x: put(x, (batch_size, *x.shape[1:])), batch)


def _of_rows(batch_size: int, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, fit((batch_size,), [AXES["batch"]], mesh.shape))


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which `layers.constrain` applies to this mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_one_device() -> contextlib.AbstractContextManager[Any]:
    """A context in which new arrays are on the first device of this process alone, also inside of
    `use_mesh`."""
    return jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]), ("data",)))
