"""Jamba against transformers without its CUDA kernels: training step, forward, decoding."""

from collections.abc import Iterator

from benchmarks import ours, theirs
from benchmarks.comparison import Arm, Comparison
from benchmarks.sizes import decoding_bytes, forward_flops, training_flops, weights


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    config, saved = weights(folder, "jamba", "tiny" if quick else "seed")
    length = 16 if quick else 128
    given = {"folder": saved, "rows": 8, "length": length}
    yield Comparison(
        f"jamba, training step 8 x {length}",
        [
            Arm("slam_jax", ours.training_step, given),
            Arm("transformers", theirs.training_step, given, needs=theirs.NEEDS, aim=15.0),
        ],
        tolerance=2e-3,
        checked=3,
        repeats=1,
        flops=training_flops(config, 8, length),
    )
    yield Comparison(
        f"jamba, forward 8 x {length}",
        [
            Arm("slam_jax", ours.forward, given),
            Arm("transformers", theirs.forward, given, needs=theirs.NEEDS, aim=2.0),
        ],
        tolerance=1e-3,
        flops=forward_flops(config, 8, length),
    )
    given = {"folder": saved, "context": length}
    yield Comparison(
        f"jamba, one token after {length}",
        [
            Arm("slam_jax", ours.decoding, {**given, "room": 128}),
            Arm("transformers", theirs.decoding, given, needs=theirs.NEEDS, aim=2.0),
        ],
        tolerance=1e-3,
        checked=3,
        repeats=8,
        bytes_moved=decoding_bytes(config, length),
    )
