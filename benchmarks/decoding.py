"""On a GPU: one more token in bfloat16, and its share of the bandwidth.

Bytes are the fewest that can be read, each once: the cache of a layer; in a model also the weights.
"""

from collections.abc import Iterator

from benchmarks import latent_cache, ours, theirs
from benchmarks.comparison import Arm, Comparison
from benchmarks.sizes import LARGER, NARROW, decoding_bytes, weights
from slam_jax.language_models import make_config

ROOM = 128  # tokens that the cache has room for, in all rounds together


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    rows, context = (2, 32) if quick else (64, 4_096)
    sizes = latent_cache.SEED if quick else latent_cache.LITE
    given = {"rows": rows, "context": context, "sizes": sizes, "dtype": "bfloat16"}
    yield Comparison(
        f"latent attention of DeepSeek-V2-Lite, one token, {rows} rows of {context:,}",
        [
            Arm("latents", latent_cache.latents, given),
            Arm("keys and values", latent_cache.plain, given, aim=3.5),
        ],
        tolerance=0.1,
        checked=2,
        repeats=20,
        bytes_moved=latent_cache.bytes_read(**given),
    )
    rows, context = (2, 32) if quick else (16, 1_024)
    for name, larger in LARGER.items():
        changes = {} if quick else larger
        _, saved = weights(f"{folder}/{name}", "standard", "tiny", **changes)
        config = make_config("standard", "tiny", **changes, **NARROW)
        given = {"folder": saved, "context": context, "rows": rows}
        yield Comparison(
            f"standard of {name}, one token, {rows} rows of {context:,}",
            theirs.beside(
                ours.decoding,
                theirs.decoding,
                given,
                2.0,
                mine={"room": ROOM, **NARROW},
                other={"dtype": "bfloat16"},
            ),
            tolerance=0.2,
            checked=2,
            repeats=20,
            bytes_moved=decoding_bytes(config, context, rows),
        )
