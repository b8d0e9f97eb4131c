"""Sizes of the benchmarked models, and their weights, which all arms share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks import ours
from benchmarks.worker import in_process
from slam_jax.language_models import flops, make_config, measure

NARROW = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
# `standard` with Llama's proportions, by how many parameters there are about.
LARGER: Mapping[str, Mapping[str, Any]] = {
    name: dict(
        vocab_size=32_000,
        embed_dim=width,
        mlp_dim=hidden,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        context_length=4_096,
    )
    for name, width, hidden, layers in (
        ("50M", 512, 1_408, 6),
        ("130M", 768, 2_048, 12),
        ("400M", 1_024, 2_816, 26),
    )
}


def weights(folder: str, system: str, preset: str, **changes: Any) -> tuple[Any, str]:
    """The configuration of a system, and the folder with its new weights."""
    saved = Path(folder) / system
    if not saved.exists():
        in_process(ours.save_weights, folder=str(saved), system=system, preset=preset, **changes)
    return make_config(system, preset, **changes), str(saved)


def forward_flops(config: Any, rows: int, length: int) -> int:
    return rows * flops.forward_flops(config, length)


def training_flops(config: Any, rows: int, length: int) -> int:
    return rows * flops.training_flops(config, length)


def decoding_bytes(config: Any, context: int, rows: int = 1) -> int:
    """The bytes read for one token of each row: the cache and the active weights, except the
    embedding table, of which a token reads one row."""
    size, width = measure(config), jnp.dtype(config.param_dtype).itemsize
    table = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    cache = context * size.cache_bytes_per_token + size.state_bytes
    return width * (size.active - table) + rows * cache
