"""What devices and the wires between them are taken to do, and how long a step then is."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from slam_jax.errors import require, require_count

Exchange = tuple[tuple[str, ...], str]  # the axes along which, and the operation
Sent = Mapping[Exchange, int]

# What a ring of n devices has each of them send, of the bytes that an operation gives a device, for
# a reduce-scatter of those that it takes. Source: Thakur, Rabenseifner & Gropp 2005, "Optimization
# of Collective Communication Operations in MPICH", section 4.
_RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices, all alike; nothing of it is measured. The defaults are what NVIDIA states of an H100
    SXM in a host of eight.

    device_memory_gib: 2**30 bytes. device_tflops: 1e12 floating-point operations a second.
    link_gb_s: 1e9 bytes a second that a device sends to others of its host; network_gb_s: the same
    to other hosts, through a card of its own. devices_per_host: neighbours in the mesh share one.
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
            f"{self.link_gb_s:g} GB/s to others of its host of {self.devices_per_host}, "
            f"{self.network_gb_s:g} GB/s to other hosts"
        )

    def bandwidth(self, axes: tuple[str, ...], sizes: Mapping[str, int]) -> float:
        """Bytes a second that a device of a ring along `axes` sends.

        Where a ring leaves the host, as many rings as it has devices in one share their cards.
        """
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        chosen = tuple(slice(None) if axis in axes else 0 for axis in sizes)
        hosts = places[chosen].reshape(-1) // self.devices_per_host
        if len(set(hosts)) == 1:
            return self.link_gb_s * 1e9
        together = int(np.bincount(hosts - hosts[0]).max())
        return min(self.link_gb_s, together * self.network_gb_s) * 1e9

    def seconds(self, sent: Sent, sizes: Mapping[str, int]) -> dict[Exchange, float]:
        """Of each collective of a step, alone: without waiting, and without the time of a start."""
        told = {}
        for (axes, op), num_bytes in sent.items():
            n = math.prod(sizes[axis] for axis in axes)
            told[axes, op] = num_bytes * _RING[op](n) / self.bandwidth(axes, sizes) if axes else 0.0
        return told
