"""SLAM v3: four encoder processes in parallel over any mix of inputs, one memory, one decoder.

The modules in the order in which data flows:

    streams           each input becomes a stream: its tokens (images by `image_encoder`)
    processes         the joint block reads all streams and computes the bank; then the encoder
                      processes run in parallel
    shared_attention  how each of them reads the bank
    fusion            their outputs become memory tokens
    decoder           compresses these to the memory, and generates from it
    model             joins all of it; `alignment` is a side head

Words: the *bank* is the keys and values of all streams, which encoder processes read inside the
encoder. The *memory* is the result of the encoder, one latent per *memory token*, which the decoder
reads. A *process* is an encoder process in this package. Elsewhere in the library, such as in
`slam_jax.runtime`, a process is one of the operating system, or of a run on several hosts.

The letters of shapes are those of `slam_jax.array_typing`.
"""

from slam_jax.slam_v3.config import ImageConfig, SlamV3Config
from slam_jax.slam_v3.decoder import Memory
from slam_jax.slam_v3.model import SlamV3
from slam_jax.slam_v3.streams import Inputs

__all__ = ["ImageConfig", "Inputs", "Memory", "SlamV3", "SlamV3Config"]
