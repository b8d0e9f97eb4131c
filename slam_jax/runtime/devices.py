"""The published speed of accelerators."""

import jax

# bfloat16 operations a second by `device_kind`, for dense matrices. For these NVIDIA's figures of
# sparse ones are halved. Sources: https://www.nvidia.com/en-us/data-center/a100/, .../h100/,
# .../h200/, .../hgx/; https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e.
PEAK_FLOPS: dict[str, float] = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops() -> float | None:
    """Operations a second of all devices of the run together; None where the kind is unknown, as
    that of a CPU is."""
    kinds = [PEAK_FLOPS.get(device.device_kind) for device in jax.devices()]
    return None if None in kinds else sum(kind for kind in kinds if kind)
