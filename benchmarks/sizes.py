"""How large the models of the benchmarks are, and their weights, once for all arms."""

from pathlib import Path
from typing import Any

from benchmarks import ours
from benchmarks.worker import in_process
from slam_jax.language_models import flops, make_config, measure


def weights(folder: str, system: str, preset: str, **changes: Any) -> tuple[Any, str]:
    """The configuration of a system, and the folder where its new weights are."""
    saved = Path(folder) / system
    if not saved.exists():
        in_process(ours.save_weights, folder=str(saved), system=system, preset=preset, **changes)
    return make_config(system, preset, **changes), str(saved)


def forward_flops(config: Any, rows: int, length: int) -> int:
    return rows * flops.forward_flops(config, length)


def training_flops(config: Any, rows: int, length: int) -> int:
    return rows * flops.training_flops(config, length)


def decoding_bytes(config: Any, context: int) -> int:
    """What one row reads for one token: the weights that it meets, but for the table of which it
    takes a row, and the cache; all in float32."""
    size = measure(config)
    table = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    return 4 * (size.active - table) + context * size.cache_bytes_per_token + size.state_bytes
