"""What is measured: a CPU in float32, or an accelerator in bfloat16, by every library alike."""

import os
from typing import Any


def share_memory() -> None:
    """Of an accelerator, between arms; the first would take most of it. To be called before JAX
    starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def accelerator() -> str:
    """What it calls itself, such as NVIDIA H100 80GB HBM3; empty on a CPU."""
    import jax

    device = jax.devices()[0]
    return "" if device.platform == "cpu" else device.device_kind


def torch_device(torch: Any) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
