"""On a GPU: training steps in bfloat16 at three sizes, against torch.compile.

`standard` against Llama in transformers, parameters and AdamW in float32 on both sides, products in
bfloat16, rows of 1,024 tokens. Operations are counted as in Chowdhery et al. 2022, "PaLM",
appendix B, attention whole though kernels leave out what is masked; the share is of a measured
product, not of what the maker states.
"""

from collections.abc import Iterator

from benchmarks import ours, theirs
from benchmarks.comparison import Comparison
from benchmarks.sizes import LARGER, training_flops, weights
from slam_jax.language_models import measure

ROWS = {"50M": 32, "130M": 32, "400M": 8}


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    length = 16 if quick else 1_024
    for name, rows in ROWS.items():
        rows, changes = (2, {}) if quick else (rows, LARGER[name])
        config, saved = weights(f"{folder}/{name}", "standard", "tiny", **changes)
        millions = measure(config).total / 1e6
        yield Comparison(
            f"standard of {name} ({millions:,.1f} million), training step {rows} x {length:,}",
            theirs.beside(
                ours.training_step,
                theirs.training_step,
                {"folder": saved, "rows": rows, "length": length},
                1.1,
                mine={"dtype": "bfloat16"},
                other={"autocast": True},
                compiled=True,
            ),
            tolerance=0.05,
            checked=3,
            repeats=5,
            flops=training_flops(config, rows, length),
        )
