"""Models as StableHLO and arrays, which run with jax and numpy alone."""

from slam_jax.interop.export.folder import export_model

__all__ = ["export_model"]
