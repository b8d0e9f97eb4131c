"""What a language model takes: operations, parameters and bytes of its cache.

Each architecture counts the operations of its layers in `LanguageModelConfig.body_flops`.
"""

import functools
from typing import Any, NamedTuple

import jax
from flax import nnx

from slam_jax.language_models.registry import make_model
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.flops import linear


def forward_flops(config: Any, num_tokens: int) -> int:
    """One forward pass over a row of `num_tokens` tokens, with the logits of all of them."""
    return config.body_flops(num_tokens) + linear(num_tokens, config.embed_dim, config.vocab_size)


def training_flops(config: Any, num_tokens: int) -> int:
    """A forward and a backward pass over one row: every product is computed three times."""
    return 3 * forward_flops(config, num_tokens)


class Size(NamedTuple):
    """Parameters in total; active: those used for one token, without the experts that it is not
    sent to; embedding: tables looked up by token or position, and the head.

    cache_bytes_per_token: growth of a row's cache with each token. state_bytes: the part of a row's
    cache that does not depend on its length.
    """

    total: int
    active: int
    embedding: int
    cache_bytes_per_token: int
    state_bytes: int


@functools.lru_cache(maxsize=64)
def measure(config: Any) -> Size:
    """The size of the model of a configuration; nothing is allocated."""
    model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
    idle = 0
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MixtureOfExperts):
            share = module.num_experts_per_token / module.num_experts
            idle += round(_count(module.experts) * (1 - share))
    total = _count(model)
    tables = [model.embedding, getattr(model, "positions", None), model.head]
    embedding = sum(_count(table) for table in tables if table is not None)
    few, many = (_cache_bytes(model, length) for length in (1 << 10, 1 << 11))
    per_token = (many - few) >> 10
    return Size(total, total - idle, embedding, per_token, few - (per_token << 10))


def _count(module: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _cache_bytes(model: Any, length: int) -> int:
    """Bytes of the cache of one row, without its counts of tokens."""
    cache = jax.eval_shape(lambda: model.init_cache((1,), length))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache) if x.ndim > 1)
