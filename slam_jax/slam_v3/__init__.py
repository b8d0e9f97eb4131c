"""SLAM v3, in the order data flows: streams, processes, fusion, decoder, alignment, model."""

from slam_jax.slam_v3.config import ImageConfig, SlamV3Config
from slam_jax.slam_v3.decoder import Memory
from slam_jax.slam_v3.model import SlamV3
from slam_jax.slam_v3.streams import Inputs

__all__ = ["ImageConfig", "Inputs", "Memory", "SlamV3", "SlamV3Config"]
