"""DeepSeek-V2's decoding, one row and one token at a time, against transformers.

They keep the keys and values of every head; ours keeps the latents and works on these.
"""

from collections.abc import Iterator

from benchmarks import ours, theirs
from benchmarks.comparison import Comparison
from benchmarks.sizes import decoding_bytes, weights

REPEATS, ROOM = 8, 128


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    changes = {"context_length": 8_192}
    config, saved = weights(folder, "deepseek_v2", "tiny" if quick else "seed", **changes)
    for context, aim in ((16, 2.0), (32, 7.0)) if quick else ((128, 2.0), (4_096, 7.0)):
        given = {"folder": saved, "context": context}
        yield Comparison(
            f"deepseek_v2, one token after {context:,}",
            theirs.beside(ours.decoding, theirs.decoding, given, aim, mine={"room": ROOM}),
            tolerance=1e-3,
            checked=3,
            repeats=REPEATS,
            bytes_moved=decoding_bytes(config, context),
        )
