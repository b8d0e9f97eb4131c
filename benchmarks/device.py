"""The device of the benchmarks, the same for all libraries: a CPU in float32, a GPU in bfloat16."""

import importlib.util
import os
from typing import Any

from slam_jax.errors import InputError


def settle() -> str:
    """The name of the GPU, such as NVIDIA H100 80GB HBM3; empty on a CPU. In processes that are
    started afterwards, every library uses the same device.

    Call it before JAX starts. Raises InputError for another kind of device, and if torch does not
    see the GPU.
    """
    # Arms share the memory of a GPU, and the first would reserve most of it.
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
