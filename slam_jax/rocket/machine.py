"""The machine and the versions that figures depend on."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import psutil

from slam_jax.version import __version__


def code_version() -> str:
    """The version of the code, and the first digits of a hash of all its sources on the disk."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:12]})"


def describe_machine() -> dict[str, Any]:
    """Processor, device, memory and versions."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "processor": _processor(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "slam_jax": __version__,
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    """The name of the processor, if the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
