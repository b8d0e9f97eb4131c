"""The assumed speed of devices and their links, and the time that a step takes on them."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from slam_jax.errors import require, require_count

Exchange = tuple[tuple[str, ...], str]  # mesh axes along which devices exchange, operation
Sent = Mapping[Exchange, int]  # -> bytes that each device is sent


@dataclasses.dataclass(frozen=True)
class Machine:
    """Equal devices. The defaults are NVIDIA's figures of an H100 SXM in a host of eight.

    device_memory_gib: in 2**30 bytes. device_tflops: in 1e12 floating-point operations a second.
    link_gb_s, network_gb_s: 1e9 bytes a second that a device sends within and out of its host.
    devices_per_host: that many neighbours in the mesh share a host.
    """

    device_memory_gib: float = 80.0
    device_tflops: float = 989.0
    link_gb_s: float = 450.0
    network_gb_s: float = 50.0
    devices_per_host: int = 8

    def __post_init__(self):
        for field in ("device_memory_gib", "device_tflops", "link_gb_s", "network_gb_s"):
            value = getattr(self, field)
            require(0 < value < math.inf, field, value, "a number above 0")
        require_count("devices_per_host", self.devices_per_host)

    def __str__(self) -> str:
        return (
            f"{self.device_memory_gib:g} GiB and {self.device_tflops:g} TFLOP/s a device, "
            f"{self.link_gb_s:g} GB/s within its host of {self.devices_per_host}, "
            f"{self.network_gb_s:g} GB/s to other hosts"
        )

    def bandwidth(self, axes: tuple[str, ...], sizes: Mapping[str, int]) -> float:
        """Bytes a second that a device sends in a ring along `axes`.

        If the ring leaves the host, its devices in one host use their network cards together.
        """
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        ring = devices[tuple(slice(None) if axis in axes else 0 for axis in sizes)].reshape(-1)
        _, devices_in_host = np.unique(ring // self.devices_per_host, return_counts=True)
        if len(devices_in_host) == 1:
            return self.link_gb_s * 1e9
        return min(self.link_gb_s, int(devices_in_host.max()) * self.network_gb_s) * 1e9

    def seconds(self, sent: Sent, sizes: Mapping[str, int]) -> dict[Exchange, float]:
        """Time of each collective by bandwidth alone: without latency and waiting."""
        return {
            (axes, op): num_bytes * _ring_share(op, axes, sizes) / self.bandwidth(axes, sizes)
            for (axes, op), num_bytes in sent.items()
        }


def _ring_share(op: str, axes: tuple[str, ...], sizes: Mapping[str, int]) -> float:
    """The share of the exchanged bytes that each device of a ring sends.

    The bytes are those of the result, or of the operand of a reduce-scatter. Source: Thakur,
    Rabenseifner & Gropp 2005, "Optimization of Collective Communication Operations in MPICH",
    section 4.
    """
    n = math.prod(sizes[axis] for axis in axes)
    if op == "collective-permute":
        return float(n > 1)
    return (2 if op == "all-reduce" else 1) * (n - 1) / n
