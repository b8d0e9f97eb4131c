"""Jamba against transformers without its CUDA kernels: training step, forward, decoding."""

from collections.abc import Iterator

from benchmarks import ours, theirs
from benchmarks.comparison import Comparison
from benchmarks.sizes import decoding_bytes, forward_flops, training_flops, weights


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    config, saved = weights(folder, "jamba", "tiny" if quick else "seed")
    length = 16 if quick else 128
    given = {"folder": saved, "rows": 8, "length": length}
    yield Comparison(
        f"jamba, training step 8 x {length}",
        theirs.beside(ours.training_step, theirs.training_step, given, 15.0),
        tolerance=2e-3,
        checked=3,
        repeats=1,
        flops=training_flops(config, 8, length),
    )
    yield Comparison(
        f"jamba, forward 8 x {length}",
        theirs.beside(ours.forward, theirs.forward, given, 2.0),
        tolerance=1e-3,
        flops=forward_flops(config, 8, length),
    )
    given = {"folder": saved, "context": length}
    yield Comparison(
        f"jamba, one token after {length}",
        theirs.beside(ours.decoding, theirs.decoding, given, 2.0, mine={"room": 128}),
        tolerance=1e-3,
        checked=3,
        repeats=8,
        bytes_moved=decoding_bytes(config, length),
    )
