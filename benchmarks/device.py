"""What is measured: a CPU in float32, or a GPU in bfloat16, and by every library the same."""

import importlib.util
import os
from typing import Any

from slam_jax.errors import InputError


def settle() -> str:
    """What the GPU calls itself, such as NVIDIA H100 80GB HBM3, empty on a CPU; processes that are
    started afterwards find the same device by every library.

    To be called before JAX starts. Raises InputError for another kind of device, and on a GPU where
    torch sees none.
    """
    # Arms share its memory; the first would take most of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return ""
    if device.platform != "gpu":
        raise InputError(f"{device.device_kind}; expected a CPU or a GPU to measure")
    if importlib.util.find_spec("torch") is not None:
        import torch  # pyright: ignore[reportMissingImports]

        if not torch.cuda.is_available():
            raise InputError("torch sees no GPU, and JAX does; install torch with CUDA, or none")
    return device.device_kind


def on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def torch_device(torch: Any) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
