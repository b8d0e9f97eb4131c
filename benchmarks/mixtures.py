"""Mixtures of experts, as in Mixtral and Hunyuan-A13B, against transformers."""

from collections.abc import Iterator
from typing import Any

from benchmarks import ours, theirs
from benchmarks.comparison import Comparison
from benchmarks.sizes import forward_flops, training_flops, weights

# The seed size, which the registry has for the nine systems only.
_HUNYUAN: dict[str, Any] = dict(
    vocab_size=10_000,
    embed_dim=512,
    mlp_dim=2_048,
    num_heads=16,
    num_kv_heads=2,
    head_dim=32,
    num_layers=6,
    num_experts=8,
    num_experts_per_token=2,
    context_length=2_048,
)


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    length = 16 if quick else 128
    for system, preset, changes in (
        ("moe", "tiny" if quick else "seed", {}),
        ("hunyuan_v1_moe", "tiny", {"head_dim": 8} if quick else _HUNYUAN),
    ):
        config, saved = weights(folder, system, preset, **changes)
        given = {"folder": saved, "rows": 8, "length": length}
        yield Comparison(
            f"{system}, forward 8 x {length}",
            theirs.beside(ours.forward, theirs.forward, given, 1.3),
            tolerance=1e-3,
            flops=forward_flops(config, 8, length),
        )
        yield Comparison(
            f"{system}, training step 8 x {length}",
            theirs.beside(ours.training_step, theirs.training_step, given, 1.3),
            tolerance=2e-3,
            checked=3,
            repeats=2,
            flops=training_flops(config, 8, length),
        )
