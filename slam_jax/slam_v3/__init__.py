"""SLAM v3. Data flows through streams, processes, fusion and decoder; model joins them.

alignment is a side head of the memory. The letters of shapes are those of `slam_jax.array_typing`.
"""

from slam_jax.slam_v3.config import ImageConfig, SlamV3Config
from slam_jax.slam_v3.decoder import Memory
from slam_jax.slam_v3.model import SlamV3
from slam_jax.slam_v3.streams import Inputs

__all__ = ["ImageConfig", "Inputs", "Memory", "SlamV3", "SlamV3Config"]
