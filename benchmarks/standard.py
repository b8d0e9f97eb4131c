"""The standard transformer against Llama in transformers, eager and by torch.compile."""

from collections.abc import Iterator

from benchmarks import ours, theirs
from benchmarks.comparison import Comparison
from benchmarks.sizes import forward_flops, training_flops, weights

# The aim for the median of all ratios; that of each ratio is 1.
MIDDLE_AIM = 1.2


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    config, saved = weights(folder, "standard", "tiny" if quick else "seed")
    length = 16 if quick else 128
    for rows in (8, 1):
        given = {"folder": saved, "rows": rows, "length": length}
        yield Comparison(
            f"standard, forward {rows} x {length}",
            theirs.beside(ours.forward, theirs.forward, given, 1.0, compiled=True),
            tolerance=1e-3,
            repeats=3 if rows > 1 else 10,
            flops=forward_flops(config, rows, length),
        )
    given = {"folder": saved, "rows": 8, "length": length}
    yield Comparison(
        f"standard, training step 8 x {length}",
        theirs.beside(ours.training_step, theirs.training_step, given, 1.0, compiled=True),
        tolerance=1e-3,
        checked=3,
        flops=training_flops(config, 8, length),
    )
