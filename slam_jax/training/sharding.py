"""Where every array of a run stands: one table, from a parameter's path to the axes of the mesh.

Layers know nothing of it, but for the names that they give to dimensions (`layers.constrain`).
"""

import contextlib
import re
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from slam_jax.layers.constrain import AXES, fit
from slam_jax.training.checkpoint.trees import num_bytes

Axes = tuple[str | EllipsisType | None, ...]
WHOLE: Axes = ()

# The end of a path -> the axis of each dimension, None = whole, ... = whole as often as is needed;
# those after the last are whole. Maps are divided where heads, hidden units or the vocabulary are
# (`tensor`) and along the width of the residual stream (`fsdp`).
RULES: tuple[tuple[str, Axes], ...] = (
    # Tables of V or T rows, and what writes V logits.
    (r"(embedding|positions)/embedding", ("tensor", "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    # Into heads and hidden units: D or R by (N, H), F or I.
    (r"(?<!experts/)(query|key|value|q|k|v|gate|up)/kernel", ("fsdp", "tensor")),
    (r"(q_nope|q_rope|k_up|v_up)/kernel", ("fsdp", "tensor")),
    (r"query_bias", ("tensor",)),
    # And out of them: (N, V), F or I by D.
    (r"(\w*attention|isolated|mixer|stack|layers/\d+)/out/kernel", ("tensor", ..., "fsdp")),
    (r"(mlp|shared|specialist)/down/kernel", ("tensor", "fsdp")),
    # Two results side by side, (2, D) by D.
    (r"(blocks/\d+|layer|specialist|rest)/out/kernel", (None, "tensor", "fsdp")),
    # D by a latent, a rotary key, or whatever else is narrow and shared by all heads.
    (r"(q_down|kv_down|k_rope|(memory_bank|latents)/down)/kernel", ("fsdp",)),
    # Expert parallel: E by D by F, and back.
    (r"experts/(gate|up)/kernel", ("tensor", "fsdp")),
    (r"experts/down/kernel", ("tensor", None, "fsdp")),
    # P times D by D: the part of each process stands with it.
    (r"concat/kernel", ("process", "fsdp")),
    # Mamba: its channels I, by the states N or the rank of dt.
    (r"(a_log|skip|conv_bias|(b|c|dt_down)/kernel|(dt_up|value|gate)/bias)", ("tensor",)),
    (r"(conv_filter|dt_up/kernel)", (None, "tensor")),
    # From pictures and vectors, and to the retrieval embedding: the last dimension is D.
    (r"(stem|conv1|conv2|shortcut|project|aux)/kernel", (..., "fsdp")),
    # Small, or one value for many.
    (r"(router/scores|weights)/kernel", WHOLE),
    (r"\w*norm\w*(/\d+)?/(scale|bias)", WHOLE),
    (r"(stem|project|aux|alignment|out)/bias", WHOLE),
    (r"(log_temperature|type|slot|instruction|queries)", WHOLE),
)


def rules_of(path: str) -> list[Axes]:
    """The axes of every rule that the path of a parameter ends in; there is exactly one."""
    return [axes for pattern, axes in RULES if re.search(rf"(^|/){pattern}$", path)]


def layout(state: PyTree[Any], mesh: Mesh | None, *, zero: bool = False) -> PyTree[Sharding]:
    """The sharding of each array of a `TrainState` or of its parameters, which may be shapes alone.

    Optimizer state and average stand where their parameter does, since their paths end in its. Of
    what the table says an axis is left out that does not divide its dimension. zero: see
    `MeshConfig`. Without a mesh all of it stands on the first device.
    """
    if mesh is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda leaf: one, state)

    def sharding(path, leaf) -> Sharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kept = zero and not name.startswith("params/")
        return NamedSharding(mesh, fit(leaf.shape, _axes(name, leaf.ndim, kept), mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def laid_out(shapes: PyTree[Any], mesh: Mesh | None, *, zero: bool = False) -> PyTree[Any]:
    """The shapes of a state, each with its sharding; see `layout`."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        layout(shapes, mesh, zero=zero),
    )


def _axes(name: str, ndim: int, zero: bool) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension."""
    if ndim == 0 or name.endswith("/ns_coeffs"):  # counters, keys, numbers of Muon's
        return []
    [axes] = rules_of(name)
    # What is stacked is run side by side: the processes, and the blocks of a level of SLAM v4, v5.
    stacked = [("process",)] if "stack" in name.split("/") else []
    if ... in axes:
        at, missing = axes.index(...), ndim - len(stacked) - (len(axes) - 1)
        axes = (*axes[:at], *[None] * missing, *axes[at + 1 :])
    named = [() if axis is None else (str(axis),) for axis in axes]
    if zero:
        named = [("fsdp", "data") if axis == ("fsdp",) else axis for axis in named]
    return [*stacked, *named]


def bytes_per_device(tree: PyTree[Any]) -> int:
    """What arrays that are laid out, or their shapes, take on each device."""

    def part(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

    return num_bytes(jax.tree.map(part, tree))


def local_rows(batch_size: int, mesh: Mesh | None) -> Sequence[int]:
    """The rows of a batch that stand on devices of this process, ascending; processes whose devices
    run different parts of the model on the same rows have those rows in common.

    They need not follow each other: a mesh orders devices by where they are on a TPU.
    """
    if mesh is None:
        return range(batch_size)
    sharding = NamedSharding(mesh, PartitionSpec(AXES["batch"]))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part for row in range(batch_size)[part[0]]})


def place(batch: PyTree[Any], mesh: Mesh | None, batch_size: int) -> PyTree[Any]:
    """A batch, its examples divided among the devices; as it is without a mesh. Each process gives
    its `local_rows` of the `batch_size`, in their order."""
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(AXES["batch"]))

    def put(x: Any) -> jax.Array:
        shape = (batch_size, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, batch)


def in_force(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Within it, what layers say by `constrain` holds."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
