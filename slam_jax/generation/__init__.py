"""Generation: requests as people have them, the loop on the device, texts and scores."""

from slam_jax.generation.answering import Answer, Sample, Score, encode, generate, score, stream
from slam_jax.generation.decode import Decoded, decode, greedy_decode
from slam_jax.generation.requests import ModelAndTokenizer, Request
from slam_jax.generation.sampling import Sampling

__all__ = [
    "Answer",
    "Decoded",
    "ModelAndTokenizer",
    "Request",
    "Sample",
    "Sampling",
    "Score",
    "decode",
    "encode",
    "generate",
    "greedy_decode",
    "score",
    "stream",
]
