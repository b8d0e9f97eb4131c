"""The device mesh: how many devices each kind of parallelism uses."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from slam_jax.errors import ConfigError, first_line, require, require_count

REST = -1  # the size of an axis that takes all remaining devices


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. Their product is the number of devices; one of them may be -1, which
    stands for the remaining devices. A single device needs no mesh.

    The batch is sharded over `data`; the batch and the parameters over `fsdp`, where parameters are
    gathered when they are used; the parallel processes of the model over `process`, where their
    parameters are never gathered, and the batch elsewhere; and heads, MLPs, vocabulary and experts
    over `tensor`. process: None = the largest divisor of the number of processes that also divides
    the devices which the other axes leave; 1 if `fsdp` or `tensor` is -1.
    zero: optimizer state and averaged parameters are sharded over `data` too (ZeRO, stage 1;
    Rajbhandari et al. 2020, section 5.1).
    """

    data: int = REST
    fsdp: int = 1
    process: int | None = None
    tensor: int = 1
    zero: bool = False

    def __post_init__(self):
        for field, size in self.sizes.items():
            if size not in (REST, None):
                require_count(f"mesh.{field}", size)
        rest = [field for field, size in self.sizes.items() if size == REST]
        require(len(rest) <= 1, "mesh", ", ".join(rest), "one field of -1 at most")

    @property
    def sizes(self) -> dict[str, Any]:
        """Axis -> size as given. Neighbouring devices communicate most along the last axis."""
        return {axis: getattr(self, axis) for axis in ("data", "fsdp", "process", "tensor")}


def make_mesh(
    config: MeshConfig, num_processes: int = 1, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """The mesh of all `devices` (None = all of JAX), or None for a single device.

    num_processes: of the model.

    Raises ConfigError where the sizes do not fit the number of devices, with sizes that do, and
    where JAX cannot arrange the devices like that.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve(config, len(devices), num_processes)
    if len(devices) == 1:
        return None
    automatic = (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), automatic, devices=devices)
    except (NotImplementedError, ValueError) as error:  # the topology of a TPU, or slices
        raise ConfigError(
            f"mesh is {name_of(sizes)}, and the devices cannot be arranged like that "
            f"({first_line(error)}); choose sizes that are products of those of the device grid"
        ) from error


def resolve(config: MeshConfig, num_devices: int, num_processes: int = 1) -> dict[str, int]:
    """Axis -> size, with -1 and None replaced by their values; raises as `make_mesh` does."""
    if config.process is None:
        others = dataclasses.replace(config, process=1).sizes.values()
        left, uneven = divmod(num_devices, math.prod(size for size in others if size != REST))
        taken = uneven or REST in (config.fsdp, config.tensor)
        process = 1 if taken else math.gcd(left, num_processes)
        config = dataclasses.replace(config, process=process)
    sizes = config.sizes
    known = math.prod(size for size in sizes.values() if size != REST)
    rest = REST in sizes.values()
    if num_devices % known if rest else known != num_devices:
        fitting = [_fitting_sizes(config, axis, num_devices) for axis in sizes]
        near = "; or ".join(text for text in fitting if text)
        raise ConfigError(
            f"mesh is {name_of(sizes)}, and the number of devices is {num_devices}; expected "
            f"{near or f'sizes whose product is {num_devices}'}"
        )
    return {axis: num_devices // known if size == REST else size for axis, size in sizes.items()}


def more_fsdp(sizes: Mapping[str, int]) -> str:
    """The advice where a state does not fit: to divide it among all devices that `data` repeats it
    on. "" where there are none."""
    data = sizes.get("data", 1)
    most = data * sizes.get("fsdp", 1)
    return f"divide it by mesh.data=1 and mesh.fsdp={most}, or " if data > 1 else ""


def name_of(sizes: Mapping[str, int]) -> str:
    """Such as "data 2 x tensor 4"."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _fitting_sizes(config: MeshConfig, axis: str, num_devices: int) -> str | None:
    """The sizes of one axis that fit with the other axes as they are, in words."""
    sizes = config.sizes
    others = [size for name, size in sizes.items() if name != axis]
    left, uneven = divmod(num_devices, math.prod(size for size in others if size != REST))
    if uneven or sizes[axis] == REST:
        return None
    if REST not in others:
        return f"mesh.{axis}={left}"
    fit = [str(size) for size in range(1, left + 1) if left % size == 0]
    return f"mesh.{axis}={' or '.join(fit)}"
